"""timm's BEiT and BEiT v2: relative positions as a bias in every attention, or one that all blocks share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenmerge._intercept.pair_bias import PairTap, pairs, placed_pairs, sample_pairs
from tokenmerge._intercept.pooling import HeadMean, PoolGuard
from tokenmerge._intercept.projections import listen_with_biases
from tokenmerge._intercept.taps import AttentionTap
from tokenmerge.adapters.base import Adapter, Binding, BlockSpec, Follow, Sizes, TokenLayout, class_names
from tokenmerge.adapters.timm.vit import timm_blocks, timm_layout, timm_tokens
from tokenmerge.errors import UnsupportedModelError

__all__ = ["TimmBeit"]

_SPEC = BlockSpec(
    attention=("norm1", "attn", "gamma_1", "drop_path1"), attn="attn", mlp=("norm2", "mlp", "gamma_2", "drop_path2")
)


class TimmBeit(Adapter):
    name = "timm_beit"
    families = "timm BEiT, BEiT v2"
    landmarks = ("blocks", "norm1", "attn", "qkv", "norm2", "mlp", "patch_embed", "rel_pos_bias")
    cut_by = "patch_embed"
    followers: ClassVar[Mapping[str, Follow]] = {"shared_rel_pos_bias": pairs}
    is_positional = True
    token_methods = ("forward_features", "forward_intermediates")
    package = "timm"
    loops = ("forward", "forward_features", "blocks.forward")
    heads = ("forward_head", "norm.forward", "fc_norm.forward")

    def matches(self, model: Any) -> bool:
        return "timm.models.beit.Beit" in class_names(model)

    def blocks(self, model: Any) -> list[tuple[str, nn.Module]]:
        return timm_blocks(model)

    def spec(self, block: Any) -> BlockSpec:
        if "timm.models.beit.Block" not in class_names(block):
            raise UnsupportedModelError(f"blocks of class {class_names(block)[0]} are not described: Beit has Block.")
        return _SPEC

    def layout(self, model: Any) -> TokenLayout:
        return timm_layout(model, int(model.num_prefix_tokens))

    def tap(self, block: Any) -> AttentionTap:
        return _BeitTap(block, "attn", _table(block), "_get_rel_pos_bias", "shared_rel_pos_bias")

    def head(self, model: Any, sizes: Sizes) -> tuple[list[Binding], list[str]]:
        return [Binding(model, "forward_head", HeadMean(model, sizes))], []

    def guards(self, model: Any, is_merging: Callable[[], bool]) -> list[Binding]:
        return [Binding(model, "forward_head", PoolGuard(model, "forward_head", is_merging))]

    def hands_out(self, model: Any) -> str | None:
        return timm_tokens(model)

    def sample(self, model: Any, block: Any, layout: TokenLayout) -> tuple[int, dict[str, Any]]:
        n = super().sample(model, block, layout)[0] if _table(block) is None else layout.tokens or 0
        if model.rel_pos_bias is None:
            return n, {}
        return n, {"shared_rel_pos_bias": sample_pairs(block.attn.num_heads, n, block.attn.proj.weight)}

    def placed(self, block: Any, places: Tensor) -> list[Binding]:
        return placed_pairs(block, _table(block), "_get_rel_pos_bias", places)

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from timm.models.beit import Beit

        model = Beit(
            img_size=32,
            patch_size=8,
            embed_dim=32,
            depth=4,
            num_heads=4,
            num_classes=10,
            init_values=0.5,
            use_abs_pos_emb=False,
            use_rel_pos_bias=True,
        )
        return model.eval(), torch.randn(2, 3, 32, 32)


def _table(block: Any) -> str | None:
    """Return the path of what holds the block's own bias, if it has one."""
    return None if block.attn.relative_position_bias_table is None else "attn"


class _BeitTap(PairTap):
    """Listens on `qkv`, which an attention with biases for q and v passes by: it uses the weight alone."""

    def seams(self, needs: frozenset[str]) -> list[Binding]:
        attn: Any = self.attn
        found = super().seams(needs)
        if not needs or attn.q_bias is None:
            return found
        return listen_with_biases(self, found, needs)
