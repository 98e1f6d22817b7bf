"""The reference implementation of every tensor operation, in plain torch; fused versions are tested against it.

Shapes: B batch, N tokens in, M tokens out, R absorbed tokens, C channels, D width of the metric.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Side",
    "alternating",
    "attend",
    "bipartite",
    "choose",
    "full_precision",
    "match",
    "merge",
    "merge_backward",
    "merge_context",
    "reduce",
    "unit",
    "unmerge",
]

Side = slice | Tensor  # the tokens of one side of a bipartite graph: positions `[Na]`, the same in every image
_TILE = 2**20  # scores of one image held at a time


def alternating(n: int, prefix: int) -> tuple[slice, slice]:
    """Return sides A and B of `n` tokens: the unprotected tokens at even and at odd places.

    Even and odd count from the start of the whole sequence, prefix included, as in the paper.
    """
    return slice(prefix + prefix % 2, n, 2), slice(prefix + 1 - prefix % 2, n, 2)


def bipartite(metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:  # [B, H, N, D] or [B, N, D]
    """Match alternating tokens by cosine similarity: `keep` `[B, N - r]`, `src` and `dst` `[B, r]` of a plan."""
    side_a, side_b = alternating(metric.shape[-2], prefix)
    best, partner = match(metric, side_a, side_b, "cosine")
    return choose(best, partner, side_a, side_b, r, prefix)


def match(
    metric: Tensor,  # [B, H, N, D] or [B, N, D]
    side_a: Side,
    side_b: Side,
    distance: str,
    valid: Tensor | None = None,  # [B, N] bool
) -> tuple[Tensor, Tensor]:
    """Return each A token's best score in side B and the place of that partner in B, both `[B, Na]`.

    Heads are averaged. Of equal scores the first place wins. A pair of tokens that are both not `valid` scores
    infinity, a valid and an invalid one minus infinity.
    """
    # half precision makes ties of scores that differ in the third digit; autocast would compute the product in it
    with full_precision(metric.device.type):
        metric = metric if metric.dtype in (torch.float32, torch.float64) else metric.float()
        metric = metric.mean(dim=1) if metric.dim() == 4 else metric
        if distance == "cosine":
            metric = unit(metric)
        a, b = metric[:, side_a], metric[:, side_b]
        valid_a, valid_b = (None, None) if valid is None else (valid[:, side_a, None], valid[:, None, side_b])
        count = a.shape[1]
        # tile side A, so that memory grows linearly with the number of tokens
        step = count if count * b.shape[1] <= _TILE else max(1, _TILE // b.shape[1])
        best = [
            _best(a[:, i : i + step], b, distance, None if valid_a is None else valid_a[:, i : i + step], valid_b)
            for i in range(0, count, max(1, step))
        ]
    if len(best) == 1:
        return best[0]
    scores, index = (torch.cat(parts, dim=1) for parts in zip(*best, strict=True))
    return scores, index


def _best(a: Tensor, b: Tensor, distance: str, valid_a: Tensor | None, valid_b: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return each row's best score and partner in side B, `[B, tile]` each, from `[B, tile, D]` and `[B, Nb, D]`."""
    scores = -torch.cdist(a, b) if distance == "euclidean" else torch.bmm(a, b.mT)  # [B, tile, Nb]
    if valid_a is not None and valid_b is not None:
        scores = scores.masked_fill(valid_a ^ valid_b, float("-inf"))
    if distance == "softmax":
        scores = (scores / a.shape[-1] ** 0.5).softmax(dim=-1)
    if valid_a is not None and valid_b is not None:
        # mask again: the softmax of a row of infinities is NaN
        scores = scores.masked_fill(~valid_a & ~valid_b, float("inf"))
        scores = scores.masked_fill(valid_a ^ valid_b, float("-inf"))
    best, index = scores.max(dim=-1)
    return best, index


def unit(metric: Tensor) -> Tensor:  # [B, N, D]
    """Normalise rows to length 1, in float32 or float64; zero rows stay zero.

    Rows whose squares would overflow or vanish are divided by their largest value first, all others by 1.
    """
    most = metric.abs().amax(dim=-1, keepdim=True)
    metric = metric / torch.where(most.clamp(1e-12, 1e15) == most, 1.0, most.clamp_min(2e-38))
    rows: Tensor = metric / metric.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return rows


