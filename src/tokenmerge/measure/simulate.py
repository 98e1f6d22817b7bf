"""Simulate merging in an unpatched model: replace each token by the mean of its group."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge import adapters
from tokenmerge.adapters.base import Adapter, BlockSpec, HookSpec, TokenLayout, WindowSpec
from tokenmerge.errors import AlreadyPatchedError, UnsupportedError
from tokenmerge.handle import handle_of

__all__ = ["simulate"]


def simulate(
    model: nn.Module,
    groups: Sequence[Tensor],  # per block [B, N]
    *inputs: Any,
    positions: Sequence[Tensor] | None = None,  # per block [B, M]
    adapter: Adapter | None = None,
    **options: Any,
) -> Any:
    """Run an unpatched model, replacing tokens by their group's mean between attention and MLP of every block.

    With proportional attention the output equals that of the patched model up to rounding: all N tokens are present, so
    a group of n tokens has weight n everywhere. `groups` are those of a handle after a forward of the same inputs. A
    model with positions in its attention also needs the handle's `positions`: all tokens of a group then take the
    position that their merged token keeps. Uses only hooks, and none of the merging code. Raises `AlreadyPatchedError`
    for a patched model, `UnsupportedError` if tokens were dropped.
    """
    if handle_of(model, None):
        raise AlreadyPatchedError("simulate() runs the unmerged model; call unpatch(model) first.")
    if any(bool((assign < 0).any()) for assign in groups):
        raise UnsupportedError("a method that drops tokens has no group-mean simulation.")
    adapter = adapter or adapters.find(model)
    layout = adapter.layout(model)
    hooks: list[Any] = []
    bound: list[tuple[nn.Module, str]] = []
    try:
        for owner, attribute, value in adapter.wiring(model):
            owner.__dict__[attribute] = value
            bound.append((owner, attribute))
        for layer, (_, block) in enumerate(adapter.blocks(model)):
            mean = _GroupMean(groups[layer], layout)
            spec = adapter.spec(block)
            if isinstance(spec, WindowSpec):
                raise UnsupportedError(
                    f"{type(model).__qualname__} merges inside windows, for the attention only: no groups leave a "
                    "block, and there is none to take the mean of. Compare with handle.r = 0 instead."
                )
            # x + f(mean(x)) leaves the block, and its group mean is mean(x) + f(mean(x)): what merging computes
            for first in _before_mlp(block, spec):
                hooks.append(first.register_forward_pre_hook(mean.before))
            hooks.append(block.register_forward_hook(mean.after, prepend=True))  # runs before the host's hooks
            if positions is not None and layer:
                places = positions[layer - 1].gather(1, groups[layer - 1])  # [B, N]
                hooks.append(block.register_forward_pre_hook(_Places(adapter, block, places), with_kwargs=True))
                for owner, attribute, value in adapter.tap(block).placed(places):
                    owner.__dict__[attribute] = value
                    bound.append((owner, attribute))
        with torch.no_grad():
            return model(*inputs, **options)
    finally:
        for hook in hooks:
            hook.remove()
        for owner, attribute in bound:
            del owner.__dict__[attribute]


def _before_mlp(block: nn.Module, spec: BlockSpec | HookSpec) -> list[nn.Module]:
    name = spec.norm if isinstance(spec, HookSpec) else next(iter(spec.mlp), None)
    if name is None:
        return []
    first = block.get_submodule(name)
    return list(first) if isinstance(first, nn.ModuleList) else [first]


class _GroupMean:
    def __init__(self, assign: Tensor, layout: TokenLayout) -> None:
        self.assign, self.layout = assign, layout

    def __call__(self, x: Tensor) -> Tensor:
        if self.layout.is_packed:
            tokens = x.reshape(*self.assign.shape, -1)  # [B, N, C]
        else:
            tokens = x if self.layout.batch_first else x.transpose(0, 1)
        same = (self.assign[:, :, None] == self.assign[:, None, :]).to(tokens.dtype)  # [B, N, N]
        mean = (same @ tokens) / same.sum(dim=-1, keepdim=True)
        return (
            mean.view(x.shape) if self.layout.is_packed else mean if self.layout.batch_first else mean.transpose(0, 1)
        )

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self(args[0]), *args[1:])

    def after(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        return (self(out[0]), *out[1:]) if isinstance(out, tuple) else self(out)


class _Places:
    """Replaces position arguments of a block (rotary tables, masks) with those of other places."""

    def __init__(self, adapter: Adapter, block: nn.Module, places: Tensor) -> None:
        self.adapter, self.places = adapter, places
        self.names = list(inspect.signature(type(block).forward).parameters)[1:]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = {**dict(zip(self.names, args, strict=False)), **kwargs}
        followers = self.adapter.host.followers
        moved = {
            name: followers[name](value, self.places) if name in followers and value is not None else value
            for name, value in call.items()
        }
        return (), moved
