"""MAE's fine-tuning models as their own repository defines them: a ViT with a boolean `global_pool`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge._intercept.pooling import OutputMean
from tokenmerge._intercept.taps import AttentionTap, SeamTap
from tokenmerge.adapters.base import Adapter, Binding, BlockSpec, Sizes, TokenLayout
from tokenmerge.adapters.timm.vit import timm_blocks
from tokenmerge.errors import UnsupportedModelError

__all__ = ["MAE"]

# older copies of the block have no layer scale, and one drop path for both branches
_SPECS = (
    BlockSpec(attention=("norm1", "attn", "ls1", "drop_path1"), attn="attn", mlp=("norm2", "mlp", "ls2", "drop_path2")),
    BlockSpec(attention=("norm1", "attn", "drop_path"), attn="attn", mlp=("norm2", "mlp", "drop_path")),
)


class MAE(Adapter):
    name = "mae"
    families = "MAE fine-tuning models of their own repository (class token or global pool)"
    landmarks = ("blocks", "norm1", "attn", "qkv", "norm2", "mlp", "patch_embed", "fc_norm")
    cut_by = "patch_embed.proj"

    def matches(self, model: Any) -> bool:
        children = dict(model.named_children())
        has_parts = {"blocks", "patch_embed", "head"} <= children.keys() and hasattr(model, "cls_token")
        return has_parts and isinstance(getattr(model, "global_pool", None), bool)

    def blocks(self, model: Any) -> list[tuple[str, nn.Module]]:
        return timm_blocks(model)

    def spec(self, block: Any) -> BlockSpec:
        children = {name for name, _ in block.named_children()}
        for spec in _SPECS:
            if set(spec.attention + spec.mlp) <= children:
                return spec
        raise UnsupportedModelError(
            f"a block with the children {sorted(children)} is not one of MAE's: expected "
            f"{sorted(set(_SPECS[1].attention + _SPECS[1].mlp))}."
        )

    def layout(self, model: Any) -> TokenLayout:
        conv = getattr(model.patch_embed, "proj", None)
        if not isinstance(conv, nn.Conv2d):  # a stem of the user's own
            return TokenLayout(1, None, None, None)
        tokens = int(model.pos_embed.shape[1])
        side = int((tokens - 1) ** 0.5)
        pixels = side * conv.stride[0]
        return TokenLayout(1, (side, side), tokens, (conv.in_channels, pixels, pixels))

    def tap(self, block: Any) -> AttentionTap:
        return SeamTap(block, "attn")

    def head(self, model: Any, sizes: Sizes) -> tuple[list[Binding], list[str]]:
        if not model.global_pool:
            return [], []
        # forward_features averages the last block's patches before fc_norm
        last = self.blocks(model)[-1][1]
        return [Binding(last, "forward", OutputMean(last, sizes, start=1))], []

    def trained_without_merging(self, model: Any) -> tuple[bool, str | None]:
        return False, (
            "proportional attention is on, as for MAE models trained with merging; an off-the-shelf MAE checkpoint "
            "is better with prop_attn=False (arXiv:2210.09461, table 1f), and the weights do not tell"
        )

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from tokenmerge.testing.models.plain import MAEStandIn

        return MAEStandIn().eval(), torch.randn(2, 3, 32, 32)
