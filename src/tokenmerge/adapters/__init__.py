"""The model families; the first adapter that matches describes the model."""

from __future__ import annotations

import torch
from torch import nn

from tokenmerge.adapters.base import Adapter
from tokenmerge.adapters.open_clip import OpenClip
from tokenmerge.adapters.refused import refusal
from tokenmerge.adapters.repos.dino import Dino, DinoV2
from tokenmerge.adapters.repos.mae import MAE
from tokenmerge.adapters.repos.mae_st import MAEst
from tokenmerge.adapters.repos.swag import Swag
from tokenmerge.adapters.timm.beit import TimmBeit
from tokenmerge.adapters.timm.cait import TimmCait
from tokenmerge.adapters.timm.eva import TimmEva
from tokenmerge.adapters.timm.naflex import TimmNaFlex
from tokenmerge.adapters.timm.relpos import TimmRelPos
from tokenmerge.adapters.timm.sam import TimmSAM
from tokenmerge.adapters.timm.vit import TimmViT
from tokenmerge.adapters.timm.vlm import TimmVLM
from tokenmerge.adapters.torch_encoder import TorchEncoder
from tokenmerge.adapters.torchvision_vit import TorchvisionViT
from tokenmerge.adapters.transformers.aimv2 import HFAimv2
from tokenmerge.adapters.transformers.audio import HFAST, HFWhisper
from tokenmerge.adapters.transformers.beit import HFBeit
from tokenmerge.adapters.transformers.clip import HFCLIP
from tokenmerge.adapters.transformers.dinov2 import HFDinov2
from tokenmerge.adapters.transformers.internvl import HFInternVL
from tokenmerge.adapters.transformers.rotary import HFVJEPA2, HFDINOv3
from tokenmerge.adapters.transformers.timm_wrapper import HFTimm
from tokenmerge.adapters.transformers.video import HFVideoMAE, HFVivit
from tokenmerge.adapters.transformers.vit import HFViT
from tokenmerge.adapters.transformers.yolos import HFYolos
from tokenmerge.adapters.vit_pytorch import VitPytorch
from tokenmerge.errors import UnsupportedModelError

__all__ = ["ADAPTERS", "find", "list_adapters"]

ADAPTERS: tuple[Adapter, ...] = (
    TimmViT(),
    TimmBeit(),
    TimmRelPos(),
    TimmCait(),
    TimmEva(),
    TimmNaFlex(),
    TimmSAM(),
    TimmVLM(),
    MAEst(),
    MAE(),
    Swag(),
    TorchvisionViT(),
    OpenClip(),
    Dino(),
    DinoV2(),
    VitPytorch(),
    HFBeit(),
    HFDINOv3(),
    HFVideoMAE(),
    HFVivit(),
    HFVJEPA2(),
    HFAST(),
    HFWhisper(),
    HFViT(),
    HFCLIP(),
    HFDinov2(),
    HFInternVL(),
    HFAimv2(),
    HFTimm(),
    HFYolos(),
    TorchEncoder(),
)


def list_adapters() -> list[str]:
    """Return the names of the model families, in the order they are tried."""
    return [adapter.name for adapter in ADAPTERS]


def find(model: nn.Module) -> Adapter:
    """Return the adapter of the model; raises `UnsupportedModelError` that says what was tried and what is nearest."""
    # before the adapters: a wrapper answers for what it wraps, so they would take it for that
    inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
    if isinstance(inner, nn.Module):
        raise UnsupportedModelError(
            f"{type(model).__qualname__} wraps a {type(inner).__qualname__}: patch that one, before it is compiled or "
            "wrapped."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            f"this {type(model).__qualname__} was made by torch.jit: its code is compiled, and nothing can be put into "
            "it. Patch the nn.Module that it was made from, then trace that (torch.jit.script takes no patched model)."
        )
    for adapter in ADAPTERS:
        if adapter.matches(model):
            return adapter.resolve(model)
    reason = refusal(model)
    if reason:
        raise UnsupportedModelError(
            f"tokens cannot be merged in {type(model).__module__}.{type(model).__qualname__}: {reason}. Take a model "
            "that keeps one plain sequence of tokens through its blocks; `tokenmerge list` names the families."
        )
    path = _part(model)
    if path is not None:
        raise UnsupportedModelError(
            f"patch(model.{path}, ...) instead: that {type(model.get_submodule(path)).__qualname__} inside this "
            f"{type(model).__module__}.{type(model).__qualname__} can be patched."
        )
    present = {part for name, _ in model.named_modules() for part in name.split(".")}
    nearest = max(ADAPTERS, key=lambda adapter: len(present.intersection(adapter.landmarks)) / len(adapter.landmarks))
    missing = [name for name in nearest.landmarks if name not in present]
    shared = len(nearest.landmarks) - len(missing)
    near = (
        f"Nearest is {nearest.name!r}: {shared} of its {len(nearest.landmarks)} children are there"
        + (f", missing are {', '.join(missing)}." if missing else ", but the model's class is another.")
        if shared
        else "None is near: no child of any family was found."
    )
    hint = (
        "Patch it by names, patch(model, blocks=..., attn=..., norm=..., mlp=...), or patch the vision tower inside it."
        if _attends(model)
        else "It has no attention that could be found (no nn.MultiheadAttention, no child called attention, attn or "
        "qkv), and tokens are merged for what attends to them: choose a vision transformer. One whose attention has "
        "another name is told its names: patch(model, blocks=..., attn=..., norm=..., mlp=...)."
    )
    cls = type(model)
    raise UnsupportedModelError(
        f"no adapter for {cls.__module__}.{cls.__qualname__}; tried: {', '.join(list_adapters())}. {near} {hint}"
    )


def _part(model: nn.Module, depth: int = 4) -> str | None:
    """Return the path of the part of a model, not deeper than `depth`, that an adapter describes."""
    parts: list[tuple[str, nn.Module]] = sorted(model.named_modules(), key=lambda item: item[0].count("."))
    shallow = (item for item in parts if item[0] and item[0].count(".") < depth and any(item[1].children()))
    return next((path for path, part in shallow if _describes(part)), None)


def _describes(part: nn.Module) -> bool:
    for adapter in ADAPTERS:
        if adapter.matches(part):
            try:
                return bool(adapter.resolve(part).blocks(part))
            except UnsupportedModelError:
                return False
    return False


def _attends(model: nn.Module) -> bool:
    """Say whether anything in the model looks like attention, by its class or its name."""
    for path, module in model.named_modules():
        kind, name = type(module).__name__.lower(), path.rpartition(".")[2].lower()
        if "attn" in kind + name or "attention" in kind + name or name in ("qkv", "to_qkv", "query", "q_proj", "to_q"):
            return True
    return False
