"""Attention with a bias per pair of positions: gather it for the remaining tokens, and add log(size).

Shapes: B batch, N tokens of the input, M remaining tokens, H heads; `kept` `[B, M]` holds their positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge._intercept.follow import add_bias
from tokenmerge._intercept.override import Binding, ChildOverride
from tokenmerge._intercept.taps import SeamTap, Slot

__all__ = ["PairTap", "pairs", "placed_pairs", "sample_pairs"]


def pairs(table: Tensor, kept: Tensor) -> Tensor:
    """Gather a bias `[1, H, N, N]` or `[H, N, N]` at the remaining tokens' positions; returns `[B, H, M, M]`."""
    B, M = kept.shape
    N = table.shape[-1]
    index = kept[:, :, None] * N + kept[:, None, :]  # [B, M, M]
    taken: Tensor = table.reshape(-1, N * N).index_select(1, index.flatten()).unflatten(1, (B, M, M))
    return taken.transpose(0, 1)


class PairTap(SeamTap):
    """Has an attention run that has its bias from a method of a module `table` of the block, or from an argument.

    `table` is a path in the block; without it there is none. `argument` is how the attention is given a bias that
    blocks share.
    """

    def __init__(self, block: nn.Module, path: str, table: str | None, method: str, argument: str) -> None:
        super().__init__(block, path)
        self.table, self.method, self.argument = table, method, argument
        self.pair = Slot()
        self.takes_bias = True

    def attend(
        self, run: Callable[..., Any], bias: Tensor | None, kept: Tensor | None, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        if self.table is None:
            given = add_bias(kwargs.get(self.argument), bias, args[0].dtype)
            return run(*args, **{**kwargs, self.argument: given})
        self.pair.put({"bias": bias, "kept": kept})
        try:
            return run(*args, **kwargs)
        finally:
            self.pair.take()

    def seams(self, needs: frozenset[str]) -> list[Binding]:
        found = super().seams(needs)
        if self.table is not None:
            parent, _, child = self.table.rpartition(".")
            table = _Pairs(self.block.get_submodule(parent), child, self.method, self.pair)
            if table.owner is not self.attn:  # which may be wrapped
                self.following.append(table)
            found.append(Binding(table.owner, self.method, table))
        return found

    def placed(self, places: Tensor) -> list[Binding]:
        return placed_pairs(self.block, self.table, self.method, places)


class _Pairs(ChildOverride):
    """Override of a method that returns the bias of all pairs; during a tap's call, only that of remaining tokens."""

    def __init__(self, parent: nn.Module, child: str, method: str, pair: Slot) -> None:
        super().__init__(parent, child, method)
        self.pair = pair

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        table: Tensor = self.original(*args, **kwargs)
        pair = self.pair.peek()
        bias, kept = pair.get("bias"), pair.get("kept")
        table = table if kept is None else pairs(table, kept)
        return table if bias is None else table + bias.to(table.dtype)[:, None, None, :]


def placed_pairs(block: nn.Module, table: str | None, method: str, places: Tensor) -> list[Binding]:
    """Return bindings that make an unpatched attention treat token n as being at position `places[:, n]`."""
    if table is None:
        return []
    pair = Slot()
    pair.put({"kept": places})
    parent, _, child = table.rpartition(".")
    bound = _Pairs(block.get_submodule(parent), child, method, pair)
    if not hasattr(type(bound.owner), method):  # it is wrapped
        bound.owner = next(inner for inner in bound.owner.modules() if hasattr(type(inner), method))
    return [Binding(bound.owner, method, bound)]


def sample_pairs(heads: int, n: int, like: Tensor) -> Tensor:
    """Return a fixed, non-random bias `[1, H, n, n]` for probing an attention."""
    return torch.arange(heads * n * n, device=like.device).view(1, heads, n, n).sin().to(like.dtype)
