"""The families of vision-language models: what differs between them, as data.

Every family encodes images by `get_image_features` of its base model, and takes the result in place of the pixels
(`mm_encoder_outputs` of transformers 5.24; `releases` does the same for 4.57). A new family is one line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokenmerge.errors import UnsupportedError, UnsupportedModelError
from tokenmerge.vlm.releases import base_of

__all__ = ["FAMILIES", "Family", "find_family", "list_families", "unwrapped"]


@dataclass(frozen=True)
class Family:
    """What to know of the models of one configuration."""

    name: str  # `config.model_type`
    has_videos: bool = False  # whether its videos are shortened too
    is_shared: bool = False  # whether videos have the placeholders of images
    has_places: bool = False  # whether its language model gives tokens positions on the image's grid (M-RoPE)
    newline: bool = False  # whether features hold `image_newline` at the end of each row
    has_units: bool = False  # whether a visual token is made of several of the tower's
    crop: Callable[[Any], int] | None = None  # tokens per crop, where the features of a prompt are one tensor


def _crop(base: Any) -> int:
    return int(base.image_seq_len)


FAMILIES = {
    family.name: family
    for family in (
        Family("llava"),
        Family("llava_next", newline=True),
        Family("llava_onevision", has_videos=True, newline=True),
        Family("qwen2_vl", has_videos=True, has_places=True, has_units=True),
        Family("qwen2_5_vl", has_videos=True, has_places=True, has_units=True),
        Family("qwen3_vl", has_videos=True, has_places=True, has_units=True),
        Family("glm4v", has_videos=True, is_shared=True, has_places=True, has_units=True),
        Family("internvl", has_units=True),
        Family("idefics3", has_units=True, crop=_crop),
        Family("smolvlm", has_units=True, crop=_crop),
        Family("paligemma"),
        Family("gemma3", has_units=True),
        Family("mistral3", has_units=True),
        Family("ovis2"),
        Family("aya_vision", has_units=True),
        Family("cohere2_vision", has_units=True),
    )
}
_REFUSED = {
    "mllama": "its language model looks at the image by cross-attention: there are no visual tokens in the prompt",
    "blip-2": "its query tokens are few and learned: none of them stands for a place",
    "instructblip": "its query tokens are few and learned: none of them stands for a place",
}


def list_families() -> list[str]:
    """Return the names of the families, as in `model.config.model_type`."""
    return list(FAMILIES)


def unwrapped(model: Any) -> Any:
    """Return the model inside PEFT's wrapper or that of `torch.compile`, whose calls run it; else the model itself.

    Raises `UnsupportedError` for prompts that PEFT learns (prompt tuning and its kind).
    """
    peft = sys.modules.get("peft")  # a model of it cannot be without it
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        return unwrapped(model._orig_mod)
    if peft is None or not isinstance(model, peft.PeftModel | peft.PeftMixedModel):
        return model
    learned = [name for name, own in model.peft_config.items() if own.is_prompt_learning]
    if learned:
        raise UnsupportedError(
            f"the adapter {learned[0]!r} puts learned tokens in front of the embeddings of a prompt, and a prompt is "
            "shortened by its ids. Use an adapter that changes weights, such as LoRA."
        )
    return model.get_base_model()


def find_family(model: nn.Module) -> tuple[Family, Any]:
    """Return the family of a model, and its base model, which encodes images.

    Raises `UnsupportedModelError` with the reason for a model that cannot be shortened.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    known = f"Known: {', '.join(FAMILIES)}."
    if kind in _REFUSED:
        raise UnsupportedModelError(f"a model of type {kind!r} cannot be given fewer visual tokens: {_REFUSED[kind]}.")
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"this {type(model).__qualname__} (config.model_type {kind!r}) is no vision-language model of a known "
            f"family. {known}"
        )
    return FAMILIES[kind], base_of(model)
