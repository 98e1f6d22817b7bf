"""Captures q, k and v of a transformers attention through transformers' `AttentionInterface`.

Shapes: B batch, N tokens, C channels, H heads, D head width.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge._intercept import follow
from tokenmerge._intercept.projections import ProjectionTap
from tokenmerge._intercept.taps import AttentionTap, SeamTap
from tokenmerge.adapters.base import Binding
from tokenmerge.errors import UnsupportedError, UnsupportedModelError

__all__ = ["FLASH", "NAME", "InterfaceTap", "MaskedTap", "hf_tap"]

NAME = "tokenmerge"  # name of our function among transformers' attention implementations
FLASH = "tokenmerge_flash"  # the same, for attentions that ask whether there is "flash" in the name
_TAP = "_tokenmerge_tap"
_BIASED = ("eager", "sdpa", "flex_attention")  # implementations that add a mask to the scores


class InterfaceTap(AttentionTap):
    """The tap of an attention that gets its implementation from transformers' `AttentionInterface`.

    The attention module gets its own copy of the configuration, which names our function. That function captures
    queries, keys and values, adds the bias to the mask and calls the implementation that the model's own configuration
    names.
    """

    kind = "AttentionInterface"

    def __init__(self, block: nn.Module, path: str) -> None:
        super().__init__(block, path)
        self.core = _core(self.attn)
        self.config: Any = self.core.config
        self.eager = _eager(self.core)
        self.eager_adds = _adds_mask(self.eager, self.core)
        self.takes_bias = self.implementation in _BIASED
        self.needs = ("q",)  # to check that it ran
        _register()

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)
        _register()  # a pickle may be loaded in a process where nothing was patched yet

    @property
    def implementation(self) -> str:
        """The implementation that the model's configuration names now; a user may change it at any time."""
        name: str = getattr(self.config, "_attn_implementation", None) or "eager"
        return name

    def seams(self, needs: frozenset[str]) -> list[Binding]:
        # other models may share the configuration: give this module its own copy
        config: Any = copy.copy(self.config)
        config._attn_implementation_internal = NAME
        return [Binding(self.core, "config", config), Binding(self.core, _TAP, self)]

    def answer(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]) -> Any:
        """Run the implementation that the user chose on `[B, H, N, D]`, with this call's bias in the mask."""
        turn = self.turn.peek()
        bias = turn.get("bias")
        if turn:
            self.turn.put({"has_run": True})
        self.slot.put({"q": q, "k": k, "v": v})
        name = self.implementation
        if bias is not None:
            if name not in _BIASED:
                raise UnsupportedError(
                    f"log(size) should be added to the attention scores, but the implementation is now {name!r}, which "
                    f"takes no mask. Use model.set_attn_implementation with {' or '.join(map(repr, _BIASED))}, or "
                    "patch again with prop_attn=False."
                )
            mask = follow.add_bias(mask, bias, q.dtype)
            # some eager functions multiply by their mask; flex attention needs it expanded to [B, 1, N, N], and its
            # CPU kernel corrupts memory when a score_mod reads a tensor (torch 2.15)
            if name == "flex_attention" or (name == "eager" and not self.eager_adds):
                name = "sdpa"
        if name == "eager":
            return self.eager(self.core, q, k, v, mask, **options)
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        # flash attention reads its own name from the module's configuration
        module = self.core if name in _BIASED else _Plain(self.core, self.config)
        return ALL_ATTENTION_FUNCTIONS[name](module, q, k, v, mask, **options)


class MaskedTap(SeamTap):
    """Intercepts the projections of an attention that takes a mask `[B, 1, N, N]` and computes the scores itself."""

    def __init__(self, block: nn.Module, path: str) -> None:
        super().__init__(block, path)
        self.takes_bias = True

    def attend(
        self, run: Callable[..., Any], bias: Tensor | None, kept: Tensor | None, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        if bias is not None:
            x = args[0]
            mask = follow.add_bias(kwargs.get("attention_mask"), bias, x.dtype)
            kwargs = {**kwargs, "attention_mask": mask.expand(-1, -1, x.shape[1], -1)}  # type: ignore[union-attr]
        return run(*args, **kwargs)


def hf_tap(block: nn.Module, path: str) -> AttentionTap:
    """Return the tap of an attention; raises `UnsupportedModelError` for an unknown kind."""
    attn = block.get_submodule(path)
    names = inspect.signature(type(attn).forward).parameters
    if _asking(attn) is None and "attention_mask" in names and hasattr(attn, "k_proj"):
        return MaskedTap(block, path)  # OWL-ViT in transformers 4
    if _asking(attn) is None and hasattr(attn, "qkv") and hasattr(attn, "projection"):
        return ProjectionTap(block, path, after=("projection",), drop="dropout")  # BLIP
    return InterfaceTap(block, path)


class _Plain:
    """A view of an attention module with the model's own, unchanged configuration."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self.module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
) -> Any:
    """The attention function that is registered with transformers and dispatches to the module's tap."""
    tap: InterfaceTap = getattr(module, _TAP)
    return tap.answer(query, key, value, attention_mask, options)


def _register() -> None:
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, _attend)
    AttentionInterface.register(FLASH, _attend)


def _asking(attn: nn.Module) -> nn.Module | None:
    """Return the module, the attention or one inside it, that reads the implementation's name."""
    for module in attn.modules():
        asks = hasattr(module.__dict__.get("config"), "_attn_implementation")
        if asks and _modeling(module, "ALL_ATTENTION_FUNCTIONS"):
            return module
    return None


def _core(attn: nn.Module) -> nn.Module:
    core = _asking(attn)
    if core is None:
        raise UnsupportedModelError(
            f"{type(attn).__module__}.{type(attn).__qualname__} does not use transformers' AttentionInterface: its "
            "queries, keys and values cannot be seen. Update transformers, or patch by names: patch(model, blocks=..., "
            "attn=..., norm=..., mlp=...)."
        )
    return core


def _modeling(module: nn.Module, name: str) -> Any:
    """Return the attribute `name` of the file that defines the module's class or one of its bases."""
    files = (sys.modules.get(cls.__module__) for cls in type(module).__mro__)
    return next((found for found in (getattr(file, name, None) for file in files) if found is not None), None)


def _eager(core: nn.Module) -> Callable[..., Any]:
    eager: Callable[..., Any] | None = _modeling(core, "eager_attention_forward")
    if eager is None:
        raise UnsupportedModelError(
            f"{type(core).__module__} has no eager_attention_forward, which attn_implementation='eager' stands "
            "for. Use a transformers version between 4.57 and 5.24."
        )
    return eager


def _adds_mask(eager: Callable[..., Any], core: nn.Module) -> bool:
    """Return whether the function adds its mask to the scores; in transformers 4's ViTs it multiplies the weights."""
    groups = getattr(core, "num_key_value_groups", 1)
    q, k = torch.zeros(1, groups, 1, 2), torch.zeros(1, 1, 2, 2)
    v = torch.tensor([1.0, 3.0]).view(1, 1, 2, 1)
    with torch.no_grad():
        out = eager(core, q, k, v, torch.tensor([0.0, -1e4]).view(1, 1, 1, 2), scaling=1.0, dropout=0.0)[0]
    return bool((out - 1).abs().max() < 1e-3)
