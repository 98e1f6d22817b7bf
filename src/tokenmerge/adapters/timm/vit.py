"""timm's plain vision transformers: its `vision_transformer`, `vision_transformer_hybrid`, `deit` and `vitamin`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge._intercept.parallel import BranchesTap, ScalingTap
from tokenmerge._intercept.pooling import BiasedPool, InputMean, PoolGuard
from tokenmerge._intercept.taps import AttentionTap, SeamTap
from tokenmerge.adapters.base import Adapter, Binding, BlockSpec, Sizes, TokenLayout, class_names
from tokenmerge.errors import UnsupportedModelError

__all__ = ["TimmViT", "timm_blocks", "timm_layout", "timm_spec", "timm_tokens"]

_MODEL = "timm.models.vision_transformer.VisionTransformer"
_PRE_NORM = BlockSpec(
    attention=("norm1", "attn", "ls1", "drop_path1"), attn="attn", mlp=("norm2", "mlp", "ls2", "drop_path2")
)
_POST_NORM = BlockSpec(attention=("attn", "norm1", "drop_path1"), attn="attn", mlp=("mlp", "norm2", "drop_path2"))
_SPECS = {
    "Block": _PRE_NORM,
    "ResPostBlock": _POST_NORM,
    "RelPosBlock": _PRE_NORM,
    "ResPostRelPosBlock": _POST_NORM,
    "ParallelThingsBlock": BlockSpec(attention=("attns",), attn="attns", mlp=("ffns",)),
    # attention and MLP in one piece: merged after the block
    "ParallelScalingBlock": BlockSpec(),
    "DiffParallelScalingBlock": BlockSpec(),
}


class TimmViT(Adapter):
    name = "timm_vit"
    families = "timm ViT, DeiT, DeiT-III, DINOv2 (with registers), CLIP, SigLIP, hybrids, ViTamin, parallel blocks"
    landmarks = ("blocks", "norm1", "attn", "qkv", "norm2", "mlp", "patch_embed", "fc_norm")
    cut_by = "patch_embed"
    token_methods = ("forward_features", "forward_intermediates", "get_intermediate_layers")
    package = "timm"
    loops = ("forward", "forward_features", "blocks.forward")
    heads = ("forward_head", "pool", "attn_pool.forward", "norm.forward", "fc_norm.forward")

    def matches(self, model: Any) -> bool:
        return _MODEL in class_names(model) and not isinstance(getattr(model, "global_pool", None), bool)

    def blocks(self, model: Any) -> list[tuple[str, nn.Module]]:
        return timm_blocks(model)

    def spec(self, block: Any) -> BlockSpec:
        return timm_spec(block)

    def layout(self, model: Any) -> TokenLayout:
        return timm_layout(model, int(model.num_prefix_tokens))

    def tap(self, block: Any) -> AttentionTap:
        kind = _kind(block)
        if kind == "ParallelThingsBlock":
            return BranchesTap(block, "attns")
        if kind in ("ParallelScalingBlock", "DiffParallelScalingBlock"):
            return ScalingTap(block, has_heads_last=kind == "ParallelScalingBlock")
        return SeamTap(block, "attn")

    def head(self, model: Any, sizes: Sizes) -> tuple[list[Binding], list[str]]:
        # both: an attention pool may be taken out later
        found = [Binding(model, "pool", InputMean(model, sizes))]
        if isinstance(model.attn_pool, nn.Module):
            # `pool` has cut the prefix off before the attention pool sees the tokens
            start = 0 if model.pool_include_prefix else int(model.num_prefix_tokens)
            found.append(Binding(model.attn_pool, "forward", BiasedPool(model.attn_pool, sizes, start)))
        return found, []

    def guards(self, model: Any, is_merging: Callable[[], bool]) -> list[Binding]:
        return [Binding(model, "pool", PoolGuard(model, "pool", is_merging))]

    def hands_out(self, model: Any) -> str | None:
        return timm_tokens(model)

    def grid_head(self, model: Any) -> str | None:
        pool = model.attn_pool
        if not isinstance(pool, nn.Module):
            return None
        if "attn_mask" not in inspect.signature(type(pool).forward).parameters:
            return f"{type(pool).__name__} takes no mask to weigh merged tokens by"
        if getattr(pool, "pos_embed", None) is not None:
            return f"{type(pool).__name__} adds position embeddings of its own to the tokens"
        return None

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


def timm_layout(model: Any, prefix: int) -> TokenLayout:
    """Return where the tokens lie in a model with timm's `patch_embed`."""
    embed: Any = model.patch_embed
    has_class = getattr(model, "cls_token", None) is not None  # registers alone make a prefix too
    if not hasattr(embed, "dynamic_feat_size"):
        # a stem of the user's own: how many tokens it gives is seen in the forward, and no rows and columns are known
        return TokenLayout(prefix, None, None, None, has_class=has_class)
    size = tuple(getattr(embed, "img_size", None) or (224, 224))
    grid = embed.dynamic_feat_size(size)
    channels = next((m.in_channels for m in embed.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), 3)
    # three axes, of clips, are no grid of rows and columns: a method that needs one is told there is none
    plane = grid if len(grid) == 2 else None
    return TokenLayout(prefix, plane, prefix + math.prod(grid), (channels, *size), has_class=has_class)


def timm_tokens(model: Any) -> str | None:
    """Say whether the model puts out its tokens, where a pool would make one of them."""
    is_pooled = model.global_pool or getattr(model, "attn_pool", None) is not None
    return None if is_pooled else "global_pool='' hands out every token"


def timm_spec(block: nn.Module) -> BlockSpec:
    """Describe a timm block by its class; raises `UnsupportedModelError` for others."""
    kind = _kind(block)
    if kind is None:
        raise UnsupportedModelError(
            f"blocks of class {class_names(block)[0]} are not described, so it is not known where attention ends and "
            f"the MLP begins; timm's {', '.join(_SPECS)} are. Describe the block in an adapter of its own "
            "(CONTRIBUTING.md, 'a new family')."
        )
    return _SPECS[kind]


def _kind(block: nn.Module) -> str | None:
    names = (name.rpartition(".") for name in class_names(block))
    return next((cls for package, _, cls in names if package.startswith("timm.") and cls in _SPECS), None)
