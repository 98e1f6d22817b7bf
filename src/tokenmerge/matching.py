"""Decide which tokens absorb which: from a metric to a `Plan`, as pure functions.

Shapes: B batch, N tokens, D width of the metric, A and B the two sides of the bipartite graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmerge import kernels
from tokenmerge.errors import unknown_name
from tokenmerge.plan import Plan

__all__ = [
    "DISTANCES",
    "HEADS",
    "PARTITIONS",
    "absorb",
    "alternating",
    "bipartite",
    "choose",
    "cosines",
    "join_heads",
    "kth",
    "largest_r",
    "lift_padding",
    "mask_pairs",
    "match",
    "mutual",
    "nearest",
    "pair_cosines",
    "partners",
    "prune",
    "random",
    "shuffle",
    "sink_padding",
    "unit",
]

DISTANCES = ("cosine", "dot", "euclidean", "softmax")
HEADS = ("mean", "concat")
PARTITIONS = ("alternating", "sequential", "random")
# beyond any score, yet finite, so that a pair masked with minus infinity ranks below every pair with padding
_FAR = torch.finfo(torch.float32).max
_ROUNDS = 3  # of pairing tokens that are each other's best

alternating, choose, match = kernels.alternating, kernels.choose, kernels.match  # for methods with their own scores


def join_heads(x: Tensor, how: str) -> Tensor:  # [B, H, N, D]
    """Join the heads of q, k or v: `concat` returns `[B, N, H * D]`; with `mean`, the matching averages them later."""
    return x if how == "mean" else x.transpose(1, 2).flatten(2)


def largest_r(n: int, prefix: int) -> int:
    """Return how many of `n` tokens one bipartite step can remove: half of the unprotected ones."""
    return max(0, (n - prefix) // 2)


def bipartite(
    metric: Tensor,  # [B, N, D] or [B, H, N, D]
    r: int,
    *,
    prefix: int = 0,
    distance: str = "cosine",
    partition: str = "alternating",
    seed: int = 0,
    by_position: bool = True,
    valid: Tensor | None = None,  # [B, N] bool
) -> Plan:
    """Match each token of side A with its best of side B and merge the `r` best pairs.

    Bipartite soft matching of Bolya et al., ICLR 2023, arXiv:2210.09461. Of equal scores the first place wins. Raises
    `UnknownNameError` for an unknown distance or partition.

    Args:
        metric: the features to compare; heads are averaged.
        r: pairs to merge, clamped to half of the unprotected tokens; 0 keeps all tokens in order.
        prefix: protected tokens in front. They come first in the output, then the unmerged tokens of A, then B.
        distance: one of `DISTANCES`.
        partition: how tokens are divided into A and B, one of `PARTITIONS`.
        seed: of the random partition.
        by_position: order the unmerged tokens of A by place; False orders them by score, as the paper's own code does
            without a class token.
        valid: which tokens are real. Padding merges with padding, before any others, and with a real token only if
            nothing else is left to remove.
    """
    if distance not in DISTANCES:
        raise unknown_name("distance", distance, DISTANCES)
    B, n = metric.shape[0], metric.shape[-2]
    r = min(r, largest_r(n, prefix))
    if r <= 0:
        everyone = torch.arange(n, device=metric.device).expand(B, -1)
        return Plan(keep=everyone, src=everyone[:, :0], dst=everyone[:, :0], n=n)
    if distance == "cosine" and partition == "alternating" and by_position and valid is None:
        return Plan(*kernels.bipartite(metric, r, prefix), n=n)
    side_a, side_b = _sides(n, prefix, partition, seed, metric.device)
    best, partner = kernels.match(metric, side_a, side_b, distance, valid)  # [B, A]
    return Plan(*kernels.choose(best, partner, side_a, side_b, r, prefix, by_position), n=n)


def partners(metric: Tensor, *, prefix: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens at even places `[A]`, the best partner of each at odd places and its cosine, `[B, A]`.

    For methods that set a threshold; `bipartite` takes the `r` best of these pairs.
    """
    n = metric.shape[-2]
    side_a, side_b = kernels.alternating(n, prefix)
    best, partner = kernels.match(metric, side_a, side_b, "cosine", valid)
    places = torch.arange(n, device=metric.device)
    return places[side_a], places[side_b][partner], best


