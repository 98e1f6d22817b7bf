"""transformers' towers with rotary attention: DINOv3 ViT, V-JEPA 2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenmerge._intercept import follow
from tokenmerge.adapters.base import PROBED, Binding, BlockSpec, Override, TokenLayout
from tokenmerge.adapters.transformers.base import HF, TINY, HFAdapter, InterfaceTap, no_change
from tokenmerge.adapters.transformers.video import clip_layout

__all__ = ["HFDINOv3", "HFVJEPA2"]

Move = Callable[[Any, Tensor], Any]  # (argument of the attention, kept) -> argument for the remaining tokens


class HFDINOv3(HFAdapter):
    name = "hf_dinov3"
    families = "transformers DINOv3 ViT"
    landmarks = ("rope_embeddings", "norm1", "layer_scale1", "norm2", "layer_scale2", "register_tokens")
    example, sizes = "DINOv3ViTModel", TINY | {"num_register_tokens": 2}
    # in transformers 5 the model requests hidden states from the encoder on its own
    towers: ClassVar = {"DINOv3ViTEncoder": ("layer",), "DINOv3ViTModel": ("layer",)}
    specs = (
        BlockSpec(
            attention=("norm1", "attention", "layer_scale1", "drop_path"),
            attn="attention",
            mlp=("norm2", "mlp", "layer_scale2", "drop_path"),
        ),
    )
    # the tap gathers the tables, since they do not tell the number of prefix tokens
    host = replace(
        HF, followers={"position_embeddings": no_change, "output_hidden_states": no_change}, is_positional=True
    )

    def prefix(self, tower: Any) -> int:
        return 1 + int(tower.config.num_register_tokens)

    def sample(self, model: nn.Module, block: Any, layout: TokenLayout) -> tuple[int, dict[str, Any]]:
        weight, width = block.norm1.weight, block.attention.head_dim
        angles = torch.arange(PROBED * width, device=weight.device, dtype=weight.dtype).view(PROBED, width)
        return layout.prefix + PROBED, {"position_embeddings": (angles.cos(), angles.sin())}

    def tap(self, block: Any) -> InterfaceTap:
        return _PlacedTap(block, "attention", "position_embeddings", _Tables(self.prefix(block.attention)))


class HFVJEPA2(HFAdapter):
    """The predictor and the attentive pooler read all tokens, so tokens are restored."""

    name = "hf_vjepa2"
    families = "transformers V-JEPA 2 (the encoder)"
    landmarks = ("encoder", "predictor", "norm1", "attention", "norm2", "mlp", "proj")
    example, shape = "VJEPA2ForVideoClassification", (2, 8, 3, 32, 32)
    sizes: ClassVar = {
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "mlp_ratio": 2.0,
        "pred_hidden_size": 48,
        "pred_num_hidden_layers": 1,
        "pred_num_attention_heads": 4,
        "crop_size": 32,
        "patch_size": 16,
        "frames_per_clip": 8,
        "num_pooler_layers": 1,
    }
    towers: ClassVar = {"VJEPA2Model": ("encoder.layer",)}
    specs = (
        BlockSpec(attention=("norm1", "attention", "drop_path"), attn="attention", mlp=("norm2", "mlp", "drop_path")),
    )
    host = replace(HF, is_positional=True, ignores_rest=True)  # the attention weights of eager attention

    def layout(self, model: Any) -> TokenLayout:
        config = self.tower(model)[1].config
        tubelet = (config.tubelet_size, config.patch_size, config.patch_size)
        return clip_layout(0, config.frames_per_clip, config.in_chans, (config.crop_size, config.crop_size), tubelet)

    def tap(self, block: Any) -> InterfaceTap:
        return _PlacedTap(block, "attention", "position_mask", _places)


class _Tables:
    """Gathers rotary tables `[P, D]`, which cover the patches only, at the places of the remaining patches."""

    def __init__(self, prefix: int) -> None:
        self.prefix = prefix

    def __call__(self, tables: tuple[Tensor, Tensor], kept: Tensor) -> tuple[Tensor, Tensor]:
        patches = kept[:, self.prefix :] - self.prefix  # prefix tokens stay in front
        cos, sin = (follow.rows(table, patches)[:, None] for table in tables)  # [B, 1, M - prefix, D]
        return cos, sin


def _places(given: None, kept: Tensor) -> Tensor:
    """Return the places themselves; by default the attention numbers its tokens."""
    return kept


class _PlacedTap(InterfaceTap):
    """Passes the places of the remaining tokens to the attention, in the argument that holds places."""

    def __init__(self, block: nn.Module, path: str, argument: str, move: Move) -> None:
        super().__init__(block, path)
        self.argument, self.move = argument, move

    def placed(self, places: Tensor) -> list[Binding]:
        return [Binding(self.attn, "forward", _Placed(self.attn, self.argument, self.move, places))]

    def __call__(self, x: Tensor, bias: Tensor | None, kept: Tensor | None = None, **given: Any) -> Tensor:
        told = given.get(self.argument)
        return super().__call__(x, bias, kept, **{self.argument: told if kept is None else self.move(told, kept)})


class _Placed(Override):
    """An attention whose token n is at place `places[b, n]`."""

    def __init__(self, attn: nn.Module, argument: str, move: Move, places: Tensor) -> None:
        super().__init__(attn)
        self.argument, self.move, self.places = argument, move, places

    def __call__(self, x: Tensor, **given: Any) -> Any:
        return self.original(x, **{**given, self.argument: self.move(given.get(self.argument), self.places)})
