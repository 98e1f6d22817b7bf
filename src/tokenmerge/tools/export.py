"""Write a reduced model as a file that another engine runs, and check it there: ONNX, OpenVINO, torch's programs."""

from __future__ import annotations

import copy
import importlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tokenmerge import kernels
from tokenmerge.errors import DataError, TokenMergeError, UnsupportedError, unknown_name
from tokenmerge.schedule import R
from tokenmerge.tools.models import Method, answer, apply_method, known_size, run_images
from tokenmerge.tools.results import check_writable

__all__ = ["TARGETS", "Exported", "Target", "export", "find_target"]

INPUT, OUTPUT = "images", "answer"
TOLERANCE = 1e-4  # of the largest output, in float32
_TRACED = 2  # images in the batch that a graph for any batch is traced with
_CHECKED = (1, 3)  # and in those that it is checked with


@dataclass(frozen=True)
class Exported:
    """A file that was written and checked; `str()` is a table."""

    path: str
    format: str
    engine: str  # what it was checked in
    batch: int | None  # None: any
    input_size: tuple[int, ...]
    tokens: list[int]  # after each block
    operators: dict[str, int]  # how many of each the graph holds; a scatter's name ends in its reduction
    difference: float  # largest difference of an answer from eager, on batches that were not traced
    scale: float  # largest entry of eager's answer
    size: int  # bytes, with the files beside it
    notes: list[str]  # what could not be done
    choice: str = ""  # what "auto" chose and why

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        scatters = ", ".join(_scatters(self.operators)) or "no scatter"
        rows = [
            ("written", f"{self.path}, {self.size / 2**20:.1f} MB"),
            ("input", f"{INPUT} [{self.batch or 'batch'}, {', '.join(map(str, self.input_size))}]"),
            ("tokens", " ".join(map(str, self.tokens))),
            ("operators", f"{sum(self.operators.values())} of {len(self.operators)} kinds, {scatters}"),
            ("checked in", f"{self.engine}: max |difference| from eager {self.difference:.2g} of {self.scale:.3g}"),
            ("could not be done", "; ".join(self.notes) or "-"),
        ]
        if self.choice:
            rows.insert(1, ("chosen", self.choice))
        return "\n".join(f"{name:<18} {value}" for name, value in rows)


def export(
    model: nn.Module,
    path: str | Path,
    *,
    r: R | None,
    to: str,
    method: Method = "tome",
    calibrate: Tensor | None = None,
    input_size: Sequence[int] | None = None,
    batch: int | None = None,
    matmul: bool = False,
    opset: int | None = None,
) -> Exported:
    """Write a copy of the model that removes `r` tokens per block; `to` is one of `TARGETS`. The model is not changed.

    The file takes `images` `[batch, *input_size]` in float32, of any batch size or only of `batch`, and gives `answer`,
    the first tensor of what the model returns. It is run in its engine on random images before it is put in place: it
    answers as eager does, or `UnsupportedError` is raised and nothing is left. `matmul` merges without a scatter.
    `method` is anything `read_method` takes or returns (a saved one has an `r` of its own, used where `r` is None),
    `calibrate` the images by which `"auto"` chooses.
    Raises `UnsupportedError` also where a package is missing or the model cannot be traced, `UnknownNameError` for an
    unknown target, `DataError` for a path that cannot be written or an input size that is missing or does not fit.
    """
    target = find_target(to)
    _check_request(model, to, batch, opset)
    path = check_writable(path, (target.suffix,))
    traced = _Answering(copy.deepcopy(model).cpu().eval())
    handle = apply_method(traced.model, method, r=r, calibrate=calibrate)
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
            if matmul:
                _check_no_scatter(operators)
            # what lies beside the file is there before the file that refers to it
            parts = sorted(Path(folder).iterdir(), key=lambda part: part == file)
            written = sum(part.stat().st_size for part in parts)
            for part in parts:
                part.replace(path.parent / part.name)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}.") from error
    counts = dict(operators.most_common())
    found = (tokens, counts, difference, scale, written, report.limits, report.choice)
    return Exported(str(path), to, engine, batch, size, *found)


