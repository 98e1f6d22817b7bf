"""Pooling that weights each token by its size.

Shapes: B batch, M tokens out, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge._intercept.override import Override
from tokenmerge.errors import UnsupportedError

__all__ = ["BiasedPool", "HeadMean", "InputMean", "OutputMean", "PoolGuard", "Sizes", "weigh"]

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


class OutputMean(Override):
    """Override of a module whose output the host averages over the tokens from `start` on."""

    def __init__(self, owner: nn.Module, sizes: Sizes, start: int, batch_first: bool = True) -> None:
        super().__init__(owner)
        self.sizes, self.start, self.batch_first = sizes, start, batch_first

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.original(*args, **kwargs)
        if self.batch_first:
            return weigh(out, self.sizes(out, 0), self.start)
        out = out.transpose(0, 1)
        return weigh(out, self.sizes(out, 0), self.start).transpose(0, 1)


class InputMean(Override):
    """Override of timm's `pool(x, pool_type)`: weights the mean by size; other pool types are unchanged."""

    def __init__(self, owner: nn.Module, sizes: Sizes) -> None:
        super().__init__(owner, "pool")
        self.sizes = sizes

    def __call__(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        kind = self.owner.global_pool if pool_type is None else pool_type
        if kind not in ("avg", "avgmax") or getattr(self.owner, "attn_pool", None) is not None:
            pooled: Tensor = self.original(x, pool_type)
            return pooled
        mean: Tensor = self.original(weigh(x, self.sizes(x, 0), _first(self.owner)), "avg")
        return mean if kind == "avg" else 0.5 * (self.original(x, "max") + mean)


class HeadMean(Override):
    """Override of timm's `forward_head(x, ...)`: weights the mean by size if `global_pool` is "avg"."""

    def __init__(self, owner: nn.Module, sizes: Sizes) -> None:
        super().__init__(owner, "forward_head")
        self.sizes = sizes

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weighed = weigh(x, self.sizes(x, 0), _first(self.owner)) if self.owner.global_pool == "avg" else x
        out: Tensor = self.original(weighed, *args, **kwargs)
        return out


def _first(model: Any) -> int:
    """Return the index of the first token that timm averages."""
    return 0 if getattr(model, "pool_include_prefix", False) else int(model.num_prefix_tokens)


class PoolGuard(Override):
    """A timm model's method that pools: refuses, while tokens are merged, kinds that were not there to be prepared."""

    def __init__(self, owner: nn.Module, attribute: str, is_merging: Callable[[], bool]) -> None:
        super().__init__(owner, attribute)
        self.is_merging, self.pool = is_merging, getattr(owner, "attn_pool", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        pool = getattr(self.owner, "attn_pool", None)
        if pool is None:
            changed = "" if self.owner.global_pool else "hands out its tokens (global_pool='')"
        else:
            changed = "" if pool is self.pool else "has another attn_pool"
        if changed and self.is_merging():
            raise UnsupportedError(
                f"this {type(self.owner).__qualname__} {changed} since it was patched, and tokens are merged (r is not "
                "0): call handle.remove() and patch it again, or patch it with restore='dense'."
            )
        return self.original(*args, **kwargs)


class BiasedPool(Override):
    """Override of an attention pool that takes `attn_mask`: adds log(size) to its scores."""

    def __init__(self, owner: nn.Module, sizes: Sizes, start: int) -> None:
        super().__init__(owner)
        self.sizes, self.start = sizes, start

    def __call__(self, x: Tensor) -> Tensor:
        size = self.sizes(x, self.start)
        mask = None if size is None else size[:, self.start :].log().to(x.dtype)[:, None, None, :]
        pooled: Tensor = self.original(x) if mask is None else self.original(x, attn_mask=mask)
        return pooled
