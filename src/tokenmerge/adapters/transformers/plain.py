"""transformers' plain vision transformers: ViT, DeiT, ViT-MAE, ViT-MSN, I-JEPA, DPT, Pixio."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge.adapters.base import BlockSpec, Surroundings, TokenLayout
from tokenmerge.adapters.transformers.base import TINY, HFAdapter, hf_names

__all__ = ["HFViT"]

_HOSTS = ("ViT", "DeiT", "ViTMAE", "ViTMSN", "IJepa", "DPT", "Pixio")
_LAYERS = ("layers", "encoder.layer")


class HFViT(HFAdapter):
    name = "hf_vit"
    families = "transformers ViT, DeiT, ViT-MAE, ViT-MSN, I-JEPA, DPT, Pixio"
    landmarks = ("embeddings", "layernorm_before", "attention", "layernorm_after", "patch_embeddings", "layernorm")
    towers = dict.fromkeys((f"{host}Model" for host in _HOSTS), _LAYERS) | {"PixioBackbone": _LAYERS}
    specs = (
        # Pixio
        BlockSpec(
            attention=("layernorm_before", "attention", "dropout", "drop_path"),
            attn="attention",
            mlp=("layernorm_after", "mlp", "dropout", "drop_path"),
        ),
        BlockSpec(
            attention=("layernorm_before", "attention", "dropout"),
            attn="attention",
            mlp=("layernorm_after", "mlp", "dropout"),
        ),
        # transformers 4
        BlockSpec(
            attention=("layernorm_before", "attention"),
            attn="attention",
            mlp=("layernorm_after", "intermediate"),
            closes="output",
        ),
    )
    class_models = frozenset(
        (
            *("ViTForImageClassification", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"),
            "ViTMSNForImageClassification",
        )
    )
    token_models = frozenset(("ViTModel", "DeiTModel", "ViTMAEModel", "ViTMSNModel", "DPTModel", "PixioModel"))

    def layout(self, model: Any) -> TokenLayout:
        layout, tower = super().layout(model), self.tower(model)[1]
        masked = getattr(tower.config, "mask_ratio", 0.0) if "ViTMAEModel" in hf_names(tower) else 0.0
        if not masked or layout.tokens is None:
            return layout
        # only these go through the encoder, in random order
        seen = int((layout.tokens - layout.prefix) * (1 - masked))
        return dataclasses.replace(layout, grid=None, tokens=layout.prefix + seen)

    def surroundings(self, model: Any) -> Surroundings:
        is_mae = "ViTMAEModel" in hf_names(self.tower(model)[1])
        return dataclasses.replace(super().surroundings(model), without_merging=is_mae)

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from transformers import ViTConfig, ViTForImageClassification

        model: nn.Module = ViTForImageClassification(ViTConfig(**TINY))
        return model.eval(), torch.randn(2, 3, 32, 32)
