"""Time a merged model against the unmerged one and against the free bound, over r and batch size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import tokenmerge
from tokenmerge import kernels
from tokenmerge.errors import DataError, UnsupportedError
from tokenmerge.schedule import R
from tokenmerge.tools.flops import count
from tokenmerge.tools.models import Method, apply_method, choices_of, find_device, known_size, run_images, shared_copy
from tokenmerge.tools.timing import Timing, attention_kernel, environment, interleave, peak_memory, training_memory

__all__ = ["Bench", "bench"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OnProgress = Callable[[int, int], None]  # done, total


@dataclass
class Bench:
    """Rows of figures, what they were measured on, and what they mean in plain sentences."""

    rows: list[dict[str, Any]]
    environment: dict[str, str]
    verdicts: list[str] = field(default_factory=list)


def bench(
    model: nn.Module,
    *,
    rs: Sequence[R] = (0, 8, 16),
    batches: Sequence[int] = (1, 8),
    method: Method = "tome",
    calibrate: torch.Tensor | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    compiled: bool | str = False,
    rounds: int = 20,
    input_size: Sequence[int] | None = None,
    compare: bool = False,
    training: bool = False,
    label: str = "model",
    progress: OnProgress | None = None,
) -> Bench:
    """Measure a model at every `r` and batch size; all variants of a row run in turn in the same rounds.

    The free bound drops the same number of tokens at the same places: no matching, no merging, no bias. `method` is
    anything `read_method` takes or returns, `calibrate` the images by which `"auto"` chooses, once for each `r`. With
    `compiled` (True, or a mode of `torch.compile`) all variants are compiled. `compare` adds the merged model on the
    reference kernels, `training` the peak memory of a training step. The model itself is not changed. Raises
    `UnsupportedError` for a device or dtype that is not there, `DataError` for an input size the model does not take.
    """
    where = find_device(device)
    if dtype not in DTYPES:
        raise UnsupportedError(f"no dtype {dtype!r}; there are: {', '.join(DTYPES)}.")
    if rounds < 1 or any(batch < 1 for batch in batches) or not batches or not rs:
        raise DataError("bench needs at least one r, one batch size >= 1 and one round.")
    # a copy: a change of dtype cannot be undone in the caller's model
    model = copy.deepcopy(model).to(where, DTYPES[dtype]).eval()
    rows = []
    with tokenmerge.patched(model, r=0) as handle:
        size = tuple(input_size or known_size(handle))
    if training:
        model.requires_grad_(True)
    merged = [_merged(model, method, r, calibrate) for r in rs]
    steps = len(batches) * len(rs)
    for i, batch in enumerate(batches):
        x = torch.randn(batch, *size, device=where, dtype=DTYPES[dtype])
        if i == 0:
            run_images(model, x[:1])
        for j, r in enumerate(rs):
            inner = _inner_progress(progress, i * len(rs) + j, steps)
            row = _row(model, merged[j], r, x, rounds, compiled, compare, inner)
            rows.append({"model": label, **row, **(_training(model, merged[j], x) if training else {})})
    about = {**environment(where), "dtype": dtype, "compiled": str(compiled), "rounds": str(rounds)}
    return Bench(rows, about, choices_of(zip(rs, merged, strict=True)) + _verdicts(rows))


def _row(
    model: nn.Module,
    merged: nn.Module,
    r: R,
    x: torch.Tensor,
    rounds: int,
    compiled: bool | str,
    compare: bool,
    progress: OnProgress | None,
) -> dict[str, Any]:
    bound = _merged(model, "drop", r)
    variants: dict[str, Any] = {"unmerged": model, "merged": merged, "bound": bound}
    if compare:
        variants["reference"] = shared_copy(merged)
    if compiled:
        torch._dynamo.reset()
        mode = None if compiled is True else compiled
        variants = {name: torch.compile(variant, mode=mode) for name, variant in variants.items()}
    calls = {name: _call(variant, x, is_reference=name == "reference") for name, variant in variants.items()}
    timings = interleave(calls, x.device, rounds=rounds, progress=progress)
    macs = count(merged, tuple(x.shape[1:]))
    return {
        "r": str(r),
        "batch": x.shape[0],
        **_figures(timings, x.shape[0]),
        "GMACs": round(macs.model / 1e9, 3),
        "matching GMACs": round(macs.matching / 1e9, 4),
        "tokens": tokenmerge.handle_of(merged).tokens[-1],
        "peak MB": round(peak_memory(merged, x) / 2**20, 1),
        "unmerged peak MB": round(peak_memory(model, x) / 2**20, 1),
        "attention": attention_kernel(merged, x),
        "unmerged attention": attention_kernel(model, x),
    }


def _training(model: nn.Module, merged: nn.Module, x: torch.Tensor) -> dict[str, float]:
    names = {"training peak MB": merged, "unmerged training peak MB": model}
    return {name: round(training_memory(variant, x) / 2**20, 1) for name, variant in names.items()}


def _merged(model: nn.Module, method: Method, r: R, calibrate: torch.Tensor | None = None) -> nn.Module:
    twin = shared_copy(model)
    apply_method(twin, method, r=r, calibrate=calibrate)
    return twin


def _figures(timings: dict[str, Timing], batch: int) -> dict[str, float | None]:
    merged, unmerged, bound = timings["merged"], timings["unmerged"], timings["bound"]
    figures = {
        "ms": round(merged.median * 1e3, 3),
        "spread %": None if merged.spread is None else round(merged.spread * 100, 1),
        "images/s": round(batch / merged.median, 2),
        "unmerged ms": round(unmerged.median * 1e3, 3),
        "speed-up": round(unmerged.over(merged), 3),
        "bound ms": round(bound.median * 1e3, 3),
        "over bound": round(merged.over(bound), 3),
    }
    if "reference" in timings:
        figures["reference ms"] = round(timings["reference"].median * 1e3, 3)
        figures["reference / merged"] = round(timings["reference"].over(merged), 3)
    return figures


def _verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Say for every r where merging is slower, where it makes no difference, and from which batch size it pays."""
    said = []
    for r in dict.fromkeys(row["r"] for row in rows if row["r"] != "0"):
        of_r = sorted((row for row in rows if row["r"] == r), key=lambda row: row["batch"])
        gains = [_gain(row) for row in of_r]
        slower = _cases(row for row, gain in zip(of_r, gains, strict=True) if gain < 0)
        equal = _cases(row for row, gain in zip(of_r, gains, strict=True) if gain == 0)
        pays = next((row["batch"] for i, row in enumerate(of_r) if all(gain > 0 for gain in gains[i:])), None)
        parts = [f"SLOWER than the unmerged model at {slower}"] if slower else []
        parts += [f"no faster, within the spread, at {equal}"] if equal else []
        if parts:
            end = f"it pays from batch {pays} on" if pays else "it pays at no batch size up to the largest measured"
            said.append(f"r = {r} is {'; '.join(parts)}; {end}.")
        else:
            said.append(f"r = {r} is faster at every batch size measured, from batch {of_r[0]['batch']} on.")
    return said


def _gain(row: dict[str, Any]) -> int:
    """1 where merging is faster, -1 where it is slower, 0 where the difference is within the spread of the rounds."""
    difference = row["speed-up"] - 1
    noise = (row["spread %"] or 0.0) / 100
    return 0 if abs(difference) <= noise else (1 if difference > 0 else -1)


def _cases(rows: Iterable[dict[str, Any]]) -> str:
    return ", ".join(f"batch {row['batch']} ({row['speed-up']:.2f}x)" for row in rows)


def _call(model: Any, x: torch.Tensor, *, is_reference: bool) -> Callable[[], Any]:
    def forced() -> Any:
        with kernels.force("reference"):
            return model(x)

    return forced if is_reference else lambda: model(x)


def _inner_progress(progress: OnProgress | None, step: int, steps: int) -> OnProgress | None:
    if progress is None:
        return None
    return lambda done, total: progress(step * total + done, steps * total)
