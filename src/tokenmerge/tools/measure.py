"""Measure reductions of one model on one set of images: answers, MACs, and time beside the free bound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import tokenmerge
from tokenmerge.config import Restore
from tokenmerge.data.labelled import Labelled
from tokenmerge.errors import DataError, UnsupportedError
from tokenmerge.measure.counting import Count, count
from tokenmerge.measure.outputs import answer, run_images, shared_copy
from tokenmerge.measure.timing import interleave
from tokenmerge.schedule import R
from tokenmerge.tools import columns
from tokenmerge.tools.columns import Record
from tokenmerge.tools.models import AUTO, Method, apply_method
from tokenmerge.tools.quality import Judge, Question

__all__ = ["BOUND", "FIGURES", "ComparisonRow", "Subject"]

_KEPT = 2**28  # bytes of the unmerged model's answers: those of 67,000 images of 1000 classes
BOUND = "drop"  # the method that removes tokens at no cost


class ComparisonRow(Record):
    """A method at one amount. What its answers do not say is None; a row without figures says why in `note`."""

    __slots__ = ()
    method = columns.METHOD
    asked = columns.ASKED
    r = columns.R
    top1 = columns.TOP1.or_none()
    top1_error = columns.TOP1_ERROR.or_none()
    agreement = columns.AGREEMENT.or_none()
    kl = columns.KL.or_none()
    error = columns.ERROR.or_none()
    cosine = columns.COSINE.or_none()
    gmacs = columns.GMACS.or_none()
    macs_share = columns.MACS_SHARE.or_none()
    matching_gmacs = columns.MATCHING_GMACS.or_none()
    images_per_second = columns.IMAGES_PER_SECOND.or_none()
    speed_up = columns.SPEED_UP.or_none()
    over_bound = columns.OVER_BOUND.or_none()
    tokens = columns.MEAN_TOKENS.or_none()
    note = columns.NOTE


# what is measured; which of the first apply depends on what the model answers
FIGURES = tuple(title for title in ComparisonRow.titles() if title not in ("method", "asked", "r", "note"))


class Subject:
    """A model that methods are measured on, its images, and what the unmerged model makes of them.

    `images` are what `"auto"` chooses by. The caller's model moves to the device, and is not changed beyond that.
    `note` says why labels do not count, where they do not. Raises `DataError` for images that cannot be read or do not
    fit; `UnsupportedModelError` for a model that no adapter describes.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Labelled,
        device: torch.device,
        *,
        rounds: int = 10,
        images: Tensor | None = None,
        restore: Restore | None = None,
    ) -> None:
        self.model = shared_copy(model.to(device)).eval()  # the caller's may be in training
        self.data, self.device, self.rounds, self.images = data, device, rounds, images
        self.restore = restore
        self.dtype = next(model.parameters()).dtype
        self.corrupt: list[str] = []  # the images left out, as soon as all were read
        batch = next((images for images, _ in data), None)
        if batch is None:
            raise DataError(f"none of the {len(data)} images could be read; the first: {data.corrupt[0]}.")
        self.batch = batch.to(device, self.dtype)
        self.question = Question(self.model, data, tuple(run_images(self.model, self.batch).shape))
        self.size = tuple(batch.shape[1:])
        with tokenmerge.patched(self.model, r=0) as handle:
            run_images(self.model, self.batch[:1])
            self.tokens, self.prefix = handle.tokens, handle.prefix
        self.macs = count(self.model, self.size).model
        self._answers: list[Tensor] = []  # of the unmerged model, as far as they are kept
        self._labels: list[Tensor] | None = None  # of each batch, as soon as all were read
        self._counted: dict[tuple[str, int], int] = {}
        self._guess: dict[float, int] = {}

    def unmerged(self) -> dict[str, Any]:
        """Return the figures of the unmerged model."""
        judge = Judge(self.question)
        for answers, _, labels in self._expected():
            judge.add(answers, answers, labels)
        timing = interleave({"unmerged": partial(self.model, self.batch)}, self.device, rounds=self.rounds)["unmerged"]
        figures: dict[str, Any] = {"r": "0", **_of_table(judge)}
        figures |= {"GMACs": round(self.macs / 1e9, 4), "MACs share": 1.0, "matching GMACs": 0.0}
        figures |= {"images/s": round(len(self.batch) / timing.median, 2), "speed-up": 1.0, "over bound": None}
        return {**figures, "tokens": self.tokens[-1]}

    def measure(self, method: Method, r: R | None = None, share: float | None = None) -> dict[str, Any]:
        """Return the figures of a method at `r` (None: its own), or at the smallest constant `r` for a share of MACs.

        `r` is what was used, `note` what `"auto"` chose. The MACs of an adaptive method are those of the free bound
        with as many tokens per block as were left on average. Raises what `patch` raises, and `UnsupportedError` for
        a share that cannot be reached.
        """
        twin = self._reduced(method, r if share is None else self._smallest_r(method, share))
        handle = tokenmerge.handle_of(twin)
        figures, tokens = self._judge(twin)
        macs, choosing = self._count(twin, tokens)
        figures |= {"GMACs": round(macs / 1e9, 4), "MACs share": round(macs / self.macs, 4)}
        figures |= {"matching GMACs": round(choosing / 1e9, 6), **self._time(twin)}
        left = round(tokens[-1], 1)
        figures["tokens"] = int(left) if left.is_integer() else left
        return {"r": str(handle.r), **figures, "note": handle.report().choice}

    def _reduced(self, method: Method, r: R | None) -> nn.Module:
        twin = shared_copy(self.model)
        apply_method(twin, method, r=r, calibrate=self.images, restore=self.restore)
        return twin

    def _run(self, model: nn.Module, images: Tensor) -> Tensor:
        with torch.inference_mode():
            return answer(model(images.to(self.device, self.dtype))).float()

    def _expected(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the unmerged model's answers, the images and the labels of each batch.

        Small answers are kept from the first pass on, the others computed anew: a map of every image may take more
        memory than there is.
        """
        if self._labels is None:
            self._answers.clear()  # of a pass that was cut off
        seen: list[Tensor] = []
        room = _KEPT
        for i, (images, labels) in enumerate(self.data):
            seen.append(labels)
            if self._labels is not None and (i >= len(self._labels) or not torch.equal(labels, self._labels[i])):
                break
            answers = self._answers[i] if i < len(self._answers) else self._run(self.model, images)
            room -= answers.nbytes
            if i == len(self._answers) and room >= 0:
                self._answers.append(answers)
            yield answers, images, labels.to(self.device)
        if self._labels is None:
            self._labels, self.corrupt = seen, list(self.data.corrupt)
        if len(seen) != len(self._labels) or not all(map(torch.equal, seen, self._labels)):
            raise DataError("the images changed since the unmerged model saw them: run the comparison again.")

    def _judge(self, model: nn.Module) -> tuple[dict[str, Any], list[float]]:
        """Return how the answers compare, and the mean tokens left after each block."""
        handle = tokenmerge.handle_of(model)
        judge, tokens = Judge(self.question), [0.0] * len(self.tokens)
        for expected, images, labels in self._expected():
            judge.add(self._run(model, images), expected, labels)
            tokens = [total + left * len(images) for total, left in zip(tokens, handle.tokens, strict=True)]
        return _of_table(judge), [total / judge.seen for total in tokens]

    def _time(self, model: nn.Module) -> dict[str, float]:
        """Time the first batch: unmerged, merged, and at the free bound with the very same tokens per block."""
        self._run(model, self.batch)
        left = tokenmerge.handle_of(model).tokens
        bound = self._reduced(BOUND, self._amounts(left))
        self._run(bound, self.batch)
        if tokenmerge.handle_of(bound).tokens != left:
            raise UnsupportedError(
                "the free bound cannot drop tokens where this model merges them: no time to compare."
            )
        models = {"unmerged": self.model, "merged": model, "bound": bound}
        timings = interleave(
            {name: partial(m, self.batch) for name, m in models.items()}, self.device, rounds=self.rounds
        )
        return {
            "images/s": round(len(self.batch) / timings["merged"].median, 2),
            "speed-up": round(timings["unmerged"].over(timings["merged"]), 3),
            "over bound": round(timings["merged"].over(timings["bound"]), 3),
        }

    def _count(self, model: nn.Module, left: Sequence[float]) -> Count:
        """Return the MACs of a reduced model that leaves these tokens after its blocks."""
        if not tokenmerge.handle_of(model).config.method.is_adaptive:
            return count(model, self.size)
        amounts = self._amounts(left)
        bound, probe = self._reduced(BOUND, amounts), shared_copy(model)
        # without values an adaptive method removes just r
        tokenmerge.handle_of(probe).r = amounts
        macs, whole = count(bound, self.size).model, count(probe, self.size)
        # a merge by a product is no part of the bound
        return Count(macs, whole.matching + max(0, whole.model - macs))

    def _amounts(self, left: Sequence[float]) -> list[int]:
        """Return how many tokens each block removes where these are left after it."""
        after = [round(n) for n in left]
        added = [0, *(n - before for before, n in pairwise(self.tokens))]  # by the model itself
        before = [self.tokens[0], *after[:-1]]
        return [n + more - rest for n, more, rest in zip(before, added, after, strict=True)]

    def _smallest_r(self, method: Method, share: float) -> int:
        """Return the smallest constant `r` with at most this share of the unmerged MACs: for `"auto"` that of tome.

        How many tokens an adaptive method leaves is measured on the first batch.
        """
        plain = "tome" if method == AUTO else method
        assert isinstance(plain, (str, tokenmerge.Reduction))
        largest = tokenmerge.MergeConfig(plain).method.largest_r(self.tokens[0], self.prefix)
        guess = self._guess.get(share, 0)
        near = [guess, guess - 1]
        low, high = 0, largest + 1  # more than the share is left at `low`, and no r is as large as `high` was at first
        while high - low > 1:
            r = next((r for r in near if low < r < high), (low + high) // 2)
            low, high = (low, r) if self._macs_at(plain, r) <= share * self.macs else (r, high)
        if high > largest:
            kept = self._macs_at(plain, largest) / self.macs
            raise UnsupportedError(
                f"cannot reach {share:g} of the MACs: at its largest r ({largest}) it keeps {kept:.3g}."
            )
        self._guess[share] = high
        return high

    def _macs_at(self, method: Method, r: int) -> int:
        key = (repr(method), r)
        if key not in self._counted:
            twin = self._reduced(method, r)
            if tokenmerge.handle_of(twin).config.method.is_adaptive:
                self._run(twin, self.batch)
            self._counted[key] = self._count(twin, tokenmerge.handle_of(twin).tokens).model
        return self._counted[key]


def _of_table(judge: Judge) -> dict[str, Any]:
    return {name: value for name, value in judge.figures().items() if name in FIGURES}