def nearest(
    metric: Tensor,  # [B, N, D] or [B, H, N, D]
    side_a: Tensor,  # [B, A]
    side_b: Tensor,  # [B, E]
    *,
    valid: Tensor | None = None,  # [B, N] bool
) -> tuple[Tensor, Tensor]:
    """Return the most similar token of side B for every token of side A and its cosine, both `[B, A]`.

    Like `partners`, for sides that differ between images.
    """
    metric = metric.mean(dim=1) if metric.dim() == 4 else metric
    tokens, split = torch.cat((side_a, side_b), dim=1), side_a.shape[1]
    rows = metric.gather(1, tokens[..., None].expand(-1, -1, metric.shape[-1]))
    valid = None if valid is None else valid.gather(1, tokens)
    best, partner = kernels.match(rows, slice(0, split), slice(split, tokens.shape[1]), "cosine", valid)
    return side_b.gather(1, partner), best


def mutual(score: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:  # [B, N, N] symmetric, [B, N]
    """Return the token that each token would merge into and the score of that pair, both `[B, N]`.

    Tokens that are each other's best are paired, in `_ROUNDS` rounds among those that have no partner yet: the greedy
    matching over all pairs, but for what later rounds would pair. Of a pair, the token with the larger weight (of
    equal ones the first) stays; it has a score of minus infinity. Every other token merges into its best of those
    that stay, so that at least half of the tokens can go. Of equal scores the first place wins.
    """
    score = score.clone()
    score.diagonal(dim1=1, dim2=2).fill_(float("-inf"))
    place = torch.arange(score.shape[1], device=score.device)
    is_free = torch.ones_like(weight, dtype=torch.bool)
    stays = torch.zeros_like(is_free)
    into, lost = place.expand_as(is_free), torch.full_like(score[:, 0], float("-inf"))
    for turn in range(_ROUNDS):
        left = score.masked_fill(~is_free[:, None], float("-inf")) if turn else score
        best, partner = left.max(dim=2)  # [B, N]
        is_paired = is_free & is_free.gather(1, partner) & (partner.gather(1, partner) == place) & (partner != place)
        other = weight.gather(1, partner)
        leads = is_paired & ((weight > other) | ((weight == other) & (place < partner)))
        follows = is_paired & ~leads
        into, lost = torch.where(follows, partner, into), torch.where(follows, best, lost)
        stays, is_free = stays | leads, is_free & ~is_paired
    best, partner = score.masked_fill(~stays[:, None], float("-inf")).max(dim=2)
    return torch.where(is_free, partner, into), torch.where(is_free, best, lost)


def absorb(src: Tensor, into: Tensor, n: int, gone: Tensor | None = None) -> Plan:  # [B, R], [B, R], [B, G]
    """Return the plan in which `into` absorb `src` and `gone` are dropped; all other tokens stay in order.

    >>> absorb(torch.tensor([[0]]), torch.tensor([[2]]), 4, gone=torch.tensor([[1]])).keep.tolist()
    [[2, 3]]
    """
    leaving = src if gone is None else torch.cat((src, gone), dim=1)
    is_leaving = torch.zeros(src.shape[0], n, dtype=torch.long, device=src.device)
    is_leaving = is_leaving.scatter_add(1, leaving, torch.ones_like(leaving))
    places = torch.arange(n, device=src.device).expand_as(is_leaving)
    keep = torch.where(is_leaving > 0, n, places).sort(dim=1).values[:, : n - leaving.shape[1]]
    slots = places - is_leaving.cumsum(dim=1)
    return Plan(keep=keep, src=src, dst=slots.gather(1, into), n=n)


def unit(metric: Tensor) -> Tensor:  # [B, N, D] or [B, H, N, D]
    """Return the metric as unit rows in full precision, heads averaged, `[B, N, D]`."""
    metric = metric if metric.dtype in (torch.float32, torch.float64) else metric.float()
    return kernels.unit(metric.mean(dim=1) if metric.dim() == 4 else metric)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Return the products of unit rows, `[B, A, D]` and `[B, E, D]` to `[B, A, E]`, for methods that need all pairs."""
    with kernels.full_precision(a.device.type):
        return torch.bmm(a, b.mT)


def pair_cosines(metric: Tensor, plan: Plan) -> Tensor:  # [B, N, D] or [B, H, N, D]
    """Return the cosine of each absorbed token of a plan and the token that leads its group, `[B, R]` float32."""
    rows, into = unit(metric), plan.keep.gather(1, plan.dst)
    gone, leads = (rows.gather(1, at[..., None].expand(-1, -1, rows.shape[-1])) for at in (plan.src, into))
    return (gone * leads).sum(dim=-1).float()


def sink_padding(score: Tensor, valid: Tensor | None, at: kernels.Side | None = None) -> Tensor:  # [B, A], [B, N] bool
    """Return the scores with minus infinity for padding; `at` selects the tokens that have scores (None: all N).

    >>> sink_padding(torch.tensor([[0.5, 0.7]]), torch.tensor([[True, True, False]]), slice(1, 3)).tolist()
    [[0.5, -inf]]
    """
    return score if valid is None else score.masked_fill(~_of(valid, at), float("-inf"))


def lift_padding(score: Tensor, valid: Tensor | None, at: kernels.Side | None = None) -> Tensor:
    """Return the scores with infinity for padding; see `sink_padding`."""
    return score if valid is None else score.masked_fill(~_of(valid, at), float("inf"))


def mask_pairs(
    score: Tensor,  # [B, A, E]
    valid: Tensor | None,  # [B, N] bool
    side_a: kernels.Side,
    side_b: kernels.Side,
    alike: float = _FAR,
    unlike: float = -_FAR,
) -> Tensor:
    """Return the scores with `alike` for pairs of padding tokens, and `unlike` for padding with a real token."""
    if valid is None:
        return score
    is_a, is_b = _of(valid, side_a)[..., None], _of(valid, side_b)[:, None]
    return score.masked_fill(is_a ^ is_b, unlike).masked_fill(~is_a & ~is_b, alike)


def prune(score: Tensor, r: int, *, prefix: int = 0) -> Plan:  # [B, N]
    """Drop the `r` unprotected tokens of the lowest scores; the others stay in order. Of equal scores the first stay.

    >>> prune(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), 1, prefix=1).keep.tolist()
    [[0, 1, 3]]
    """
    B, n = score.shape
    order = score[:, prefix:].argsort(dim=1, descending=True, stable=True)
    front = torch.arange(prefix, device=score.device).expand(B, -1)
    keep = torch.cat((front, order[:, : n - prefix - r].sort(dim=1).values + prefix), dim=1)
    return Plan(keep=keep, src=keep[:, :0], dst=keep[:, :0], n=n)


def kth(metric: Tensor, k: int) -> Plan:  # [B, N, D]
    """Merge every token into its best among every k-th token; the last `N % k` tokens are dropped.

    >>> kth(torch.rand(1, 12, 4), k=3).keep.tolist()
    [[2, 5, 8, 11]]
    """
    B, n, _ = metric.shape
    token = torch.arange(n - n % k, device=metric.device)
    keep, src = token[k - 1 :: k], token.view(-1, k)[:, : k - 1].flatten()
    _, partner = kernels.match(metric, src, keep)
    return Plan(keep=keep.expand(B, -1), src=src.expand(B, -1), dst=partner, n=n)


def random(metric: Tensor, r: int) -> Plan:  # [B, N, D]
    """Absorb `r` tokens drawn with torch's global generator, each into its best among the rest."""
    B, n, D = metric.shape
    order = torch.rand(B, n, device=metric.device).argsort(dim=1)
    shuffled = metric.gather(1, order[..., None].expand(-1, -1, D))
    _, partner = kernels.match(shuffled, slice(0, r), slice(r, n))
    return Plan(keep=order[:, r:], src=order[:, :r], dst=partner, n=n)


