"""The search: method and options on a few images, then how much each block removes, on all images to search on.

How much the answers suffer from each block is measured once, at one share of the MACs, and every target starts from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmerge.methods import Reduction
from tokenmerge.tuning.alike import ALIKE, as_alike
from tokenmerge.tuning.shapes import CONSTANT, Shape, families, fit, normal
from tokenmerge.tuning.space import neighbours
from tokenmerge.tuning.subject import Outcome, Subject

__all__ = ["FRONT", "Candidate", "Search"]

FRONT = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3)  # shares of the MACs at which what is solved is measured, on the way
_PROBE = 0.75  # what a probe adds to the weight of a block; the mean weight is 1
_STEPS = (0.35, 0.8, 1.6)  # how far the weight of the most sensitive block moves
_SOLVED = 3 + len(_STEPS)  # candidates that a share is solved with: constant, start, as alike, and one for each step
_PASSES = 2  # over the options of a method
_CERTAIN = 1.0  # standard errors by which another option must be better on the screening images
_LEAST_GAIN = 0.02  # share of the damage; a round of probes that gains less is the last
_FINALISTS = 4  # candidates that are compared on all images to search on: a few images may mislead


@dataclass(frozen=True)
class Candidate:
    """A method with a shape: how the removed tokens are spread over the blocks."""

    method: Reduction
    shape: Shape
    name: str


class Search:
    """Finds, for a share of the MACs, the configuration with the least damage on the images to search on.

    `budget` is how many candidates may be tried on all images to search on for one share. All is deterministic: a
    search that goes on from a journal takes the same way.
    """

    def __init__(
        self, subject: Subject, starts: Sequence[Reduction], budget: int, reference: float, passes: int = _PASSES
    ) -> None:
        self.subject, self.starts, self.budget, self.reference = subject, starts, budget, reference
        self.passes = passes
        self.tried: dict[Candidate, Outcome] = {}  # on the screening images, in order
        self._slope: Tensor | None = None
        self._start: Candidate | None = None

    @property
    def screened(self) -> float:
        """How many candidates are about to be tried on the screening images, finalists counted by their images."""
        options = sum(len(option(self.starts[0])) for option in neighbours(self.starts[0]))
        finals = _FINALISTS * len(self.subject.parts.search) / len(self.subject.parts.screen)
        return len(self.starts) * len(families(self.subject.depth)) + 1.5 * options + finals

    @property
    def searched(self) -> int:
        """How many candidates are about to be tried on the images to search on, for one target, after the probes."""
        each = self.subject.depth + len(_STEPS)
        return min(_SOLVED, self.budget) + each * min(3, max(0, self.budget - _SOLVED) // each)

    @property
    def goes_on(self) -> bool:
        """Whether the budget allows more than what is solved."""
        return self.searched > _SOLVED

    @property
    def start(self) -> Candidate:
        """The method, options and family of shapes that are best at the reference share."""
        if self._start is None:
            self._start = self._screened()
        return self._start

    def prefer(self, start: Candidate) -> None:
        """Start from another candidate than the one of least damage at equal MACs."""
        self._start, self._slope = start, None

    @property
    def slope(self) -> Tensor:
        """The change of the damage, as a share of it, where a block removes more and the others less, `[depth]`."""
        if self._slope is None:
            self._slope = self._sensitivity(self.start, self.reference)
        return self._slope

    def outcome(self, candidate: Candidate, share: float, part: str = "search") -> Outcome:
        config = self.subject.config(candidate.method, fit(self.subject, candidate.shape, share))
        return self.subject.outcome(config, part)

    def solved(self, share: float) -> list[Candidate]:
        """Return what the measurements at the reference share suggest for a share, and the schedule as alike."""
        start = self.start
        constant = Candidate(start.method, (1.0,) * self.subject.depth, CONSTANT)
        moved = [self._moved(start, self.slope, step) for step in _STEPS]
        return [constant, start, *self._alike(start.method, share), *moved]

    def best(self, share: float) -> list[Candidate]:
        """Return candidates for a share, the one of least damage on the images to search on first."""
        likely = dict.fromkeys(self._likely(share))
        if len(likely) == 1:
            return [*likely]
        tried = {candidate: self.outcome(candidate, share).mean for candidate in likely}
        left = self.budget - len(tried)
        best = min(tried, key=lambda one: tried[one])
        shrink = 1.0
        while left >= self.subject.depth + len(_STEPS):
            slope = self._sensitivity(best, share)
            moved = [self._moved(best, slope, step * shrink) for step in _STEPS]
            tried |= {candidate: self.outcome(candidate, share).mean for candidate in moved}
            left -= self.subject.depth + len(moved)
            before, best = best, min(tried, key=lambda one: tried[one])
            shrink /= 2
            if tried[best] > (1 - _LEAST_GAIN) * tried[before]:
                break
        return sorted(tried, key=lambda one: tried[one])

    def _likely(self, share: float) -> list[Candidate]:
        """Return what is solved for a share, within the budget: what did best at the nearest share of the front."""
        solved, near = self.solved(share), min(FRONT, key=lambda one: abs(one - share))
        if self.budget >= len(solved):
            return solved
        there = self.solved(near)
        if len(there) == len(solved):
            damage = [self.outcome(candidate, near, "select").mean for candidate in there]
            solved = [solved[i] for i in sorted(range(len(solved)), key=damage.__getitem__)]
        return solved[: self.budget]

    def _screened(self) -> Candidate:
        """Choose on the screening images: a start and a family of shapes, then one option after the other."""

        def screened(candidate: Candidate) -> Outcome:
            self.tried[candidate] = self.outcome(candidate, self.reference, "screen")
            return self.tried[candidate]

        shapes = families(self.subject.depth).items()
        first = [Candidate(method, shape, name) for method in self.starts for name, shape in shapes]
        best = min(first, key=lambda one: screened(one).mean)
        for _ in range(self.passes):
            before = best
            for option in neighbours(best.method):
                for other in option(best.method):
                    if not self.subject.accepts(other):
                        continue
                    candidate = Candidate(other, best.shape, best.name)
                    if _gain(screened(best), screened(candidate)) < -_CERTAIN:
                        best = candidate
            if best == before:
                break
        if len(self.subject.parts.search) > len(self.subject.parts.screen):
            finalists = sorted(self.tried, key=lambda one: self.tried[one].mean)[:_FINALISTS]
            best = min(dict.fromkeys([best, *finalists]), key=lambda one: self.outcome(one, self.reference).mean)
        return min([best, *self._alike(best.method, self.reference)], key=lambda one: screened(one).mean)

    def _alike(self, method: Reduction, share: float) -> list[Candidate]:
        r = as_alike(self.subject, method, share)
        return [] if r is None or not any(r) else [Candidate(method, normal(r), ALIKE)]

    def _sensitivity(self, base: Candidate, share: float) -> Tensor:
        """Probe each block: it removes more, the others less, at equal MACs; what noise explains is shrunk."""
        at, slopes = self.outcome(base, share), []
        for layer in range(self.subject.depth):
            probe = list(base.shape)
            probe[layer] += _PROBE
            other = self.outcome(Candidate(base.method, tuple(probe), "probe"), share)
            t = _gain(at, other)
            slopes.append((other.mean - at.mean) / max(at.mean, 1e-300) * t * t / (1 + t * t))
        return torch.tensor(slopes, dtype=torch.float64)

    def _moved(self, base: Candidate, slope: Tensor, step: float) -> Candidate:
        largest = float(slope.abs().max()) or 1.0
        weights = [max(0.0, weight - step * s / largest) for weight, s in zip(base.shape, slope.tolist(), strict=True)]
        return Candidate(base.method, normal(weights), "searched")


def _gain(base: Outcome, other: Outcome) -> float:
    """Return the change of the damage from one outcome to another on the same images, in standard errors.

    0 where there is no telling: one image, or images that all change alike.
    """
    if len(base.damage) < 2:
        return 0.0
    change = other.damage - base.damage
    noise = float(change.std()) / math.sqrt(len(change))
    return float(change.mean()) / noise if noise > 0 else 0.0
