"""timm's vision transformers with relative positions as a bias or an MLP, in every block or shared by all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenmerge._intercept.pair_bias import PairTap, pairs, placed_pairs, sample_pairs
from tokenmerge._intercept.pooling import HeadMean, PoolGuard
from tokenmerge._intercept.taps import AttentionTap
from tokenmerge.adapters.base import Adapter, Binding, BlockSpec, Follow, Sizes, TokenLayout, class_names
from tokenmerge.adapters.timm.vit import timm_blocks, timm_layout, timm_spec, timm_tokens

__all__ = ["TimmRelPos"]


class TimmRelPos(Adapter):
    name = "timm_relpos"
    families = "timm ViTs with relative positions (vit_relpos_*, vit_srelpos_*)"
    landmarks = ("blocks", "norm1", "attn", "qkv", "norm2", "mlp", "patch_embed", "rel_pos")
    cut_by = "patch_embed"
    followers: ClassVar[Mapping[str, Follow]] = {"shared_rel_pos": pairs}
    is_positional = True
    token_methods = ("forward_features", "forward_intermediates")
    package = "timm"
    loops = ("forward", "forward_features", "blocks.forward")
    heads = ("forward_head", "norm.forward", "fc_norm.forward")

    def matches(self, model: Any) -> bool:
        return "timm.models.vision_transformer_relpos.VisionTransformerRelPos" in class_names(model)

    def blocks(self, model: Any) -> list[tuple[str, nn.Module]]:
        return timm_blocks(model)

    def spec(self, block: Any) -> BlockSpec:
        return timm_spec(block)

    def layout(self, model: Any) -> TokenLayout:
        return timm_layout(model, int(model.num_prefix_tokens))

    def tap(self, block: Any) -> AttentionTap:
        return PairTap(block, "attn", _table(block), "get_bias", "shared_rel_pos")

    def head(self, model: Any, sizes: Sizes) -> tuple[list[Binding], list[str]]:
        return [Binding(model, "forward_head", HeadMean(model, sizes))], []

    def guards(self, model: Any, is_merging: Callable[[], bool]) -> list[Binding]:
        return [Binding(model, "forward_head", PoolGuard(model, "forward_head", is_merging))]

    def hands_out(self, model: Any) -> str | None:
        return timm_tokens(model)

    def sample(self, model: Any, block: Any, layout: TokenLayout) -> tuple[int, dict[str, Any]]:
        if model.shared_rel_pos is None:
            return layout.tokens or 0, {}
        n = super().sample(model, block, layout)[0]
        return n, {"shared_rel_pos": sample_pairs(block.attn.num_heads, n, block.attn.proj.weight)}

    def placed(self, block: Any, places: Tensor) -> list[Binding]:
        return placed_pairs(block, _table(block), "get_bias", places)

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from timm.models.vision_transformer_relpos import VisionTransformerRelPos

        model = VisionTransformerRelPos(
            img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, num_classes=10, rel_pos_dim=16
        )
        return model.eval(), torch.randn(2, 3, 32, 32)


def _table(block: Any) -> str | None:
    """Return the path of what holds the block's own bias, if it has one."""
    return None if block.attn.rel_pos is None else "attn.rel_pos"