def _of(valid: Tensor, at: kernels.Side | None) -> Tensor:
    if at is None:
        return valid
    return valid.gather(1, at) if isinstance(at, Tensor) and at.dim() == 2 else valid[:, at]


def _sides(n: int, prefix: int, partition: str, seed: int, device: torch.device) -> tuple[kernels.Side, kernels.Side]:
    """Return the unprotected tokens of A and B."""
    if partition == "alternating":
        return kernels.alternating(n, prefix)
    half = prefix + (n - prefix + 1) // 2
    if partition == "sequential":
        return slice(prefix, half), slice(half, n)
    if partition == "random":
        shuffled = prefix + shuffle(n - prefix, seed, device)
        return shuffled[: half - prefix].sort().values, shuffled[half - prefix :].sort().values
    raise unknown_name("partition", partition, PARTITIONS)


def shuffle(n: int, seed: int, device: torch.device) -> Tensor:
    """Return a permutation of `n` that depends on `seed` alone; it hashes, since generators cannot be captured."""
    value = torch.arange(n, device=device) + (seed * 7919 + 1) % 2**31
    for shift, factor in ((16, 0x45D9F3B), (15, 0x119DE1F3), (16, 0x3449F5)):
        value = ((value ^ (value >> shift)) * factor) % 2**31
    return value.argsort()
