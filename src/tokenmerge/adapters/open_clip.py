"""CLIP of open_clip and of OpenAI's own repository: the vision tower, alone or inside the whole model.

Shapes: B batch, M tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge._intercept.multihead import multihead
from tokenmerge._intercept.pooling import weigh
from tokenmerge.adapters.base import (
    Adapter,
    Binding,
    BlockSpec,
    Context,
    Host,
    Override,
    Sizes,
    Surroundings,
    TokenLayout,
    class_names,
)
from tokenmerge.adapters.within import Within
from tokenmerge.errors import UnsupportedError, UnsupportedModelError

__all__ = ["OpenClip"]

_TIMM = "open_clip.timm_model.TimmModel"


class OpenClip(Adapter):
    name = "open_clip"
    families = "CLIP and CoCa of open_clip, CLIP of OpenAI's repository: whole models and their vision towers"
    landmarks = ("visual", "conv1", "transformer", "resblocks", "ln_1", "attn", "ln_2", "mlp")
    # OpenAI's models are recognised by structure and tested
    host = Host(
        "open_clip",
        blocks="transformer.resblocks",
        loops=("forward", "transformer.forward"),
        heads=("_pool", "_global_pool", "ln_post.forward"),
        token_methods=("forward_intermediates",),
        cut_by="conv1",
    )

    def matches(self, model: Any) -> bool:
        return any(_is_ours(part) for part in (model, getattr(model, "visual", None)))

    def resolve(self, model: Any) -> Adapter:
        from tokenmerge.adapters import find

        # the text tower has the same blocks; only those of the vision tower are patched
        path = "visual" if isinstance(getattr(model, "visual", None), nn.Module) else "trunk"
        part = getattr(model, path, None)
        return self if part is None else Within(path, find(part), self.host.token_methods)

    def blocks(self, model: Any) -> list[tuple[str, nn.Module]]:
        if not _is_tower(model):
            raise UnsupportedModelError(
                f"{type(model).__qualname__} is a text tower: its attention is causal and its end token is found by "
                "its place, so its tokens are not merged. Patch the vision tower or the whole model."
                if hasattr(model, "token_embedding")
                else f"{type(model).__qualname__} is convolutional: it has no tokens before its attention pool. Choose "
                "a ViT model of CLIP."
            )
        return super().blocks(model)

    def spec(self, block: Any) -> BlockSpec:
        if getattr(block, "attn_mask", None) is not None or hasattr(block, "ln_1_kv"):
            raise UnsupportedModelError(
                f"this {type(block).__qualname__} has a mask or a cross-attention of its own: it belongs to a text "
                "tower or a decoder, whose tokens are not merged."
            )
        # older versions have no scaled attention and no layer scale
        scaled = [name for name in ("ln_attn", "ls_1") if hasattr(block, name)]
        mlp = ("ln_2", "mlp", *(["ls_2"] if hasattr(block, "ls_2") else []))
        return BlockSpec(attention=("ln_1", "attn", *scaled), attn="attn", mlp=mlp)

    def layout(self, model: Any) -> TokenLayout:
        attn: Any = self.blocks(model)[0][1].attn
        tokens = int(model.positional_embedding.shape[0])
        side = int((tokens - 1) ** 0.5)
        rows, columns = getattr(model, "grid_size", (side, side))
        conv: nn.Conv2d = model.conv1
        pixels = (int(rows * conv.stride[0]), int(columns * conv.stride[1]))
        plain = multihead(attn)
        batch_first = plain is None or plain.batch_first
        return TokenLayout(1, (int(rows), int(columns)), tokens, (conv.in_channels, *pixels), batch_first)

    def surroundings(self, model: Any) -> Surroundings:
        last = None
        if getattr(model, "attn_pool", None) is not None:
            last = "its attention pool looks at every token"
        elif getattr(model, "global_average_pool", False):
            last = "versions of open_clip before pool_type average all tokens, the class token too"
        handed_out = "the tower hands its tokens out (output_tokens, or pool_type='none')" if _is_open(model) else None
        return replace(super().surroundings(model), last=last, handed_out=handed_out)

    def overrides(self, model: Any, context: Context) -> list[Binding]:
        if context.sizes is None or not hasattr(model, "_global_pool"):
            return []
        found: list[Override] = [_PatchMean(model, context.sizes)]
        if context.must_refuse:
            found.append(_Unchanged(model, context.is_merging))
        return [Binding(model, "_global_pool", override) for override in found]

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from tokenmerge.testing.models.clip import ClipTowerStandIn

        return ClipTowerStandIn().eval(), torch.randn(2, 3, 32, 32)


class _PatchMean(Override):
    """open_clip's `_global_pool(x)`: weights by size where it averages the tokens behind the class token."""

    def __init__(self, owner: nn.Module, sizes: Sizes) -> None:
        super().__init__(owner, "_global_pool")
        self.sizes = sizes

    def __call__(self, x: Tensor) -> Any:  # [B, M, C]
        pooled, tokens = self.original(x)
        if getattr(self.owner, "pool_type", "tok") == "avg":
            pooled = self.original(weigh(x, self.sizes(x, 0), 1))[0]
        return pooled, tokens


class _Unchanged(Override):
    """open_clip's `_global_pool(x)`: while merging, raises if the pooling was changed after patching."""

    def __init__(self, owner: nn.Module, is_merging: Callable[[], bool]) -> None:
        super().__init__(owner, "_global_pool")
        self.is_merging = is_merging

    def __call__(self, x: Tensor) -> Any:
        tower: Any = self.owner
        if (_is_open(tower) or tower.attn_pool is not None) and self.is_merging():
            raise UnsupportedError(
                f"this {type(tower).__qualname__} was given another pooling since it was patched (output_tokens, "
                "pool_type, attn_pool), and tokens are merged (r is not 0): call handle.remove() and patch it again."
            )
        return self.original(x)


def _is_open(tower: Any) -> bool:
    """Return whether the tower returns tokens."""
    return getattr(tower, "output_tokens", False) or getattr(tower, "pool_type", "tok") not in ("tok", "avg")


def _is_ours(part: Any) -> bool:
    if not isinstance(part, nn.Module):
        return False
    is_resnet = hasattr(part, "attnpool") and hasattr(part, "layer4")
    is_text = hasattr(part, "token_embedding") and _has_blocks(part)
    return _is_tower(part) or is_resnet or is_text or _TIMM in class_names(part)


def _is_tower(part: Any) -> bool:
    return _has_blocks(part) and all(hasattr(part, name) for name in ("conv1", "class_embedding", "ln_post"))


def _has_blocks(part: Any) -> bool:
    return hasattr(getattr(part, "transformer", None), "resblocks")
