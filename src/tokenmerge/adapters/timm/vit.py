"""timm's plain vision transformers: modules `vision_transformer`, `vision_transformer_hybrid`, `deit`, `vitamin`."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from tokenmerge._intercept.parallel import BranchesTap, ScalingTap
from tokenmerge._intercept.pooling import InputMean
from tokenmerge._intercept.taps import AttentionTap, SeamTap
from tokenmerge.adapters.base import Binding, BlockSpec, Context, Surroundings, class_names
from tokenmerge.adapters.timm.base import TIMM, TimmAdapter, pooling
from tokenmerge.errors import UnsupportedModelError

__all__ = ["TimmViT", "timm_spec"]

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
    # attention and MLP run in one step: tokens are merged after the block
    "ParallelScalingBlock": BlockSpec(),
    "DiffParallelScalingBlock": BlockSpec(),
}


class TimmViT(TimmAdapter):
    name = "timm_vit"
    families = "timm ViT, DeiT, DeiT-III, DINOv2 (with registers), CLIP, SigLIP, hybrids, ViTamin, parallel blocks"
    landmarks = ("blocks", "norm1", "attn", "qkv", "norm2", "mlp", "patch_embed", "fc_norm")
    sizes: ClassVar = {"init_values": 0.5, "reg_tokens": 1}
    host = replace(
        TIMM,
        models=("timm.models.vision_transformer.VisionTransformer",),
        token_methods=(*TIMM.token_methods, "get_intermediate_layers"),
        heads=("forward_head", "pool", "attn_pool.forward", "norm.forward", "fc_norm.forward"),
    )

    def matches(self, model: Any) -> bool:
        # MAE's own models derive from timm's; their global_pool is a bool
        return super().matches(model) and not isinstance(getattr(model, "global_pool", None), bool)

    def spec(self, block: Any) -> BlockSpec:
        return timm_spec(block)

    def tap(self, block: Any) -> AttentionTap:
        kind = _kind(block)
        if kind == "ParallelThingsBlock":
            return BranchesTap(block, "attns")
        if kind in ("ParallelScalingBlock", "DiffParallelScalingBlock"):
            return ScalingTap(block, has_heads_last=kind == "ParallelScalingBlock")
        return SeamTap(block, "attn")

    def surroundings(self, model: Any) -> Surroundings:
        tag = (getattr(model, "pretrained_cfg", None) or {}).get("tag") or ""
        last = _why_all(model.attn_pool) if isinstance(model.attn_pool, nn.Module) else None
        return replace(super().surroundings(model), last=last, without_merging=tag.startswith("mae"))

    def overrides(self, model: Any, context: Context) -> list[Binding]:
        # `pool` drops the prefix before the attention pool
        start = 0 if model.pool_include_prefix else int(model.num_prefix_tokens)
        return pooling(model, context, InputMean, start)


def _why_all(pool: nn.Module) -> str | None:
    """Return why an attention pool needs all tokens, or None."""
    if "attn_mask" not in inspect.signature(type(pool).forward).parameters:
        return f"{type(pool).__name__} takes no mask to weigh merged tokens by"
    if getattr(pool, "pos_embed", None) is not None:
        return f"{type(pool).__name__} adds position embeddings of its own to the tokens"
    return None


def timm_spec(block: nn.Module) -> BlockSpec:
    """Return the spec of a timm block by its class; raises `UnsupportedModelError` for other classes."""
    kind = _kind(block)
    if kind is None:
        raise UnsupportedModelError(
            f"blocks of class {class_names(block)[0]} are not described, so it is not known where attention ends and "
            f"the MLP begins; timm's {', '.join(_SPECS)} are. Describe the block in an adapter of its own "
            "(CONTRIBUTING.md, 'a new family')."
        )
    return _SPECS[kind]


def __getattr__(name: str) -> Any:
    """Return the functions that preceded `TimmAdapter`, for third-party adapters."""
    successors = {"timm_blocks": "blocks", "timm_layout": "layout", "timm_tokens": "surroundings"}
    if name not in successors:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    method = successors[name]
    warnings.warn(f"{__name__}.{name} is TimmAdapter.{method} now.", DeprecationWarning, stacklevel=2)

    def function(model: Any, prefix: int | None = None) -> Any:
        found: Any = getattr(TimmViT(), method)(model)
        if method != "layout" or prefix is None:
            return found.handed_out if method == "surroundings" else found
        tokens = None if found.tokens is None else found.tokens - found.prefix + prefix
        return replace(found, prefix=prefix, tokens=tokens)

    return function


def _kind(block: nn.Module) -> str | None:
    names = (name.rpartition(".") for name in class_names(block))
    return next((cls for package, _, cls in names if package.startswith("timm.") and cls in _SPECS), None)
