"""Small transformers models with random weights, one per class that is supported, and how to call each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from helpers import randomised

TOWER = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
VISION = {**TOWER, "image_size": 32, "patch_size": 8}
DINO = {**VISION, "mlp_ratio": 2, "layerscale_value": 0.5}
TEXT = {**TOWER, "num_hidden_layers": 2, "vocab_size": 64, "max_position_embeddings": 20, "type_vocab_size": 1}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BACKBONE = {**DINO, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False, "apply_layernorm": False}
MASKED = {**VISION, "norm_pix_loss": False, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1}
MASKED |= {"decoder_num_attention_heads": 4, "decoder_intermediate_size": 64, "mask_ratio": 0.25}

Inputs = Callable[[], dict[str, Any]]
Output = Callable[[Any], Tensor]


class Case(NamedTuple):
    """A model class with its configuration, what it is called with, and the tensor of its answer to compare."""

    cls: str
    config: str
    settings: dict[str, Any]
    inputs: Inputs
    output: Output

    def make(self, **more: Any) -> nn.Module:
        """Build it in eval mode and double precision, with parameters that hide nothing."""
        config = getattr(transformers, self.config)(**{**self.settings, **more})
        return randomised(getattr(transformers, self.cls)(config)).eval().double()


def images(side: int = 32) -> dict[str, Any]:
    return {"pixel_values": torch.randn(3, 3, side, side).double()}


def pairs() -> dict[str, Any]:
    words = torch.tensor([[1, 5, 7, 9, 11, 2], [1, 6, 8, 10, 12, 2], [1, 9, 3, 4, 5, 2]])
    return {"input_ids": words, "attention_mask": torch.ones_like(words), **images()}


def prompts(places: int = 3) -> dict[str, Any]:
    """Words after the places for an image."""
    words = torch.tensor([[63] * places + words for words in ([5, 7, 2], [8, 9, 2], [6, 4, 2])])
    return {"input_ids": words, "attention_mask": torch.ones_like(words), **images()}


def image_lists() -> dict[str, Any]:
    """A list of one image for each text."""
    given = prompts(4)
    mask = torch.ones(3, 1, 32, 32, dtype=torch.bool)
    return {**given, "pixel_values": given["pixel_values"][:, None], "pixel_attention_mask": mask}


def marked_pairs() -> dict[str, Any]:
    """The first four words of each text are an image."""
    return {**pairs(), "image_embeds_position_mask": torch.tensor(3 * [[True] * 4 + [False] * 2])}


def masked_images() -> dict[str, Any]:
    return {**images(), "noise": torch.rand(3, 16, generator=torch.Generator().manual_seed(3))}


def patches() -> dict[str, Any]:
    """Flattened patches of images of different shapes, without padding."""
    shapes = torch.tensor([[4, 4], [2, 8], [8, 2]])
    mask = torch.ones(3, 16, dtype=torch.long)
    return {"pixel_values": torch.randn(3, 16, 192).double(), "pixel_attention_mask": mask, "spatial_shapes": shapes}


def patch_pairs() -> dict[str, Any]:
    return {**pairs(), **patches()}


def logits(out: Any) -> Tensor:
    return out.logits


def tokens(out: Any) -> Tensor:
    return out.last_hidden_state


def class_token(out: Any) -> Tensor:
    return out.last_hidden_state[:, 0]


def pooled(out: Any) -> Tensor:
    return out.pooler_output


def image_embeds(out: Any) -> Tensor:
    return out.image_embeds


def _towers(**vision: Any) -> dict[str, Any]:
    return {"vision_config": {**VISION, **vision}, "text_config": TEXT, "projection_dim": 16}


_SIGLIP2 = {**TOWER, "num_patches": 16, "patch_size": 8}
_OPT = {**TEXT, "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32}
_QFORMER = {**TEXT, "encoder_hidden_size": 32, "cross_attention_frequency": 1}
_LLAMA = {**TEXT, "model_type": "llama", "num_key_value_heads": 4}
_LLAVA = {
    "vision_config": {**VISION, "model_type": "clip_vision_model"},
    "text_config": _LLAMA,
    "image_token_index": 63,
}
_SHUFFLED = {"scale_factor": 2, "image_token_id": 63}
_QWEN2 = {**TEXT, "model_type": "qwen2", "num_key_value_heads": 4}

_BLIP = {**TEXT, "encoder_hidden_size": 32, "sep_token_id": 2}
_KOSMOS2 = {"vision_config": VISION, "latent_query_num": 4}
_KOSMOS2["text_config"] = {"vocab_size": 64, "embed_dim": 32, "layers": 1, "ffn_dim": 64, "attention_heads": 4}
_SIGLIP = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
_GEMMA = {**_LLAMA, "model_type": "gemma", "head_dim": 8}
_PALIGEMMA = {"vision_config": _SIGLIP, "text_config": _GEMMA, "image_token_id": 63, "projection_dim": 32}
_PERCEIVER = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 8}
_IDEFICS2 = {"vision_config": VISION, "text_config": {**_LLAMA, "model_type": "mistral"}, "image_token_id": 63}
_IDEFICS2["perceiver_config"] = {**_PERCEIVER, "num_key_value_heads": 2, "hidden_size": 32, "rms_norm_eps": 1e-6}
_OVIS2 = {"text_config": _QWEN2, "image_token_id": 63, "hidden_size": 32, "vocab_size": 64}
_OVIS2 |= {"vision_config": {**VISION, "vocab_size": 64, "hidden_stride": 1, "num_visual_indicator_tokens": 5}}
_OVIS2 |= {"visual_indicator_token_ids": [50, 51, 52, 53, 54]}

CASES = {
    "vit": Case("ViTModel", "ViTConfig", VISION, images, class_token),
    "vit-classifier": Case("ViTForImageClassification", "ViTConfig", VISION, images, logits),
    "vit-masked": Case(
        "ViTForMaskedImageModeling",
        "ViTConfig",
        {**VISION, "encoder_stride": 8},
        images,
        lambda out: out.reconstruction,
    ),
    "deit": Case("DeiTModel", "DeiTConfig", VISION, images, lambda out: out.last_hidden_state[:, :2]),
    "deit-distilled": Case("DeiTForImageClassificationWithTeacher", "DeiTConfig", VISION, images, logits),
    "deit-classifier": Case("DeiTForImageClassification", "DeiTConfig", VISION, images, logits),
    "vit-msn": Case("ViTMSNForImageClassification", "ViTMSNConfig", VISION, images, logits),
    "ijepa": Case("IJepaModel", "IJepaConfig", VISION, images, tokens),
    "ijepa-classifier": Case("IJepaForImageClassification", "IJepaConfig", VISION, images, logits),
    "vit-mae": Case("ViTMAEModel", "ViTMAEConfig", {**MASKED, "mask_ratio": 0.0}, masked_images, class_token),
    "vit-mae-masked": Case("ViTMAEForPreTraining", "ViTMAEConfig", MASKED, masked_images, logits),
    "dinov2": Case("Dinov2Model", "Dinov2Config", DINO, images, class_token),
    "dinov2-swiglu": Case("Dinov2Model", "Dinov2Config", {**DINO, "use_swiglu_ffn": True}, images, class_token),
    "dinov2-drop-path": Case("Dinov2Model", "Dinov2Config", {**DINO, "drop_path_rate": 0.3}, images, class_token),
    "dinov2-classifier": Case("Dinov2ForImageClassification", "Dinov2Config", DINO, images, logits),
    "dinov2-registers": Case(
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        DINO,
        images,
        lambda out: out.last_hidden_state[:, :5],
    ),
    "dinov2-registers-classifier": Case(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", DINO, images, logits
    ),
    "clip-vision": Case("CLIPVisionModel", "CLIPVisionConfig", VISION, images, pooled),
    "clip-projection": Case("CLIPVisionModelWithProjection", "CLIPVisionConfig", VISION, images, image_embeds),
    "clip": Case("CLIPModel", "CLIPConfig", _towers(), pairs, image_embeds),
    "clip-classifier": Case("CLIPForImageClassification", "CLIPConfig", _towers(), images, logits),
    "metaclip2": Case("MetaClip2Model", "MetaClip2Config", _towers(), pairs, image_embeds),
    "altclip": Case("AltCLIPModel", "AltCLIPConfig", _towers(), pairs, image_embeds),
    "altclip-vision": Case("AltCLIPVisionModel", "AltCLIPVisionConfig", VISION, images, pooled),
    "chinese-clip": Case("ChineseCLIPModel", "ChineseCLIPConfig", _towers(), pairs, image_embeds),
    "siglip-vision": Case("SiglipVisionModel", "SiglipVisionConfig", VISION, images, pooled),
    "siglip": Case("SiglipModel", "SiglipConfig", _towers(), pairs, image_embeds),
    "siglip-classifier": Case("SiglipForImageClassification", "SiglipConfig", _towers(), images, logits),
    "siglip2-vision": Case("Siglip2VisionModel", "Siglip2VisionConfig", _SIGLIP2, patches, pooled),
    "siglip2-classifier": Case(
        "Siglip2ForImageClassification", "Siglip2Config", {"vision_config": _SIGLIP2}, patches, logits
    ),
    "siglip2": Case(
        "Siglip2Model", "Siglip2Config", {**_towers(), "vision_config": _SIGLIP2}, patch_pairs, image_embeds
    ),
    "clipseg-model": Case("CLIPSegModel", "CLIPSegConfig", _towers(), pairs, image_embeds),
    "owlvit-vision": Case("OwlViTVisionModel", "OwlViTVisionConfig", VISION, images, pooled),
    "owlvit": Case("OwlViTModel", "OwlViTConfig", _towers(), pairs, image_embeds),
    "owlvit-detection": Case(
        "OwlViTForObjectDetection", "OwlViTConfig", {**_towers(), "projection_dim": 32}, pairs, logits
    ),
    "owlv2-detection": Case(
        "Owlv2ForObjectDetection", "Owlv2Config", {**_towers(), "projection_dim": 32}, pairs, logits
    ),
    "git": Case("GitForCausalLM", "GitConfig", {**TEXT, "vision_config": VISION}, pairs, logits),
    "kosmos2": Case("Kosmos2Model", "Kosmos2Config", _KOSMOS2, marked_pairs, tokens),
    "blip-vision": Case("BlipVisionModel", "BlipVisionConfig", VISION, images, pooled),
    "blip": Case(
        "BlipForImageTextRetrieval", "BlipConfig", {**_towers(), "text_config": _BLIP}, pairs, lambda out: out.itm_score
    ),
    "instructblip-vision": Case("InstructBlipVisionModel", "InstructBlipVisionConfig", VISION, images, pooled),
    "janus-vision": Case("JanusVisionModel", "JanusVisionConfig", VISION, images, tokens),
    "paligemma": Case("PaliGemmaModel", "PaliGemmaConfig", _PALIGEMMA, lambda: prompts(16), tokens),
    "blip2-vision": Case("Blip2VisionModel", "Blip2VisionConfig", VISION, images, pooled),
    "blip2": Case(
        "Blip2Model",
        "Blip2Config",
        {
            "vision_config": VISION,
            "qformer_config": _QFORMER,
            "text_config": _OPT,
            "num_query_tokens": 3,
            "image_token_index": 63,
        },
        prompts,
        lambda out: out.qformer_outputs.last_hidden_state,
    ),
    "internvl-vision": Case("InternVLVisionModel", "InternVLVisionConfig", VISION, images, class_token),
    "internvl": Case(
        "InternVLModel",
        "InternVLConfig",
        {"vision_config": VISION, "text_config": _QWEN2, "image_token_id": 63, "image_seq_length": 4},
        lambda: prompts(4),
        tokens,
    ),
    "idefics2": Case("Idefics2Model", "Idefics2Config", _IDEFICS2, image_lists, tokens),
    "idefics3": Case(
        "Idefics3Model",
        "Idefics3Config",
        {"vision_config": VISION, "text_config": _LLAMA, **_SHUFFLED},
        image_lists,
        tokens,
    ),
    "smolvlm": Case(
        "SmolVLMModel",
        "SmolVLMConfig",
        {"vision_config": VISION, "text_config": _LLAMA, **_SHUFFLED},
        image_lists,
        tokens,
    ),
    "ovis2": Case("Ovis2Model", "Ovis2Config", _OVIS2, lambda: prompts(16), tokens),
    "aimv2": Case("Aimv2Model", "Aimv2Config", _towers(use_head=True), pairs, image_embeds),
    "aimv2-vision": Case("Aimv2VisionModel", "Aimv2VisionConfig", VISION, images, tokens),
    "aimv2-pooled": Case("Aimv2VisionModel", "Aimv2VisionConfig", {**VISION, "use_head": True}, images, pooled),
}

_DPT = {**VISION, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [16, 16, 16, 16], "fusion_hidden_size": 16}
_DPT |= {"is_hybrid": False, "readout_type": "project"}
_ANYTHING = {"backbone_config": {**BACKBONE, "model_type": "dinov2"}, "patch_size": 8, "reassemble_hidden_size": 32}
_ANYTHING |= {"neck_hidden_sizes": [16, 16, 16, 16], "fusion_hidden_size": 16, "head_hidden_size": 8}


def depth(out: Any) -> Tensor:
    return out.predicted_depth


# they read the tokens of several blocks
DENSE_CASES = {
    "dpt": Case("DPTForDepthEstimation", "DPTConfig", _DPT, images, depth),
    "depth-anything": Case("DepthAnythingForDepthEstimation", "DepthAnythingConfig", _ANYTHING, images, depth),
    "dinov2-backbone": Case("Dinov2Backbone", "Dinov2Config", BACKBONE, images, lambda out: out.feature_maps[1]),
    "dinov2-registers-backbone": Case(
        "Dinov2WithRegistersBackbone", "Dinov2WithRegistersConfig", BACKBONE, images, lambda out: out.feature_maps[1]
    ),
    "llava": Case("LlavaModel", "LlavaConfig", _LLAVA, lambda: prompts(16), tokens),
    "clipseg": Case(
        "CLIPSegForImageSegmentation",
        "CLIPSegConfig",
        {**_towers(), "extract_layers": [1, 2, 3], "reduce_dim": 16, "decoder_num_attention_heads": 4},
        pairs,
        logits,
    ),
}


def yolos() -> Case:
    """A detector whose tokens at the end are not to be merged."""
    sizes = {**VISION, "image_size": [32, 32], "num_detection_tokens": 3, "use_mid_position_embeddings": False}
    return Case("YolosForObjectDetection", "YolosConfig", sizes, images, lambda out: out.pred_boxes)


if hasattr(transformers, "PixioModel"):  # transformers 5
    CASES["pixio"] = Case(
        "PixioModel", "PixioConfig", {**VISION, "n_cls_tokens": 2, "drop_path_rate": 0.3}, images, pooled
    )
    CASES["radio"] = Case(
        "RadioModel",
        "RadioConfig",
        {
            **VISION,
            "mlp_ratio": 2.0,
            "max_img_size": 64,
            "num_cls_tokens": 2,
            "num_registers": 1,
            "layerscale_value": 0.5,
        },
        images,
        lambda out: out.summary,
    )
    CASES["mlcd"] = Case("MLCDVisionModel", "MLCDVisionConfig", {**VISION, "num_key_value_groups": 1}, images, pooled)
    CASES["tipsv2"] = Case(
        "Tipsv2VisionModel", "Tipsv2VisionConfig", {**DINO, "num_register_tokens": 2}, images, pooled
    )
