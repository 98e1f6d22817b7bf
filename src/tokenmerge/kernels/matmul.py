"""Merge without scatter: a product with a 0/1 membership matrix sums the groups, for engines with a broken scatter.

Never chosen automatically; select it with `kernels.force("matmul")`, also during export. The graph moves tokens with
row gathers, one comparison and one batched matrix product only.

Shapes: B batch, N tokens in, M tokens out, R absorbed tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["merge"]


def merge(
    x: Tensor,  # [B, N, C]
    size: Tensor | None,  # [B, N], None = all ones
    keep: Tensor,  # [B, M]
    src: Tensor,  # [B, R]
    dst: Tensor,  # [B, R]
    branch: Tensor | None = None,  # [B, N, C]
) -> tuple[Tensor, Tensor]:
    """Merge groups of `x + branch` as size-weighted means; returns `[B, M, C]` and the new sizes `[B, M]`.

    Same formula as the reference. Each sum covers all R absorbed tokens of an image, most of them times 0, so one
    non-finite token makes the whole image non-finite.
    """
    x = x if branch is None else x + branch
    B, N, C = x.shape
    M, R = keep.shape[1], src.shape[1]
    size = torch.ones((B, N), dtype=torch.float32, device=x.device) if size is None else size
    is_member = dst[:, None] == torch.arange(M, device=x.device)[:, None]  # [B, M, R]
    absorbed_size = size.gather(1, src)  # [B, R]
    new_size = size.gather(1, keep) + (is_member * absorbed_size[:, None]).sum(dim=2)  # [B, M]
    first = torch.arange(B, device=x.device)[:, None]
    flat = x.reshape(B * N, C)
    kept = flat.index_select(0, (keep + first * N).flatten()).view(B, M, C)
    absorbed = flat.index_select(0, (src + first * N).flatten()).view(B, R, C)
    leader = flat.index_select(0, (keep.gather(1, dst) + first * N).flatten()).view(B, R, C)
    # a group of padding only has size 0
    weight = absorbed_size / new_size.gather(1, dst).clamp_min(1e-12)  # [B, R]
    step = weight[..., None].to(x.dtype) * (absorbed - leader)
    return kept + torch.bmm(is_member.to(x.dtype), step), new_size
