"""transformers' towers that take all images as one sequence of tokens: Qwen's, GLM's, Pixtral.

Shapes: B images, N tokens of each, M tokens left, C channels, H heads, D head width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenmerge._intercept import follow
from tokenmerge.adapters.base import (
    PROBED,
    Adapter,
    Binding,
    Context,
    Override,
    PackedSpec,
    Surroundings,
    TokenLayout,
    first_of,
)
from tokenmerge.adapters.transformers.base import HF, HFAdapter, InterfaceTap, no_change
from tokenmerge.adapters.transformers.by_size import BySize
from tokenmerge.adapters.transformers.interface import FLASH, NAME
from tokenmerge.errors import UnsupportedModelError

__all__ = ["HFPixtral", "HFQwenVision", "PackedTap"]

_CUT = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # where flash attention cuts a sequence


def _ends(*places: int, like: Tensor) -> Tensor:
    """Return where images end, 0 first, as `[B + 1]`; hosts read it off, which a meta tensor does not allow."""
    return torch.tensor((0, *places), dtype=torch.int32, device="cpu" if like.is_meta else like.device)


def _tables(tables: tuple[Tensor, ...], kept: Tensor) -> tuple[Tensor, ...]:
    """Gather rotary tables `[B, N, D]` at `kept` `[B, M]`, or tables `[B * N, D]` of the whole sequence."""
    if tables[0].dim() == 3:
        return tuple(follow.rows(table, kept) for table in tables)
    by_image = (table.unflatten(0, (kept.shape[0], -1)) for table in tables)
    return tuple(follow.rows(table, kept).flatten(0, 1) for table in by_image)


class _Packed(HFAdapter):
    """A tower whose blocks are described by a `PackedSpec`; merged tokens never leave it."""

    specs: ClassVar[tuple[PackedSpec, ...]]
    last: ClassVar[str]  # why all tokens are put back after the last block

    def resolve(self, model: nn.Module) -> Adapter:
        version = str(sys.modules["transformers"].__version__)
        if int(version.partition(".")[0]) < 5:
            raise UnsupportedModelError(
                f"transformers {version} writes {type(model).__qualname__} in another way than transformers 5, for "
                "which merging in it was written. Install transformers>=5.24, or leave its vision tower unpatched."
            )
        return super().resolve(model)

    def layout(self, model: Any) -> TokenLayout:
        return TokenLayout(0, None, None, None, is_packed=True)

    def tap(self, block: Any) -> PackedTap:
        spec: Any = self.spec(block)
        return PackedTap(block, spec.attn, spec.tables, spec.ends, spec.is_batch)

    def surroundings(self, model: Any) -> Surroundings:
        around = super().surroundings(model)
        return replace(around, last=around.last or self.last, handed_out=None)

    def sample(self, model: nn.Module, block: Any, layout: TokenLayout) -> tuple[int, dict[str, Any]]:
        spec: Any = self.spec(block)
        attn = block.get_submodule(spec.attn)
        weight = next(p for p in block.parameters() if p.dim() > 1)
        angles = torch.arange(2 * PROBED * attn.head_dim, device=weight.device, dtype=weight.dtype)
        angles = angles.view(2, PROBED, attn.head_dim)
        ends = _ends(PROBED, 2 * PROBED, like=weight)
        return PROBED, {spec.tables: (angles.cos(), angles.sin()), **self.apart(ends, block)}

    def apart(self, ends: Tensor, block: Any) -> dict[str, Any]:
        """Return the arguments of a block that keep images apart which end at these places, `[B + 1]`."""
        return {"cu_seqlens": ends}


class HFQwenVision(_Packed):
    name = "hf_qwen_vision"
    families = (
        "transformers Qwen2-VL, Qwen3-VL, Qwen3.5, Qwen3-Omni, Qwen4, GLM-4V, GLM-OCR, GLM-5, ERNIE 4.5 VL, Kimi K2.5, "
        "Cohere Compass, dots3, VideoLLaMA 3, PaddleOCR-VL: the vision tower"
    )
    landmarks = ("patch_embed", "blocks", "norm1", "attn", "norm2", "mlp", "merger", "rotary_pos_emb")
    towers: ClassVar = {
        **dict.fromkeys(
            (
                *("Qwen2VisionTransformerPretrainedModel", "Qwen3VLVisionModel", "Qwen3VLMoeVisionModel"),
                *("Qwen3_5VisionModel", "Qwen3_5MoeVisionModel", "Qwen3OmniMoeVisionEncoder", "Qwen4ExpVisionModel"),
                *("Glm4vVisionModel", "Glm4vMoeVisionModel", "GlmOcrVisionModel", "Glm5NextVisionModel"),
                *("Ernie4_5_VLMoeVisionTransformerPretrainedModel", "CohereCompassVisionModel", "Dots3NoteVisionModel"),
            ),
            ("blocks",),
        ),
        "Kimi_K25VisionModel": ("layers",),
        **dict.fromkeys(("VideoLlama3VisionModel", "PaddleOCRVisionTransformer"), ("encoder.layers",)),
    }
    host = replace(
        HF,
        followers={**HF.followers, "position_embeddings": _tables, "cu_seqlens": no_change, "max_seqlen": no_change},
        padding={},
        is_positional=True,
    )
    specs = (
        PackedSpec(
            attention=("norm1", "attn"),
            attn="attn",
            mlp=("norm2", "mlp"),
            ends="cu_seqlens",
            tables="position_embeddings",
        ),
        PackedSpec(
            attention=("layer_norm1", "self_attn"),
            attn="self_attn",
            mlp=("layer_norm2", "mlp"),
            ends="cu_seqlens",
            tables="position_embeddings",
        ),
    )
    last = "the merger joins neighbouring tokens by their places"

    def surroundings(self, model: Any) -> Surroundings:
        tower = self.tower(model)[1]
        deep = f"{type(tower).__qualname__} reads the tokens of several blocks (DeepStack)"
        around = super().surroundings(model)
        has_deep = bool(getattr(tower, "deepstack_visual_indexes", None))
        return replace(around, every=around.every or (deep if has_deep else None))

    def overrides(self, model: Any, context: Context) -> list[Binding]:
        tower = self.tower(model)[1]
        return [*super().overrides(model, context), Binding(tower, "forward", BySize(tower, context.is_merging))]

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from transformers import Qwen2VLVisionConfig
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

        sizes = {"depth": 4, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8}
        tower: Any = Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(**sizes))
        return _Cut(tower).eval(), torch.randn(2, 3, 32, 32)


class HFPixtral(_Packed):
    name = "hf_pixtral"
    families = "transformers Pixtral (the vision tower of Mistral 3 and of Pixtral)"
    landmarks = ("patch_conv", "ln_pre", "transformer", "attention_norm", "attention", "ffn_norm", "feed_forward")
    example = "PixtralVisionModel"
    towers: ClassVar = {"PixtralVisionModel": ("transformer.layers",)}
    host = replace(
        HF,
        followers={
            **HF.followers,
            "position_embeddings": _tables,
            **dict.fromkeys(("attention_mask", *_CUT), no_change),  # a batch of images needs no mask
        },
        padding={},
        is_positional=True,
        ignores_rest=True,
    )
    specs = (
        PackedSpec(
            attention=("attention_norm", "attention"),
            attn="attention",
            mlp=("ffn_norm", "feed_forward"),
            ends="cu_seq_lens_q",
            tables="position_embeddings",
            is_batch=True,
        ),
    )
    last = "the images in one sequence are told apart by how many tokens each has"

    def tiny(self) -> tuple[nn.Module, Tensor]:
        tower, images = super().tiny()
        return _ByImage(tower).eval(), images

    def apart(self, ends: Tensor, block: Any) -> dict[str, Any]:
        longest = int(ends.diff().max())
        if "flash" in block.attention.config._attn_implementation:
            return {"attention_mask": None, **dict(zip(_CUT, (ends, ends, longest, longest), strict=True))}
        like = block.attention.q_proj.weight
        image = torch.arange(int(ends[-1]), device=like.device) // longest
        mask = (image[:, None] != image[None, :]).to(like.dtype) * torch.finfo(like.dtype).min
        return {"attention_mask": mask[None, None], "cu_seq_lens_q": ends}

    def overrides(self, model: Any, context: Context) -> list[Binding]:
        tower = self.tower(model)[1]
        found = [_Counted(tower, context.is_merging), BySize(tower, context.is_merging, tower.patch_size)]
        return [*super().overrides(model, context), *(Binding(tower, "forward", value) for value in found)]


class _Counted(Override):
    """Pixtral's forward: while merging, tells the blocks where the images end, which a mask alone would say."""

    def __init__(self, owner: Any, is_merging: Callable[[], bool]) -> None:
        super().__init__(owner)
        self.is_merging = is_merging

    @property
    def __code__(self) -> Any:
        """The code object by which `torch.export` names the forward."""
        return type(self.owner).forward.__code__

    def __call__(self, pixel_values: Tensor, image_sizes: Any = None, **kwargs: Any) -> Any:
        if self.is_merging():
            sizes = [pixel_values.shape[-2:]] * pixel_values.shape[0] if image_sizes is None else image_sizes
            side: Any = self.owner.patch_size
            # an argument that the host passes on to its blocks, for flash attention
            counts = ((int(size[0]) // side) * (int(size[1]) // side) for size in sizes)
            kwargs["cu_seq_lens_q"] = tuple(accumulate(counts, initial=0))
        return self.original(pixel_values, image_sizes=image_sizes, **kwargs)


class PackedTap(InterfaceTap):
    """Attends within each image: the attention gets one sequence, and its interface function makes a batch of it.

    For attentions that take rotary tables of one sequence only. `tables`, `ends` and `is_batch` are as in `PackedSpec`.
    """

    def __init__(self, block: nn.Module, path: str, tables: str, ends: str = "", is_batch: bool = True) -> None:
        super().__init__(block, path)
        self.tables, self.ends, self.is_batch = tables, ends, is_batch

    def seams(self, needs: frozenset[str]) -> list[Binding]:
        found = [binding for binding in super().seams(needs) if binding.attribute != "config"]
        return [Binding(self.core, "config", _Asking(self.config)), *found]

    def call(self, attention: Callable[..., Any], x: Tensor, given: dict[str, Any]) -> Any:
        B, M, C = x.shape
        self.turn.put({"images": B})
        by_image = given[self.tables]  # [B, M, ...] each, or one such table
        is_one = isinstance(by_image, Tensor)
        more: dict[str, Any] = {
            self.tables: by_image.flatten(0, 1) if is_one else tuple(table.flatten(0, 1) for table in by_image)
        }
        if self.is_batch:
            return first_of(attention(x.reshape(1, B * M, C), **more)).view(B, M, C)
        more[self.ends] = _ends(B * M, like=x)
        return first_of(attention(x.reshape(B * M, C), **more)).view(B, M, C)

    def answer(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]) -> Any:
        images = self.turn.peek().get("images")
        if images is None:  # the block's own forward
            return super().answer(q, k, v, mask, options)
        # [1, H, B * M, D] -> [B, H, M, D]
        q, k, v = (part[0].unflatten(1, (images, -1)).transpose(0, 1) for part in (q, k, v))
        options = {name: value for name, value in options.items() if name not in _CUT}
        out = super().answer(q, k, v, None, options)[0]  # [B, M, H, D]
        return out.flatten(0, 1)[None], None


class _Asking:
    """A configuration that names our function, with "flash" in the name where the model's own has it."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def _attn_implementation(self) -> str:
        return FLASH if "flash" in (self.config._attn_implementation or "") else NAME

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "config":  # asked for while a copy is made
            raise AttributeError(name)
        return getattr(self.config, name)


class _Cut(nn.Module):
    """Cuts images into patches, in units of 2 x 2, as the processor of Qwen2-VL does; returns what the merger makes."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.visual = tower

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, height, width] -> [B, N / 4, C]
        config = self.visual.config
        side, times, B = config.patch_size, config.temporal_patch_size, images.shape[0]
        rows, columns = images.shape[-2] // side, images.shape[-1] // side
        x = images.view(B, 3, rows // 2, 2, side, columns // 2, 2, side).permute(0, 2, 5, 3, 6, 1, 4, 7)
        x = x.reshape(B * rows * columns, 3, 1, side, side).expand(-1, -1, times, -1, -1).flatten(1)
        grid = torch.tensor([[1, rows, columns]], device=x.device).expand(B, -1)
        out: Tensor = self.visual(x, grid).pooler_output
        return out.view(B, -1, out.shape[-1])


class _ByImage(nn.Module):
    """Returns the tokens of Pixtral's images as a batch."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.vision_tower = tower

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, height, width] -> [B, N, C]
        out: Tensor = self.vision_tower(images).last_hidden_state
        return out.view(images.shape[0], -1, out.shape[-1])
