"""Base class of the timm adapters: the list of blocks, the layout from `patch_embed`, and pooling."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenmerge._intercept.pooling import BiasedPool, PoolGuard
from tokenmerge.adapters.base import Adapter, Binding, Context, Host, Override, Sizes, Surroundings, TokenLayout

__all__ = ["TIMM", "TimmAdapter", "pooling", "stem_layout"]

TIMM = Host(
    package="timm",
    loops=("forward", "forward_features", "blocks.forward"),
    token_methods=("forward_features", "forward_intermediates"),
    cut_by="patch_embed",
)
_SIZES: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 10,
}


class TimmAdapter(Adapter):
    """Base class of timm families. A subclass sets models and blocks in `host` and `specs`, and its pooling."""

    sizes: ClassVar[Mapping[str, Any]] = {}  # options of the tiny model, besides `_SIZES`

    def layout(self, model: Any) -> TokenLayout:
        embed, prefix = model.patch_embed, int(model.num_prefix_tokens)
        has_class = getattr(model, "cls_token", None) is not None  # the prefix may be registers only
        if not hasattr(embed, "dynamic_feat_size"):
            # a custom stem: the number of tokens is known in the forward only, the grid never
            return TokenLayout(prefix, None, None, None, has_class=has_class)
        size = tuple(getattr(embed, "img_size", None) or (224, 224))
        grid = embed.dynamic_feat_size(size)
        channels = next((m.in_channels for m in embed.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), 3)
        # the three axes of video are no grid of rows and columns, so methods that need a grid are rejected
        plane = grid if len(grid) == 2 else None
        return TokenLayout(prefix, plane, prefix + math.prod(grid), (channels, *size), has_class=has_class)

    def surroundings(self, model: Any) -> Surroundings:
        is_pooled = model.global_pool or getattr(model, "attn_pool", None) is not None
        handed_out = None if is_pooled else "global_pool='' hands out every token"
        return replace(super().surroundings(model), handed_out=handed_out)

    def tiny(self) -> tuple[nn.Module, Tensor]:
        module, _, name = next(iter(self.host.models)).rpartition(".")
        model: nn.Module = getattr(import_module(module), name)(**_SIZES, **self.sizes)
        return model.eval(), torch.randn(2, 3, 32, 32)


def pooling(
    model: Any, context: Context, mean: Callable[[nn.Module, Sizes], Override], start: int = 0
) -> list[Binding]:
    """Return overrides that make a timm model pool by size, and reject pooling types set after it was patched.

    `mean` replaces the pooling method; an attention pool gets the tokens from `start` on.
    """
    if context.sizes is None:
        return []
    found = [mean(model, context.sizes)]
    # bind both: the attention pool may be removed later
    pool = getattr(model, "attn_pool", None)
    if isinstance(pool, nn.Module):
        found.append(BiasedPool(pool, context.sizes, start))
    if context.must_refuse:
        found.append(PoolGuard(model, found[0].attribute, context.is_merging))
    return [Binding(override.owner, override.attribute, override) for override in found]


def stem_layout(embed: Any, prefix: int = 0, has_class: bool | None = None) -> TokenLayout:
    """Return the layout of a patch embedding built for one image size."""
    if not all(hasattr(embed, name) for name in ("grid_size", "proj", "img_size")):  # a custom stem
        return TokenLayout(prefix, None, None, None, has_class=has_class)
    height, width = embed.grid_size
    size = (embed.proj.in_channels, *embed.img_size)
    return TokenLayout(prefix, (height, width), prefix + height * width, size, has_class=has_class)
