"""Vision-language models of every family with random weights, and prompts for them with images of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor

from helpers import randomised

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"intermediate_size": 64, "vocab_size": 80, "max_position_embeddings": 512, "head_dim": 8}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
VISION = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
VISION |= {"image_size": 32, "patch_size": 8}
CLIP = {**VISION, "model_type": "clip_vision_model"}
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
IMAGE, VIDEO, START, END = 70, 71, 72, 73  # token ids
SPECIAL = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
IS_OLD = int(transformers.__version__.split(".")[0]) < 5  # 4.57, the oldest
NEWER = pytest.mark.skipif(IS_OLD, reason="needs transformers 5.24, and 4.57 is refused")
CACHE = "past_key_values" if IS_OLD else "cache"  # the name of the argument and of the output
QWEN = {**TEXT, ("rope_scaling" if IS_OLD else "rope_parameters"): MROPE}


def base_of(model: Any) -> Any:
    """The model that encodes images: 4.57 has no name for some of them."""
    return getattr(model.base_model, "model", model.base_model)


def family_of(model: Any) -> Any:
    """Its family and its base model, for functions that take them: with the interface of 5.24 on 4.57 too."""
    from tokenmerge.vlm.families import find_family
    from tokenmerge.vlm.releases import adapt

    found = find_family(model)
    if "forward" not in vars(model):
        adapt(model, found[1])
    return found


def encoded(model: Any, kind: str = "image", **given: Any) -> Any:
    """The visual tokens of each image, from the plain model or with what is bound on it, also on 4.57."""
    base = base_of(model)
    name = f"get_{kind}_features"
    function = getattr(base, name)
    if IS_OLD and name not in vars(base):
        from tokenmerge.vlm.releases import _Features, _Seam

        function = _Features(base, _Seam(base), kind)
    return function(**given, return_dict=True).pooler_output


class Tiny(NamedTuple):
    """One family: its model, and how its prompts look."""

    cls: str
    config: str
    settings: dict[str, Any]
    tokens: int  # placeholders per image
    pixels: Callable[[list[int]], dict[str, Any]]  # the arguments of so many images per row

    def make(self, dtype: torch.dtype = torch.float32) -> Any:
        """Build it in eval mode, with parameters that hide nothing."""
        config = getattr(transformers, self.config)(**self.settings)
        model: Any = randomised(getattr(transformers, self.cls)(config)).eval().to(dtype)
        if hasattr(base_of(model), "text_config_dtype"):
            model.model.text_config_dtype = dtype  # PaliGemma of 4.57 makes its mask in the type that it was made in
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        # random weights would say them
        model.generation_config.suppress_tokens = [IMAGE, VIDEO]
        return model

    def prompts(self, images: list[int], words: int = 4, pads_right: bool = False) -> dict[str, Any]:
        """Return a batch: each row has so many images with text between, and is padded on the left."""
        generator = torch.Generator().manual_seed(len(images))
        rows = []
        for number, count in enumerate(images):
            text = torch.randint(5, 60, (count + 1, words + number), generator=generator)
            row = text[0].tolist()
            for index in range(count):
                row += [START, *[IMAGE] * self.tokens, END, *text[index + 1].tolist()]
            rows.append(row)
        longest = max(map(len, rows))
        sides = [(longest - len(row)) * [0] for row in rows]
        ids = torch.tensor([row + side if pads_right else side + row for row, side in zip(rows, sides, strict=True)])
        mask = (ids != 0).long()
        inputs = {"input_ids": ids, "attention_mask": mask, **self.pixels(images)}
        if self.cls.startswith("PaliGemma"):
            inputs["token_type_ids"] = torch.zeros_like(ids)
        if self.cls.startswith("Gemma3"):
            inputs["token_type_ids"] = (ids == IMAGE).long()
        if self.cls.startswith(("Qwen", "Glm")) and not IS_OLD:
            inputs["mm_token_type_ids"] = (ids == IMAGE).long()
        return inputs


def squares(images: list[int]) -> dict[str, Any]:
    return {"pixel_values": _noise(sum(images), 3, 32, 32)}


def crops(images: list[int]) -> dict[str, Any]:
    """Lists of crops with a mask; rows with fewer are filled up with black ones."""
    pixels, mask = torch.zeros(len(images), max(images), 3, 32, 32), torch.zeros(len(images), max(images), 32, 32)
    for row, count in enumerate(images):
        pixels[row, :count], mask[row, :count] = _noise(count, 3, 32, 32) + row, 1
    return {"pixel_values": pixels, "pixel_attention_mask": mask.bool()}


def anyres(images: list[int]) -> dict[str, Any]:
    """Images of 64 x 32 pixels: the whole, and two crops below each other."""
    count = sum(images)
    return {"pixel_values": _noise(count, 3, 3, 32, 32), "image_sizes": torch.tensor([[64, 32]] * count)}


def flat(images: list[int]) -> dict[str, Any]:
    """Patches of images of 8 x 6 patches in a list, as the Qwen processors return them."""
    count = sum(images)
    return {
        "pixel_values": _noise(count * 48, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 8, 6]] * count),
    }


def sized(images: list[int]) -> dict[str, Any]:
    return {"pixel_values": _noise(sum(images), 3, 32, 32), "image_sizes": torch.tensor([[32, 32]] * sum(images))}


def _noise(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


_QWEN_VISION = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "intermediate_size": 64}
_QWEN_VISION |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32}
_QWEN2_VISION = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
_QWEN2_VISION |= {"spatial_merge_size": 2, "temporal_patch_size": 2}
_OVIS_VISION = {**VISION, "vocab_size": 64, "hidden_stride": 1, "num_visual_indicator_tokens": 5}
_GLM_VISION = {**_QWEN_VISION, "image_size": 32, "rms_norm_eps": 1e-5}

FAMILIES = {
    "llava": Tiny(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {"vision_config": CLIP, "text_config": {**TEXT, "model_type": "llama"}, "image_token_index": IMAGE},
        16,
        squares,
    ),
    "llava_next": Tiny(
        "LlavaNextForConditionalGeneration",
        "LlavaNextConfig",
        {
            "vision_config": CLIP,
            "text_config": {**TEXT, "model_type": "llama"},
            "image_token_index": IMAGE,
            "image_grid_pinpoints": [[64, 32], [32, 64]],
        },
        16 + 8 * 5,
        anyres,
    ),
    "llava_onevision": Tiny(
        "LlavaOnevisionForConditionalGeneration",
        "LlavaOnevisionConfig",
        {
            "vision_config": SIGLIP,
            "text_config": {**TEXT, "model_type": "qwen2"},
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "image_grid_pinpoints": [[64, 32], [32, 64]],
        },
        16 + 8 * 5,
        anyres,
    ),
    "qwen2_vl": Tiny(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {"vision_config": _QWEN2_VISION, "text_config": QWEN, **SPECIAL},
        12,
        flat,
    ),
    "qwen2_5_vl": Tiny(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "vision_config": {**_QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
            "text_config": QWEN,
            **SPECIAL,
        },
        12,
        flat,
    ),
    "qwen3_vl": Tiny(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {
            "vision_config": {**_QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
            "text_config": QWEN,
            **SPECIAL,
        },
        12,
        flat,
    ),
    "glm4v": Tiny(
        "Glm4vForConditionalGeneration",
        "Glm4vConfig",
        {
            "vision_config": _GLM_VISION,
            "text_config": QWEN,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "image_start_token_id": START,
            "image_end_token_id": END,
            "video_start_token_id": 74,
            "video_end_token_id": 75,
        },
        12,
        flat,
    ),
    "internvl": Tiny(
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        {
            "vision_config": {**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
            "text_config": {**TEXT, "model_type": "qwen2"},
            "image_token_id": IMAGE,
            "image_seq_length": 4,
        },
        4,
        squares,
    ),
    "idefics3": Tiny(
        "Idefics3ForConditionalGeneration",
        "Idefics3Config",
        {
            "vision_config": VISION,
            "text_config": {**TEXT, "model_type": "llama"},
            "scale_factor": 2,
            "image_token_id": IMAGE,
        },
        4,
        crops,
    ),
    "smolvlm": Tiny(
        "SmolVLMForConditionalGeneration",
        "SmolVLMConfig",
        {
            "vision_config": VISION,
            "text_config": {**TEXT, "model_type": "llama"},
            "scale_factor": 2,
            "image_token_id": IMAGE,
        },
        4,
        crops,
    ),
    "paligemma": Tiny(
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        {
            "vision_config": SIGLIP,
            "text_config": {**TEXT, "model_type": "gemma"},
            "image_token_id": IMAGE,
            "projection_dim": 32,
        },
        16,
        squares,
    ),
    "gemma3": Tiny(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "vision_config": SIGLIP,
            "text_config": {**TEXT, "sliding_window": 512, "layer_types": ["full_attention", "sliding_attention"]},
            "image_token_id": IMAGE,
            "mm_tokens_per_image": 4,
        },
        4,
        squares,
    ),
    "mistral3": Tiny(
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {
            "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 8},
            "text_config": {**TEXT, "model_type": "mistral"},
            "image_token_index": IMAGE,
            "spatial_merge_size": 2,
        },
        4,
        sized,
    ),
    "ovis2": Tiny(
        "Ovis2ForConditionalGeneration",
        "Ovis2Config",
        {
            "vision_config": _OVIS_VISION,
            "text_config": {**TEXT, "model_type": "qwen2"},
            "image_token_id": IMAGE,
            "hidden_size": 32,
            "vocab_size": 80,
            "visual_indicator_token_ids": [50, 51, 52, 53, 54],
        },
        16,
        squares,
    ),
    "aya_vision": Tiny(
        "AyaVisionForConditionalGeneration",
        "AyaVisionConfig",
        {
            "vision_config": SIGLIP,
            "text_config": {**TEXT, "model_type": "cohere2"},
            "image_token_index": IMAGE,
            "downsample_factor": 2,
            "adapter_layer_norm_eps": 1e-6,
        },
        4,
        squares,
    ),
    "cohere2_vision": Tiny(
        "Cohere2VisionForConditionalGeneration",
        "Cohere2VisionConfig",
        {
            "vision_config": SIGLIP,
            "text_config": {**TEXT, "model_type": "cohere2"},
            "image_token_id": IMAGE,
            "downsample_factor": 2,
            "alignment_intermediate_size": 64,
        },
        4,
        squares,
    ),
}


def doubled(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs in float64, indices as they are."""
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
