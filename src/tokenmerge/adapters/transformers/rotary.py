"""transformers' towers with rotary attention: DINOv3 ViT, V-JEPA 2, MLCD, Llama 4, Gemma 4."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenmerge._intercept import follow
from tokenmerge.adapters.base import PROBED, Binding, BlockSpec, Context, Override, Surroundings, TokenLayout
from tokenmerge.adapters.transformers.base import HF, TINY, HFAdapter, InterfaceTap, no_change, pair
from tokenmerge.adapters.transformers.packed import PackedTap
from tokenmerge.adapters.transformers.video import clip_layout

__all__ = ["HFMLCD", "HFDINOv3", "HFGemma4", "HFLlama4", "HFVJEPA2"]

Move = Callable[[Any, Tensor], Any]  # (argument of the attention, kept) -> argument for the remaining tokens


def _unfolded(cutter: Any, image: Any, out: Any) -> tuple[int, int]:
    height, width = cutter.unfold.kernel_size
    return image.shape[-2] // height, image.shape[-1] // width


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


class HFMLCD(HFAdapter):
    name = "hf_mlcd"
    families = "transformers MLCD"
    landmarks = ("embeddings", "pre_layrnorm", "encoder", "vision_rotary_embedding", "layer_norm1", "self_attn")
    example = "MLCDVisionModel"
    towers: ClassVar = {"MLCDVisionModel": ("encoder.layers",)}
    specs = (BlockSpec(attention=("layer_norm1", "self_attn"), attn="self_attn", mlp=("layer_norm2", "mlp")),)
    # the tap gathers the tables; masks are refused: the attention gets all images as one sequence
    host = replace(
        HF,
        followers={
            **{name: no_change for name in HF.followers if "mask" not in name},
            "position_embeddings": no_change,
        },
        padding={},
        is_positional=True,
    )
    token_models = frozenset(("MLCDVisionModel",))

    def sample(self, model: nn.Module, block: Any, layout: TokenLayout) -> tuple[int, dict[str, Any]]:
        weight, width, n = block.layer_norm1.weight, block.self_attn.head_dim, layout.prefix + PROBED
        angles = torch.arange(n * width, device=weight.device, dtype=weight.dtype).view(n, width)
        return n, {"position_embeddings": (angles.cos(), angles.sin())}

    def tap(self, block: Any) -> InterfaceTap:
        return _OneSequenceTap(block, "self_attn", "position_embeddings")


class HFLlama4(HFAdapter):
    """Its class token stands behind the patches."""

    name = "hf_llama4"
    families = "transformers Llama 4 (the vision tower)"
    landmarks = (
        "patch_embedding",
        "rotary_embedding",
        "layernorm_pre",
        "self_attn",
        "layernorm_post",
        "vision_adapter",
    )
    example = "Llama4VisionModel"
    sizes: ClassVar = TINY | {
        "intermediate_size": 128,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
        "vision_output_dim": 16,
    }
    towers: ClassVar = {"Llama4VisionModel": ("model.layers",)}
    specs = (
        BlockSpec(
            attention=("input_layernorm", "self_attn"), attn="self_attn", mlp=("post_attention_layernorm", "mlp")
        ),
    )
    host = replace(HFMLCD.host, followers={**HFMLCD.host.followers, "freqs_ci": no_change}, grid_of=_unfolded)

    def layout(self, model: Any) -> TokenLayout:
        config = self.tower(model)[1].config
        rows, columns = (
            size // side for size, side in zip(pair(config.image_size), pair(config.patch_size), strict=True)
        )
        return TokenLayout(
            0, (rows, columns), rows * columns + 1, (config.num_channels, *pair(config.image_size)), suffix=1
        )

    def tap(self, block: Any) -> InterfaceTap:
        return _Llama4Tap(block, "self_attn", "freqs_ci")

    def sample(self, model: nn.Module, block: Any, layout: TokenLayout) -> tuple[int, dict[str, Any]]:
        weight, width = block.input_layernorm.weight, block.self_attn.head_dim // 2
        angles = torch.arange(PROBED * width, device=weight.device).view(PROBED, 1, width).float()
        return PROBED, {"freqs_ci": torch.polar(torch.ones_like(angles), angles)}

    def surroundings(self, model: Any) -> Surroundings:
        around = super().surroundings(model)
        last = around.last or "its adapter joins neighbouring tokens by their places (pixel shuffle)"
        return replace(around, last=last, handed_out=None, cutter=self.tower(model)[1].patch_embedding)

    def overrides(self, model: Any, context: Context) -> list[Binding]:
        named = [Binding(block, "forward", _ByPosition(block)) for _, block in self.blocks(model)]
        return [*super().overrides(model, context), *named]


class HFGemma4(HFAdapter):
    name = "hf_gemma4"
    families = "transformers Gemma 4 (the vision tower)"
    landmarks = ("patch_embedder", "encoder", "pooler", "input_layernorm", "self_attn", "pre_feedforward_layernorm")
    towers: ClassVar = {"Gemma4VisionModel": ("encoder.layers",)}
    specs = (
        BlockSpec(
            attention=("input_layernorm", "self_attn", "post_attention_layernorm"),
            attn="self_attn",
            mlp=("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
        ),
    )
    host = replace(
        HF,
        followers={
            **HF.followers,
            "position_embeddings": lambda tables, kept: tuple(follow.rows(table, kept) for table in tables),
            "position_ids": follow.rows,
        },
        is_positional=True,
    )

    def layout(self, model: Any) -> TokenLayout:
        return TokenLayout(0, None, None, None)  # images of any shape, padded to the longest

    def sample(self, model: nn.Module, block: Any, layout: TokenLayout) -> tuple[int, dict[str, Any]]:
        weight, width = block.input_layernorm.weight, block.self_attn.head_dim
        angles = torch.arange(2 * PROBED * width, device=weight.device, dtype=weight.dtype).view(2, PROBED, width)
        places = torch.zeros(2, PROBED, 2, dtype=torch.long, device=weight.device)
        return PROBED, {"position_embeddings": (angles.cos(), angles.sin()), "position_ids": places}

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from transformers import Gemma4VisionConfig, Gemma4VisionModel

        sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
        sizes |= {"intermediate_size": 64, "head_dim": 8, "patch_size": 8, "pooling_kernel_size": 2}
        config: Any = Gemma4VisionConfig(**sizes, position_embedding_size=16)
        return _Patched(Gemma4VisionModel(config)).eval(), torch.randn(2, 3, 32, 32)


class _Patched(nn.Module):
    """Cuts images into patches as the processor of Gemma 4 does; returns its tokens as a batch."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.vision_tower = tower

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, height, width] -> [B, N / 4, C]
        side, B = self.vision_tower.config.patch_size, images.shape[0]
        rows, columns = images.shape[-2] // side, images.shape[-1] // side
        x = images.view(B, 3, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1).reshape(B, rows * columns, -1)
        at = torch.arange(rows * columns, device=x.device)
        places = torch.stack((at % columns, at // columns), dim=-1).expand(B, -1, -1)
        out: Tensor = self.vision_tower(x, places).last_hidden_state
        return out.view(B, -1, out.shape[-1])


class _OneSequenceTap(PackedTap):
    """Gathers tables `[N, ...]` that all images share, for an attention that takes one sequence with its tables."""

    def placed(self, places: Tensor) -> list[Binding]:
        return [Binding(self.attn, "forward", _EachImage(self.attn, self.tables, places))]

    def __call__(self, x: Tensor, bias: Tensor | None, kept: Tensor | None = None, **given: Any) -> Tensor:
        def by_image(table: Tensor) -> Tensor:  # [B, M, ...]
            return table.expand(x.shape[0], *table.shape) if kept is None else table[kept]

        return super().__call__(x, bias, kept, **{**given, self.tables: _each(by_image, given[self.tables])})


class _Llama4Tap(_OneSequenceTap):
    """The file defines two eager attentions, and the tower's has a name of its own."""

    def __init__(self, block: nn.Module, path: str, tables: str) -> None:
        super().__init__(block, path, tables)
        self.eager = sys.modules[type(self.core).__module__].vision_eager_attention_forward
        self.eager_adds = True


class _EachImage(Override):
    """An attention that is called for each image, with tables of the places `[B, N]` of its tokens."""

    def __init__(self, attn: nn.Module, tables: str, places: Tensor) -> None:
        super().__init__(attn)
        self.tables, self.places = tables, places

    def __call__(self, hidden_states: Tensor, **given: Any) -> Any:
        tables, outs = given.pop(self.tables), []
        for x, places in zip(hidden_states, self.places, strict=True):
            own = _each(lambda table, places=places: table[places], tables)  # type: ignore[misc]
            outs.append(self.original(x[None], **given, **{self.tables: own})[0])
        return torch.cat(outs), None


def _each(change: Callable[[Tensor], Tensor], tables: Any) -> Any:
    """Change one table, or each of several."""
    return change(tables) if isinstance(tables, Tensor) else tuple(change(table) for table in tables)


class _ByPosition(Override):
    """The forward of a block whose host names the tokens: hands them on as the first argument."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.first = list(inspect.signature(type(block).forward).parameters)[1]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs) if args else self.original(kwargs.pop(self.first), **kwargs)


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
