"""lucidrains' vit-pytorch: `ViT` and `SimpleViT`, whose blocks are pairs in a list and not callable."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge._intercept.layout import PROBED
from tokenmerge._intercept.pooling import OutputMean
from tokenmerge._intercept.projections import ProjectionTap
from tokenmerge._intercept.prove import Probe, check_parity
from tokenmerge._intercept.taps import AttentionTap
from tokenmerge.adapters.base import (
    Adapter,
    Binding,
    BlockSpec,
    Context,
    Host,
    Override,
    Sizes,
    Surroundings,
    TokenLayout,
    class_names,
)
from tokenmerge.errors import UnsupportedModelError

__all__ = ["VitPytorch"]

_MODELS = frozenset(("vit_pytorch.vit.ViT", "vit_pytorch.simple_vit.SimpleViT"))


def _grid_of(cutter: Any, image: Any, out: Any) -> tuple[int, int] | None:
    # the patch embedding is einops' "b c (h p1) (w p2) -> b (h w) (p1 p2 c)"
    patch = getattr(cutter[0], "axes_lengths", {})
    return (image.shape[-2] // patch["p1"], image.shape[-1] // patch["p2"]) if {"p1", "p2"} <= set(patch) else None


class VitPytorch(Adapter):
    name = "vit_pytorch"
    families = "vit-pytorch ViT and SimpleViT (lucidrains)"
    landmarks = ("to_patch_embedding", "transformer", "layers", "to_qkv", "to_latent")
    host = Host(
        "vit_pytorch",
        blocks="transformer.layers",
        loops=("forward", "transformer.forward"),
        heads=("transformer.norm.forward",),
        cut_by="to_patch_embedding",
        grid_of=_grid_of,
    )
    specs = (BlockSpec(attention=("0",), attn="0", mlp=("1",)),)  # each member normalises its input

    def matches(self, model: nn.Module) -> bool:
        return any(name.startswith("vit_pytorch.") for name in class_names(model))

    def wiring(self, model: Any) -> list[Binding]:
        # make the pairs callable, and let the loop call them instead of their members
        transformer = model.transformer
        pairs, loop = [_Pair(pair) for pair in transformer.layers], _Loop(transformer)
        composed = partial(loop.run, pairs)
        probe = Probe(PROBED, {}, self.layout(model), "transformer", has_places=False)
        check_parity(transformer, loop.original, composed, probe, None)
        return [Binding(bound.owner, "forward", bound) for bound in (*pairs, loop)]

    def blocks(self, model: Any) -> list[tuple[str, nn.Module]]:
        if _MODELS.isdisjoint(class_names(model)):
            raise UnsupportedModelError(
                f"{class_names(model)[0]} is not described: of vit-pytorch only ViT and SimpleViT are. Patch the ViT "
                "inside, if it holds one."
            )
        return super().blocks(model)

    def layout(self, model: Any) -> TokenLayout:
        self.blocks(model)
        class_token = getattr(model, "cls_token", None)
        prefix = 0 if class_token is None else int(class_token.shape[-2])
        tokens = int(model.pos_embedding.shape[-2])
        side = int((tokens - prefix) ** 0.5)
        height, width = model.patch_size
        channels = int(model.to_patch_embedding[1].normalized_shape[0]) // (height * width)
        if side**2 != tokens - prefix:
            return TokenLayout(prefix, None, tokens, None)
        return TokenLayout(prefix, (side, side), tokens, (channels, side * height, side * width))

    def tap(self, block: Any) -> AttentionTap:
        return ProjectionTap(block, "0", qkv=("to_qkv",), before=("norm",), after=("to_out",), drop="dropout")

    def surroundings(self, model: Any) -> Surroundings:
        handed_out = "without a classifier the model hands its tokens out" if _is_open(model) else None
        return replace(super().surroundings(model), handed_out=handed_out)

    def overrides(self, model: Any, context: Context) -> list[Binding]:
        norm = model.transformer.norm
        return [Binding(norm, "forward", _NormMean(norm, context.sizes, model))] if context.sizes else []

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from vit_pytorch import ViT

        model: nn.Module = ViT(
            image_size=32, patch_size=8, num_classes=10, dim=32, depth=4, heads=4, dim_head=8, mlp_dim=64
        )
        return model.eval(), torch.randn(2, 3, 32, 32)


def _is_open(model: Any) -> bool:
    return getattr(model, "mlp_head", getattr(model, "linear_head", None)) is None


class _NormMean(OutputMean):
    """The norm after the blocks: weights its output by size if the model averages it, as set at each call."""

    def __init__(self, norm: nn.Module, sizes: Sizes, model: nn.Module) -> None:
        super().__init__(norm, sizes, start=0)
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.model.pool == "mean" and not _is_open(self.model):
            return super().__call__(*args, **kwargs)
        out: Tensor = self.original(*args, **kwargs)
        return out


class _Pair(Override):
    """The forward of a pair (attention, MLP), which is a plain list."""

    def __call__(self, input: Tensor) -> Tensor:
        attention, mlp = self.owner.children()
        x: Tensor = attention(input) + input
        out: Tensor = mlp(x) + x
        return out


class _Loop(Override):
    """The instance `forward` of the module that runs the pairs: calls each pair as a block."""

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(self.owner.layers, x)  # type: ignore[arg-type]

    def run(self, pairs: Iterable[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
        for pair in pairs:
            x = pair(x)
        out: Tensor = self.owner.norm(x)  # type: ignore[operator]
        return out
