"""Shared by vision transformers of research repositories: block specs, square layouts, mean pooling."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokenmerge._intercept.pooling import OutputMean
from tokenmerge.adapters.base import Binding, BlockSpec, Context, TokenLayout

__all__ = ["LAYER_SCALED", "PRE_NORM", "mean_behind", "square_layout"]

LAYER_SCALED = BlockSpec(
    attention=("norm1", "attn", "ls1", "drop_path1"), attn="attn", mlp=("norm2", "mlp", "ls2", "drop_path2")
)
# a block without layer scale, with one drop path for both branches
PRE_NORM = BlockSpec(attention=("norm1", "attn", "drop_path"), attn="attn", mlp=("norm2", "mlp", "drop_path"))


def square_layout(conv: Any, patches: int, prefix: int, batch_first: bool = True) -> TokenLayout:
    """Return the layout for a square image with this number of position embeddings for patches, cut by `conv`."""
    if not isinstance(conv, nn.Conv2d):  # a custom stem
        return TokenLayout(prefix, None, None, None, batch_first)
    side = int(patches**0.5)
    if side**2 != patches:
        return TokenLayout(prefix, None, prefix + patches, None, batch_first)
    size = (conv.in_channels, side * conv.stride[0], side * conv.stride[1])
    return TokenLayout(prefix, (side, side), prefix + patches, size, batch_first)


def mean_behind(module: nn.Module, context: Context, start: int, batch_first: bool = True) -> list[Binding]:
    """Return the override that weights the mean over the tokens from `start` on of `module`'s output by size."""
    if context.sizes is None:
        return []
    return [Binding(module, "forward", OutputMean(module, context.sizes, start, batch_first))]
