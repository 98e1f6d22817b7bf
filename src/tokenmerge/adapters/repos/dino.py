"""DINO and DINOv2 as defined in their own repositories."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge._intercept.projections import ProjectionTap
from tokenmerge._intercept.taps import AttentionTap
from tokenmerge.adapters.base import (
    Adapter,
    Binding,
    Context,
    Host,
    Override,
    Spec,
    Surroundings,
    TokenLayout,
)
from tokenmerge.adapters.repos.base import LAYER_SCALED, PRE_NORM, square_layout
from tokenmerge.adapters.within import Within
from tokenmerge.errors import UnsupportedError, UnsupportedModelError

__all__ = ["Dino", "DinoV2"]


class Dino(Adapter):
    name = "dino"
    families = "DINO ViTs of their own repository"
    landmarks = ("blocks", "norm1", "attn", "qkv", "norm2", "mlp", "patch_embed", "pos_drop")
    host = Host(cut_by="patch_embed.proj", token_methods=("get_intermediate_layers", "get_last_selfattention"))
    specs = (PRE_NORM,)

    def matches(self, model: Any) -> bool:
        # iBOT's models have these too, but their forward may return tokens
        has_parts = hasattr(model, "prepare_tokens") and hasattr(model, "get_last_selfattention")
        return has_parts and not hasattr(model, "return_all_tokens")

    def layout(self, model: Any) -> TokenLayout:
        return _square(model, prefix=1)

    def tap(self, block: Any) -> AttentionTap:
        return ProjectionTap(block, "attn")

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from tokenmerge.testing.models.dino import DinoStandIn

        return DinoStandIn().eval(), torch.randn(2, 3, 32, 32)


class DinoV2(Adapter):
    name = "dinov2"
    families = "DINOv2 ViTs of their own repository (with registers, in chunks), alone or as a `backbone`"
    landmarks = ("blocks", "norm1", "attn", "qkv", "ls1", "norm2", "mlp", "ls2", "patch_embed")
    host = Host(
        cut_by="patch_embed.proj",
        token_methods=("get_intermediate_layers",),
        restored_methods=("forward_features",),
    )
    specs = (LAYER_SCALED,)

    def matches(self, model: Any) -> bool:
        return any(hasattr(part, "prepare_tokens_with_masks") for part in (model, getattr(model, "backbone", None)))

    def resolve(self, model: Any) -> Adapter:
        return self if hasattr(model, "prepare_tokens_with_masks") else Within("backbone", self)

    def blocks(self, model: Any) -> list[tuple[str, nn.Module]]:
        # the blocks are a list, or chunks that start with placeholders
        return [(f"blocks.{name}", block) for name, block in model.blocks.named_modules() if hasattr(block, "norm1")]

    def spec(self, block: Any) -> Spec:
        if getattr(block, "sample_drop_ratio", 0.0) > 0.1:
            raise UnsupportedModelError(
                f"in training this block leaves out whole samples (sample_drop_ratio={block.sample_drop_ratio}) in a "
                "way of its own. Build the model with drop_path_rate=0, or set block.sample_drop_ratio = 0."
            )
        return super().spec(block)

    def layout(self, model: Any) -> TokenLayout:
        registers = getattr(model, "register_tokens", None)
        return _square(model, prefix=1 if registers is None else 1 + registers.shape[1])

    def tap(self, block: Any) -> AttentionTap:
        return ProjectionTap(block, "attn")

    def surroundings(self, model: Any) -> Surroundings:
        handed_out = "forward_features and forward(is_training=True) hand every token out"
        return replace(super().surroundings(model), handed_out=handed_out)

    def overrides(self, model: Any, context: Context) -> list[Binding]:
        return [Binding(model, "forward_features_list", _OneTensor(model, "forward_features_list"))]

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from tokenmerge.testing.models.dino import DinoV2StandIn

        return DinoV2StandIn().eval(), torch.randn(2, 3, 32, 32)


class _OneTensor(Override):
    """Rejects a list of batches, which DINOv2 packs into one for training."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(
            "a list of batches of several sizes was given; a patched model takes one batch as one tensor. Run the "
            "batches one by one, or unpatch the model."
        )


def _square(model: Any, prefix: int) -> TokenLayout:
    """Return the layout from the position embeddings, one of which belongs to the class token."""
    return square_layout(getattr(model.patch_embed, "proj", None), model.pos_embed.shape[1] - 1, prefix)
