"""torchvision's vision transformers (ViT-B/16 to ViT-H/14), with a class token, batch first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge._intercept.multihead import multihead
from tokenmerge.adapters.base import Adapter, BlockSpec, Host, Spec, TokenLayout
from tokenmerge.errors import UnsupportedModelError

__all__ = ["TorchvisionViT"]


class TorchvisionViT(Adapter):
    name = "torchvision_vit"
    families = "torchvision VisionTransformer (vit_b_16 to vit_h_14)"
    landmarks = ("encoder", "layers", "ln_1", "self_attention", "ln_2", "mlp", "conv_proj", "heads")
    host = Host(
        "torchvision",
        blocks="encoder.layers",
        loops=("forward", "encoder.forward", "encoder.layers.forward"),
        heads=("encoder.ln.forward",),
        cut_by="conv_proj",
    )
    specs = (BlockSpec(attention=("ln_1", "self_attention", "dropout"), attn="self_attention", mlp=("ln_2", "mlp")),)

    def matches(self, model: Any) -> bool:
        position = getattr(getattr(model, "encoder", None), "pos_embedding", None)
        # SWAG's models have the same children, but are sequence-first and call their classifier `head`
        has_parts = hasattr(model, "conv_proj") and hasattr(model, "heads")
        return has_parts and isinstance(position, Tensor) and position.shape[0] == 1

    def blocks(self, model: Any) -> list[tuple[str, nn.Module]]:
        if isinstance(model, torch.fx.GraphModule):
            raise UnsupportedModelError(
                "this model is a traced graph (torch.fx, create_feature_extractor): its blocks are modules that it "
                "never calls. Patch the model itself, then trace it with its blocks as leaves: "
                "create_feature_extractor(model, ..., tracer_kwargs={'leaf_modules': [EncoderBlock]})."
            )
        return super().blocks(model)

    def spec(self, block: Any) -> Spec:
        attention: Any = getattr(block, "self_attention", None)
        plain = multihead(attention)
        if plain is None or not plain.batch_first:
            raise UnsupportedModelError(
                f"the self_attention of a {type(block).__qualname__} is a {type(attention).__qualname__}, not the "
                "batch-first nn.MultiheadAttention of torchvision's blocks."
            )
        return super().spec(block)

    def layout(self, model: Any) -> TokenLayout:
        self.blocks(model)
        tokens = int(model.encoder.pos_embedding.shape[1])
        side = int((tokens - 1) ** 0.5)
        pixels = int(model.image_size)
        channels = next((m.in_channels for m in model.conv_proj.modules() if isinstance(m, nn.Conv2d)), 3)
        return TokenLayout(1, (side, side), tokens, (channels, pixels, pixels))

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from torchvision.models import VisionTransformer

        model: nn.Module = VisionTransformer(
            image_size=32, patch_size=8, num_layers=4, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=10
        )
        return model.eval(), torch.randn(2, 3, 32, 32)
