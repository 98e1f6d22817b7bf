"""`tome.patch.timm`, `tome.patch.swag`, `tome.patch.mae`: the model gets `model.r` and `model._tome_info`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge import api
from tokenmerge.errors import UnsupportedModelError
from tokenmerge.schedule import parse_r

__all__ = ["mae", "swag", "timm"]


def _patcher(*families: str) -> Callable[..., api.Handle]:
    def apply_patch(model: nn.Module, trace_source: bool = False, prop_attn: bool = True) -> api.Handle:
        """Patch the model with `model.r = 0`; set `model.r` to merge, read `model._tome_info` after a forward.

        With `trace_source` the info holds `source` `[B, M, N]`. Returns the handle, whose `remove()` undoes the patch.
        """
        handle = api.patch(model, r=0, prop_attn=prop_attn, track=trace_source, restore="merged")
        if handle.report().adapter not in families:
            found = handle.report().adapter
            handle.remove()
            raise UnsupportedModelError(
                f"this patch is for {' or '.join(families)} models, the model is one of {found!r}."
            )
        prefix = handle.prefix
        model.__dict__["r"] = 0
        model.__dict__["_tome_info"] = {
            "r": 0,
            "size": None,
            "source": None,
            "trace_source": trace_source,
            "prop_attn": prop_attn,
            "class_token": prefix >= 1,
            "distill_token": prefix >= 2,
        }
        handle.followers.append(_Follower(model))
        hooks = [model.register_forward_pre_hook(_read_settings), model.register_forward_hook(_write_info)]
        handle.on_remove(_Cleanup(model, hooks))
        return handle

    return apply_patch


def _read_settings(model: nn.Module, args: tuple[Any, ...]) -> None:
    handle, info = api.handle_of(model), model.__dict__["_tome_info"]
    if handle.r != model.r:
        handle.r = model.r  # type: ignore[assignment]
    if handle.track != info["trace_source"]:
        handle.track = info["trace_source"]


def _write_info(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    handle, info = api.handle_of(model), model.__dict__["_tome_info"]
    depth = len(handle.tokens)
    info["r"] = [model.r] * depth if callable(model.r) else parse_r(depth, model.r)  # type: ignore[arg-type]
    was_merged = handle.has_merged
    info["size"] = handle.sizes[..., None] if was_merged else None
    info["source"] = _source(handle.groups[-1], handle.sizes.shape[1]) if was_merged and handle.track else None


def _source(groups: Tensor, tokens: int) -> Tensor:  # [B, N] -> [B, M, N]
    slots = torch.arange(tokens, device=groups.device)[None, :, None]
    return (groups[:, None, :] == slots).float()


class _Follower:
    """Copies settings from the handle to `model.r` and the info, so that the last change on either side counts."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> None:
        handle = api.handle_of(self.model)
        self.model.__dict__["r"] = handle.r
        self.model.__dict__["_tome_info"]["trace_source"] = handle.track


class _Cleanup:
    """Removes the attributes and hooks of this interface."""

    def __init__(self, model: nn.Module, hooks: list[Any]) -> None:
        self.model, self.hooks = model, hooks

    def __call__(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for name in ("r", "_tome_info"):
            self.model.__dict__.pop(name, None)


timm = _patcher("timm_vit")
swag = _patcher("swag")
mae = _patcher("mae", "timm_vit")
