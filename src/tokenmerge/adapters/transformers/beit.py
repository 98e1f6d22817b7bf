"""transformers' BEiT and Data2Vec-Vision: relative positions as a bias in every attention, or one shared by all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenmerge._intercept.pair_bias import PairTap, pairs, placed_pairs, sample_pairs
from tokenmerge._intercept.pooling import OutputMean
from tokenmerge._intercept.taps import AttentionTap
from tokenmerge._torch.tracing import is_compiling
from tokenmerge.adapters.base import Binding, BlockSpec, Context, Override, TokenLayout
from tokenmerge.adapters.transformers.base import HF, SIZES, HFAdapter, InterfaceTap, follow_mask, no_change

__all__ = ["HFBeit"]


def _biases(table: Tensor, kept: Tensor) -> Tensor:
    """Gather a bias shared by all images, or (when traced) the sum of it and a mask, `[B or 1, H, N, N]`."""
    return pairs(table, kept) if table.shape[0] == 1 else follow_mask(table, kept)


def _at_its_size(value: bool, kept: Tensor) -> bool:
    """Return False: the bias keeps the size for all tokens, and its rows and columns are gathered instead."""
    return False


class HFBeit(HFAdapter):
    name = "hf_beit"
    families = "transformers BEiT, Data2Vec-Vision"
    landmarks = ("layernorm_before", "attention", "layernorm_after", "drop_path", "relative_position_bias", "lambda_1")
    towers: ClassVar = {"BeitEncoder": ("layer",), "BeitModel": ("layers",), "Data2VecVisionEncoder": ("layer",)}
    host = replace(
        HF,
        followers={
            **HF.followers,
            "attention_mask": _biases,
            "relative_position_bias": pairs,
            "interpolate_pos_encoding": _at_its_size,
            "resolution": no_change,
        },
        padding={},  # the argument attention_mask holds the shared bias
        is_positional=True,
    )
    refused = ("attention_mask",)
    class_models = frozenset(("BeitForImageClassification", "Data2VecVisionForImageClassification"))

    def prefix(self, tower: Any) -> int:
        return 1

    def spec(self, block: Any) -> BlockSpec:
        if _has_interface(block):
            # without layer scale these attributes are a plain 1.0
            first, second = (
                (name,) if isinstance(getattr(block, name), Tensor) else () for name in ("lambda_1", "lambda_2")
            )
            return BlockSpec(
                attention=("layernorm_before", "attention", "dropout", *first, "drop_path"),
                attn="attention",
                mlp=("layernorm_after", "mlp", "dropout", *second, "drop_path"),
            )
        return BlockSpec(
            attention=(
                *("layernorm_before", "attention.attention"),
                *("attention.output.dense", "attention.output.dropout", "lambda_1", "drop_path"),
            ),
            attn="attention.attention",
            mlp=("layernorm_after", "intermediate", "output", "lambda_2", "drop_path"),
        )

    def tap(self, block: Any) -> AttentionTap:
        if _has_interface(block):
            return _MaskTap(block)
        return PairTap(block, "attention.attention", _table(block), "forward", "relative_position_bias")

    def sample(self, model: nn.Module, block: Any, layout: TokenLayout) -> tuple[int, dict[str, Any]]:
        config = self.tower(model)[1].config
        given: dict[str, Any] = {"resolution": (3 * config.patch_size, 6 * config.patch_size)}
        if config.use_shared_relative_position_bias:
            name = "attention_mask" if _has_interface(block) else "relative_position_bias"
            given[name] = sample_pairs(config.num_attention_heads, 19, block.layernorm_before.weight)
        return 19, given

    def overrides(self, model: Any, context: Context) -> list[Binding]:
        found = super().overrides(model, context)
        if context.sizes and not self.surroundings(model).handed_out and model.config.use_mean_pooling:
            # with mean pooling this norm is an identity, and the pooler averages its output
            norm = next(module for name, module in model.named_modules() if name.split(".")[-1] == "layernorm")
            found.append(Binding(norm, "forward", OutputMean(norm, context.sizes, start=1)))
        shared = getattr(self.tower(model)[1], "relative_position_bias", None)
        return found if shared is None else [*found, Binding(shared, "forward", _Whole(shared))]

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from transformers import BeitConfig, BeitForImageClassification

        # fused attention rounds differently where the bias needs no gradient, as in reentrant checkpointing
        config: Any = BeitConfig(**SIZES, image_size=32, patch_size=8, use_relative_position_bias=True)
        config._attn_implementation = "eager"
        return BeitForImageClassification(config).eval(), torch.randn(2, 3, 32, 32)


class _MaskTap(InterfaceTap):
    """Adds the bias of a block's own table, which the block itself looks up, to the attention mask."""

    def __init__(self, block: Any) -> None:
        super().__init__(block, "attention")

    def placed(self, places: Tensor) -> list[Binding]:
        return placed_pairs(self.block, _table(self.block), "forward", places)

    def __call__(self, x: Tensor, bias: Tensor | None, kept: Tensor | None = None, **given: Any) -> Tensor:
        height, width = given.pop("resolution")
        given.pop("interpolate_pos_encoding", None)
        block: Any = self.block
        table, patch_size = block.relative_position_bias, block.patch_size
        if table is not None:
            # strict export names a constant that a module creates by the path to the module, which here goes through
            # this object, no module; without hooks, forward is equivalent to a call
            is_plain = not (table._forward_hooks or table._forward_pre_hooks)
            look_up = table.forward if is_plain and is_compiling() else table
            own = look_up((height // patch_size, width // patch_size))  # [1, H, N, N]
            own = own if kept is None else pairs(own, kept)
            given["attention_mask"] = own + given.get("attention_mask", 0)
        return super().__call__(x, bias, kept, **given)


class _Whole(Override):
    """The shared bias, computed for all places, although the caller asks for the remaining tokens."""

    def __call__(self, window_size: Any, interpolate_pos_encoding: bool = False, dim_size: Any = None) -> Tensor:
        whole: Tensor = self.original(window_size, interpolate_pos_encoding, 1 + window_size[0] * window_size[1])
        return whole


def _has_interface(block: Any) -> bool:
    """Return whether the block's attention is one module that uses transformers' `AttentionInterface`."""
    return not hasattr(block.attention, "attention")


def _table(block: Any) -> str | None:
    """Return the path of the block's own bias, or None."""
    path = "relative_position_bias" if _has_interface(block) else "attention.attention.relative_position_bias"
    parent, _, child = path.rpartition(".")
    return path if getattr(block.get_submodule(parent), child, None) is not None else None
