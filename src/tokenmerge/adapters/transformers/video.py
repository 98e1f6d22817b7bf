"""transformers' video models with absolute positions: VideoMAE, ViViT. Tokens merge across frames."""

from __future__ import annotations

from typing import Any, ClassVar

from tokenmerge.adapters.base import TokenLayout
from tokenmerge.adapters.transformers.base import SIZES, HFAdapter, pair
from tokenmerge.adapters.transformers.plain import HFViT

__all__ = ["HFVideoMAE", "HFVivit", "clip_layout"]


class HFVideoMAE(HFAdapter):
    """The mean over tokens, the first token and the decoder read all tokens, so tokens are restored."""

    name = "hf_videomae"
    families = "transformers VideoMAE"
    landmarks = ("videomae", *HFViT.landmarks)
    example, sizes = "VideoMAEForVideoClassification", {**SIZES, "image_size": 32, "patch_size": 16, "num_frames": 8}
    shape = (2, 8, 3, 32, 32)
    towers: ClassVar = {"VideoMAEModel": ("encoder.layer",)}
    specs = HFViT.specs

    def layout(self, model: Any) -> TokenLayout:
        config = self.tower(model)[1].config
        tubelet = (config.tubelet_size, *pair(config.patch_size))
        return clip_layout(0, config.num_frames, config.num_channels, pair(config.image_size), tubelet)


class HFVivit(HFAdapter):
    name = "hf_vivit"
    families = "transformers ViViT"
    landmarks = ("vivit", *HFViT.landmarks)
    example = "VivitForVideoClassification"
    sizes: ClassVar = {**SIZES, "image_size": 32, "tubelet_size": [2, 16, 16], "num_frames": 8}
    shape = (2, 8, 3, 32, 32)
    towers: ClassVar = {"VivitModel": ("layers", "encoder.layer")}
    specs = HFViT.specs
    class_models = frozenset(("VivitForVideoClassification",))
    token_models = frozenset(("VivitModel",))

    def layout(self, model: Any) -> TokenLayout:
        config = self.tower(model)[1].config
        size = pair(config.image_size)
        return clip_layout(1, config.num_frames, config.num_channels, size, tuple(config.tubelet_size))


def clip_layout(
    prefix: int, frames: int, channels: int, size: tuple[int, int], tubelet: tuple[int, int, int]
) -> TokenLayout:
    """Return the layout of a clip `[frames, channels, height, width]`, cut into tubelets (frames, height, width)."""
    tokens = (frames // tubelet[0]) * (size[0] // tubelet[1]) * (size[1] // tubelet[2])
    return TokenLayout(prefix, None, prefix + tokens, (frames, channels, *size))
