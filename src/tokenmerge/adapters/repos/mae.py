"""Fine-tuning models of MAE, and of spatiotemporal MAE for video, as defined in their own repositories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenmerge._intercept.projections import ProjectionTap
from tokenmerge._intercept.taps import AttentionTap
from tokenmerge.adapters.base import Adapter, Binding, Context, Host, Spec, Surroundings, TokenLayout
from tokenmerge.adapters.repos.base import LAYER_SCALED, PRE_NORM, mean_behind, square_layout
from tokenmerge.errors import UnsupportedModelError

__all__ = ["MAE", "MAEst"]


class MAE(Adapter):
    """A ViT with a boolean `global_pool`."""

    name = "mae"
    families = "MAE fine-tuning models of their own repository (class token or global pool)"
    landmarks: ClassVar[tuple[str, ...]] = ("blocks", "norm1", "attn", "qkv", "norm2", "mlp", "patch_embed", "fc_norm")
    host = Host(cut_by="patch_embed.proj")
    # older blocks have no layer scale, and one drop path for both branches
    specs: ClassVar[Sequence[Spec]] = (LAYER_SCALED, PRE_NORM)

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
        from tokenmerge.testing.models.plain import MAEStandIn

        return MAEStandIn().eval(), torch.randn(2, 3, 32, 32)


class MAEst(MAE):
    """A video ViT that always averages its tokens."""

    name = "mae_st"
    families = "spatiotemporal MAE fine-tuning models of their own repository (video)"
    landmarks = ("blocks", "norm1", "attn", "q", "k", "v", "norm2", "mlp", "patch_embed")
    host = Host()
    specs = (PRE_NORM,)

    def matches(self, model: Any) -> bool:
        conv = getattr(getattr(model, "patch_embed", None), "proj", None)
        has_parts = all(hasattr(model, name) for name in ("blocks", "norm", "head"))
        # VideoMAE's own models have these too, but no input_size, and one projection for q, k and v
        return has_parts and isinstance(conv, nn.Conv3d) and hasattr(model.patch_embed, "input_size")

    def spec(self, block: Any) -> Spec:
        attn = getattr(block, "attn", None)
        # divided space-time attention takes tokens with four axes
        is_joint = not getattr(attn, "requires_t_shape", False)
        if not is_joint or not all(hasattr(attn, name) for name in ("q", "k", "v", "proj")):
            raise UnsupportedModelError(
                f"the attention of a {type(block).__qualname__} is not that of spatiotemporal MAE: expected the "
                "children q, k, v and proj, and one sequence of all the clip's tokens."
            )
        return super().spec(block)

    def layout(self, model: Any) -> TokenLayout:
        conv = model.patch_embed.proj
        prefix = _prefix(model)
        frames, rows, columns = model.patch_embed.input_size  # in patches
        size = [patches * step for patches, step in zip((frames, rows, columns), conv.stride, strict=True)]
        # three axes are no grid of rows and columns, so methods that need a grid are rejected
        return TokenLayout(prefix, None, prefix + frames * rows * columns, (conv.in_channels, *size))

    def tap(self, block: Any) -> AttentionTap:
        return ProjectionTap(block, "attn", qkv=("q", "k", "v"))

    def overrides(self, model: Any, context: Context) -> list[Binding]:
        # the model averages the last block's output without the class token, then normalises
        return mean_behind(self.blocks(model)[-1][1], context, start=_prefix(model))

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from tokenmerge.testing.models.video import VideoMAEStandIn

        return VideoMAEStandIn().eval(), torch.randn(2, 3, 8, 32, 32)


def _prefix(model: Any) -> int:
    return 1 if isinstance(getattr(model, "cls_token", None), Tensor) else 0
