"""Importance scores per token, from the tensors of one attention.

Shapes: B batch, N tokens, H heads, D head width, C channels. Attention is a_ij, of query i to key j, heads apart.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tokenmerge import kernels

__all__ = [
    "attention_rows",
    "class_attention",
    "class_value",
    "entropy",
    "page_rank",
    "received_attention",
    "self_received",
    "shift",
]

# attention weights of one image, all heads, held at a time; a limit per batch would fix the batch size in a graph
_TILE = 2**18


def class_attention(q: Tensor, k: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """Return the attention of the first token to all tokens, `[B, H, N]`; computes one row of the attention only.

    The score of EViT (Liang et al., ICLR 2022, arXiv:2202.07800) and DiffRate is its mean over heads.
    """
    return next(attention_rows(q[:, :, :1], k, scale, bias))[:, :, 0]


def class_value(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None
) -> Tensor:  # [B, H, N, D]
    """Return class attention times the norm of the value, heads averaged, `[B, N]`.

    The score of ATS (Fayyaz et al., ECCV 2022, arXiv:2111.15667), there divided by its sum over the patches.
    """
    length = v.float().norm(dim=-1).repeat_interleave(q.shape[1] // v.shape[1], dim=1)  # [B, H, N]
    weighted: Tensor = class_attention(q, k, scale, bias) * length
    return weighted.mean(dim=1)


def received_attention(q: Tensor, k: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """Return the mean attention each token receives, over all queries and heads, `[B, N]`.

    The significance score of PoWER-BERT and Token Pooling (arXiv:2110.03860). Computed in tiles: memory grows linearly
    with the tokens, time quadratically.
    """
    total = torch.zeros_like(k[:, 0, :, 0], dtype=torch.float32)
    for rows in attention_rows(q, k, scale, bias):
        total = total + rows.sum(dim=(1, 2))
    return total / (q.shape[1] * q.shape[2])


def entropy(q: Tensor, k: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """Return `sum_j a_ij log a_ij` of the heads' mean attention, the negative entropy of each token's row, `[B, N]`.

    High for a token that attends to few others: the saliency of vid-TLDR (Choi et al., CVPR 2024, arXiv:2403.13347).
    """
    tiles = []
    for rows in attention_rows(q, k, scale, bias):
        mean = rows.mean(dim=1)  # [B, tile, N]
        tiles.append(torch.special.xlogy(mean, mean).sum(dim=-1))
    return torch.cat(tiles, dim=1)


def self_received(q: Tensor, k: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """Return each token's attention to itself times the attention it receives from all, heads apart, `[B, H, N]`.

    The score of GTP-ViT (Xu et al., WACV 2024, arXiv:2311.03035): how hard a token is to regenerate from others, and
    how much it passes to them.
    """
    total = torch.zeros_like(q[..., 0], dtype=torch.float32)
    own: list[Tensor] = []
    for rows in attention_rows(q, k, scale, bias):
        total = total + rows.sum(dim=2)
        own.append(rows.diagonal(sum(part.shape[-1] for part in own), dim1=2, dim2=3).clone())
    return total * torch.cat(own, dim=2)


def page_rank(
    q: Tensor,
    k: Tensor,
    start: Tensor,  # [B, N]
    iterations: int,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return the mass per head, `[B, H, N]`, after repeated steps `s <- A^T s` from `start`.

    The importance of Zero-TPrune (Wang et al., CVPR 2024, arXiv:2305.17328). Attention that needs more than one tile is
    recomputed in every step.
    """
    B, H, n, _ = q.shape
    mass = start[:, None].expand(B, H, n).float()
    tiles = [next(attention_rows(q, k, scale, bias))] if H * n * n <= _TILE else None
    for _ in range(iterations):
        moved, at = torch.zeros_like(mass), 0
        for rows in attention_rows(q, k, scale, bias) if tiles is None else tiles:
            moved = moved + _product(mass[:, :, None, at : at + rows.shape[2]], rows)[:, :, 0]
            at += rows.shape[2]
        mass = moved
    return mass


def shift(x: Tensor, x_pre: Tensor) -> Tensor:  # [B, N, C]
    """Return how far the attention moved each token, `||x - x_pre||`, `[B, N]`.

    Representation Shift (ICCV 2025, arXiv:2508.00367) of the attention. The paper prefers that of the MLP, which here
    runs after tokens are removed. It needs no attention map.
    """
    moved: Tensor = (x - x_pre).float().norm(dim=-1)
    return moved


def attention_rows(q: Tensor, k: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Iterator[Tensor]:
    """Yield the attention for one tile of queries after another, `[B, H, tile, N]` in float32.

    `scale` multiplies the scores (None: 1 / sqrt(D)), `bias` `[B, N]` is added per key. With fewer key than query
    heads, each key head serves several query heads, as in grouped-query attention.
    """
    _, H, n, D = q.shape
    if k.shape[1] != H:
        k = k.repeat_interleave(H // k.shape[1], dim=1)
    q, k = q.float() * (D**-0.5 if scale is None else scale), k.float()
    step = max(1, _TILE // max(1, H * k.shape[2]))
    for start in range(0, n, step):
        scores = _product(q[:, :, start : start + step], k.mT)  # [B, H, tile, N]
        yield (scores if bias is None else scores + bias.float()[:, None, None, :]).softmax(dim=-1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    # autocast would compute the product in half precision
    with kernels.full_precision(a.device.type):
        return a @ b
