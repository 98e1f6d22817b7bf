"""SWAG's vision transformers as their own repository defines them: sequence-first tokens, `nn.MultiheadAttention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge._intercept.multihead import MultiheadTap, multihead
from tokenmerge._intercept.pooling import OutputMean
from tokenmerge._intercept.taps import AttentionTap
from tokenmerge.adapters.base import Adapter, Binding, BlockSpec, Sizes, TokenLayout
from tokenmerge.errors import UnsupportedModelError

__all__ = ["Swag"]

_SPEC = BlockSpec(attention=("ln_1", "self_attention", "dropout"), attn="self_attention", mlp=("ln_2", "mlp"))


class Swag(Adapter):
    name = "swag"
    families = "SWAG ViTs of their own repository (class token or average pool)"
    landmarks = ("encoder", "layers", "ln_1", "self_attention", "ln_2", "mlp", "conv_proj")
    cut_by = "conv_proj"

    def matches(self, model: Any) -> bool:
        position = getattr(getattr(model, "encoder", None), "pos_embedding", None)
        # torchvision's ViT has the same children, but keeps the batch first
        return isinstance(position, Tensor) and position.shape[1] == 1 and hasattr(model, "conv_proj")

    def blocks(self, model: Any) -> list[tuple[str, nn.Module]]:
        return [(f"encoder.layers.{name}", block) for name, block in model.encoder.layers.named_children()]

    def spec(self, block: Any) -> BlockSpec:
        attention: Any = getattr(block, "self_attention", None)
        plain = multihead(attention)
        if plain is None or plain.batch_first:
            raise UnsupportedModelError("the block's self_attention is no sequence-first nn.MultiheadAttention.")
        return _SPEC

    def layout(self, model: Any) -> TokenLayout:
        conv: nn.Conv2d = model.conv_proj
        prefix = 1 if isinstance(getattr(model, "class_token", None), Tensor) else 0
        tokens = int(model.encoder.pos_embedding.shape[0])
        side = int((tokens - prefix) ** 0.5)
        pixels = side * conv.stride[0]
        return TokenLayout(prefix, (side, side), tokens, (conv.in_channels, pixels, pixels), batch_first=False)

    def tap(self, block: Any) -> AttentionTap:
        return MultiheadTap(block, "self_attention")

    def head(self, model: Any, sizes: Sizes) -> tuple[list[Binding], list[str]]:
        if self.layout(model).prefix:
            return [], []
        norm: nn.Module = model.encoder.ln
        return [Binding(norm, "forward", OutputMean(norm, sizes, start=0, batch_first=False))], []

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from tokenmerge.testing.models.plain import SwagStandIn

        return SwagStandIn().eval(), torch.randn(2, 3, 32, 32)
