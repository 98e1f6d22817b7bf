"""Accuracy and speed over labelled images, with and without merging in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tokenmerge
from tokenmerge.config import Restore
from tokenmerge.data.labelled import Labelled, check_labelled
from tokenmerge.measure.counting import flops
from tokenmerge.measure.outputs import find_device, run_images, shared_copy
from tokenmerge.measure.retrieval import LEAST, NEAREST, recalls
from tokenmerge.measure.timing import environment
from tokenmerge.measure.trial import BOUND, Seen, Trial
from tokenmerge.report import columns
from tokenmerge.report.axes import QUALITY, Chart
from tokenmerge.report.columns import Record
from tokenmerge.report.plots import plot_tradeoff
from tokenmerge.report.table import KINDS, PICTURES, Table
from tokenmerge.schedule import R
from tokenmerge.tools.models import Method, apply_method, choices_of

__all__ = ["Evaluation", "EvaluationRow", "evaluate"]

_QUALITY = ("top-1 %", "top-1 ±", "top-5 %", "agreement %", "error %", "cosine", "recall@10", "recall@10 old")


class EvaluationRow(Record):
    """The model at one `r` over all images. Figures that do not apply are None."""

    __slots__ = ()
    r = columns.R
    top1 = columns.TOP1.or_none()
    top1_error = columns.TOP1_ERROR.or_none()
    top5 = columns.TOP5.or_none()
    agreement = columns.AGREEMENT.or_none()
    error = columns.ERROR.or_none()
    cosine = columns.COSINE.or_none()
    recall = columns.RECALL.or_none()
    recall_mixed = columns.RECALL_MIXED.or_none()
    images_per_second = columns.IMAGES_PER_SECOND
    speed_up = columns.SPEED_UP
    gmacs = columns.GMACS
    tokens = columns.TOKENS
    bound_images_per_second = columns.BOUND_IMAGES_PER_SECOND.or_none()  # with bound=True
    over_bound = columns.OVER_BOUND.or_none()


@dataclass(repr=False)
class Evaluation(Table[EvaluationRow]):
    """One row per `r` (r = 0 is the unmerged model), images left out, choices of "auto", and the environment.

    `notes` name the preprocessing and caveats of the figures.
    """

    rows: list[EvaluationRow]
    environment: dict[str, str]
    images: int
    corrupt: list[str] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kinds = (*KINDS, *PICTURES)
    chart = Chart(
        x=("images/s", "speed-up", "GMACs", "tokens"),
        y=QUALITY,
        label=lambda row: f"r = {row['r']}",
        is_unmerged=lambda row: row["r"] == "0",
    )

    def _draw(self, path: Path, title: str) -> None:
        plot_tradeoff(path, self.rows, title or f"{self.images} images")

    @property
    def remarks(self) -> list[str]:
        """Notes for the reader, line by line."""
        whole = self.images + len(self.corrupt)
        lost = [f"{len(self.corrupt)} of {whole} images could not be read and were left out:"] if self.corrupt else []
        return [*self.notes, *lost, *(f"  {line}" for line in self.corrupt), *self.choices]


def evaluate(
    model: nn.Module,
    data: Labelled,
    *,
    rs: Sequence[R] = (0, 8, 16),
    method: Method = "tome",
    calibrate: Tensor | None = None,
    prop_attn: bool | str | None = None,
    restore: Restore | None = None,
    device: str = "cpu",
    bound: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Run every image with every `r`, in turn for each batch, and through the unmerged model.

    Agreement is the share of images with the same answer as the unmerged model; `top-1 ±` is the standard error of the
    accuracy, which images without labels (-1) have not. If the outputs are not classes of these images (embeddings,
    depth), they are only compared with the unmerged model's, and a note says so; embeddings of 50 images or more also
    by `recalls`. The first batch also runs untimed as a warm-up. Raises `DataError` if no image could be read.

    `method` is anything `read_method` takes or returns, `calibrate` the images for `"auto"`, `restore` that of `patch`.
    With `bound` the free bound of each `r` (the same tokens dropped at no cost) is timed too.
    """
    check_labelled(data)
    where = find_device(device)
    model = shared_copy(model.to(where)).eval()  # the caller's model may be in train mode
    merged = {i: _patched(model, method, r, prop_attn, restore, calibrate) for i, r in enumerate(rs) if r != 0}
    bounds = {i: _patched(model, BOUND, rs[i], False, restore) for i in merged} if bound else {}
    trial = Trial(model, data, where, keep=0)
    trial.question.keeps_embeddings = True
    models = [trial.model, *merged.values(), *bounds.values()]
    for twin in models[1:]:
        trial.question.check(run_images(twin, trial.batch), run_images(trial.model, trial.batch))
    unmerged, *others = trial.judge(models, progress)
    found = dict(zip([*merged, *(~i for i in bounds)], others, strict=True))
    rows = [_row("0", unmerged, unmerged, trial.model, trial, None, bound)]
    rows += [_row(str(rs[i]), found[i], unmerged, twin, trial, found.get(~i), bound) for i, twin in merged.items()]
    empty = [name for name in rows[0] if name in _QUALITY and all(row[name] is None for row in rows)]
    whole = [EvaluationRow({name: value for name, value in row.items() if name not in empty}) for row in rows]
    notes = [*data.preprocessing.notes(), *data.notes, *([trial.question.note] if trial.question.note else [])]
    seen = {"0": unmerged, **{str(rs[i]): found[i] for i in merged}}
    notes += [f"r = {r}: {one.judge.note}" for r, one in seen.items() if one.judge.note]
    notes += _searched(unmerged)
    choices = choices_of((rs[i], twin) for i, twin in merged.items())
    return Evaluation(whole, environment(where), unmerged.judge.seen, trial.corrupt, choices, notes)


