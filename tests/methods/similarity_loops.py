"""The training-free methods as numpy loops over one image, and a view to run them on: a third opinion."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tokenmerge import plan as plans
from tokenmerge.methods import TokenView
from tokenmerge.plan import AnyPlan

Array = NDArray[np.float64]
Pairs = list[tuple[int, int]]  # who is absorbed, by whom


def groups_of(plan: AnyPlan, image: int) -> list[list[int]]:
    """The tokens of each group, in order, and of no group those dropped."""
    slots = plans.assignment(plan)[image].tolist()
    return sorted(sorted(i for i, at in enumerate(slots) if at == slot) for slot in set(slots) - {-1})


def groups_from(n: int, pairs: Pairs, dropped: list[int] | None = None) -> list[list[int]]:
    """What pairs make of n tokens; nobody is absorbed by a token that is absorbed."""
    absorbed = dict(pairs)
    assert not set(absorbed) & set(absorbed.values())
    kept = [i for i in range(n) if i not in absorbed and i not in (dropped or [])]
    return sorted(sorted([i] + [src for src, into in pairs if into == i]) for i in kept)


def array(x: Tensor) -> Array:
    found: Array = x.double().numpy()
    return found


def cosines(metric: Tensor) -> Array:
    """Of one image, `[H, N, D]` or `[N, D]`."""
    rows = array(metric)
    rows = rows.mean(axis=0) if rows.ndim == 3 else rows
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    found: Array = rows @ rows.T
    return found


def sides(n: int, prefix: int) -> tuple[list[int], list[int]]:
    tokens = range(prefix, n)
    return [i for i in tokens if i % 2 == 0], [i for i in tokens if i % 2 == 1]


def best_pairs(score: Array, side_a: list[int], side_b: list[int]) -> list[tuple[float, int, int]]:
    """Every token of A with its best of B, best pairs first."""
    found = []
    for i in side_a:
        j = max(side_b, key=lambda token: score[i, token])
        found.append((float(score[i, j]), i, j))
    return sorted(found, key=lambda pair: -pair[0])


def attention(view: TokenView, image: int) -> Array:
    """`[H, N, N]`"""
    assert view.q is not None and view.k is not None
    q, k = array(view.q[image]), array(view.k[image])
    scores = np.exp(q @ k.transpose(0, 2, 1) / q.shape[-1] ** 0.5)
    found: Array = scores / scores.sum(axis=-1, keepdims=True)
    return found


def pitome(view: TokenView, image: int, r: int, margin: float = 0.9, alpha: float = 1.0) -> Pairs:
    assert view.k is not None
    cosine, n = cosines(view.k[image]), view.k.shape[2]
    margin = margin - margin * view.layer / view.depth
    energy = {}
    for i in range(view.prefix, n):
        values = [cosine[i, j] for j in range(view.prefix, n)]
        energy[i] = np.mean([c if c >= margin else alpha * (np.exp(c - margin) - 1) for c in values])
    order = sorted(energy, key=lambda i: -energy[i])[: 2 * r]
    side_a, side_b = order[0::2], order[1::2]
    return [(i, max(side_b, key=lambda j, i=i: cosine[i, j])) for i in side_a]  # type: ignore[misc]


def mctf(view: TokenView, image: int, r: int, taus: tuple[float, float, float] = (1.0, 20.0, 40.0)) -> Pairs:
    assert view.size is not None
    cosine, size = cosines(view.x[image]), array(view.size[image])
    received = attention(view, image).mean(axis=(0, 1))
    n = len(size)
    score = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            similarity = ((cosine[i, j] + 1) / 2) ** (1 / taus[0])
            info = (1 / (received[i] * received[j])) ** (1 / taus[1])
            score[i, j] = similarity * info * (1 / (size[i] * size[j])) ** (1 / taus[2])
    side_a, side_b = sides(n, view.prefix)
    first = [(i, j) for _, i, j in best_pairs(score, side_a, side_b)[: r - r // 2]]
    left_a = [i for i in side_a if i not in dict(first)]
    left_b = [j for j in side_b if j not in dict(first).values()]
    return first + [(j, i) for _, j, i in best_pairs(score, left_b, left_a)[: r // 2]]


def diffrate(view: TokenView, image: int, r: int, pruned: int) -> tuple[Pairs, list[int]]:
    importance, cosine = attention(view, image)[:, 0].mean(axis=0), cosines(view.x[image])
    order = sorted(range(view.prefix, len(cosine)), key=lambda i: -importance[i])
    stays, merged, dropped = order[:-r], order[-r : len(order) - pruned], order[len(order) - pruned :]
    return [(i, max(stays, key=lambda j, i=i: cosine[i, j])) for i in merged], dropped  # type: ignore[misc]


def ppt_variance(view: TokenView, image: int) -> tuple[float, Array]:
    assert view.v is not None
    norms = np.linalg.norm(array(view.v[image]), axis=-1)  # [H, N]
    score = (attention(view, image)[:, 0] * norms).mean(axis=0)[view.prefix :]
    return float(np.var(score / score.sum())), score


def atm(view: TokenView, image: int, threshold: float, is_distinctive: bool) -> Pairs:
    """All pairs above the threshold, best first."""
    assert view.k is not None and view.size is not None
    side_a, side_b = sides(view.k.shape[2], view.prefix)
    if is_distinctive:
        size, half = view.size[image].tolist(), len(side_a)
        order = sorted(side_a + side_b, key=lambda i: (size[i], i % 2, i))
        side_a, side_b = order[:half], order[half:]
    return [(i, j) for score, i, j in best_pairs(cosines(view.k[image]), side_a, side_b) if score > threshold]


def mame_weights(view: TokenView, image: int, tau: float) -> dict[tuple[int, int], float]:
    """The weights after both thresholds, of (source, destination), those above 0."""
    cosine = cosines(view.x[image])
    side_a, side_b = sides(len(cosine), view.prefix)
    found = {}
    for j in side_b:
        column = {i: max(0.0, cosine[i, j] - tau) for i in side_a}
        total = sum(column.values()) or 1.0
        column = {i: value / total for i, value in column.items() if value > 0}
        mean = sum(column.values()) / max(1, len(column))
        found.update({(i, j): value - mean for i, value in column.items() if value - mean > 1e-9})
    return found


def mame(view: TokenView, image: int, count: int, tau: float) -> tuple[list[int], Array]:
    """Who stays, in order of sides, and the means of `view.x`, when `count` sources go."""
    assert view.size is not None
    cosine, weights = cosines(view.x[image]), mame_weights(view, image, tau)
    side_a, side_b = sides(len(cosine), view.prefix)
    takers = {i for i, _ in weights}
    ranked = sorted(side_a, key=lambda i: (i not in takers, -max(cosine[i, j] for j in side_b)))
    gone = ranked[:count]
    stays = list(range(view.prefix)) + [i for i in side_a if i not in gone]
    x, size = array(view.x[image]), array(view.size[image])
    rows = [x[i] for i in stays]
    for j in side_b:
        parts = {i: weights[i, j] for i in gone if (i, j) in weights}
        total = sum(parts.values())
        parts = {j: 1.0, **{i: value / total for i, value in parts.items()}}
        parts.update({i: 1.0 for i in gone if i not in takers and j == max(side_b, key=lambda b, i=i: cosine[i, b])})
        rows.append(sum(w * size[i] * x[i] for i, w in parts.items()) / sum(w * size[i] for i, w in parts.items()))
    return stays + side_b, np.array(rows)


def greedy(view: TokenView, image: int, r: int) -> Pairs:
    assert view.k is not None
    cosine, free = cosines(view.k[image]), list(range(view.prefix, view.k.shape[2]))
    found = []
    for _ in range(r):
        _, i, j = max((cosine[i, j], i, j) for i in free for j in free if i < j)
        found.append((j, i))
        free = [token for token in free if token not in (i, j)]
    return found


def tomecis(view: TokenView, image: int, r: int, damping: float) -> Pairs:
    assert view.k is not None
    cosine, importance = cosines(view.k[image]), attention(view, image)[:, 0].mean(axis=0)
    importance = importance / importance[view.prefix :].max()
    pairs = best_pairs(cosine, *sides(len(cosine), view.prefix))
    damped = [(s - damping * max(importance[i], importance[j]) * abs(s), i, j) for s, i, j in pairs]
    return [(i, j) for _, i, j in sorted(damped, key=lambda pair: -pair[0])[:r]]


def dsm(view: TokenView, image: int, r: int) -> Pairs:
    assert view.k is not None and view.grid is not None
    cells, cosine, (rows, columns) = view.cells()[0][image].tolist(), cosines(view.k[image]), view.grid
    at = {token: divmod(cells[token - view.prefix], columns) for token in range(view.prefix, len(cosine))}
    window = {token: (row >= (rows + 1) // 2, column >= (columns + 1) // 2) for token, (row, column) in at.items()}
    ranked = []
    for quarter in set(window.values()):
        side_a, side_b = ([i for i in side if window[i] == quarter] for side in sides(len(cosine), view.prefix))
        for rank, (score, i, j) in enumerate(best_pairs(cosine, side_a, side_b) if side_b else []):
            ranked.append((rank, -score, i, j))
    return [(i, j) for _, _, i, j in sorted(ranked)[:r]]


def least_loss(view: TokenView, image: int, r: int, size: float, importance: float) -> Pairs:
    assert view.k is not None and view.size is not None
    cosine, weights = cosines(view.k[image]), array(view.size[image])
    asked = attention(view, image)[:, 0].mean(axis=0)  # what the class token attends to
    side_a, side_b = sides(view.k.shape[2], view.prefix)
    pairs = best_pairs(cosine, side_a, side_b)
    lost = {i: (1 - score) * weights[i] ** size * asked[i] ** importance for score, i, _ in pairs}
    return [(i, j) for _, i, j in sorted(pairs, key=lambda pair: lost[pair[1]])[:r]]


def mutual_loss(view: TokenView, image: int, r: int, size: float, importance: float, rounds: int) -> Pairs:
    """The pairs of `LeastLoss(pairs="mutual")`: each absorbed token, and the token that stays."""
    assert view.k is not None and view.size is not None
    cosine, weights = cosines(view.k[image]), array(view.size[image])
    asked = attention(view, image)[:, 0].mean(axis=0)
    free = list(range(view.prefix, view.k.shape[2]))

    def loss(i: int, j: int) -> float:
        ward = weights[i] * weights[j] / (weights[i] + weights[j])
        return float((1 - cosine[i, j]) * ward**size * min(asked[i], asked[j]) ** importance)

    def nearest(i: int, among: list[int]) -> int:
        return min((j for j in among if j != i), key=lambda j: loss(i, j))

    order = asked if importance else weights
    pairs, stay = [], []
    for _ in range(rounds):
        best = {i: nearest(i, free) for i in free} if len(free) > 1 else {}
        for i, j in best.items():
            if best[j] == i and (order[i] < order[j] or (order[i] == order[j] and i > j)):
                pairs.append((i, j))
                stay.append(j)
        free = [i for i in free if not any(i in pair for pair in pairs)]
    pairs += [(i, nearest(i, stay)) for i in free]
    return sorted(pairs, key=lambda pair: loss(*pair))[:r]
