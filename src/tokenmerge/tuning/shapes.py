"""Schedules: shapes that are scaled to a share of the MACs, and the moves between them."""

from __future__ import annotations

from collections.abc import Sequence

from tokenmerge.tuning.subject import Subject

__all__ = ["CONSTANT", "Shape", "families", "fit", "normal"]


Shape = tuple[float, ...]  # the proportions of these, with a mean of 1
CONSTANT = "constant"


def fit(subject: Subject, shape: Sequence[float], share: float) -> list[int]:
    """Return amounts in the proportions of `shape` that leave at most this share of the MACs, and little less.

    What whole numbers leave over is given back one token at a time, first to the blocks that were rounded up most.
    Returns the largest amounts where the share cannot be reached.
    """
    most = subject.cost.tokens
    low, high = 0.0, float(most) / max(min((s for s in shape if s > 0), default=1.0), 1e-6)
    rounded = [min(most, round(high * s)) for s in shape]
    if subject.share(rounded) > share:
        return rounded
    for _ in range(40):
        middle = (low + high) / 2
        if subject.share([min(most, round(middle * s)) for s in shape]) <= share:
            high = middle
        else:
            low = middle
    exact = [min(float(most), high * s) for s in shape]
    r = [round(x) for x in exact]
    for layer in sorted(range(len(r)), key=lambda layer: exact[layer] - r[layer]):
        if r[layer] and subject.share([*r[:layer], r[layer] - 1, *r[layer + 1 :]]) <= share:
            r[layer] -= 1
    return r


def families(depth: int) -> dict[str, tuple[float, ...]]:
    """Return the shapes that every search starts from, by name."""
    last = max(1, depth - 1)
    at = [layer / last for layer in range(depth)]
    shapes = {
        CONSTANT: [1.0] * depth,
        "rising": [0.5 + x for x in at],
        "easing": [1.5 - x for x in at],
        "falling": [1 - x for x in at],
        "steeply falling": [(1 - x) ** 2 for x in at],
    }
    return {name: normal(shape) for name, shape in shapes.items() if any(shape)}


def normal(shape: Sequence[float]) -> Shape:
    """Return the weights with a mean of 1; all equal where none is left."""
    mean = sum(shape) / len(shape)
    return tuple(weight / mean for weight in shape) if mean > 0 else (1.0,) * len(shape)
