"""transformers' AIMv2 and Ovis2 vision towers: RMS norms, no class token, attention pooling."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenmerge.adapters.base import BlockSpec
from tokenmerge.adapters.transformers.base import TINY, HFAdapter

__all__ = ["HFAimv2"]


class HFAimv2(HFAdapter):
    name = "hf_aimv2"
    families = "transformers AIMv2, Ovis2 (the vision tower)"
    landmarks = ("embeddings", "encoder", "rms_norm1", "attention", "rms_norm2", "ffn", "rms_norm")
    towers = dict.fromkeys(("Aimv2VisionModel", "Ovis2VisionTransformer"), ("encoder.layers",))
    specs = (BlockSpec(attention=("rms_norm1", "attention"), attn="attention", mlp=("rms_norm2", "ffn")),)

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from transformers import Aimv2VisionConfig, Aimv2VisionModel

        model: nn.Module = Aimv2VisionModel(Aimv2VisionConfig(**TINY))
        return model.eval(), torch.randn(2, 3, 32, 32)
