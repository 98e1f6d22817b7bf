"""transformers' DINOv2, with registers or without, and what is made like it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenmerge.adapters.base import BlockSpec
from tokenmerge.adapters.transformers.base import TINY, HFAdapter

__all__ = ["HFDinov2"]

_HOSTS = ("Dinov2", "Dinov2WithRegisters", "Tipsv2Vision")


class HFDinov2(HFAdapter):
    name = "hf_dinov2"
    families = "transformers DINOv2 (with registers), TIPSv2, and what has them as its backbone (Depth Anything)"
    landmarks = ("embeddings", "encoder", "norm1", "attention", "layer_scale1", "norm2", "layer_scale2", "layernorm")
    towers = dict.fromkeys((f"{host}{part}" for host in _HOSTS for part in ("Model", "Backbone")), ("encoder.layer",))
    specs = (
        BlockSpec(
            attention=("norm1", "attention", "layer_scale1", "drop_path"),
            attn="attention",
            mlp=("norm2", "mlp", "layer_scale2", "drop_path"),
        ),
    )
    token_models = frozenset(f"{host}Model" for host in _HOSTS)

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification

        config = Dinov2WithRegistersConfig(**TINY, mlp_ratio=2)
        model: nn.Module = Dinov2WithRegistersForImageClassification(config)
        return model.eval(), torch.randn(2, 3, 32, 32)
