"""transformers' InternVL vision tower: BEiT's layer scale around CLIP's attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenmerge.adapters.base import BlockSpec
from tokenmerge.adapters.transformers.base import TINY, HFAdapter

__all__ = ["HFInternVL"]


class HFInternVL(HFAdapter):
    name = "hf_internvl"
    families = "transformers InternVL (the vision tower)"
    landmarks = ("vision_tower", "embeddings", "encoder", "layernorm_before", "attention", "layernorm_after")
    towers = dict.fromkeys(("InternVLVisionModel",), ("encoder.layer",))
    specs = (
        BlockSpec(
            attention=("layernorm_before", "attention", "lambda_1"),
            attn="attention",
            mlp=("layernorm_after", "mlp", "dropout", "lambda_2"),
        ),
    )
    token_models = frozenset(("InternVLVisionModel",))

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from transformers import InternVLVisionConfig, InternVLVisionModel

        model: nn.Module = InternVLVisionModel(InternVLVisionConfig(**TINY))
        return model.eval(), torch.randn(2, 3, 32, 32)
