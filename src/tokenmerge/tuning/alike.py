"""Schedules that merge, in every block, the pairs above one similarity: a block with many tokens alike loses more."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from tokenmerge import matching
from tokenmerge.methods import Reduction, ToMe
from tokenmerge.methods.base import TokenView
from tokenmerge.plan import Plan
from tokenmerge.tuning.subject import Subject

__all__ = ["ALIKE", "as_alike", "counted_images"]

ALIKE = "as alike"
_STEPS = 10  # of the search for the threshold
_IMAGES = 16


@dataclass(frozen=True)
class _AsAlike(ToMe):
    """ToMe that merges, in every image, the mean number of pairs with a cosine above a threshold."""

    is_adaptive = True

    threshold: float = 1.0
    amounts: dict[int, int] = field(default_factory=dict, compare=False)  # pairs merged per layer in the last forward

    def plan(self, view: TokenView, r: int) -> Plan:
        *_, cosine = matching.partners(self.features(view), prefix=view.prefix, valid=view.valid)
        wanted = (cosine > self.threshold).sum(dim=1, dtype=torch.float32).mean()
        self.amounts[view.layer] = min(r, round(wanted.item()))
        return super().plan(view, self.amounts[view.layer])


def counted_images(shares: int) -> int:
    """Return how many images are about to be run for the schedules of so many shares, as they have steps in common."""
    return _IMAGES * (_STEPS + (shares - 1) * _STEPS // 2)


def as_alike(subject: Subject, method: Reduction, share: float) -> list[int] | None:
    """Return the schedule that merges the mean number of pairs above one cosine of the method's metric, per block.

    The threshold is the highest whose schedule leaves at most this share of the MACs; pairs are counted on 16 images.
    None if no threshold removes enough, or the model cannot run ToMe with this metric.
    """
    settings = {name: getattr(method, name) for name in ("metric", "heads") if hasattr(method, name)}
    if not subject.accepts(ToMe(**settings)):
        return None

    low, high = math.log(1e-5), math.log(2.0)  # bounds of log(1 - cosine)
    found = None
    for _ in range(_STEPS):
        middle = (low + high) / 2
        amounts = _counted(subject, settings, 1 - math.exp(middle))
        if subject.share(amounts) <= share:
            high, found = middle, amounts
        else:
            low = middle
    return found


def _counted(subject: Subject, settings: dict[str, Any], threshold: float) -> list[int]:
    """Return how many pairs above a cosine each block merges; the first thresholds are the same for every share."""

    def holds(found: Any) -> bool:
        is_list = isinstance(found, list) and len(found) == subject.depth
        return is_list and all(type(amount) is int and amount >= 0 for amount in found)

    def counted() -> list[int]:
        images = torch.cat([batch for batch, _ in islice(subject.parts.screen, _IMAGES)])[:_IMAGES]
        counter = _AsAlike(**settings, threshold=threshold)
        subject.run(counter, images)
        return [counter.amounts.get(layer, 0) for layer in range(subject.depth)]

    amounts: list[int] = subject.kept(f"as alike {settings} above {threshold!r}", counted, holds)
    return amounts
