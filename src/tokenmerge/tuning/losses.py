"""How much of the answers is lost, and how sure that is on so many images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tokenmerge.tuning.subject import Outcome

__all__ = ["Loss", "interval", "least_images", "loss_of"]

_SURE = 1.645  # standard errors: 19 of 20, one-sided
_IMAGES = 310  # times 1 / points: what `loss_of` needs of `tune`'s parts where no change is seen
_BOTH = 1.96  # of an interval of 95 %


@dataclass(frozen=True)
class Loss:
    """Points lost, with the standard error of what other images will show."""

    points: float
    error: float

    @property
    def most(self) -> float:
        """The points lost at most on other images, in 19 of 20 cases."""
        return self.points + _SURE * self.error


def loss_of(kind: str, before: Sequence[Outcome], after: Sequence[Outcome], others: int) -> Loss:
    """Return the loss of accuracy ("drop") or of agreement over outcomes on several parts.

    `before` are the outcomes of the unmerged model on the same parts; the loss is to hold on `others` images more. One
    half of a change more than seen is assumed: none seen does not mean that there are none.
    """
    if kind == "drop":
        changes: list[float] = [
            int(b) - int(a) for x, y in zip(before, after, strict=True) for b, a in zip(x.hits, y.hits, strict=True)
        ]
    else:
        changes = [1 - same for one in after for same in one.same]
    n = len(changes)
    # no variance is larger than the mean square, here that of whole images or of shares of their pixels
    rate = (sum(change**2 for change in changes) + 0.5) / (n + 1)
    return Loss(100 * sum(changes) / n, 100 * math.sqrt(rate * (1 / n + 1 / others)))


def least_images(points: float) -> float:
    """Return how many images `tune` needs to keep a loss of so many points: with fewer, none seen proves too little.

    >>> least_images(0.5), least_images(0.0)
    (620, inf)
    """
    return math.ceil(round(_IMAGES / points, 6)) if points else math.inf


def interval(hits: float, seen: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, in percent (Wilson's, 1927). Of sums of shares, it is wider than need be.

    >>> [round(end, 1) for end in interval(99, 100)]
    [94.6, 99.8]
    """
    share, z = hits / seen, _BOTH**2 / seen
    middle = (share + z / 2) / (1 + z)
    half = math.sqrt(share * (1 - share) * z + z * z / 4) / (1 + z)
    return 100 * (middle - half), 100 * (middle + half)
