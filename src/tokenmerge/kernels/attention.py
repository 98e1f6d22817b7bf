"""Proportional attention without a mask, for kernels that are slow or missing with one; exact, never automatic.

`columns` and `values` put the bias into widened keys or values and call the plain kernel. `flex` is FlexAttention. On
CPU all three are slower than the mask (benchmarks/results/attention.md); on GPUs they were not measured.

Shapes: B batch, H heads, N tokens, D head width.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmerge._torch.tracing import is_compiling

__all__ = ["columns", "flex", "supports_flex", "values"]

_WIDTH = 8  # widths are padded to a multiple of this, as kernels require


def columns(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None = None) -> Tensor:
    """See `kernels.attend`: appends bias / scale to the keys and ones to the queries as extra columns.

    In half precision one column would round the bias; three columns hold all its bits. Values are padded with zeros,
    since not every kernel accepts values narrower than keys.
    """
    D = q.shape[-1]
    scale = D**-0.5 if scale is None else scale
    rest, parts = _full(bias, q) / scale, []
    for _ in range(1 if rest.dtype == q.dtype else 3):
        parts.append(rest.to(q.dtype))
        # of padding, minus infinity, nothing is left
        rest = (rest - parts[-1].to(rest.dtype)).nan_to_num(0.0)
    column = torch.stack(parts, dim=-1)[:, None].expand(-1, k.shape[1], -1, -1)  # [B, H, N, parts]
    fill = _WIDTH - (D + len(parts) - 1) % _WIDTH - 1
    ones = q.new_ones(*q.shape[:-1], len(parts))
    q, k = (F.pad(torch.cat(pair, dim=-1), (0, fill)) for pair in ((q, ones), (k, column)))
    out = F.scaled_dot_product_attention(q, k, F.pad(v, (0, q.shape[-1] - D)), scale=scale)
    return out[..., :D]


def values(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None = None) -> Tensor:
    """See `kernels.attend`: `softmax(a + log s) v = softmax(a) (s v) / (softmax(a) s)`; s is an extra value column.

    Sizes are divided by the largest size of each image, which cancels, so that they fit half precision.
    """
    D = q.shape[-1]
    scale = D**-0.5 if scale is None else scale
    bias = _full(bias, q)
    weight = (bias - bias.amax(dim=-1, keepdim=True)).exp()[:, None, :, None].to(v.dtype)
    weighted = torch.cat((v * weight, weight.expand(-1, v.shape[1], -1, -1)), dim=-1)
    fill = _WIDTH - D % _WIDTH
    q, k, weighted = F.pad(q, (0, fill)), F.pad(k, (0, fill)), F.pad(weighted, (0, fill - 1))
    out = F.scaled_dot_product_attention(q, k, weighted, scale=scale)
    return out[..., :D] / out[..., D : D + 1]


def flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None = None) -> Tensor:
    """See `kernels.attend`: FlexAttention, compiled here unless the caller is being compiled."""
    bias = bias.detach()

    def add(score: Tensor, image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[image, key]

    out: Tensor = _flex(is_compiling())(q, k, v, score_mod=add, scale=scale)
    return out


def supports_flex(q: Tensor) -> bool:
    """Return whether FlexAttention supports `q`: on CUDA, with a power of two as head width.

    Its CPU kernel corrupts memory when a score_mod reads a tensor (torch 2.15), and some torch versions reject other
    widths.
    """
    return q.device.type == "cuda" and q.shape[-1] & (q.shape[-1] - 1) == 0


@cache
def _flex(is_compiling: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if is_compiling else torch.compile(flex_attention, dynamic=True)


def _full(bias: Tensor, q: Tensor) -> Tensor:
    """Return the bias without gradient, in float32 or wider."""
    return bias.detach().to(torch.promote_types(q.dtype, torch.float32))
