"""timm's NaFlexVit: images of different sizes in one batch, padded to the longest and masked.

Shapes: B batch, N tokens (prefix, then patches, then padding), M tokens left, H heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge._intercept import follow
from tokenmerge._intercept.override import Override
from tokenmerge._intercept.taps import AttentionTap
from tokenmerge.adapters.base import (
    PROBED,
    Binding,
    BlockSpec,
    Context,
    Surroundings,
    TokenLayout,
    class_names,
    grid_of_call,
)
from tokenmerge.adapters.timm.base import TIMM, TimmAdapter
from tokenmerge.adapters.timm.eva import EVA_SPECS, RopeTap, moved_by_tap, sample_rope
from tokenmerge.adapters.timm.vit import TimmViT, timm_spec
from tokenmerge.errors import UnsupportedError

__all__ = ["TimmNaFlex"]


def _by_image(mask: Tensor) -> Tensor:
    """Return a mask as `[B or 1, H or 1, 1 or N, N]`; a mask for all images may be `[N, N]`."""
    return mask[None, None] if mask.dim() == 2 else mask


def _mask(given: Tensor, kept: Tensor) -> Tensor:
    return follow.mask(_by_image(given), kept)


def _seen(mask: Tensor) -> Tensor:
    """Return which keys are visible to any query in any head."""
    return follow.keys_of_mask(_by_image(mask).amax(dim=1, keepdim=True))


def _grid_of(cutter: Any, image: Any, out: Any) -> tuple[int, int] | None:
    # out[1] is the grid of an image; None for patches with coordinates, whose images may differ in shape
    if isinstance(out, tuple):
        return out[1] and (out[1][0], out[1][1])
    return grid_of_call(cutter, image, out) if image.dim() == 4 else None


class TimmNaFlex(TimmAdapter):
    name = "timm_naflex"
    families = "timm NaFlexViT and C-RADIO, images or dictionaries of padded patches; use_naflex=True of ViT and EVA"
    landmarks = ("embeds", "blocks", "norm1", "attn", "norm2", "mlp", "fc_norm", "attn_pool")
    host = replace(
        TIMM,
        models=("timm.models.naflexvit.NaFlexVit",),
        followers={"rope": moved_by_tap, "attn_mask": _mask},
        padding={"attn_mask": _seen},
        is_positional=True,  # for models with rotary tables
        cut_by="embeds",
        grid_of=_grid_of,
    )

    def spec(self, block: Any) -> BlockSpec:
        return _eva_spec(block) or timm_spec(block)

    def layout(self, model: Any) -> TokenLayout:
        embeds, prefix = model.embeds, int(model.num_prefix_tokens)
        has_class = getattr(embeds, "cls_token", None) is not None
        if not all(hasattr(embeds, name) for name in ("patch_size", "pos_embed_grid_size", "dynamic_feat_size")):
            return TokenLayout(prefix, None, None, None, has_class=has_class)
        height, width = embeds.patch_size
        config = getattr(model, "pretrained_cfg", None) or {}
        size = getattr(embeds, "default_img_size", None) or config.get("input_size", (None,))[1:]
        if not size:
            if not embeds.pos_embed_grid_size:
                return TokenLayout(prefix, None, None, None, has_class=has_class)
            size = (embeds.pos_embed_grid_size[0] * height, embeds.pos_embed_grid_size[1] * width)
        grid = embeds.dynamic_feat_size(size)
        channels = embeds.proj.weight[0].numel() // (height * width)
        return TokenLayout(prefix, grid, prefix + grid[0] * grid[1], (channels, *size), has_class=has_class)

    def tap(self, block: Any) -> AttentionTap:
        return RopeTap(block, "attn") if _eva_spec(block) else TimmViT().tap(block)

    def sample(self, model: Any, block: Any, layout: TokenLayout) -> tuple[int, dict[str, Any]]:
        rope = getattr(model, "rope", None)  # timm 1.0.16 has none here
        return layout.prefix + PROBED, {} if rope is None else {"rope": sample_rope(block.attn, PROBED)}

    def surroundings(self, model: Any) -> Surroundings:
        found = super().surroundings(model)
        masked = "pooling leaves out padding by a mask that is made for every place"
        return replace(found, last=None if found.handed_out else masked)

    def overrides(self, model: Any, context: Context) -> list[Binding]:
        names = ("forward", *self.host.token_methods)
        return [Binding(model, name, _Masked(model, name, context.is_merging)) for name in names]

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from timm.models.naflexvit import NaFlexVit

        model = NaFlexVit(
            num_classes=10,
            patch_size=8,
            embed_dim=32,
            depth=4,
            num_heads=4,
            pos_embed_grid_size=(4, 4),
            global_pool="avg",
            class_token=True,
            reg_tokens=1,
            init_values=0.5,
        )
        return model.eval(), torch.randn(2, 3, 32, 32)


def _eva_spec(block: nn.Module) -> BlockSpec | None:
    return next((EVA_SPECS[name] for name in class_names(block) if name in EVA_SPECS), None)


class _Masked(Override):
    """A model method that takes patches: while merging, rejects patches whose padding is not marked."""

    def __init__(self, model: nn.Module, name: str, is_merging: Callable[[], bool]) -> None:
        super().__init__(model, name)
        self.is_merging = is_merging
        self.__signature__ = inspect.signature(getattr(model, name))
        self.names = list(self.__signature__.parameters)

    @property
    def __code__(self) -> Any:
        """The code object by which `torch.export` names the forward."""
        return getattr(type(self.owner), self.attribute).__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_merging():
            given = self.by_name(args, kwargs)
            first = given.get(self.names[0])
            given = {**given, **first} if isinstance(first, dict) else given
            coordinates = given.get("patch_coord")
            is_masked = any(given.get(name) is not None for name in ("patch_valid", "attn_mask"))
            if coordinates is not None and not is_masked:
                raise UnsupportedError(
                    f"{self.attribute}() got patch_coord {tuple(coordinates.shape)} without patch_valid while tokens "
                    "are merged: images of different sizes are padded to the longest, and padding that is not marked "
                    "would be merged with patches. Pass patch_valid [B, N], True for patches and False for padding."
                )
        return self.original(*args, **kwargs)
