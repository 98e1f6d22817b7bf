"""The model that is tuned: what a configuration costs in MACs, and what it does to the answers on each part."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge.config import MergeConfig
from tokenmerge.errors import DataError, TokenMergeError
from tokenmerge.handle import attached, handle_of
from tokenmerge.measure.allocator import large_blocks_returned, return_freed
from tokenmerge.measure.counting import CostModel
from tokenmerge.measure.trial import Trial
from tokenmerge.methods import Reduction
from tokenmerge.report.journal import Journal
from tokenmerge.schedule import R
from tokenmerge.tuning.parts import Parts

__all__ = ["Outcome", "Subject", "is_figure"]

_TWINS = 4  # patched copies that are kept


@dataclass(frozen=True)
class Outcome:
    """What one configuration did to each image of a part."""

    config: MergeConfig
    damage: Tensor  # [images] float64
    same: tuple[float, ...] = ()  # whether the answer is the unmerged model's, or of how many pixels; empty for others
    hits: tuple[bool, ...] = ()

    @property
    def mean(self) -> float:
        return self.damage.mean().item()


class Subject:
    """A model with its images, for the search: every outcome is computed once and kept in the journal.

    The caller's model is not changed. `options` are those of `MergeConfig` that all candidates share.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Parts,
        device: torch.device,
        options: Mapping[str, Any],
        journal: Journal | None = None,
    ) -> None:
        self.parts, self.device, self.options, self.journal = parts, device, dict(options), journal
        self.model = model
        self.on_outcome: Callable[[str, int], None] | None = None  # part, images; after each that was computed
        self._trials: dict[str, Trial] = {}
        self._twins: dict[str, nn.Module] = {}  # patched copies by settings, the last few
        self._refusals: dict[str, str] = {}  # by method; "" where it can run
        self.outcomes: dict[str, Outcome] = {}  # by part and configuration
        self._kept: dict[str, Any] = {}
        size = self.trial("screen").size
        with attached(model, MergeConfig(**self.options)) as handle:
            self.depth, self.has_class = len(handle.runners), handle.has_class
            self.cost = CostModel(model, size)
        self.macs = self.cost([0] * self.depth)

    def trial(self, part: str) -> Trial:
        if part not in self._trials:
            self._trials[part] = Trial(
                self.model, getattr(self.parts, part), self.device, rounds=1, options=self.options
            )
        return self._trials[part]

    def config(self, method: Reduction, r: Sequence[int]) -> MergeConfig:
        return MergeConfig(method, r=list(r), **self.options)

    def removed(self, r: Sequence[int]) -> list[int]:
        """Return how many tokens each block removes at `r`, where it may ask for more than half of them.

        So a method that could remove more, as one that prunes, keeps to the MACs that were counted.
        """
        planned = self.cost.planned(list(r))
        return [n - m for n, m in pairwise(planned)] if self.cost.is_exact else list(r)

    def share(self, r: R) -> float:
        """Return the MACs at `r` as a share of the unmerged model's."""
        return self.cost(r) / self.macs

    def tokens(self, r: R) -> int:
        """Return how many tokens leave the last block at `r`."""
        return self.cost.planned(r)[-1]

    def accepts(self, method: Reduction) -> bool:
        """Whether the model has what a method needs."""
        return not self.refusal(method)

    def refusal(self, method: Reduction) -> str:
        """Return why a method cannot run in the model, "" if it can."""
        if repr(method) not in self._refusals:
            try:
                with attached(self.model, self.config(method, [1] * self.depth)):
                    self._refusals[repr(method)] = ""
            except TokenMergeError as error:
                self._refusals[repr(method)] = str(error)
        return self._refusals[repr(method)]

    def kept(self, key: str, measure: Callable[[], Any], holds: Callable[[Any], bool]) -> Any:
        """Return a measurement from the journal, or make it and keep it there.

        `holds` says whether a value can be such a measurement; raises `DataError` for one in the journal that cannot.
        """
        if key not in self._kept:
            row = None if self.journal is None else self.journal.rows.get(key)
            if self.journal is not None and row is not None and not holds(row["measured"]):
                raise self.journal.broken(key, f"holds {str(row['measured'])[:60]}, which nothing measures")
            if row is None:
                row = {"measured": measure()}
                if self.journal is not None:
                    self.journal.add(key, row)
            self._kept[key] = row["measured"]
        return self._kept[key]

    def run(self, method: Reduction, images: Tensor) -> None:
        """Run the model on images with a method that removes all that it wants to."""
        trial = self.trial("screen")
        reduced = trial.reduced(self.config(method, [self.cost.tokens] * self.depth))
        with torch.inference_mode(), large_blocks_returned():
            reduced(images.to(self.device, trial.dtype))
        return_freed()

    def outcome(self, config: MergeConfig, part: str = "search") -> Outcome:
        """Run a configuration over a part; raises `DataError` where answers are not finite."""
        key = f"{part} {config!r}"
        if key not in self.outcomes:
            is_known = self.journal is not None and key in self.journal.rows
            holds = partial(_is_outcome, len(getattr(self.parts, part)))
            row = self.kept(key, partial(self._computed, config, part), holds)
            if self.on_outcome is not None and not is_known:
                self.on_outcome(part, len(row["damage"]))
            damage = torch.tensor(row["damage"], dtype=torch.float64)
            self.outcomes[key] = Outcome(config, damage, tuple(row["same"]), tuple(row["hits"]))
        return self.outcomes[key]

    def _reduced(self, config: MergeConfig) -> nn.Module:
        """Return a patched copy; candidates that differ in `r` alone share it, because patching takes time."""
        settings = repr(config.changed(r=0))
        if settings not in self._twins:
            if len(self._twins) == _TWINS:
                del self._twins[next(iter(self._twins))]
            self._twins[settings] = self.trial("screen").reduced(config)
        handle_of(self._twins[settings]).r = config.r
        return self._twins[settings]

    def _computed(self, config: MergeConfig, part: str) -> dict[str, Any]:
        with large_blocks_returned():
            (seen,) = self.trial(part).judge([self._reduced(config)])
        damage = seen.judge.damage
        if not damage.isfinite().all():
            raise DataError(
                f"the answers to {int((~damage.isfinite()).sum())} of {len(damage)} images are NaN or infinity, with "
                f"{config.method!r} or unmerged: nothing can be compared. Is the model's precision too low?"
            )
        return {"damage": damage.tolist(), "same": seen.judge.same, "hits": seen.judge.hits}


def _is_outcome(images: int, value: Any) -> bool:
    """Whether a value from a journal can be what was measured on so many images."""
    if not isinstance(value, dict) or {*value} != {"damage", "same", "hits"}:
        return False
    damage, same, hits = value["damage"], value["same"], value["hits"]
    if not isinstance(damage, list) or len(damage) != images or not all(is_figure(one, 0.0) for one in damage):
        return False
    if not all(isinstance(flags, list) and len(flags) in (0, images) for flags in (same, hits)):
        return False
    return all(type(hit) is bool for hit in hits) and all(type(x) in (bool, float) and 0 <= x <= 1 for x in same)


def is_figure(value: Any, least: float) -> bool:
    """Whether a value from a journal is a finite number of at least this."""
    return type(value) in (int, float) and least <= value < math.inf