def choose(
    best: Tensor,  # [B, Na]
    partner: Tensor,  # [B, Na]
    side_a: Side,
    side_b: Side,
    r: int,
    prefix: int,
    by_position: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `keep`, `src` and `dst` of the plan that absorbs the `r` best tokens of A; of equal scores the first ones.

    `keep` holds the first `prefix` tokens, the rest of A in order of place (`by_position`) or of score, then B.
    """
    B, n = best.shape[0], prefix + _length(side_a) + _length(side_b)
    token = torch.arange(n, device=best.device)
    token_a, token_b = token[side_a], token[side_b]
    if _is_for_onnx():
        order = best.argsort(dim=-1, descending=True)
    else:
        order = best.argsort(dim=-1, descending=True, stable=True)
    absorbed, unmerged = order[:, :r], order[:, r:]
    if by_position:
        unmerged = unmerged.sort(dim=-1).values
    keep = torch.cat((token[:prefix].expand(B, -1), token_a[unmerged], token_b.expand(B, -1)), dim=1)
    dst = partner.gather(1, absorbed) + (prefix + unmerged.shape[1])
    return keep, token_a[absorbed], dst


def merge(
    x: Tensor,  # [B, N, C]
    size: Tensor | None,  # [B, N], None = all ones
    keep: Tensor,  # [B, M]
    src: Tensor,  # [B, R]
    dst: Tensor,  # [B, R]
    branch: Tensor | None = None,  # [B, N, C]
) -> tuple[Tensor, Tensor]:
    """Merge absorbed tokens of `x + branch` into kept ones as size-weighted means: `[B, M, C]` and sizes `[B, M]`.

    With s the sizes and S the new size of a group, the mean of the group is
    `x_kept + sum_i (s_i / S) (x_i - x_kept)`: only absorbed rows are touched, and equal tokens stay bit-equal.
    """
    x = x if branch is None else x + branch
    B, N, C = x.shape
    M = keep.shape[1]
    size = x.new_ones((B, N), dtype=torch.float32) if size is None else size
    absorbed_size = size.gather(1, src)  # [B, R]
    new_size = size.gather(1, keep).scatter_add(1, dst, absorbed_size)  # [B, M]
    rows = torch.arange(B, device=x.device)[:, None]
    flat = x.reshape(B * N, C)
    # one flat index_select copies whole rows; a gather with an expanded index is several times slower on CPU
    out = flat.index_select(0, (keep + rows * N).flatten())  # [B*M, C]
    flat_dst = (dst + rows * M).flatten()  # [B*R]
    # a group of only padding has size 0
    weight = (absorbed_size / new_size.gather(1, dst).clamp_min(1e-12)).flatten()[:, None].to(x.dtype)
    step = flat.index_select(0, (src + rows * N).flatten()) - out.index_select(0, flat_dst)
    out.index_add_(0, flat_dst, weight * step)
    return out.view(B, M, C), new_size


def merge_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save what `merge_backward` needs from a call of `merge`: sizes and indices, no features."""
    x, size, keep, src, dst, branch = inputs
    ctx.save_for_backward(size, keep, src, dst, output[1])
    ctx.tokens, ctx.has_branch = x.shape[1], branch is not None
    ctx.mark_non_differentiable(output[1])


def merge_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # [B, M, C]
    """Return the gradients of `merge`: each token gets its share of its group's, a dropped token none. `[B, N, C]`."""
    size, keep, src, dst, new_size = ctx.saved_tensors
    (B, M, C), n = grad.shape, ctx.tokens
    size = new_size.new_ones((B, n)) if size is None else size
    # in a group of only padding (size 0) the leader gets the whole gradient
    lead = torch.where(new_size > 0, size.gather(1, keep) / new_size, 1.0)  # [B, M]
    share = size.gather(1, src) / new_size.gather(1, dst).clamp_min(1e-12)  # [B, R]
    weight = size.new_zeros(B, n).scatter(1, keep, lead).scatter(1, src, share)
    slots = torch.arange(M, device=keep.device).expand(B, M)
    groups = dst.new_zeros(B, n).scatter(1, keep, slots).scatter(1, src, dst)
    rows = (groups + torch.arange(B, device=keep.device)[:, None] * M).flatten()
    spread = grad.reshape(B * M, C).index_select(0, rows).view(B, n, C) * weight[..., None].to(grad.dtype)
    return spread, None, None, None, None, spread if ctx.has_branch else None


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None = None) -> Tensor:  # [B, H, N, D], [B, N]
    """Compute attention with an additive bias per key, log(size) in proportional attention; returns `[B, H, N, D]`."""
    mask = bias.to(q.dtype)[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def reduce(x: Tensor, keep: Tensor, src: Tensor, dst: Tensor, mode: str) -> Tensor:
    """Combine each kept token with those it absorbs by `mode` (`sum`, `mean`, `amax`, `amin`, `prod`), unweighted."""
    C = x.shape[-1]
    kept = x.gather(1, keep[..., None].expand(-1, -1, C))  # [B, M, C]
    absorbed = x.gather(1, src[..., None].expand(-1, -1, C))  # [B, R, C]
    return kept.scatter_reduce(1, dst[..., None].expand(-1, -1, C), absorbed, reduce=mode)


def unmerge(y: Tensor, assignment: Tensor) -> Tensor:  # [B, M, C], [B, N]
    """Copy to every input token the row of its group, `[B, N, C]`; dropped tokens (-1) get zeros."""
    index = assignment.clamp_min(0)[..., None].expand(-1, -1, y.shape[-1])
    return y.gather(1, index).masked_fill(assignment[..., None] < 0, 0)


def _length(side: Side) -> int:
    if isinstance(side, Tensor):
        return side.shape[0]
    return len(range(side.start, side.stop, side.step or 1))


def _is_for_onnx() -> bool:
    # ONNX sorts are stable by definition, and torch 2.15 cannot export a stable argsort
    is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)()
    return bool(is_exporting and torch.onnx.is_in_onnx_export())


def full_precision(device: str) -> AbstractContextManager[None]:
    """Return a context that turns autocast off if it is on."""
    is_on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if is_on else nullcontext()
