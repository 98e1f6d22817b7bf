"""The search: method and options on a few images, then the amounts of the blocks on all images to search on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenmerge.methods import Reduction
from tokenmerge.tuning.shapes import families, fit
from tokenmerge.tuning.space import neighbours
from tokenmerge.tuning.subject import Amounts, Outcome, Subject

Shape = tuple[float, ...]
_PROBE = 0.75  # how much a probe adds to the weight of a block; the mean weight is 1
_STEPS = (0.35, 0.8, 1.6)  # of the weight of the most sensitive block


@dataclass(frozen=True)
class Found:
    method: Reduction
    shape: Shape
    outcome: Outcome


def choose_method(subject: Subject, starts: Sequence[Reduction], share: float) -> tuple[Reduction, Shape]:
    """Return the method and the shape of least damage on the screening images, one option after the other."""

    def damage(method: Reduction, shape: Shape) -> float:
        return subject.outcome(subject.config(method, fit(subject, shape, share)), "screen").mean

    shapes = list(families(subject.depth).values())
    tried = {(method, shape): damage(method, shape) for method in starts for shape in shapes}
    best, shape = min(tried, key=lambda pair: tried[pair])
    least = tried[best, shape]
    for _ in range(2):
        before = best
        for option, _ in neighbours(best):
            for other in dict(neighbours(best))[option]:
                if other != best and subject.accepts(other):
                    found = damage(other, shape)
                    if found < least:
                        best, least = other, found
        if best == before:
            break
    return best, shape


def gradient(subject: Subject, method: Reduction, shape: Shape, share: float) -> Tensor:
    base = subject.outcome(subject.config(method, fit(subject, shape, share)))
    slopes = []
    for layer in range(subject.depth):
        probe = list(shape)
        probe[layer] += _PROBE
        r = fit(subject, probe, share)
        other = subject.outcome(subject.config(method, r))
        change = other.damage - base.damage
        noise = change.std() / math.sqrt(len(change))
        t = (change.mean() / noise.clamp_min(1e-300)).item() if noise > 0 else 0.0
        slopes.append((change.mean() / base.damage.mean()).item() * t * t / (1 + t * t))
    return torch.tensor(slopes)


def refine(subject: Subject, method: Reduction, shape: Shape, share: float, rounds: int = 2) -> tuple[Shape, float]:
    best = normal(shape)
    least = subject.outcome(subject.config(method, fit(subject, best, share))).mean
    for turn in range(rounds):
        slope = gradient(subject, method, best, share)
        scale = slope.abs().max().clamp_min(1e-12)
        found = best
        for step in _STEPS:
            step = step / (turn + 1)
            moved = normal([max(0.0, w - step * g) for w, g in zip(best, (slope / scale).tolist())])
            damage = subject.outcome(subject.config(method, fit(subject, moved, share))).mean
            if damage < least:
                found, least = moved, damage
        if found == best:
            break
        best = found
    return best, least


def normal(shape: Sequence[float]) -> Shape:
    mean = sum(shape) / len(shape)
    return tuple(w / mean for w in shape)
