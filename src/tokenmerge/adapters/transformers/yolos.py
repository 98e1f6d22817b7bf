"""transformers' YOLOS: a ViT with detection tokens after the patches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from tokenmerge.adapters.base import Surroundings, TokenLayout
from tokenmerge.adapters.transformers.base import TINY, HFAdapter
from tokenmerge.adapters.transformers.plain import HFViT
from tokenmerge.errors import UnsupportedModelError

__all__ = ["HFYolos"]


class HFYolos(HFAdapter):
    """The detection tokens come after the patches and are never merged."""

    name = "hf_yolos"
    families = "transformers YOLOS without position embeddings between its blocks (yolos-tiny, yolos-small-dwr)"
    landmarks = (
        "embeddings",
        "layernorm_before",
        "attention",
        "layernorm_after",
        "bbox_predictor",
        "class_labels_classifier",
    )
    example = "YolosModel"
    sizes: ClassVar = {
        **TINY,
        "image_size": [32, 32],
        "num_detection_tokens": 3,
        "use_mid_position_embeddings": False,
    }
    towers = dict.fromkeys(("YolosModel",), ("encoder.layer",))
    specs = HFViT.specs

    def layout(self, model: Any) -> TokenLayout:
        config = self.tower(model)[1].config
        if config.use_mid_position_embeddings:
            raise UnsupportedModelError(
                "this YOLOS adds position embeddings of all tokens between its blocks (use_mid_position_embeddings): "
                "merged tokens are fewer. Take a model without them, e.g. yolos-tiny or yolos-small-dwr."
            )
        found, count = super().layout(model), int(config.num_detection_tokens)
        return replace(found, suffix=count, tokens=None if found.tokens is None else found.tokens + count)

    def surroundings(self, model: Any) -> Surroundings:
        return replace(super().surroundings(model), last="detection tokens are handed out behind all patches")
