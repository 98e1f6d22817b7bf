"""transformers' plain vision towers, which differ in the names of classes and of a block's children."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenmerge.adapters.base import PROBED, BlockSpec, HookSpec, Spec, Surroundings, TokenLayout
from tokenmerge.adapters.transformers.base import HF, TINY, HFAdapter, hf_names, no_change

__all__ = ["HFCLIP", "HFAimv2", "HFDinov2", "HFInternVL", "HFRadio", "HFViT", "HFVitPose"]

_BY_CLASS_TOKEN = ("CLIP", "AltCLIP", "ChineseCLIP", "MetaClip2", "OwlViT", "Owlv2")
_BY_ALL_TOKENS = (
    *("Siglip", "Siglip2", "Blip", "Blip2", "InstructBlip", "InstructBlipVideo", "CLIPSeg", "Git", "Janus"),
    *("Kosmos2", "Idefics", "Idefics2", "Idefics3", "SmolVLM", "GraniteDocling"),
)
_CLIPS = _BY_CLASS_TOKEN + _BY_ALL_TOKENS
_PARTS = ("Model", "Transformer")  # the model runs its blocks itself, or an inner transformer does
_DINOS = ("Dinov2", "Dinov2WithRegisters", "Tipsv2Vision")
_VITS = ("ViT", "DeiT", "ViTMAE", "ViTMSN", "IJepa", "DPT", "Pixio")


def _grid_of_radio(cutter: Any, image: Any, out: Any) -> tuple[int, int] | None:
    side = cutter.patch_size
    return (image.shape[-2] // side, image.shape[-1] // side) if image.dim() == 4 else None


class HFViT(HFAdapter):
    name = "hf_vit"
    families = "transformers ViT, DeiT, ViT-MAE, ViT-MSN, I-JEPA, DPT, Pixio"
    landmarks = ("embeddings", "layernorm_before", "attention", "layernorm_after", "patch_embeddings", "layernorm")
    example = "ViTForImageClassification"
    towers = dict.fromkeys((*(f"{host}Model" for host in _VITS), "PixioBackbone"), ("layers", "encoder.layer"))
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
        # only visible patches go through the encoder, in random order
        seen = int((layout.tokens - layout.prefix) * (1 - masked))
        return dataclasses.replace(layout, grid=None, tokens=layout.prefix + seen)

    def surroundings(self, model: Any) -> Surroundings:
        is_mae = "ViTMAEModel" in hf_names(self.tower(model)[1])
        return dataclasses.replace(super().surroundings(model), without_merging=is_mae)


class HFCLIP(HFAdapter):
    name = "hf_clip"
    families = (
        "transformers CLIP, MetaCLIP-2, AltCLIP, Chinese-CLIP, SigLIP, SigLIP2, OWL-ViT, OWLv2, BLIP, BLIP-2, "
        "InstructBLIP, CLIPSeg, GIT, Janus, Kosmos-2, Idefics, SmolVLM, Granite Docling: alone or "
        "inside a larger model"
    )
    landmarks = ("vision_model", "embeddings", "encoder", "self_attn", "layer_norm1", "layer_norm2", "post_layernorm")
    example = "CLIPVisionModelWithProjection"
    towers = dict.fromkeys((f"{host}Vision{part}" for host in _CLIPS for part in _PARTS), ("encoder.layers",))
    specs = (BlockSpec(attention=("layer_norm1", "self_attn"), attn="self_attn", mlp=("layer_norm2", "mlp")),)
    token_models = frozenset(
        f"{host}{part}"
        for host in _BY_CLASS_TOKEN
        for part in ("Model", "VisionModel", "VisionTransformer", "VisionModelWithProjection")
    ) | {"BlipVisionModel", "Blip2VisionModel", "InstructBlipVisionModel"}

    def is_plain(self, model: nn.Module) -> bool:
        # Janus takes the first of its tokens, though it has no class token
        return "JanusVisionModel" not in hf_names(model) and super().is_plain(model)


class HFDinov2(HFAdapter):
    name = "hf_dinov2"
    families = "transformers DINOv2 (with registers), TIPSv2, and what has them as its backbone (Depth Anything)"
    landmarks = ("embeddings", "encoder", "norm1", "attention", "layer_scale1", "norm2", "layer_scale2", "layernorm")
    example, sizes = "Dinov2WithRegistersForImageClassification", TINY | {"mlp_ratio": 2}
    towers = dict.fromkeys((f"{host}{part}" for host in _DINOS for part in ("Model", "Backbone")), ("encoder.layer",))
    specs = (
        BlockSpec(
            attention=("norm1", "attention", "layer_scale1", "drop_path"),
            attn="attention",
            mlp=("norm2", "mlp", "layer_scale2", "drop_path"),
        ),
    )
    token_models = frozenset(f"{host}Model" for host in _DINOS)


class HFRadio(HFAdapter):
    name = "hf_radio"
    families = "transformers C-RADIO"
    landmarks = ("input_conditioner", "embeddings", "encoder", "norm1", "attention", "layer_scale1", "norm2")
    example = "RadioModel"
    sizes: ClassVar = TINY | {"mlp_ratio": 2.0, "max_img_size": 64, "num_cls_tokens": 2, "num_registers": 1}
    towers: ClassVar = {"RadioModel": ("encoder.layer",)}
    specs = HFDinov2.specs
    host = dataclasses.replace(HF, grid_of=_grid_of_radio)
    token_models = frozenset(("RadioModel",))

    def prefix(self, tower: Any) -> int:
        return int(tower.config.num_summary_tokens)

    def surroundings(self, model: Any) -> Surroundings:
        return dataclasses.replace(super().surroundings(model), cutter=self.tower(model)[1].embeddings)


class HFVitPose(HFAdapter):
    name = "hf_vitpose"
    families = "transformers ViTPose (with experts too)"
    landmarks = ("backbone", "embeddings", "encoder", "layernorm_before", "attention", "layernorm_after", "head")
    towers: ClassVar = {"VitPoseBackbone": ("encoder.layer",)}
    host = dataclasses.replace(HF, followers={**HF.followers, "dataset_index": no_change})  # one for each image

    def spec(self, block: Any) -> Spec:
        if block.num_experts > 1:  # its MLP takes an argument of the block
            return HookSpec(attn="attention", norm="layernorm_after", mlp="mlp")
        return BlockSpec(attention=("layernorm_before", "attention"), attn="attention", mlp=("layernorm_after", "mlp"))

    def sample(self, model: nn.Module, block: Any, layout: TokenLayout) -> tuple[int, dict[str, Any]]:
        device = block.layernorm_before.weight.device
        experts = torch.arange(2, device=device).view(2, 1, 1) if block.num_experts > 1 else None
        return PROBED, {"dataset_index": experts}

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation

        backbone = VitPoseBackboneConfig(**{**TINY, "image_size": [32, 32], "patch_size": [8, 8]}, mlp_ratio=2)
        config: Any = VitPoseConfig(backbone_config=backbone, num_labels=5)
        return VitPoseForPoseEstimation(config).eval(), torch.randn(self.shape)


class HFInternVL(HFAdapter):
    name = "hf_internvl"
    families = "transformers InternVL, Qianfan-OCR (the vision tower)"
    landmarks = ("vision_tower", "embeddings", "encoder", "layernorm_before", "attention", "layernorm_after")
    example = "InternVLVisionModel"
    towers: ClassVar = {"InternVLVisionModel": ("encoder.layer",), "QianfanOCRVisionModel": ("layers",)}
    specs = (
        # Qianfan-OCR
        BlockSpec(
            attention=("layernorm_before", "attention", "lambda_1", "drop_path1"),
            attn="attention",
            mlp=("layernorm_after", "mlp", "dropout", "lambda_2", "drop_path2"),
        ),
        BlockSpec(
            attention=("layernorm_before", "attention", "lambda_1"),
            attn="attention",
            mlp=("layernorm_after", "mlp", "dropout", "lambda_2"),
        ),
    )
    token_models = frozenset(("InternVLVisionModel", "QianfanOCRVisionModel"))


class HFAimv2(HFAdapter):
    name = "hf_aimv2"
    families = "transformers AIMv2, Ovis2 (the vision tower)"
    landmarks = ("embeddings", "encoder", "rms_norm1", "attention", "rms_norm2", "ffn", "rms_norm")
    example = "Aimv2VisionModel"
    towers = dict.fromkeys(("Aimv2VisionModel", "Ovis2VisionTransformer"), ("encoder.layers",))
    specs = (BlockSpec(attention=("rms_norm1", "attention"), attn="attention", mlp=("rms_norm2", "ffn")),)
