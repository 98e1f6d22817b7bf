"""Schedules: shapes that are scaled to a share of the MACs, and the moves between them."""

from __future__ import annotations

from collections.abc import Sequence

from tokenmerge.tuning.subject import Subject

__all__ = ["CONSTANT", "Shape", "families", "fit", "normal"]


Shape = tuple[float, ...]  # the proportions of these, with a mean of 1
CONSTANT = "constant"
_EVENED = (0.05, 0.15, 0.5, 1.5, 5.0)  # what is added to the weights, of a mean of 1
_HALVINGS = 40


def fit(subject: Subject, shape: Sequence[float], share: float) -> list[int]:
    """Return amounts in the proportions of `shape` that leave at most this share of the MACs, and little less.

    Where a shape leaves too much even at its largest, as one whose first blocks remove nothing, it is evened out until
    it does not. What whole numbers leave over is given back one token at a time, first to the blocks that were rounded
    up most. Returns the largest amounts of all where no schedule reaches the share.
    """
    most = subject.cost.tokens
    for even in (0.0, *_EVENED):
        weights = [weight + even for weight in shape]
        high = most / min(weight for weight in weights if weight > 0)
        if subject.share(_rounded(weights, high, most)) <= share:
            break
    else:
        return subject.removed([most] * len(shape))
    low = 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if subject.share(_rounded(weights, middle, most)) <= share else (middle, high)
    r = _rounded(weights, high, most)
    for layer in sorted(range(len(r)), key=lambda layer: min(most, high * weights[layer]) - r[layer]):
        if r[layer] and subject.share([*r[:layer], r[layer] - 1, *r[layer + 1 :]]) <= share:
            r[layer] -= 1
    return subject.removed(r)


def _rounded(weights: Sequence[float], scale: float, most: int) -> list[int]:
    return [min(most, round(scale * weight)) for weight in weights]


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
