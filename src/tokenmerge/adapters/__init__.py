"""The model families: the built-in ones, one line each, and those that a user registers."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tokenmerge.adapters import _older
from tokenmerge.adapters.base import Adapter
from tokenmerge.adapters.refused import refusal, refused_part
from tokenmerge.errors import ConfigError, UnknownNameError, UnsupportedModelError

__all__ = ["ADAPTERS", "find", "known", "list_adapters", "register", "unregister", "untouched"]

# tried in this order; the first adapter that matches is used
_FAMILIES = (
    "timm.vit.TimmViT",
    "timm.beit.TimmBeit",
    "timm.relpos.TimmRelPos",
    "timm.cait.TimmCait",
    "timm.eva.TimmEva",
    "timm.naflex.TimmNaFlex",
    "timm.sam.TimmSAM",
    "timm.vlm.TimmVLM",
    "repos.mae.MAEst",
    "repos.mae.MAE",
    "repos.swag.Swag",
    "torchvision_vit.TorchvisionViT",
    "open_clip.OpenClip",
    "repos.dino.Dino",
    "repos.dino.DinoV2",
    "vit_pytorch.VitPytorch",
    "transformers.beit.HFBeit",
    "transformers.rotary.HFDINOv3",
    "transformers.video.HFVideoMAE",
    "transformers.video.HFVivit",
    "transformers.rotary.HFVJEPA2",
    "transformers.audio.HFAST",
    "transformers.audio.HFWhisper",
    "transformers.audio.HFWav2Vec2",
    "transformers.speech.HFSpeech",
    "transformers.plain.HFViT",
    "transformers.plain.HFCLIP",
    "transformers.plain.HFDinov2",
    "transformers.plain.HFRadio",
    "transformers.plain.HFVitPose",
    "transformers.plain.HFInternVL",
    "transformers.plain.HFAimv2",
    "transformers.rotary.HFMLCD",
    "transformers.rotary.HFLlama4",
    "transformers.rotary.HFGemma4",
    "transformers.packed.HFQwenVision",
    "transformers.packed.HFPixtral",
    "transformers.timm_wrapper.HFTimm",
    "transformers.yolos.HFYolos",
    "torch_encoder.TorchEncoder",
)


def _built_in(path: str) -> Adapter:
    module, _, name = path.rpartition(".")
    adapter: Adapter = getattr(import_module(f"{__name__}.{module}"), name)()
    return adapter


@cache
def _all_built_in() -> tuple[Adapter, ...]:
    return tuple(map(_built_in, _FAMILIES))


if TYPE_CHECKING:
    ADAPTERS: tuple[Adapter, ...]
else:

    def __getattr__(name: str) -> Any:
        """Import the families when they are first asked for: `import tokenmerge` does not need them."""
        if name == "ADAPTERS":
            return _all_built_in()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_registered: list[Adapter] = []


def known() -> tuple[Adapter, ...]:
    """Return the families in the order they are tried: registered ones first, then built-in ones."""
    return (*_registered, *_all_built_in())


def register(adapter: Adapter) -> Adapter:
    """Add a model family from outside the library to `patch` and all tools; returns the adapter.

    Registered families are tried before the built-in ones, in order of registration: some built-in ones recognise a
    model by its structure and would claim yours. `unregister` removes a family again.

    Args:
        adapter: an instance of a subclass of `tokenmerge.adapters.base.Adapter` with a name of its own.

    Raises `ConfigError` for anything but an instance, and `UnknownNameError` if the name is taken.

    >>> from tokenmerge.adapters.timm.vit import TimmViT
    >>> class MyViT(TimmViT):
    ...     name = "my_vit"
    >>> adapter = register(MyViT())
    >>> list_adapters()[:2]
    ['my_vit', 'timm_vit']
    >>> _ = unregister("my_vit")
    """
    if not isinstance(adapter, Adapter):
        given = f"the class {adapter.__qualname__}" if isinstance(adapter, type) else f"a {type(adapter).__qualname__}"
        raise ConfigError(f"register() takes an instance of an Adapter, and was given {given}: register(MyFamily()).")
    given = {name: getattr(adapter, name, None) for name in ("name", "families")}
    lacking = [name for name, value in given.items() if not isinstance(value, str) or not value.strip()]
    if type(adapter).matches is Adapter.matches and not adapter.host.models:
        lacking.append("matches (or host.models)")
    if lacking:
        raise ConfigError(f"{type(adapter).__qualname__} does not say its {', '.join(lacking)}.")
    taken = next((other for other in known() if other.name == adapter.name), None)
    if taken is not None:
        raise UnknownNameError(
            f"the name {adapter.name!r} is taken by the adapter {type(taken).__qualname__}. Give yours another `name`"
            + (f", or take that one out first: unregister({taken.name!r})." if taken in _registered else ".")
        )
    _older.adopt(type(adapter))
    _registered.append(adapter)
    return adapter


def unregister(name: str) -> Adapter:
    """Remove a registered family and return its adapter; patched models keep theirs.

    Raises `UnknownNameError` for a name that was not registered; built-in families cannot be removed.
    """
    adapter = next((adapter for adapter in _registered if adapter.name == name), None)
    if adapter is None:
        names = ", ".join(repr(adapter.name) for adapter in _registered) or "none"
        raise UnknownNameError(f"no adapter {name!r} was registered. Registered are: {names}; built-in families stay.")
    _registered.remove(adapter)
    return adapter


def list_adapters() -> list[str]:
    """Return the names of the model families, in the order they are tried."""
    return [adapter.name for adapter in known()]


def _check_bare(model: nn.Module) -> None:
    """Reject wrappers: they forward attribute access to the wrapped model, so an adapter would match them."""
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


def find(model: nn.Module) -> Adapter:
    """Return the adapter of the model; raises `UnsupportedModelError` with the families tried and the nearest one."""
    _check_bare(model)
    for adapter in known():
        if adapter.matches(model):
            _older.adopt(type(adapter))  # names that were set after the class was made
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
    refused = refused_part(model)
    if refused is not None:
        path, reason = refused
        raise UnsupportedModelError(
            f"tokens cannot be merged in {type(model).__module__}.{type(model).__qualname__}: of its {path}, a "
            f"{type(model.get_submodule(path)).__qualname__}: {reason}. Take a model that keeps one plain sequence of "
            "tokens through its blocks; another part that does can be patched by names, patch(model, blocks=..., "
            "attn=..., norm=..., mlp=...)."
        )
    raise _undescribed(model)


def _undescribed(model: nn.Module) -> UnsupportedModelError:
    """Return the error for a model that no family describes, with the nearest one where it has attention."""
    present = {part for name, _ in model.named_modules() for part in name.split(".")}
    nearest = max(
        known(), key=lambda adapter: len(present.intersection(adapter.landmarks)) / max(1, len(adapter.landmarks))
    )
    missing = [name for name in nearest.landmarks if name not in present]
    shared = len(nearest.landmarks) - len(missing)
    near = (
        f"Nearest is {nearest.name!r}: {shared} of its {len(nearest.landmarks)} children are there"
        + (f", missing are {', '.join(missing)}." if missing else ", but the model's class is another.")
        if shared
        else "None is near: no child of any family was found."
    )
    hint = (
        f"{near} Patch it by names, patch(model, blocks=..., attn=..., norm=..., mlp=...), or patch the vision tower "
        "inside it."
        if _attends(model)
        else "It has no attention that could be found (no nn.MultiheadAttention, no child called attention, attn or "
        "qkv), and tokens are merged for what attends to them: choose a vision transformer. One whose attention has "
        "another name is told its names: patch(model, blocks=..., attn=..., norm=..., mlp=...)."
    )
    cls = type(model)
    return UnsupportedModelError(
        f"no adapter for {cls.__module__}.{cls.__qualname__}: none of the {len(known())} families describes it "
        f"(`tokenmerge list`, docs/support.md). {hint}"
    )


def _part(model: nn.Module, depth: int = 4) -> str | None:
    """Return the path of a part of the model, at most `depth` levels deep, that an adapter describes."""
    parts: list[tuple[str, nn.Module]] = sorted(model.named_modules(), key=lambda item: item[0].count("."))
    shallow = (item for item in parts if item[0] and item[0].count(".") < depth and any(item[1].children()))
    return next((path for path, part in shallow if _describes(part)), None)


def _describes(part: nn.Module) -> bool:
    for adapter in known():
        if adapter.matches(part):
            try:
                return bool(adapter.resolve(part).blocks(part))
            except UnsupportedModelError:
                return False
    return False


def untouched(model: nn.Module, blocks: Collection[str]) -> list[str]:
    """Return the parts of a model with attention of their own that hold none of these blocks, such as a text tower."""
    found: list[str] = []
    for path, module in model.named_modules():
        holds = any(f"{name}.".startswith(f"{path}." if path else "") for name in blocks)
        inside = any(path.startswith(f"{outer}.") for outer in (*found, *blocks))
        if not (holds or inside or path in blocks) and _runs_layers(module):
            found.append(path)
    return found


def _runs_layers(module: nn.Module) -> bool:
    lists = (inner for inner in module.modules() if isinstance(inner, (nn.ModuleList, nn.Sequential)))
    return any(len(found) > 0 and _attends(found) for found in lists)


def _attends(model: nn.Module) -> bool:
    """Return whether a class or name in the model looks like attention."""
    for path, module in model.named_modules():
        kind, name = type(module).__name__.lower(), path.rpartition(".")[2].lower()
        if "attn" in kind + name or "attention" in kind + name or name in ("qkv", "to_qkv", "query", "q_proj", "to_q"):
            return True
    return False
