"""MAE's fine-tuning models as their own repository defines them: a ViT with a boolean `global_pool`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge.adapters.base import Adapter, Binding, BlockSpec, Context, Host, Surroundings, TokenLayout
from tokenmerge.adapters.repos.base import PRE_NORM, mean_behind, square_layout

__all__ = ["MAE"]


class MAE(Adapter):
    name = "mae"
    families = "MAE fine-tuning models of their own repository (class token or global pool)"
    landmarks = ("blocks", "norm1", "attn", "qkv", "norm2", "mlp", "patch_embed", "fc_norm")
    host = Host(cut_by="patch_embed.proj")
    # older copies of the block have no layer scale, and one drop path for both branches
    specs = (
        BlockSpec(
            attention=("norm1", "attn", "ls1", "drop_path1"), attn="attn", mlp=("norm2", "mlp", "ls2", "drop_path2")
        ),
        PRE_NORM,
    )

    def matches(self, model: Any) -> bool:
        children = dict(model.named_children())
        has_parts = {"blocks", "patch_embed", "head"} <= children.keys() and hasattr(model, "cls_token")
        return has_parts and isinstance(getattr(model, "global_pool", None), bool)

    def layout(self, model: Any) -> TokenLayout:
        return square_layout(getattr(model.patch_embed, "proj", None), int(model.pos_embed.shape[1]) - 1, prefix=1)

    def surroundings(self, model: Any) -> Surroundings:
        return replace(super().surroundings(model), without_merging=None)

    def overrides(self, model: Any, context: Context) -> list[Binding]:
        # forward_features averages the last block's patches before fc_norm
        return mean_behind(self.blocks(model)[-1][1], context, start=1) if model.global_pool else []

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from tokenmerge.adapters.standins.plain import MAEStandIn

        return MAEStandIn().eval(), torch.randn(2, 3, 32, 32)
