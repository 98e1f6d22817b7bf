"""Gather position-dependent inputs (rotary tables, masks) for the remaining tokens.

Shapes: B batch, N input tokens, M remaining tokens, H heads, D width. `kept` `[B, M]` holds the input position of each
remaining token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenmerge.errors import UnsupportedError

__all__ = ["Follow", "add_bias", "keys_of_mask", "mask", "rows"]

Follow = Callable[[Any, Tensor], Any]  # (the host's argument, `kept`) -> the argument for the remaining tokens


def rows(table: Tensor, kept: Tensor) -> Tensor:
    """Gather rows `kept` of a table `[N, D]`, `[B or 1, N, D]` or `[B or 1, H, N, D]`; returns `[B, (H,) M, D]`."""
    if table.dim() == 2:
        return table[kept]
    B, M = kept.shape
    index = kept.view(B, *[1] * (table.dim() - 3), M, 1).expand(B, *table.shape[1:-2], M, table.shape[-1])
    return table.expand(B, *table.shape[1:]).gather(-2, index)


def mask(given: Tensor, kept: Tensor) -> Tensor:
    """Gather a key mask, `[B or 1, N]` or `[B or 1, H or 1, 1 or N, N]`, at `kept`.

    Raises `UnsupportedError` for any other shape.
    """
    B, M = kept.shape
    if given.dim() == 2:
        return given.expand(B, -1).gather(1, kept)
    if given.dim() != 4 or given.shape[0] not in (1, B):
        raise UnsupportedError(
            f"the attention mask has the shape {tuple(given.shape)}; with merged tokens it can be [{B}, N] or "
            f"[{B} or 1, heads or 1, 1 or N, N]."
        )
    heads, queries = given.shape[1:3]
    given = given.expand(B, *given.shape[1:])
    if queries > 1:
        given = given.gather(2, kept[:, None, :, None].expand(B, heads, M, given.shape[3]))
    return given.gather(3, kept[:, None, None, :].expand(B, heads, given.shape[2], M))


def keys_of_mask(given: Tensor) -> Tensor:
    """Return the visible keys, `[B, N]` bool, of a bool or additive mask `[B, N]` or `[B, 1, 1 or N, N]`."""
    seen = given if given.dtype == torch.bool else given > torch.finfo(given.dtype).min / 2
    return seen if seen.dim() == 2 else seen.any(dim=2)[:, 0]


def add_bias(given: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:  # [B, ..., M], [B, M]
    """Combine a bool or additive mask `[B or 1, H or 1, 1 or M, M]` and a bias per key into one additive mask."""
    if bias is None:
        return given
    bias = bias.to(dtype)[:, None, None, :]
    if given is None:
        return bias
    if given.dtype == torch.bool:
        # -inf, not the lowest finite number: adding a bias to that overflows to -inf in some rows only
        return torch.where(given, bias, float("-inf"))
    return given.to(dtype) + bias
