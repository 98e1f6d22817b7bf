"""From targets to a share of the MACs: at most so much, and at least so much."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from tokenmerge.config import MergeConfig
from tokenmerge.tuning.clock import Clock, Timed
from tokenmerge.tuning.losses import Loss, loss_of
from tokenmerge.tuning.search import Candidate, Search
from tokenmerge.tuning.shapes import fit
from tokenmerge.tuning.space import cheaper
from tokenmerge.tuning.subject import Subject
from tokenmerge.tuning.target import Target

__all__ = ["Goals"]

_STEPS = 7  # of a bisection over shares: to less than a hundredth
_GRID = (0.75, 0.5, 0.35)  # shares that are timed to learn what MACs cost here
_AIM, _OVER = 1.01, 1.03  # times the speed asked: what is aimed at, and what is more than enough
_TRIES = 5
_PARTS = ("search", "select")


class Goals:
    """What targets mean for this model, on its images and this machine."""

    def __init__(self, subject: Subject, clock: Clock, search: Search) -> None:
        self.subject, self.clock, self.search = subject, clock, search
        self.lowest = subject.share(fit(subject, (1.0,) * subject.depth, 0.0))
        self._line: tuple[float, float] | None = None

    def weigh_time(self) -> None:
        """Let the search start from a cheaper method that hurts less at equal time, where MACs do not tell the time."""
        search, share = self.search, self.search.reference
        method = cheaper(search.start.method)
        if method is None:
            return
        other = replace(search.start, method=method)
        slow, fast = (1 / self._timed(one, share).speed_up for one in (search.start, other))
        if slow < 1:
            # on the line from its time at this share to the unmerged model's
            equal = min(1.0, share + (slow - fast) / max(1 - fast, 1e-9) * (1 - share))
            if equal <= share or search.outcome(search.start, share).mean <= search.outcome(other, equal).mean:
                return
        search.prefer(other)

    def most(self, target: Target, candidate: Candidate) -> float | None:
        """Return the largest share of the MACs that meets a cost; None if none does."""
        if target.kind == "macs":
            return target.value if target.value >= self.lowest else None
        if target.kind == "memory":
            return self._bisected(lambda share: self.clock.memory(self._config(candidate, share)) <= target.value)
        base, slope = self._cost_of_macs(candidate)
        share = (1 / (_AIM * self.speed(target, candidate)) - base) / slope
        # the line is a guess: what is near the end is tried, not refused
        return (
            min(1.0, max(self.lowest, share)) if share > 0.8 * self.lowest or self._reaches(target, candidate) else None
        )

    def speed(self, target: Target, candidate: Candidate) -> float:
        """Return a target of speed or time as times the unmerged model's speed."""
        if target.kind == "speed":
            return target.value
        return 1000 * self._timed(candidate, self.search.reference).unmerged / target.value

    def least(self, target: Target, candidate: Candidate) -> float | None:
        """Return the smallest share of the MACs that keeps a loss; None if only the unmerged model does."""
        low, high = self.lowest, 1.0
        if self.loss(target, candidate, low).most <= target.points:
            return low
        found = None
        for _ in range(_STEPS):
            middle = (low + high) / 2
            if self.loss(target, candidate, middle).most <= target.points:
                high = found = middle
            else:
                low = middle
        return found

    def nearest(self, target: Target, candidate: Candidate) -> str:
        """Say how near the schedule that removes most comes to a cost that cannot be had; times are said elsewhere."""
        if target.kind == "macs":
            return f": the least that can be left is macs={math.ceil(1000 * self.lowest) / 1000:g}"
        if target.kind == "memory":
            least = self.clock.memory(self._config(candidate, self.lowest))
            return f": the least that was measured is memory={least:.3f}"
        return ""

    def loss(self, target: Target, candidate: Candidate, share: float) -> Loss:
        """Return the loss of a candidate on the images to search and to select on, for those of the report."""
        none = self.subject.config(candidate.method, [0] * self.subject.depth)
        before = [self.subject.outcome(none, part) for part in _PARTS]
        after = [self.search.outcome(candidate, share, part) for part in _PARTS]
        return loss_of(target.kind, before, after, len(self.subject.parts.report))

    def met(self, targets: Sequence[Target], candidate: Candidate, share: float, cap: float) -> tuple[float, Timed]:
        """Return the share near this one, at most `cap`, at which the speeds asked are measured, and its timing."""
        wanted = max((self.speed(one, candidate) for one in targets), default=0.0)
        seen: dict[float, Timed] = {}
        for _ in range(_TRIES if wanted else 1):
            seen[share] = self._timed(candidate, share)
            speed = seen[share].speed_up
            if not wanted or wanted <= speed <= _OVER * wanted:
                return share, seen[share]
            _, slope = self._cost_of_macs(candidate)
            share = min(cap, max(self.lowest, share + (1 / (_AIM * wanted) - 1 / speed) / slope))
            if share in seen:
                break
        enough = [one for one, timed in seen.items() if timed.speed_up >= wanted]
        share = max(enough) if enough else max(seen, key=lambda one: seen[one].speed_up)
        return share, seen[share]

    def _reaches(self, target: Target, candidate: Candidate) -> bool:
        return self._timed(candidate, self.lowest).speed_up >= self.speed(target, candidate)

    def _cost_of_macs(self, candidate: Candidate) -> tuple[float, float]:
        """Return the line `time = a + b * share`, both as shares of the unmerged model's, through what was timed."""
        if self._line is None:
            shares = [share for share in _GRID if share > self.lowest] or [self.lowest]
            points = [(share, 1 / self._timed(candidate, share).speed_up) for share in shares]
            x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
            spread = sum((share - x) ** 2 for share, _ in points)
            slope = sum((share - x) * (time - y) for share, time in points) / spread if spread else y / x
            slope = slope if slope > 0.1 else y / x  # noise can turn it round
            self._line = y - slope * x, slope
        return self._line

    def _timed(self, candidate: Candidate, share: float) -> Timed:
        return self.clock.time(self._config(candidate, share))

    def _config(self, candidate: Candidate, share: float) -> MergeConfig:
        return self.subject.config(candidate.method, fit(self.subject, candidate.shape, share))

    def _bisected(self, holds: Callable[[float], bool]) -> float | None:
        low, high = self.lowest, 1.0
        if not holds(low):
            return None
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if holds(middle) else (low, middle)
        return low
