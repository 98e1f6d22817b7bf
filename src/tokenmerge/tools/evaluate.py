"""Accuracy and speed over labelled images, with and without merging in one pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import tokenmerge
from tokenmerge.config import Restore
from tokenmerge.data.labelled import Labelled
from tokenmerge.errors import DataError
from tokenmerge.measure.counting import flops
from tokenmerge.measure.outputs import answer, find_device, run_images, shared_copy
from tokenmerge.measure.timing import environment
from tokenmerge.schedule import R
from tokenmerge.tools import columns
from tokenmerge.tools.columns import Record
from tokenmerge.tools.models import Method, apply_method, choices_of
from tokenmerge.tools.quality import Judge, Question
from tokenmerge.tools.results import Results, measured_on

__all__ = ["Evaluation", "EvaluationRow", "evaluate"]

_QUALITY = ("top-1 %", "top-1 ±", "top-5 %", "agreement %", "error %", "cosine")


class EvaluationRow(Record):
    """The model at one `r` over all images. What its answers do not say is None."""

    __slots__ = ()
    r = columns.R
    top1 = columns.TOP1.or_none()
    top1_error = columns.TOP1_ERROR.or_none()
    top5 = columns.TOP5.or_none()
    agreement = columns.AGREEMENT.or_none()
    error = columns.ERROR.or_none()
    cosine = columns.COSINE.or_none()
    images_per_second = columns.IMAGES_PER_SECOND
    speed_up = columns.SPEED_UP
    gmacs = columns.GMACS
    tokens = columns.TOKENS
    bound_images_per_second = columns.BOUND_IMAGES_PER_SECOND.or_none()  # with bound=True
    over_bound = columns.OVER_BOUND.or_none()


@dataclass(repr=False)
class Evaluation(Results[EvaluationRow]):
    """One row per `r` (the unmerged model is r = 0), the images left out, what "auto" chose, and what it ran on.

    `notes` say how the images were prepared, and what the figures cannot say.
    """

    rows: list[EvaluationRow]
    environment: dict[str, str]
    images: int
    corrupt: list[str] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def remarks(self) -> list[str]:
        """What a reader has to know besides the figures, line by line."""
        whole = self.images + len(self.corrupt)
        lost = [f"{len(self.corrupt)} of {whole} images could not be read and were left out:"] if self.corrupt else []
        return [*self.notes, *lost, *(f"  {line}" for line in self.corrupt), *self.choices]

    def _said(self) -> list[str]:
        return [*self.remarks, measured_on(self.environment)]


class _Variant:
    """One model in the pass: how its answers compare, and the seconds of its forwards."""

    def __init__(self, model: nn.Module, r: R) -> None:
        self.model, self.r = model, r
        self.judge: Judge | None = None
        self.seconds = 0.0

    def __call__(self, images: Tensor) -> Tensor:
        start = time.perf_counter()
        output = self.model(images)
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        self.seconds += time.perf_counter() - start
        return answer(output)


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
    """Run every image with every `r`, batch by batch in turn, and through the unmerged model.

    `method` is anything `read_method` takes or returns, `calibrate` the images by which `"auto"` chooses, `restore`
    that of `patch`. Agreement is the share of images that get the unmerged model's answer, `top-1 ±` the standard error
    of the accuracy. Where the answers are no classes of these images (embeddings, depth), they are compared with the
    unmerged model's alone, and a note says so. With `bound`, the free bound of each `r` (the same tokens
    dropped at no cost) is timed beside it. The first batch also warms up, untimed.
    Raises `DataError` where no image could be read.
    """
    where = find_device(device)
    model = shared_copy(model.to(where)).eval()  # the caller's may be in training
    dtype = next(model.parameters()).dtype
    variants = [_Variant(model, 0)]
    bounds: dict[int, _Variant] = {}
    for r in rs:
        if r == 0:
            continue
        variants.append(_Variant(_patched(model, method, r, prop_attn, restore, calibrate), r))
        if bound:
            bounds[len(variants) - 1] = _Variant(_patched(model, "drop", r, False, restore), r)
    everyone = variants + list(bounds.values())
    seen = 0
    shape: tuple[int, ...] | None = None
    notes = [*data.preprocessing.notes(), *data.notes]
    with torch.inference_mode():
        for turn, (images, labels) in enumerate(data):
            images, labels = images.to(where, dtype), labels.to(where)
            if shape is None:
                shape = tuple(images.shape[1:])
                question = _warm_up(everyone, images, data)
                notes += [question.note] if question.note else []
            _one_batch(variants, everyone, images, labels, turn)
            seen += len(images)
            if progress is not None:
                progress(seen, len(data))
    if shape is None:
        raise DataError(f"none of the {len(data)} images could be read; the first: {data.corrupt[0]}.")
    rows = [_row(variant, variants[0], bounds.get(i), bound, seen, shape) for i, variant in enumerate(variants)]
    empty = [name for name in rows[0] if name in _QUALITY and all(row[name] is None for row in rows)]
    whole = [EvaluationRow({name: value for name, value in row.items() if name not in empty}) for row in rows]
    choices = choices_of((variant.r, variant.model) for variant in variants[1:])
    return Evaluation(whole, environment(where), seen, list(data.corrupt), choices, notes)


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


def _warm_up(everyone: list[_Variant], images: Tensor, data: Labelled) -> Question:
    """Run the first batch once untimed, and say what can be asked of the answers."""
    answers = [run_images(variant.model, images) for variant in everyone]
    question = Question(everyone[0].model, data, tuple(answers[0].shape))
    for variant, got in zip(everyone, answers, strict=True):
        question.check(got, answers[0])
        variant.judge = Judge(question)
    return question


def _one_batch(variants: list[_Variant], everyone: list[_Variant], images: Tensor, labels: Tensor, turn: int) -> None:
    first = turn % len(everyone)
    answers = {id(variant): variant(images) for variant in everyone[first:] + everyone[:first]}
    for variant in variants:
        assert variant.judge is not None
        variant.judge.add(answers[id(variant)], answers[id(variants[0])], labels)


def _row(
    variant: _Variant, unmerged: _Variant, bound: _Variant | None, with_bound: bool, seen: int, shape: tuple[int, ...]
) -> dict[str, Any]:
    assert variant.judge is not None
    quality = variant.judge.figures()
    row: dict[str, Any] = {
        "r": str(variant.r),
        **{name: quality[name] for name in _QUALITY},
        "images/s": round(seen / variant.seconds, 1),
        "speed-up": round(unmerged.seconds / variant.seconds, 2),
        "GMACs": round(flops(variant.model, shape) / 1e9, 4),
        "tokens": _tokens(variant.model),
    }
    if with_bound:
        row["bound images/s"] = round(seen / bound.seconds, 1) if bound else None
        row["over bound"] = round(variant.seconds / bound.seconds, 3) if bound else None
    return row


def _tokens(model: nn.Module) -> int:
    handle = tokenmerge.handle_of(model, None)
    if handle:
        return handle.tokens[-1]
    with tokenmerge.patched(model, r=0) as handle:
        return handle.tokens[-1]
