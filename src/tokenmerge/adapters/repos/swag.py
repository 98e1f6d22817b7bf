"""SWAG's vision transformers as defined in their own repository: sequence-first, with `nn.MultiheadAttention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge._intercept.multihead import multihead
from tokenmerge.adapters.base import Adapter, Binding, BlockSpec, Context, Host, Spec, TokenLayout
from tokenmerge.adapters.repos.base import mean_behind, square_layout
from tokenmerge.errors import UnsupportedModelError

__all__ = ["Swag"]


class Swag(Adapter):
    name = "swag"
    families = "SWAG ViTs of their own repository (class token or average pool)"
    landmarks = ("encoder", "layers", "ln_1", "self_attention", "ln_2", "mlp", "conv_proj")
    host = Host(blocks="encoder.layers", cut_by="conv_proj")
    specs = (BlockSpec(attention=("ln_1", "self_attention", "dropout"), attn="self_attention", mlp=("ln_2", "mlp")),)

    def matches(self, model: Any) -> bool:
        position = getattr(getattr(model, "encoder", None), "pos_embedding", None)
        # torchvision's ViT has the same children, but keeps the batch first
        return isinstance(position, Tensor) and position.shape[1] == 1 and hasattr(model, "conv_proj")

    def spec(self, block: Any) -> Spec:
        attention: Any = getattr(block, "self_attention", None)
        plain = multihead(attention)
        if plain is None or plain.batch_first:
            raise UnsupportedModelError("the block's self_attention is no sequence-first nn.MultiheadAttention.")
        return super().spec(block)

    def layout(self, model: Any) -> TokenLayout:
        prefix = 1 if isinstance(getattr(model, "class_token", None), Tensor) else 0
        patches = int(model.encoder.pos_embedding.shape[0]) - prefix
        return square_layout(model.conv_proj, patches, prefix, batch_first=False)

    def overrides(self, model: Any, context: Context) -> list[Binding]:
        return [] if self.layout(model).prefix else mean_behind(model.encoder.ln, context, start=0, batch_first=False)

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from tokenmerge.testing.models.plain import SwagStandIn

        return SwagStandIn().eval(), torch.randn(2, 3, 32, 32)
