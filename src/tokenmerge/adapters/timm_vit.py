"""timm's plain vision transformers: every model of its `vision_transformer` and `deit` modules made of `Block`s."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge.adapters.base import Adapter, BlockSpec, Replacement, Sizes, TokenLayout, class_names
from tokenmerge.adapters.heads import BiasedPool, InputMean
from tokenmerge.adapters.taps import AttentionTap, SeamTap
from tokenmerge.errors import UnsupportedModelError

__all__ = ["TimmViT", "timm_blocks", "timm_spec"]

_MODEL = "timm.models.vision_transformer.VisionTransformer"
_SPECS = {
    "Block": BlockSpec(
        attention=("norm1", "attn", "ls1", "drop_path1"), attn="attn", mlp=("norm2", "mlp", "ls2", "drop_path2")
    ),
    "ResPostBlock": BlockSpec(
        attention=("attn", "norm1", "drop_path1"), attn="attn", mlp=("mlp", "norm2", "drop_path2")
    ),
}


class TimmViT(Adapter):
    name = "timm_vit"
    families = "timm ViT, DeiT, DeiT-III, DINOv2 (with registers), CLIP, SigLIP, average-pooled ViTs"
    landmarks = ("blocks", "norm1", "attn", "qkv", "norm2", "mlp", "patch_embed", "fc_norm")
    token_methods = ("forward_features", "forward_intermediates", "get_intermediate_layers")

    def matches(self, model: Any) -> bool:
        return _MODEL in class_names(model) and not isinstance(getattr(model, "global_pool", None), bool)

    def blocks(self, model: Any) -> list[tuple[str, nn.Module]]:
        return timm_blocks(model)

    def spec(self, block: Any) -> BlockSpec:
        return timm_spec(block)

    def layout(self, model: Any) -> TokenLayout:
        embed = model.patch_embed
        prefix = int(model.num_prefix_tokens)
        height, width = getattr(embed, "img_size", None) or (224, 224)
        grid = embed.dynamic_feat_size((height, width))
        channels = next((m.in_channels for m in embed.modules() if isinstance(m, nn.Conv2d)), 3)
        return TokenLayout(prefix, grid, prefix + grid[0] * grid[1], (channels, height, width))

    def tap(self, block: Any) -> AttentionTap:
        return SeamTap(block.attn)

    def head(self, model: Any, sizes: Sizes) -> tuple[list[Replacement], list[str]]:
        start = 0 if model.pool_include_prefix else int(model.num_prefix_tokens)
        pool = model.attn_pool
        if not isinstance(pool, nn.Module):
            return [Replacement(model, "pool", InputMean(model, sizes, start))], []
        if "attn_mask" not in inspect.signature(type(pool).forward).parameters:
            return [], [f"{type(pool).__name__} takes no mask: pooling counts each merged token once"]
        if getattr(pool, "pos_embed", None) is not None:
            raise UnsupportedModelError("the attention pool adds position embeddings of its own to the tokens.")
        # `pool` has cut the prefix off before the attention pool sees the tokens
        return [Replacement(pool, "forward", BiasedPool(pool, sizes, start))], []

    def trained_without_merging(self, model: Any) -> tuple[bool, str | None]:
        tag = (getattr(model, "pretrained_cfg", None) or {}).get("tag") or ""
        return tag.startswith("mae"), None

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from timm.models.vision_transformer import VisionTransformer

        model = VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, num_classes=10, init_values=0.5, reg_tokens=1
        )
        return model.eval(), torch.randn(2, 3, 32, 32)


def timm_blocks(model: Any) -> list[tuple[str, nn.Module]]:
    """Return `model.blocks` with their names."""
    return [(f"blocks.{name}", block) for name, block in model.blocks.named_children()]


def timm_spec(block: nn.Module) -> BlockSpec:
    """Describe a timm block by its class; raises `UnsupportedModelError` for those without a place to merge."""
    for name in class_names(block):
        package, _, cls = name.rpartition(".")
        if package.startswith("timm.") and cls in _SPECS:
            return _SPECS[cls]
    raise UnsupportedModelError(
        f"blocks of class {class_names(block)[0]} are not described: only timm's {' and '.join(_SPECS)} have attention "
        "and MLP one after the other with a residual between them (parallel blocks have no place to merge)."
    )
