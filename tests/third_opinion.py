"""Matching and merging as numpy loops: a third opinion that shares no code with the library."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def bipartite(metric: Array, r: int, prefix: int, valid: Array | None = None) -> list[list[int]]:
    """Groups of one image's tokens `[N, D]` in output order, each led by the token that stays.

    With `valid` `[N]` padding goes to padding first, then real tokens to their best real one, then what is left.
    """
    n = len(metric)
    unit = metric / np.linalg.norm(metric, axis=1, keepdims=True)
    is_real = [True] * n if valid is None else [bool(entry) for entry in valid]
    side_a = [i for i in range(prefix, n) if i % 2 == 0]
    side_b = [i for i in range(prefix, n) if i % 2 == 1]
    r = min(r, (n - prefix) // 2)
    edges = []
    for i in side_a:
        alike = [j for j in side_b if is_real[i] == is_real[j]] or side_b
        if is_real[i] != is_real[alike[0]]:
            rank, partner, score = 2, alike[0], 0.0
        elif not is_real[i]:
            rank, partner, score = 0, alike[0], 0.0
        else:
            scores = [float(unit[i] @ unit[j]) for j in alike]
            rank, partner, score = 1, alike[int(np.argmax(scores))], max(scores)
        edges.append((rank, -score, i, partner))
    edges.sort(key=lambda edge: edge[:2])
    absorbed = {i: j for _, _, i, j in edges[:r]}
    kept = list(range(prefix)) + [i for i in side_a if i not in absorbed] + side_b
    return [[token] + [i for i, j in absorbed.items() if j == token] for token in kept]


def weighted_mean(x: Array, size: Array, groups: list[list[int]]) -> tuple[Array, Array]:
    """Size-weighted means `[M, C]` of `x` `[N, C]` and the sums of `size` `[N]`."""
    rows = [sum(size[i] * x[i] for i in group) / sum(size[i] for i in group) for group in groups]
    return np.array(rows), np.array([sum(size[i] for i in group) for group in groups])
