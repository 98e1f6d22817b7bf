"""Schedules: shapes that are scaled to a share of the MACs, and the moves between them."""

from __future__ import annotations

from collections.abc import Sequence

from tokenmerge.tuning.subject import Amounts, Subject

__all__ = ["families", "fit"]


def fit(subject: Subject, shape: Sequence[float], share: float) -> Amounts:
    """Return amounts in the proportions of `shape` that leave at most this share of the MACs, and little less.

    What whole numbers leave over is given back one token at a time, first to the blocks that were rounded up most.
    Returns the largest amounts where the share cannot be reached.
    """
    most = subject.cost.tokens
    low, high = 0.0, float(most) / max(min((s for s in shape if s > 0), default=1.0), 1e-6)
    rounded = [min(most, round(high * s)) for s in shape]
    if subject.share(rounded) > share:
        return tuple(rounded)
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
    return tuple(r)


def families(depth: int) -> dict[str, tuple[float, ...]]:
    """Return the shapes that every search starts from, by name."""
    last = max(1, depth - 1)
    at = [layer / last for layer in range(depth)]
    return {
        "constant": (1.0,) * depth,
        "rising": tuple(0.5 + x for x in at),
        "easing": tuple(1.5 - x for x in at),
        "falling": tuple(1 - x for x in at),
        "steeply falling": tuple((1 - x) ** 2 for x in at),
    }
