"""timm's registry as a list of small models: every name of its ViT modules, built at depth 2 without its weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MODULES = (
    "vision_transformer",
    "deit",
    "eva",
    "beit",
    "naflexvit",
    "vision_transformer_relpos",
    "vision_transformer_hybrid",
    "vision_transformer_sam",
    "vitamin",
    "cait",
    "qwen3_vit",
    "gemma4_vit",
    "deepseek_vit",
)
# what a name's own settings need beside a small depth and width
_EXTRA: dict[str, dict[str, Any]] = {"sapiens2": {"num_kv_heads": 4}, "samvit": {"global_attn_indexes": (1,)}}
# 96: where a gated MLP would be of an odd width otherwise
_WIDTHS: tuple[dict[str, Any], ...] = ({"embed_dim": 64, "num_heads": 4}, {"embed_dim": 96, "num_heads": 4}, {})
# the ways in which models draw their first weights
_DRAWS = {"erfinv_", "kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "uniform_", "xavier_uniform_"}


def names() -> dict[str, str]:
    """Return every registered name with its module, for the modules that the installed timm has."""
    import timm

    found = {module: timm.list_models(module=module) for module in MODULES}
    return {name: module for module, members in found.items() for name in members}


def build(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """Return a small model of this name and an input size with few tokens; raises what timm raises where none works.

    Its parameters hold anything: they are to be drawn. A stem of convolutions is computed once for each input.
    """
    with undrawn():
        model, size = _build(name)
    embed = getattr(model, "patch_embed", None)
    if isinstance(getattr(embed, "backbone", None), nn.Module):
        embed.backbone = _Once(embed.backbone)  # type: ignore[union-attr]
    return model, size


def undrawn() -> AbstractContextManager[Any]:
    """Build models without drawing their weights, which takes longer than all that is tested with them."""
    return _Undrawn()


class _Undrawn(TorchFunctionMode):
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = args[0] if args else (kwargs or {}).get("tensor")
        if getattr(func, "__name__", "") not in _DRAWS:
            return func(*args, **(kwargs or {}))
        with torch.no_grad():  # what the memory held may be outside the bounds, for which torch draws again and again
            return drawn.zero_()


class _Once(nn.Module):
    """A stem that remembers the last input and its features: the stem is the host's, and no part of what is tested."""

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.seen: tuple[Tensor, Any] | None = None

    def forward(self, x: Tensor) -> Any:
        if self.seen is None or self.seen[0].dtype != x.dtype or not torch.equal(self.seen[0], x):
            self.seen = x.clone(), self.stem(x)
        features = self.seen[1]
        return [part.clone() for part in features] if isinstance(features, (list, tuple)) else features.clone()


def _build(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    import timm

    extra = next((options for part, options in _EXTRA.items() if part in name), {})
    problem: Exception | None = None
    for width in _WIDTHS:
        options = {"depth": 2, **width, **extra}
        try:
            size = _size(timm.create_model(name, **options))
            for sized in ({"img_size": size[1]}, {}):
                try:
                    return timm.create_model(name, **options, **sized), size
                except TypeError as error:
                    problem = error
        except (AssertionError, TypeError, RuntimeError) as error:
            problem = error
    assert problem is not None
    raise problem


def _size(model: nn.Module) -> tuple[int, int, int]:
    """An image of six by six patches."""
    embed = getattr(model, "patch_embed", None)
    if callable(getattr(embed, "feat_ratio", None)):
        stride = embed.feat_ratio()  # a stem of convolutions
    elif isinstance(embed, nn.Module):
        stride = embed.patch_size
    else:
        stride = next((module.stride for module in model.modules() if isinstance(module, nn.Conv2d)), 16)
    side = 6 * int(stride[0] if isinstance(stride, (tuple, list)) else stride)
    return 3, side, side
