"""Time a merged model against the unmerged one and against the free bound, over r and batch size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tokenmerge
from tokenmerge import kernels
from tokenmerge.config import Restore
from tokenmerge.errors import DataError
from tokenmerge.measure.counting import count
from tokenmerge.measure.outputs import find_device, find_dtype, known_size, run_images, shared_copy
from tokenmerge.measure.timing import (
    ENOUGH_ROUNDS,
    NOISY,
    Timing,
    attention_kernel,
    environment,
    interleave,
    peak_memory,
    training_memory,
)
from tokenmerge.report import columns
from tokenmerge.report.columns import Record
from tokenmerge.report.plots import plot_speed
from tokenmerge.report.table import KINDS, PICTURES, Table
from tokenmerge.schedule import R
from tokenmerge.tools.models import Method, apply_method, choices_of

__all__ = ["Bench", "BenchRow", "bench"]

OnProgress = Callable[[int, int], None]  # (done, total)


class BenchRow(Record):
    """One `r` at one batch size: the merged model, the unmerged model and the free bound."""

    __slots__ = ()
    model = columns.MODEL
    r = columns.R
    batch = columns.BATCH
    ms = columns.MS
    spread = columns.SPREAD
    images_per_second = columns.IMAGES_PER_SECOND
    unmerged_ms = columns.UNMERGED_MS
    speed_up = columns.SPEED_UP
    noise = columns.NOISE
    bound_ms = columns.BOUND_MS
    over_bound = columns.OVER_BOUND
    reference_ms = columns.REFERENCE_MS.or_none()  # with compare=True
    reference_over_merged = columns.REFERENCE_OVER_MERGED.or_none()
    gmacs = columns.GMACS
    matching_gmacs = columns.MATCHING_GMACS
    tokens = columns.TOKENS
    peak_mb = columns.PEAK_MB
    unmerged_peak_mb = columns.UNMERGED_PEAK_MB
    attention = columns.ATTENTION
    unmerged_attention = columns.UNMERGED_ATTENTION
    training_peak_mb = columns.TRAINING_PEAK_MB.or_none()  # with training=True
    unmerged_training_peak_mb = columns.UNMERGED_TRAINING_PEAK_MB.or_none()


@dataclass(repr=False)
class Bench(Table[BenchRow]):
    """Rows of figures, the environment, and verdicts in plain sentences."""

    rows: list[BenchRow]
    environment: dict[str, str]
    verdicts: list[str] = field(default_factory=list)
    kinds = (*KINDS, *PICTURES)

    def _draw(self, path: Path, title: str) -> None:
        plot_speed(path, self.rows, title or str(self.rows[0].model))

    @property
    def remarks(self) -> list[str]:
        """What the figures mean."""
        return self.verdicts


def bench(
    model: nn.Module,
    *,
    rs: Sequence[R] = (0, 8, 16),
    batches: Sequence[int] = (1, 8),
    method: Method = "tome",
    calibrate: torch.Tensor | None = None,
    restore: Restore | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    compiled: bool | str = False,
    rounds: int = 20,
    input_size: Sequence[int] | None = None,
    compare: bool = False,
    training: bool = False,
    label: str = "model",
    progress: OnProgress | None = None,
    so_far: Callable[[Bench], None] | None = None,
) -> Bench:
    """Measure a model at every `r` and batch size; all variants of a row run in turn in the same rounds.

    The free bound drops the same number of tokens at the same places: no matching, no merging, no bias. The model is
    not changed. Raises `UnsupportedError` for an unavailable device or dtype, `DataError` for an input size that the
    model does not take.

    Args:
        model: the unpatched model.
        rs: values of `r`.
        batches: batch sizes.
        method: anything `read_method` takes or returns.
        calibrate: images for `"auto"`, which chooses once per `r`.
        restore: as in `patch`.
        device: a torch device.
        dtype: "float32", "bfloat16" or "float16".
        compiled: compile all variants; True or a mode of `torch.compile`.
        rounds: timed rounds per row.
        input_size: (channels, height, width); default: the size the model declares.
        compare: also time the merged model on the reference kernels.
        training: also measure the peak memory of a training step.
        label: name of the model in the rows.
        progress: called with (done, total).
        so_far: called after each row with all rows up to it, to keep them should the rest be interrupted.
    """
    where, kind = find_device(device), find_dtype(dtype)
    if rounds < 1 or any(batch < 1 for batch in batches) or not batches or not rs:
        raise DataError("bench needs at least one r, one batch size >= 1 and one round.")
    if input_size is not None and (len(input_size) != 3 or min(input_size) < 1):
        raise DataError(f"input_size is {tuple(input_size)}; give channels, height and width of 1 or more.")
    # copy first: a change of dtype loses precision in the caller's model
    model = copy.deepcopy(model).to(where, kind).eval()
    rows: list[BenchRow] = []
    with tokenmerge.patched(model, r=0, restore=restore) as handle:
        size = tuple(input_size or known_size(handle))
    if training:
        model.requires_grad_(True)
    merged = [_merged(model, method, r, restore, calibrate) for r in rs]
    bounds = [_merged(model, "drop", r, restore) for r in rs]
    about = {**environment(where), "dtype": dtype, "compiled": str(compiled), "rounds": str(rounds)}

    def result() -> Bench:
        return Bench([*rows], about, choices_of(zip(rs, merged, strict=True)) + _verdicts(rows))

    for i, batch in enumerate(batches):
        x = torch.randn(batch, *size, device=where, dtype=kind)
        if i == 0:
            run_images(model, x[:1])
        for j, r in enumerate(rs):
            inner = _inner_progress(progress, i * len(rs) + j, len(batches) * len(rs))
            row = _row(model, merged[j], bounds[j], r, x, rounds, compiled, compare, inner)
            rows.append(BenchRow({"model": label, **row, **(_training(model, merged[j], x) if training else {})}))
            if so_far is not None:
                so_far(result())
    return result()


def _row(
    model: nn.Module,
    merged: nn.Module,
    bound: nn.Module,
    r: R,
    x: torch.Tensor,
    rounds: int,
    compiled: bool | str,
    compare: bool,
    progress: OnProgress | None,
) -> dict[str, Any]:
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


def _merged(
    model: nn.Module, method: Method, r: R, restore: Restore | None, calibrate: torch.Tensor | None = None
) -> nn.Module:
    twin = shared_copy(model)
    apply_method(twin, method, r=r, restore=restore, calibrate=calibrate)
    return twin


def _figures(timings: dict[str, Timing], batch: int) -> dict[str, float | None]:
    merged, unmerged, bound = timings["merged"], timings["unmerged"], timings["bound"]
    figures = {
        "ms": round(merged.median * 1e3, 3),
        "spread %": None if merged.spread is None else round(merged.spread * 100, 1),
        "images/s": round(batch / merged.median, 2),
        "unmerged ms": round(unmerged.median * 1e3, 3),
        "speed-up": round(unmerged.over(merged), 3),
        "noise %": None if (noise := unmerged.noise(merged)) is None else round(noise * 100, 1),
        "bound ms": round(bound.median * 1e3, 3),
        "over bound": round(merged.over(bound), 3),
    }
    if "reference" in timings:
        figures["reference ms"] = round(timings["reference"].median * 1e3, 3)
        figures["reference / merged"] = round(timings["reference"].over(merged), 3)
    return figures


def _verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return sentences per r: where merging is slower, where no difference shows, and from which batch size it pays.

    A difference counts if it exceeds the noise: the variation of the speed-up between rounds, and the distance from 1
    of the r = 0 row, which merges nothing.
    """
    merging = [row for row in rows if row["r"] != "0"]
    if merging and any(row["noise %"] is None for row in merging):
        return [f"Too few rounds to tell faster from slower: at least {ENOUGH_ROUNDS} are needed (--rounds)."]
    said = []
    noises = {(row["r"], row["batch"]): _noise(row, rows) for row in merging}
    for r in dict.fromkeys(row["r"] for row in merging):
        of_r = sorted((row for row in merging if row["r"] == r), key=lambda row: row["batch"])
        gains = [_gain(row, noises[r, row["batch"]]) for row in of_r]
        slower = _cases((row for row, gain in zip(of_r, gains, strict=True) if gain < 0), noises)
        equal = _cases((row for row, gain in zip(of_r, gains, strict=True) if gain == 0), noises)
        pays = next((row["batch"] for i, row in enumerate(of_r) if all(gain > 0 for gain in gains[i:])), None)
        parts = [f"SLOWER than the unmerged model at {slower}"] if slower else []
        parts += [f"no difference measured at {equal}"] if equal else []
        if parts:
            if pays:
                parts.append(f"it pays from batch {pays} on")
            elif slower:
                parts.append("it pays at no batch size up to the largest measured")
            said.append(f"r = {r}: {'; '.join(parts)}.")
        else:
            said.append(f"r = {r}: faster at {_cases(of_r, noises)}: at every batch size measured.")
    return said + _warning(rows, max(noises.values(), default=0.0))


