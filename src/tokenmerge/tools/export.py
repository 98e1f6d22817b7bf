"""Export a reduced model to ONNX, OpenVINO or torch.export, and check the file in its engine."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import tokenmerge
from tokenmerge import kernels
from tokenmerge.config import Restore
from tokenmerge.data.prepare import find_preprocessing
from tokenmerge.data.preprocessing import Preprocessing
from tokenmerge.errors import AlreadyPatchedError, DataError, TokenMergeError, UnsupportedError
from tokenmerge.measure.outputs import answer, known_size, run_images
from tokenmerge.report.table import check_writable
from tokenmerge.schedule import R
from tokenmerge.tools.engines import INPUT, OUTPUT, TARGETS, Target, find_target
from tokenmerge.tools.models import Method, apply_method

__all__ = ["TARGETS", "Exported", "Target", "export", "find_target"]

TOLERANCE = 1e-4  # of the largest output, in float32
_TRACED = 2  # batch size for tracing a graph with a dynamic batch
_CHECKED = (1, 3)  # batch sizes for the check


@dataclass(frozen=True)
class Exported:
    """A file that was written and checked; `str()` is a table."""

    path: str
    format: str
    engine: str  # the engine of the check
    batch: int | None  # None: any
    input_size: tuple[int, ...]
    tokens: list[int]  # after each block
    operators: dict[str, int]  # counts in the graph; a scatter's name ends in its reduction
    difference: float  # largest difference from eager mode, on other batch sizes than traced
    scale: float  # largest entry of the eager output
    size: int  # bytes, including separate files
    notes: list[str]  # limitations
    choice: str = ""  # what "auto" chose and why
    answers: tuple[int, ...] = ()  # shape of the output for one image
    preprocessing: str = ""  # preprocessing that the images need
    deployed: str = ""  # difference when the engine chooses the precision

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        scatters = ", ".join(_scatters(self.operators)) or "no scatter"
        rows = [
            ("written", f"{self.path}, {self.size / 2**20:.1f} MB"),
            ("input", f"{INPUT} [{self.batch or 'batch'}, {', '.join(map(str, self.input_size))}], float32"),
            ("output", f"{OUTPUT} [{', '.join(map(str, (self.batch or 'batch', *self.answers)))}]"),
            ("preprocessing", self.preprocessing or "unknown"),
            ("tokens", " ".join(map(str, self.tokens))),
            ("operators", f"{sum(self.operators.values())} of {len(self.operators)} kinds, {scatters}"),
            ("checked in", f"{self.engine}: max |difference| from eager {self.difference:.2g} of {self.scale:.3g}"),
            ("limitations", "; ".join(self.notes) or "none"),
        ]
        if self.deployed:
            rows.insert(-1, ("deployed", self.deployed))
        if self.choice:
            rows.insert(1, ("chosen", self.choice))
        code = TARGETS[self.format].snippet.format(file=self.path)
        return "\n".join([*(f"{name:<18} {value}" for name, value in rows), "", "To run it:", "", code])


def export(
    model: nn.Module,
    path: str | Path,
    *,
    r: R | None = None,
    to: str,
    method: Method | None = None,
    calibrate: Tensor | None = None,
    restore: Restore | None = None,
    preprocessing: Preprocessing | None = None,
    input_size: Sequence[int] | None = None,
    batch: int | None = None,
    matmul: bool = False,
    opset: int | None = None,
) -> Exported:
    """Write a copy of the model that removes `r` tokens per block; `to` is one of `TARGETS`. The model is not changed.

    A patched model is written as it is: leave out `r` and `method`.

    The file takes `images` `[batch, *input_size]` in float32, of any batch size or only of `batch`, and returns
    `answer`, the first tensor of the model's output. It runs in its engine on random images before it is put in place:
    if its output differs from eager mode, `UnsupportedError` is raised and no file is left. Raises `UnsupportedError`
    also if a package is missing or the model cannot be traced, `UnknownNameError` for an unknown target, `DataError`
    for a path that cannot be written or an input size that is missing or does not fit.

    `matmul` merges without a scatter. `method` is anything `read_method` takes or returns; the `r` of a saved one is
    used if `r` is None. `calibrate` are the images for `"auto"`, `restore` is that of `patch`. `preprocessing` is
    recorded in the result; by default the one found with the model.
    """
    target = find_target(to)
    _check_request(model, to, batch, opset)
    path = check_writable(path, (target.suffix,))
    traced = _Answering(copy.deepcopy(model).cpu().eval())
    handle = _patched(traced.model, method, r, calibrate, restore)
    size = tuple(input_size or known_size(handle))
    images, expected = _steady_images(traced, size, batch or max(_CHECKED))
    tokens, report = handle.tokens, handle.report()
    with kernels.force("matmul") if matmul else nullcontext():
        program = _trace(traced, torch.randn(batch or _TRACED, *size), batch)
    try:
        with TemporaryDirectory(dir=path.parent, prefix=".tokenmerge-") as folder:
            file = Path(folder) / path.name
            operators, pairs = _write(program, file, to, opset, images, [batch] if batch else list(_CHECKED), expected)
            engine = f"{target.engine} {version(target.engine)}"
            difference, scale = _compare(pairs, path, engine)
            deployed = _deployed(target, file, images, expected, batch or 1)
            if matmul:
                _check_no_scatter(operators)
            # move separate files first, then the file that refers to them
            parts = sorted(Path(folder).iterdir(), key=lambda part: part == file)
            written = sum(part.stat().st_size for part in parts)
            for part in parts:
                part.replace(path.parent / part.name)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}.") from error
    counts = dict(operators.most_common())
    found = (tokens, counts, difference, scale, written, report.limits, report.choice)
    prepared = _prepared(model, preprocessing)
    return Exported(str(path), to, engine, batch, size, *found, tuple(expected.shape[1:]), prepared, deployed)


def _patched(
    model: nn.Module, method: Method | None, r: R | None, calibrate: Tensor | None, restore: Restore | None
) -> tokenmerge.Handle:
    """Patch a copy, unless the original is patched already."""
    handle = tokenmerge.handle_of(model, None)
    if handle is None:
        return apply_method(model, method or "tome", r=r, calibrate=calibrate, restore=restore)
    if (method, r, calibrate, restore) != (None, None, None, None):
        raise AlreadyPatchedError(
            f"this model is reduced already: {handle!r}. Leave out r, method, calibrate and restore to export it as it "
            "is, or call tokenmerge.unpatch(model) first."
        )
    return handle


def _prepared(model: nn.Module, given: Preprocessing | None) -> str:
    try:
        found = given or find_preprocessing(model)
    except TokenMergeError as error:
        return f"unknown: {error}"
    return found.warning() or str(found)


def _deployed(target: Target, file: Path, images: Tensor, expected: Tensor, batch: int) -> str:
    """Describe the difference from eager mode when the engine chooses the precision."""
    if target.plainly is None:
        return ""
    precision, run = target.plainly(file)
    got = torch.cat([run(part) for part in images.split(batch)])
    far, scale = (got - expected).abs().max().item(), expected.abs().max().item()
    if far <= TOLERANCE * max(1.0, scale):
        return f"without a hint {target.engine} runs it in {precision} here: max |difference| {far:.2g} of {scale:.3g}"
    return (
        f"WARNING: without a hint {target.engine} runs it in {precision} on this processor: max |difference| from "
        f"eager {far:.2g} of {scale:.3g}. Load it with the hint below for the answers that were checked."
    )


def _check_request(model: nn.Module, to: str, batch: int | None, opset: int | None) -> None:
    if batch is not None and batch < 1:
        raise DataError(f"a batch holds at least 1 image; got {batch}. Leave it out for a file that takes any batch.")
    if opset is not None and (to == "torch-export" or opset < 18):
        raise UnsupportedError(
            f"opset {opset} was asked for {to}: torch writes ONNX in opset 18 and later, torch-export has none. Leave "
            "opset out to get torch's own choice."
        )
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if dtypes:
        raise UnsupportedError(
            f"only float32 models are exported, since only those can be checked to {TOLERANCE:g}; this one holds "
            f"{', '.join(sorted(map(str, dtypes)))}. Export model.float() and convert the file in your engine."
        )


class _Answering(nn.Module):
    """A model with one input and one output tensor, without the output class of its host."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return answer(self.model(images))


