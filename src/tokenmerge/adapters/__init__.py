"""The model families; the first adapter that matches describes the model."""

from __future__ import annotations

from torch import nn

from tokenmerge.adapters.base import Adapter
from tokenmerge.adapters.mae import MAE
from tokenmerge.adapters.swag import Swag
from tokenmerge.adapters.timm_vit import TimmViT
from tokenmerge.errors import UnsupportedModelError

__all__ = ["ADAPTERS", "find", "list_adapters"]

ADAPTERS: tuple[Adapter, ...] = (TimmViT(), MAE(), Swag())


def list_adapters() -> list[str]:
    """Return the names of the model families, in the order they are tried."""
    return [adapter.name for adapter in ADAPTERS]


def find(model: nn.Module) -> Adapter:
    """Return the adapter of the model; raises `UnsupportedModelError` that says what was tried and what is nearest."""
    for adapter in ADAPTERS:
        if adapter.matches(model):
            return adapter
    inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
    if isinstance(inner, nn.Module):
        raise UnsupportedModelError(
            f"{type(model).__qualname__} wraps a {type(inner).__qualname__}: patch that one, before it is compiled or "
            "wrapped."
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
    cls = type(model)
    raise UnsupportedModelError(
        f"no adapter for {cls.__module__}.{cls.__qualname__}; tried: {', '.join(list_adapters())}. {near} "
        "Add a family in adapters/ (CONTRIBUTING.md), or patch the vision tower inside the model."
    )
