"""transformers' YOLOS: a ViT whose detection tokens stand behind the patches.

Shapes: B batch, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenmerge._torch.memory import carry, watched
from tokenmerge._torch.tracing import is_compiling
from tokenmerge.adapters.base import Binding, Context, Override, Surroundings, TokenLayout, first_of
from tokenmerge.adapters.transformers.base import TINY, HFAdapter
from tokenmerge.adapters.transformers.plain import HFViT
from tokenmerge.errors import UnsupportedModelError

__all__ = ["HFYolos"]


class HFYolos(HFAdapter):
    """Blocks that merge get the detection tokens in front, where tokens are protected, and hand them out behind."""

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
        return super().layout(model)

    def prefix(self, tower: Any) -> int:
        return super().prefix(tower) + int(tower.config.num_detection_tokens)

    def surroundings(self, model: Any) -> Surroundings:
        why = "detection tokens stand behind the patches (in handle.groups and handle.sizes, in front of all others)"
        return replace(super().surroundings(model), last=why)

    def overrides(self, model: Any, context: Context) -> list[Binding]:
        count = self.tower(model)[1].config.num_detection_tokens
        turned = [_Turned(block, context.is_merging, count) for _, block in self.blocks(model)]
        return [*super().overrides(model, context), *(Binding(block.owner, "forward", block) for block in turned)]


class _Turned(Override):
    """The instance `forward` of a block: its last `count` tokens go in as the first, and come out as the last."""

    def __init__(self, block: nn.Module, is_merging: Callable[[], bool], count: int) -> None:
        super().__init__(block)
        self.is_merging, self.count = is_merging, count

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_merging():
            return self.original(x, *args, **kwargs)
        turned = _turn(x, -self.count)
        if not is_compiling():
            carry(x, turned)
        out = first_of(self.original(turned, *args, **kwargs))
        back = watched(_turn, out, self.count)
        if not is_compiling():
            carry(turned, x)  # a checkpoint gives these again
            carry(out, back)
        return back


def _turn(x: Tensor, by: int) -> Tensor:  # [B, N, C]
    return torch.cat((x[:, by:], x[:, :by]), dim=1)
