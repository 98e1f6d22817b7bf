"""Every tensor operation of the library in plain torch: the truth that fused versions are compared with.

Shapes: B batch, N tokens in, M tokens out, R absorbed tokens, C channels, D width of the metric.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

__all__ = ["Side", "match", "mean_heads", "merge", "reduce", "unmerge"]

Side = slice | Tensor  # the tokens of one side of a bipartite graph: positions `[Na]`, the same in every image


def match(
    metric: Tensor,  # [B, N, D]
    side_a: Side,
    side_b: Side,
    distance: str,
    valid: Tensor | None = None,  # [B, N] bool
) -> tuple[Tensor, Tensor]:
    """Return for every token of side A its best score in side B and the place there that has it, both `[B, Na]`.

    Between two tokens that are not `valid` the score is infinite, between one that is and one that is not minus that.
    """
    # half precision ties scores that differ in the third digit, and autocast would bring it back in the product
    with torch.autocast(metric.device.type, enabled=False) if _is_autocast(metric.device.type) else nullcontext():
        metric = metric if metric.dtype in (torch.float32, torch.float64) else metric.float()
        if distance == "cosine":
            metric = metric / metric.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        a, b = metric[:, side_a], metric[:, side_b]
        scores = -torch.cdist(a, b) if distance == "euclidean" else torch.bmm(a, b.mT)  # [B, Na, Nb]
        if valid is not None:
            a, b = valid[:, side_a, None], valid[:, None, side_b]  # [B, Na, 1], [B, 1, Nb]
            scores = scores.masked_fill(a ^ b, float("-inf"))
        if distance == "softmax":
            scores = (scores / metric.shape[-1] ** 0.5).softmax(dim=-1)
        if valid is not None:
            # again after the softmax: of infinities alone it is NaN
            scores = scores.masked_fill(~a & ~b, float("inf")).masked_fill(a ^ b, float("-inf"))
        best, index = scores.max(dim=-1)
    return best, index


def mean_heads(x: Tensor) -> Tensor:  # [B, H, N, D]
    """Return the mean over heads, `[B, N, D]`."""
    return x.mean(dim=1)


def merge(
    x: Tensor,  # [B, N, C]
    size: Tensor | None,  # [B, N], None = all ones
    keep: Tensor,  # [B, M]
    src: Tensor,  # [B, R]
    dst: Tensor,  # [B, R]
) -> tuple[Tensor, Tensor]:
    """Merge absorbed tokens into kept ones as size-weighted means; returns `[B, M, C]` and the new sizes `[B, M]`.

    With s the sizes and S the new size of a group, the mean of the group is
    `x_kept + sum_i (s_i / S) (x_i - x_kept)`: only absorbed rows are touched, and equal tokens stay bit-equal.
    """
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
    # groups of padding alone have the size 0
    weight = (absorbed_size / new_size.gather(1, dst).clamp_min(1e-12)).flatten()[:, None].to(x.dtype)
    step = flat.index_select(0, (src + rows * N).flatten()) - out.index_select(0, flat_dst)
    out.index_add_(0, flat_dst, weight * step)
    return out.view(B, M, C), new_size


def reduce(x: Tensor, keep: Tensor, src: Tensor, dst: Tensor, mode: str) -> Tensor:
    """Combine each kept token with those it absorbs by `mode` (`sum`, `mean`, `amax`, `amin`, `prod`), unweighted."""
    C = x.shape[-1]
    kept = x.gather(1, keep[..., None].expand(-1, -1, C))  # [B, M, C]
    absorbed = x.gather(1, src[..., None].expand(-1, -1, C))  # [B, R, C]
    return kept.scatter_reduce(1, dst[..., None].expand(-1, -1, C), absorbed, reduce=mode)


def unmerge(y: Tensor, assignment: Tensor) -> Tensor:  # [B, M, C], [B, N]
    """Give every input token the row of its group, `[B, N, C]`; dropped tokens (-1) get zeros."""
    index = assignment.clamp_min(0)[..., None].expand(-1, -1, y.shape[-1])
    return y.gather(1, index).masked_fill(assignment[..., None] < 0, 0)


def _is_autocast(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)
