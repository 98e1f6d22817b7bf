"""timm's BEiT and BEiT v2: relative positions as a bias in every attention, or one shared by all blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from tokenmerge._intercept.pair_bias import PairTap, pairs, sample_pairs
from tokenmerge._intercept.pooling import HeadMean
from tokenmerge._intercept.projections import listen_with_biases
from tokenmerge._intercept.taps import AttentionTap
from tokenmerge.adapters.base import Binding, BlockSpec, Context, TokenLayout
from tokenmerge.adapters.timm.base import TIMM, TimmAdapter, pooling

__all__ = ["TimmBeit"]


class TimmBeit(TimmAdapter):
    name = "timm_beit"
    families = "timm BEiT, BEiT v2"
    landmarks = ("blocks", "norm1", "attn", "qkv", "norm2", "mlp", "patch_embed", "rel_pos_bias")
    sizes: ClassVar = {"init_values": 0.5, "use_abs_pos_emb": False, "use_rel_pos_bias": True}
    host = replace(
        TIMM,
        models=("timm.models.beit.Beit",),
        followers={"shared_rel_pos_bias": pairs},
        is_positional=True,
        heads=("forward_head", "norm.forward", "fc_norm.forward"),
    )
    specs: ClassVar = {
        "timm.models.beit.Block": BlockSpec(
            attention=("norm1", "attn", "gamma_1", "drop_path1"),
            attn="attn",
            mlp=("norm2", "mlp", "gamma_2", "drop_path2"),
        )
    }

    def tap(self, block: Any) -> AttentionTap:
        return _BeitTap(block, "attn", _table(block), "_get_rel_pos_bias", "shared_rel_pos_bias")

    def overrides(self, model: Any, context: Context) -> list[Binding]:
        return pooling(model, context, HeadMean)

    def sample(self, model: Any, block: Any, layout: TokenLayout) -> tuple[int, dict[str, Any]]:
        n = super().sample(model, block, layout)[0] if _table(block) is None else layout.tokens or 0
        if model.rel_pos_bias is None:
            return n, {}
        return n, {"shared_rel_pos_bias": sample_pairs(block.attn.num_heads, n, block.attn.proj.weight)}


def _table(block: Any) -> str | None:
    """Return the path of the module that holds the block's own bias, or None."""
    return None if block.attn.relative_position_bias_table is None else "attn"


class _BeitTap(PairTap):
    """Intercepts `qkv`, which an attention with biases for q and v does not call: it uses the weight alone."""

    def seams(self, needs: frozenset[str]) -> list[Binding]:
        attn: Any = self.attn
        found = super().seams(needs)
        if not needs or attn.q_bias is None:
            return found
        return listen_with_biases(self, found, needs)