def _steady_images(model: nn.Module, size: tuple[int, ...], count: int) -> tuple[Tensor, Tensor]:
    """Draw images without near-ties between pairs: of two equal pairs engines may merge either one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * count + 4, *size, generator=generator)
    answers = run_images(model, x)
    moved = run_images(model, x + 1e-6 * torch.randn(x.shape, generator=generator))
    change = (moved - answers).abs().flatten(1).amax(dim=1)
    steady = change <= TOLERANCE / 2 * max(1.0, answers.abs().max().item())
    if steady.sum() < count:
        raise UnsupportedError(
            f"the answers of this model cannot be compared: moving random images by 1e-6 changes {(~steady).sum()} of "
            f"{len(x)} answers by up to {change.max():.2g}. Is it trained, and are its weights finite?"
        )
    return x[steady][:count], answers[steady][:count]


def _trace(model: nn.Module, x: Tensor, batch: int | None) -> ExportedProgram:
    shapes = None if batch else ({0: torch.export.Dim("batch")},)
    try:
        with torch.no_grad():
            return torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False)
    except TokenMergeError:
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        what = f"a batch of {batch}" if batch else "batches of any size"
        hint = "Ask torch.export about the unpatched model." if batch else "Give one batch size (--batch N)."
        raise UnsupportedError(f"torch cannot export this model for {what}: {_reason(error)}. {hint}") from error


def _write(
    program: ExportedProgram,
    file: Path,
    to: str,
    opset: int | None,
    images: Tensor,
    batches: Sequence[int],
    expected: Tensor,
) -> tuple[Counter[str], list[tuple[Tensor, Tensor]]]:
    """Write the file and run it; return its operators, its outputs and the expected outputs."""
    try:
        operators = TARGETS[to].write(program, file, opset)
        run = TARGETS[to].load(file)
        return operators, [(run(images[:n]), expected[:n]) for n in batches]
    except (TokenMergeError, OSError):
        raise
    except Exception as error:  # the engines' errors have no other common base class
        raise UnsupportedError(
            f"this model cannot be exported to {to}: {_reason(error)}. Nothing was written; other targets: "
            f"{', '.join(name for name in TARGETS if name != to)}."
        ) from error


def _reason(error: BaseException) -> str:
    """Return the root cause of an error in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return shorten(str(error), 400, placeholder=" ...").rstrip(".") or type(error).__name__


