"""Attention whose scores get a bias per pair of places: the bias of the tokens left, and log(size) on top of it.

Shapes: B batch, N tokens of the input, M tokens left, H heads; `kept` `[B, M]` is the place each one left stands at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge.adapters.follow import add_bias
from tokenmerge.adapters.original import Original, Replacement
from tokenmerge.adapters.taps import SeamTap, Slot

__all__ = ["PairTap", "pairs", "placed_pairs", "sample_pairs"]


def pairs(table: Tensor, kept: Tensor) -> Tensor:
    """Take a bias `[1, H, N, N]` or `[H, N, N]` at the places of the tokens left, `[B, H, M, M]`."""
    B, M = kept.shape
    N = table.shape[-1]
    index = kept[:, :, None] * N + kept[:, None, :]  # [B, M, M]
    taken: Tensor = table.reshape(-1, N * N).index_select(1, index.flatten()).unflatten(1, (B, M, M))
    return taken.transpose(0, 1)


class PairTap(SeamTap):
    """Calls an attention that has its bias from a method of `owner` without arguments, or from an argument.

    Without `owner` it has none of its own. `argument` is how the attention is given a bias that blocks share.
    """

    def __init__(self, attn: nn.Module, owner: nn.Module | None, method: str, argument: str) -> None:
        super().__init__(attn)
        self.owner, self.method, self.argument = owner, method, argument
        self.turn = Slot()
        self.takes_bias = True

    def __call__(self, x: Tensor, bias: Tensor | None, kept: Tensor | None = None, **given: Any) -> Tensor:
        if self.owner is None:
            given[self.argument] = add_bias(given.get(self.argument), bias, x.dtype)
            return self._attend(x, given)
        self.turn.put({"bias": bias, "kept": kept})
        try:
            return self._attend(x, given)
        finally:
            self.turn.take()

    def _attend(self, x: Tensor, given: dict[str, Any]) -> Tensor:
        out = self.attn(x, **given)
        tokens: Tensor = out[0] if isinstance(out, tuple) else out
        return tokens

    def seams(self, needs: frozenset[str]) -> list[Replacement]:
        found = super().seams(needs)
        if self.owner is not None:
            found.append(Replacement(self.owner, self.method, _Pairs(self.owner, self.method, self.turn)))
        return found


class _Pairs(Original):
    """A method that returns the bias of all pairs of places: while a tap is at work, that of the tokens left."""

    def __init__(self, owner: nn.Module, method: str, turn: Slot) -> None:
        super().__init__(owner, method)
        self.turn = turn

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        table: Tensor = self.original(*args, **kwargs)
        turn = self.turn.peek()
        bias, kept = turn.get("bias"), turn.get("kept")
        table = table if kept is None else pairs(table, kept)
        return table if bias is None else table + bias.to(table.dtype)[:, None, None, :]


def placed_pairs(owner: nn.Module | None, method: str, places: Tensor) -> list[Replacement]:
    """Return what makes an unpatched attention take token n for one that stands at `places` `[B, N]`."""
    if owner is None:
        return []
    turn = Slot()
    turn.put({"kept": places})
    return [Replacement(owner, method, _Pairs(owner, method, turn))]


def sample_pairs(heads: int, n: int, like: Tensor) -> Tensor:
    """Return a bias `[1, H, n, n]` to probe an attention with: any numbers, but not random ones."""
    return torch.arange(heads * n * n, device=like.device).view(1, heads, n, n).sin().to(like.dtype)
