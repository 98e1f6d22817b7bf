"""transformers' towers made of CLIP's blocks: CLIP and what followed it, SigLIP, OWL-ViT, BLIP-2, Idefics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenmerge.adapters.base import BlockSpec
from tokenmerge.adapters.transformers.base import TINY, HFAdapter, hf_names

__all__ = ["HFCLIP"]

_BY_CLASS_TOKEN = ("CLIP", "AltCLIP", "ChineseCLIP", "MetaClip2", "OwlViT", "Owlv2")
_BY_ALL_TOKENS = (
    *("Siglip", "Siglip2", "Blip", "Blip2", "InstructBlip", "InstructBlipVideo", "CLIPSeg", "Git", "Janus"),
    *("Kosmos2", "Idefics2", "Idefics3", "SmolVLM"),
)
_HOSTS = _BY_CLASS_TOKEN + _BY_ALL_TOKENS
_PARTS = ("Model", "Transformer")  # the model runs its blocks itself, or has a transformer inside that does


class HFCLIP(HFAdapter):
    name = "hf_clip"
    families = (
        "transformers CLIP, MetaCLIP-2, AltCLIP, Chinese-CLIP, SigLIP, SigLIP2, OWL-ViT, OWLv2, BLIP, BLIP-2, "
        "InstructBLIP, CLIPSeg, GIT, Janus, Kosmos-2, Idefics 2 and 3, SmolVLM: alone or inside a larger model"
    )
    landmarks = ("vision_model", "embeddings", "encoder", "self_attn", "layer_norm1", "layer_norm2", "post_layernorm")
    towers = dict.fromkeys((f"{host}Vision{part}" for host in _HOSTS for part in _PARTS), ("encoder.layers",))
    specs = (BlockSpec(attention=("layer_norm1", "self_attn"), attn="self_attn", mlp=("layer_norm2", "mlp")),)
    token_models = frozenset(
        f"{host}{part}"
        for host in _BY_CLASS_TOKEN
        for part in ("Model", "VisionModel", "VisionTransformer", "VisionModelWithProjection")
    ) | {"BlipVisionModel", "Blip2VisionModel", "InstructBlipVisionModel"}

    def is_plain(self, model: nn.Module) -> bool:
        # Janus takes the first of its tokens, though it has no class token
        return "JanusVisionModel" not in hf_names(model) and super().is_plain(model)

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        model: nn.Module = CLIPVisionModelWithProjection(CLIPVisionConfig(**TINY))
        return model.eval(), torch.randn(2, 3, 32, 32)