def _recall(seen: Seen, unmerged: Seen) -> dict[str, float | None]:
    """Return how many of the nearest images are found; None where the answers are no embeddings of enough images."""
    vectors = [torch.cat(one.judge.embeddings) for one in (seen, unmerged) if one.judge.embeddings]
    is_known = len(vectors) == 2 and vectors[0].shape[0] >= LEAST and not seen.judge.odd
    anew, mixed = recalls(vectors[0], vectors[1]) if is_known else (None, None)
    return {name: None if x is None else round(x, 4) for name, x in (("recall@10", anew), ("recall@10 old", mixed))}


def _searched(unmerged: Seen) -> list[str]:
    """Return what was searched for among which images; nothing for answers that are no embeddings."""
    count = sum(len(found) for found in unmerged.judge.embeddings)
    if not count:
        return []
    if count < LEAST:
        return [f"recall@{NEAREST} needs at least {LEAST} images, and there are {count}."]
    return [
        f"recall@{NEAREST}: of the {NEAREST} images nearest to each of {count} in the unmerged model, the share found "
        "where all are embedded merged; old: where merged ones are searched for in the unmerged index."
    ]


def _patched(
    model: nn.Module,
    method: Method,
    r: R,
    prop_attn: bool | str | None,
    restore: Restore | None,
    calibrate: Tensor | None = None,
) -> nn.Module:
    twin = shared_copy(model)
    apply_method(twin, method, r=r, prop_attn=prop_attn, restore=restore, calibrate=calibrate)
    return twin


def _row(
    r: str, seen: Seen, unmerged: Seen, model: nn.Module, trial: Trial, bound: Seen | None, with_bound: bool
) -> dict[str, Any]:
    images, quality = unmerged.judge.seen, {**seen.judge.figures(), **_recall(seen, unmerged)}
    handle = tokenmerge.handle_of(model, None)
    row: dict[str, Any] = {
        "r": r,
        **{name: quality[name] for name in _QUALITY},
        "images/s": float(f"{images / seen.seconds:.4g}"),  # a large model has less than one
        "speed-up": round(unmerged.seconds / seen.seconds, 2),
        "GMACs": round((flops(model, trial.size) if handle else trial.macs) / 1e9, 4),
        "tokens": (handle.tokens if handle else trial.tokens)[-1],
    }
    if with_bound:
        row["bound images/s"] = float(f"{images / bound.seconds:.4g}") if bound else None
        row["over bound"] = round(seen.seconds / bound.seconds, 3) if bound else None
    return row