def _compare(pairs: list[tuple[Tensor, Tensor]], path: Path, engine: str) -> tuple[float, float]:
    """Return the largest difference and the largest entry; raise `UnsupportedError` if they do not agree."""
    scale = max(expected.abs().max().item() for _, expected in pairs)
    allowed, difference = TOLERANCE * max(1.0, scale), 0.0
    for got, expected in pairs:
        far = (got - expected).abs().max().item() if got.shape == expected.shape else float("inf")
        if not far <= allowed:
            raise UnsupportedError(
                f"{path.name} answers wrongly in {engine}: {len(expected)} images give {tuple(got.shape)}, up to "
                f"{far:.2g} away from eager's {tuple(expected.shape)}, where {allowed:.2g} is allowed. Nothing was "
                "written; try matmul=True (--matmul), which merges without a scatter, or another target."
            )
        difference = max(difference, far)
    return difference, scale


def _check_no_scatter(operators: Counter[str]) -> None:
    if found := _scatters(operators):
        raise UnsupportedError(
            f"a file without scatter was asked for, and the graph holds {', '.join(found)}: they belong to the model "
            "or to options (restore, another combine) that need them. Leave matmul out, or these options."
        )


def _scatters(operators: Mapping[str, int]) -> list[str]:
    """Count the operators that write rows at indices, under the names of every format."""
    kinds = ("scatter", "index_add", "index_put", "index_reduce")
    return [f"{count} {name}" for name, count in operators.items() if any(kind in name.lower() for kind in kinds)]
