"""How much a token matters: a score per token, from what one attention saw. It decides nothing.

Shapes: B batch, N tokens, H heads, D head width, C channels. Attention is a_ij, of query i to key j, heads apart.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["attention_rows", "class_attention", "class_value", "entropy", "received_attention", "shift"]

_TILE = 2**22  # attention weights of all images and heads that are held at a time


def class_attention(q: Tensor, k: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """Return what the first token attends to, `[B, H, N]`: one row of the attention, at the cost of one token.

    The score of EViT (Liang et al., ICLR 2022, arXiv:2202.07800) and DiffRate is its mean over heads.
    """
    return next(attention_rows(q[:, :, :1], k, scale, bias))[:, :, 0]


def class_value(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None
) -> Tensor:  # [B, H, N, D]
    """Return class attention times the norm of the value, heads averaged, `[B, N]`.

    The score of ATS (Fayyaz et al., ECCV 2022, arXiv:2111.15667), there divided by its sum over the patches.
    """
    weighted: Tensor = class_attention(q, k, scale, bias) * v.float().norm(dim=-1)
    return weighted.mean(dim=1)


def received_attention(q: Tensor, k: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """Return the mean attention each token gets, over all queries and heads, `[B, N]`.

    The significance score of PoWER-BERT and Token Pooling (arXiv:2110.03860). Rows are made in tiles: memory grows with
    the tokens, time with their square.
    """
    total = torch.zeros_like(k[:, 0, :, 0], dtype=torch.float32)
    for rows in attention_rows(q, k, scale, bias):
        total = total + rows.sum(dim=(1, 2))
    return total / (q.shape[1] * q.shape[2])


def entropy(q: Tensor, k: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """Return `sum_j a_ij log a_ij` of the heads' mean attention, the negative entropy of each token's row, `[B, N]`.

    High where a token looks at few others: the saliency of vid-TLDR (Choi et al., CVPR 2024, arXiv:2403.13347).
    """
    found = []
    for rows in attention_rows(q, k, scale, bias):
        mean = rows.mean(dim=1)  # [B, tile, N]
        found.append(torch.special.xlogy(mean, mean).sum(dim=-1))
    return torch.cat(found, dim=1)


def shift(x: Tensor, x_pre: Tensor) -> Tensor:  # [B, N, C]
    """Return how far the attention moved each token, `||x - x_pre||`, `[B, N]`.

    Representation Shift (ICCV 2025, arXiv:2508.00367) of the attention; the paper prefers that of the MLP, which here
    runs after the tokens are gone. It needs no attention map.
    """
    moved: Tensor = (x - x_pre).float().norm(dim=-1)
    return moved


def attention_rows(q: Tensor, k: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Iterator[Tensor]:
    """Yield the attention of one tile of queries after another, `[B, H, tile, N]` in float32.

    `scale` multiplies the scores (None: 1 / sqrt(D)), `bias` `[B, N]` is added per key. Fewer key than query heads:
    each serves several queries' heads, as in grouped-query attention.
    """
    B, H, n, D = q.shape
    if k.shape[1] != H:
        k = k.repeat_interleave(H // k.shape[1], dim=1)
    q, k = q.float() * (D**-0.5 if scale is None else scale), k.float()
    step = max(1, _TILE // max(1, B * H * k.shape[2]))
    for start in range(0, n, step):
        scores = q[:, :, start : start + step] @ k.mT  # [B, H, tile, N]
        yield (scores if bias is None else scores + bias.float()[:, None, None, :]).softmax(dim=-1)