def find_target(to: str) -> Target:
    """Return the target of that name; raises `UnknownNameError`, or `UnsupportedError` where a package is missing."""
    if to not in TARGETS:
        raise unknown_name("export target", to, TARGETS)
    for package in TARGETS[to].packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UnsupportedError(
                f'exporting to {to} needs {package}: pip install "tokenmerge[{TARGETS[to].extra}]"'
            ) from error
    return TARGETS[to]


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
    """A model with one input and one output, whatever its host wraps the output in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return answer(self.model(images))


def _steady_images(model: nn.Module, size: tuple[int, ...], count: int) -> tuple[Tensor, Tensor]:
    """Draw images whose answers rounding does not decide, with these: of two equal pairs engines may merge either."""
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
    """Write the file and run it; returns the operators it holds, and answers with those that are expected."""
    try:
        operators = TARGETS[to].write(program, file, opset)
        run = TARGETS[to].load(file)
        return operators, [(run(images[:n]), expected[:n]) for n in batches]
    except (TokenMergeError, OSError):
        raise
    except Exception as error:  # the engines' errors have no parent but this one
        raise UnsupportedError(
            f"this model cannot be exported to {to}: {_reason(error)}. Nothing was written; other targets: "
            f"{', '.join(name for name in TARGETS if name != to)}."
        ) from error


def _reason(error: BaseException) -> str:
    """Return what an error is in the end about, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return shorten(str(error), 400, placeholder=" ...").rstrip(".") or type(error).__name__


def _compare(pairs: list[tuple[Tensor, Tensor]], path: Path, engine: str) -> tuple[float, float]:
    """Return the largest difference and the largest entry; raises `UnsupportedError` where they do not agree."""
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
    """Return how many there are of each operator that writes rows at indices, whatever its format calls it."""
    kinds = ("scatter", "index_add", "index_put", "index_reduce")
    return [f"{count} {name}" for name, count in operators.items() if any(kind in name.lower() for kind in kinds)]


def _write_onnx(program: ExportedProgram, file: Path, opset: int | None) -> Counter[str]:
    onnx = importlib.import_module("onnx")
    # with gradients attention is decomposed to other strides than it was traced with, and some models' views fail
    with torch.no_grad():
        written = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={INPUT: {0: "batch"}} if program.range_constraints else None,
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
        )
    assert written is not None
    # weights of more than 2 GB go to a file beside it
    written.save(file)
    graph = onnx.load(file, load_external_data=False)
    given = graph.opset_import[0].version
    if opset not in (None, given):
        raise UnsupportedError(
            f"opset {opset} was asked for and torch wrote {given}; leave opset out, or ask for less."
        )
    return Counter(_onnx_name(node) for node in graph.graph.node)


def _stable_sort(x: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """Sort in ONNX, whose TopK takes the first of equal values; torch translates only the sort that may not."""
    op = importlib.import_module("onnxscript").opset18
    count = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
    return op.TopK(x, count, axis=dim, largest=int(descending), sorted=1)


def _onnx_name(node: Any) -> str:
    reductions = [attribute.s.decode() for attribute in node.attribute if attribute.name == "reduction"]
    return " ".join([node.op_type, *(name for name in reductions if name != "none")])


def _load_onnx(file: Path) -> Callable[[Tensor], Tensor]:
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # its threads would take cores from whatever runs next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _write_openvino(program: ExportedProgram, file: Path, opset: int | None) -> Counter[str]:
    openvino = importlib.import_module("openvino")
    # by way of ONNX: of torch's own operators OpenVINO reads fewer
    with TemporaryDirectory() as folder:
        onnx_file = Path(folder) / "model.onnx"
        _write_onnx(program, onnx_file, opset)
        model = openvino.Core().read_model(onnx_file)
        for operator in model.get_ops():
            if operator.get_type_name() == "TopK":
                # OpenVINO forgets that ONNX takes the first of equal values
                operator.set_attribute("stable", True)
        openvino.save_model(model, file, compress_to_fp16=False)
    return Counter(operator.get_type_name() for operator in model.get_ops())


def _load_openvino(file: Path) -> Callable[[Tensor], Tensor]:
    openvino = importlib.import_module("openvino")
    # the default precision is the processor's fastest
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(file, "CPU", settings)
    return lambda images: torch.from_numpy(compiled(images.numpy())[0])


def _write_program(program: ExportedProgram, file: Path, opset: int | None) -> Counter[str]:
    torch.export.save(program, file)
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


def _load_program(file: Path) -> Callable[[Tensor], Tensor]:
    module = torch.export.load(file).module()

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            return module(images)  # type: ignore[no-any-return]

    return run


class Target(NamedTuple):
    """A format: what files of it end in, what it needs, and how it is written and run."""

    suffix: str
    engine: str  # the package that runs it
    packages: tuple[str, ...]
    extra: str  # what installs them
    write: Callable[[ExportedProgram, Path, int | None], Counter[str]]
    load: Callable[[Path], Callable[[Tensor], Tensor]]


_ONNX = ("onnx", "onnxscript")
TARGETS = {
    "onnx": Target(".onnx", "onnxruntime", (*_ONNX, "onnxruntime"), "onnx", _write_onnx, _load_onnx),
    "openvino": Target(".xml", "openvino", (*_ONNX, "openvino"), "openvino", _write_openvino, _load_openvino),
    "torch-export": Target(".pt2", "torch", (), "", _write_program, _load_program),
}