def _noise(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> float:
    """Return the smallest significant distance of this row's speed-up from 1."""
    control = next((one for one in rows if one["r"] == "0" and one["batch"] == row["batch"]), None)
    own = (row["noise %"] or 0.0) / 100
    return max(own, 0.0 if control is None else abs(control["speed-up"] - 1))


def _warning(rows: Sequence[dict[str, Any]], worst: float) -> list[str]:
    if worst < NOISY:
        return []
    busy = [row for row in rows if row["r"] == "0" and abs(row["speed-up"] - 1) >= NOISY]
    control = f"; the r = 0 row, which merges nothing, says {busy[0]['speed-up']:.2f}x instead of 1" if busy else ""
    return [f"Noisy ({100 * worst:.0f} %{control}): close other programs, or take more rounds (--rounds)."]


def _gain(row: dict[str, Any], noise: float) -> int:
    """Return 1 if merging is faster, -1 if slower, 0 if the difference is within the noise."""
    difference = row["speed-up"] - 1
    return 0 if abs(difference) <= noise else (1 if difference > 0 else -1)


def _cases(rows: Iterable[dict[str, Any]], noises: dict[tuple[str, int], float]) -> str:
    return ", ".join(
        f"batch {row['batch']} ({row['speed-up']:.2f}x, noise {100 * noises[row['r'], row['batch']]:.1f} %)"
        for row in rows
    )


def _call(model: Any, x: torch.Tensor, *, is_reference: bool) -> Callable[[], Any]:
    def forced() -> Any:
        with kernels.force("reference"):
            return model(x)

    return forced if is_reference else lambda: model(x)


def _inner_progress(progress: OnProgress | None, step: int, steps: int) -> OnProgress | None:
    if progress is None:
        return None
    return lambda done, total: progress(step * total + done, steps * total)
