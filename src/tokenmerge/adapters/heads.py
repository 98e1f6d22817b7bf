"""Pooling that counts a merged token as the tokens it stands for.

Shapes: B batch, M tokens out, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge.adapters.original import Original

__all__ = ["BiasedPool", "HeadMean", "InputMean", "OutputMean", "Sizes", "weigh"]

# the sizes [B, M] of tokens [B, M - cut, C] that left the last block, by the tokens and `cut`
Sizes = Callable[[Tensor, int], "Tensor | None"]


def weigh(x: Tensor, size: Tensor | None, start: int) -> Tensor:  # [B, M, C], [B, M]
    """Scale the tokens from `start` on so that their plain mean is the size-weighted one."""
    if size is None:
        return x
    size = size[:, start:]
    scale = size * (size.shape[1] / size.sum(dim=1, keepdim=True))  # [B, M - start]
    ones = scale.new_ones(scale.shape[0], start)
    return torch.cat((ones, scale), dim=1)[..., None].to(x.dtype) * x


class OutputMean(Original):
    """A module whose output the host averages over the tokens from `start` on."""

    def __init__(self, owner: nn.Module, sizes: Sizes, start: int, batch_first: bool = True) -> None:
        super().__init__(owner)
        self.sizes, self.start, self.batch_first = sizes, start, batch_first

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.original(*args, **kwargs)
        if self.batch_first:
            return weigh(out, self.sizes(out, 0), self.start)
        out = out.transpose(0, 1)
        return weigh(out, self.sizes(out, 0), self.start).transpose(0, 1)


class InputMean(Original):
    """timm's `pool(x, pool_type)`: weighs what goes into its mean, leaves its other kinds alone."""

    def __init__(self, owner: nn.Module, sizes: Sizes, start: int) -> None:
        super().__init__(owner, "pool")
        self.sizes, self.start = sizes, start

    def __call__(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        kind = self.owner.global_pool if pool_type is None else pool_type
        if kind not in ("avg", "avgmax"):
            pooled: Tensor = self.original(x, pool_type)
            return pooled
        mean: Tensor = self.original(weigh(x, self.sizes(x, 0), self.start), "avg")
        return mean if kind == "avg" else 0.5 * (self.original(x, "max") + mean)


class HeadMean(Original):
    """timm's `forward_head(x, ...)`: where `global_pool` is "avg", its mean over the tokens from `start` on weighs."""

    def __init__(self, owner: nn.Module, sizes: Sizes, start: int) -> None:
        super().__init__(owner, "forward_head")
        self.sizes, self.start = sizes, start

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weighed = weigh(x, self.sizes(x, 0), self.start) if self.owner.global_pool == "avg" else x
        out: Tensor = self.original(weighed, *args, **kwargs)
        return out


class BiasedPool(Original):
    """An attention pool that takes `attn_mask`: log-size is added to its scores."""

    def __init__(self, owner: nn.Module, sizes: Sizes, start: int) -> None:
        super().__init__(owner)
        self.sizes, self.start = sizes, start

    def __call__(self, x: Tensor) -> Tensor:
        size = self.sizes(x, self.start)
        mask = None if size is None else size[:, self.start :].log().to(x.dtype)[:, None, None, :]
        pooled: Tensor = self.original(x) if mask is None else self.original(x, attn_mask=mask)
        return pooled
