"""timm's vision transformers with relative positions, as a bias or an MLP, per block or shared by all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from tokenmerge._intercept.pair_bias import PairTap, pairs, sample_pairs
from tokenmerge._intercept.pooling import HeadMean
from tokenmerge._intercept.taps import AttentionTap
from tokenmerge.adapters.base import Binding, BlockSpec, Context, TokenLayout
from tokenmerge.adapters.timm.base import TIMM, TimmAdapter, pooling
from tokenmerge.adapters.timm.vit import timm_spec

__all__ = ["TimmRelPos"]


class TimmRelPos(TimmAdapter):
    name = "timm_relpos"
    families = "timm ViTs with relative positions (vit_relpos_*, vit_srelpos_*)"
    landmarks = ("blocks", "norm1", "attn", "qkv", "norm2", "mlp", "patch_embed", "rel_pos")
    sizes: ClassVar = {"rel_pos_dim": 16}
    host = replace(
        TIMM,
        models=("timm.models.vision_transformer_relpos.VisionTransformerRelPos",),
        followers={"shared_rel_pos": pairs},
        is_positional=True,
        heads=("forward_head", "norm.forward", "fc_norm.forward"),
    )

    def spec(self, block: Any) -> BlockSpec:
        return timm_spec(block)

    def tap(self, block: Any) -> AttentionTap:
        return PairTap(block, "attn", _table(block), "get_bias", "shared_rel_pos")

    def overrides(self, model: Any, context: Context) -> list[Binding]:
        return pooling(model, context, HeadMean)

    def sample(self, model: Any, block: Any, layout: TokenLayout) -> tuple[int, dict[str, Any]]:
        if model.shared_rel_pos is None:
            return layout.tokens or 0, {}
        n = super().sample(model, block, layout)[0]
        return n, {"shared_rel_pos": sample_pairs(block.attn.num_heads, n, block.attn.proj.weight)}


def _table(block: Any) -> str | None:
    """Return the path of the module that holds the block's own bias, or None."""
    return None if block.attn.rel_pos is None else "attn.rel_pos"
