"""Run reductions of one model on one set of images: figures beside those of the unmerged model and the free bound."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge.config import MergeConfig
from tokenmerge.data.labelled import Labelled, none_read
from tokenmerge.errors import DataError, UnsupportedError
from tokenmerge.handle import attached, handle_of
from tokenmerge.measure.allocator import return_freed
from tokenmerge.measure.counting import Count, count
from tokenmerge.measure.outputs import answer, run_images, shared_copy
from tokenmerge.measure.quality import Judge, Question
from tokenmerge.measure.retrieval import MOST
from tokenmerge.measure.timing import interleave

__all__ = ["BOUND", "Seen", "Trial"]

_KEPT = 2**28  # bytes of unmerged outputs to keep: 67,000 images with 1000 classes
BOUND = "drop"  # the method that removes tokens at no cost
OnProgress = Callable[[int, int], None]  # done, total


@dataclass
class Seen:
    """The result of one model in a pass over the images: comparison, seconds of its forwards, mean tokens."""

    judge: Judge
    seconds: float = 0.0
    tokens: list[float] = field(default_factory=list)  # left after each block, mean over images; empty if not patched


class Trial:
    """A model to try reductions on, its images, and the outputs of the unmerged model.

    All tools run models over images with `judge`. The caller's model moves to the device and is not changed otherwise.
    `keep` is how many bytes of unmerged outputs stay in memory for later passes (256 MiB), `options` are those of
    `patch`. Raises `DataError` for images that cannot be read or do not fit, `UnsupportedModelError` for a model
    without an adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Labelled,
        device: torch.device,
        *,
        rounds: int = 10,
        keep: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = shared_copy(model.to(device)).eval()  # the caller's model may be in train mode
        self.data, self.device, self.rounds, self.options = data, device, rounds, dict(options or {})
        self.dtype = next(model.parameters()).dtype
        self.corrupt: list[str] = []  # images left out; set after the first full pass
        batch = next((images for images, _ in data), None)
        if batch is None:
            raise none_read(data)
        self.batch = batch.to(device, self.dtype)
        self.question = Question(self.model, data, tuple(run_images(self.model, self.batch).shape))
        self.size = tuple(batch.shape[1:])
        with attached(self.model, MergeConfig(**self.options)) as handle:
            run_images(self.model, self.batch[:1])
            self.tokens, self.protected = handle.tokens, handle.protected
        self._keep = _KEPT if keep is None else keep
        self._answers: list[Tensor] = []  # unmerged outputs, up to `keep` bytes
        self._passed: list[tuple[Tensor, Tensor]] | None = None  # labels and digest of each batch; set by a full pass
        self._counted: dict[tuple[str, int], int] = {}
        self._guess: dict[float, int] = {}

    @cached_property
    def macs(self) -> int:
        """The MACs of the unmerged model for one image."""
        return count(self.model, self.size).model

    def judge(self, models: Sequence[nn.Module], progress: OnProgress | None = None) -> list[Seen]:
        """Run every model over all images, in turn for each batch, and compare with the unmerged outputs.

        Raises `DataError` if the images differ from those of the previous pass.
        """
        own = next((i for i, model in enumerate(models) if model is self.model), None)
        seen = [Seen(Judge(self.question)) for _ in models]
        done = 0
        for turn, (images, labels) in enumerate(self._batches()):
            images = images.to(self.device, self.dtype)
            answers: list[Tensor] = [images] * len(models)
            for i in (*range(turn % len(models), len(models)), *range(turn % len(models))):
                start = time.perf_counter()
                answers[i] = self._run(models[i], images)
                seen[i].seconds += time.perf_counter() - start
            expected = self._expected(turn, images, None if own is None else answers[own])
            for model, one, got in zip(models, seen, answers, strict=True):
                one.judge.add(got, expected, labels.to(self.device))
                if self.question.keeps_embeddings and done < MOST:
                    found = self.question.embedded(got, self.tokens[0], self.protected)
                    one.judge.embeddings += [] if found is None else [found[: MOST - done].float().cpu()]
                handle = handle_of(model, None)
                for layer, left in enumerate(handle.tokens if handle else ()):
                    one.tokens[layer : layer + 1] = [(one.tokens[layer] if turn else 0.0) + left * len(images)]
            done += len(images)
            if progress is not None:
                progress(done, len(self.data))
        for one in seen:
            one.tokens = [total / done for total in one.tokens]
        return_freed()
        return seen

    def reduced(self, config: MergeConfig) -> nn.Module:
        """Return a copy of the model with shared weights, patched by `config`."""
        twin = shared_copy(self.model)
        attached(twin, config)
        return twin

    def unmerged(self) -> dict[str, Any]:
        """Return the figures of the unmerged model."""
        (seen,) = self.judge([self.model])
        timing = interleave({"unmerged": partial(self.model, self.batch)}, self.device, rounds=self.rounds)["unmerged"]
        figures: dict[str, Any] = {"r": "0", **seen.judge.figures()}
        figures |= {"GMACs": round(self.macs / 1e9, 4), "MACs share": 1.0, "matching GMACs": 0.0}
        figures |= {"images/s": round(len(self.batch) / timing.median, 2), "speed-up": 1.0, "over bound": None}
        return {**figures, "tokens": self.tokens[-1], "note": seen.judge.note}

    def measure(self, reduced: nn.Module) -> dict[str, Any]:
        """Return the figures of a patched copy of the model.

        `r` is the value it was patched with, `note` the choice of `"auto"` and how many answers hold NaN. For an
        adaptive method the MACs are those of the free bound with the mean number of tokens per block. Raises
        `UnsupportedError` if the free bound cannot drop tokens.
        """
        handle = handle_of(reduced)
        (seen,) = self.judge([reduced])
        macs, choosing = self._count(reduced, seen.tokens)
        figures = seen.judge.figures() | {"GMACs": round(macs / 1e9, 4), "MACs share": round(macs / self.macs, 4)}
        figures |= {"matching GMACs": round(choosing / 1e9, 6), **self._time(reduced)}
        left = round(seen.tokens[-1], 1)
        figures["tokens"] = int(left) if left.is_integer() else left
        return {
            "r": str(handle.r),
            **figures,
            "note": "; ".join(filter(None, (handle.report().choice, seen.judge.note))),
        }

    def smallest_r(self, reduce: Callable[[int], nn.Module], share: float) -> int:
        """Return the smallest constant `r` with at most this share of the unmerged MACs.

        `reduce` returns a copy of the model, patched with an `r`. For adaptive methods the tokens left are measured on
        the first batch. Raises `UnsupportedError` if no `r` reaches the share.
        """
        method = handle_of(reduce(0)).config.method

        def macs(r: int) -> int:
            key = (repr(method), r)
            if key not in self._counted:
                twin = reduce(r)
                if method.is_adaptive:
                    self._run(twin, self.batch)
                self._counted[key] = self._count(twin, handle_of(twin).tokens).model
            return self._counted[key]

        largest = method.largest_r(self.tokens[0], self.protected)
        guess = self._guess.get(share, 0)
        near = [guess, guess - 1]
        low, high = 0, largest + 1  # `low` is above the share; no r can be as large as the first `high`
        while high - low > 1:
            r = next((r for r in near if low < r < high), (low + high) // 2)
            low, high = (low, r) if macs(r) <= share * self.macs else (r, high)
        if high > largest:
            raise UnsupportedError(
                f"cannot reach {share:g} of the MACs: at its largest r ({largest}) it keeps "
                f"{macs(largest) / self.macs:.3g}."
            )
        self._guess[share] = high
        return high

    def _run(self, model: nn.Module, images: Tensor) -> Tensor:
        with torch.inference_mode():
            output = model(images)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        return answer(output)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images and labels of each batch; raise `DataError` if they changed since the last pass."""
        seen: list[tuple[Tensor, Tensor]] = []
        if self._passed is None:
            self._answers.clear()  # of an interrupted pass
        for images, labels in self.data:
            seen.append((labels, _digest(images)))
            if self._passed is not None and not _is_same(seen[-1], self._passed[len(seen) - 1 : len(seen)]):
                raise DataError(_CHANGED)
            yield images, labels
        if self._passed is None:
            self._passed, self.corrupt = seen, list(self.data.corrupt)
        if len(seen) != len(self._passed):
            raise DataError(_CHANGED)

    def _expected(self, turn: int, images: Tensor, answers: Tensor | None) -> Tensor:
        """Return the unmerged outputs of a batch, from memory if kept.

        Others are computed again: dense outputs of all images may not fit in memory.
        """
        if answers is None and turn < len(self._answers):
            return self._answers[turn]
        found = self._run(self.model, images) if answers is None else answers
        room = self._keep - sum(kept.nbytes for kept in self._answers)
        if turn == len(self._answers) and found.nbytes <= room:
            self._answers.append(found)
        return found

    def _bound(self, left: Sequence[float]) -> nn.Module:
        """Return the free bound with these tokens after its blocks."""
        return self.reduced(MergeConfig(BOUND, r=[*self._amounts(left)], **self.options))

    def _time(self, reduced: nn.Module) -> dict[str, float]:
        """Time the first batch: unmerged, merged, and the free bound with the same tokens per block."""
        self._run(reduced, self.batch)
        left = handle_of(reduced).tokens
        bound = self._bound(left)
        self._run(bound, self.batch)
        if handle_of(bound).tokens != left:
            raise UnsupportedError(
                "the free bound cannot drop tokens where this model merges them: no time to compare."
            )
        models = {"unmerged": self.model, "merged": reduced, "bound": bound}
        timings = interleave(
            {name: partial(m, self.batch) for name, m in models.items()}, self.device, rounds=self.rounds
        )
        return {
            "images/s": round(len(self.batch) / timings["merged"].median, 2),
            "speed-up": round(timings["unmerged"].over(timings["merged"]), 3),
            "over bound": round(timings["merged"].over(timings["bound"]), 3),
        }

    def _count(self, reduced: nn.Module, left: Sequence[float]) -> Count:
        """Return the MACs of a reduced model with these tokens after its blocks."""
        if not handle_of(reduced).config.method.is_adaptive:
            return count(reduced, self.size)
        probe = shared_copy(reduced)
        # on the meta device an adaptive method has no values and removes exactly r
        handle_of(probe).r = [*self._amounts(left)]
        macs, whole = count(self._bound(left), self.size).model, count(probe, self.size)
        # the free bound has no matrix product for merging
        return Count(macs, whole.matching + max(0, whole.model - macs))

    def _amounts(self, left: Sequence[float]) -> list[int]:
        """Return how many tokens each block removes, given the tokens after each block."""
        after = [round(n) for n in left]
        added = [0, *(n - before for before, n in pairwise(self.tokens))]  # tokens that the model itself adds
        before = [self.tokens[0], *after[:-1]]
        return [n + more - rest for n, more, rest in zip(before, added, after, strict=True)]


def _digest(images: Tensor) -> Tensor:
    """Return some values of a batch, evenly spread, and its sum: cheap beside any forward."""
    flat = images.detach().flatten()
    return torch.cat((flat[:: max(1, len(flat) // 256)].double(), flat.sum(dtype=torch.float64)[None])).cpu()


def _is_same(batch: tuple[Tensor, Tensor], before: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Say whether a batch is the one that was seen before, if any was."""
    for labels, digest in before:
        is_alike = digest.shape == batch[1].shape and torch.allclose(batch[1], digest, 1e-9, 1e-6, equal_nan=True)
        return is_alike and torch.equal(batch[0], labels)
    return False


_CHANGED = "the images changed since the unmerged model saw them: run the comparison again."
