"""The meaning of merging, without merging: replace each token by the mean of its group in an unpatched model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge import adapters
from tokenmerge.errors import AlreadyPatchedError, UnsupportedError

__all__ = ["simulate"]


def simulate(model: nn.Module, groups: Sequence[Tensor], *inputs: Tensor) -> Any:  # per block [B, N]
    """Run an unpatched model whose tokens become their group's mean between attention and MLP of every block.

    `groups` are a handle's after a forward of the same inputs. With proportional attention a patched model's answer is
    this one, to rounding: all N tokens are still there, so a group of n weighs n times by itself, everywhere. Uses
    hooks only, none of the code that merges. Raises `AlreadyPatchedError` for a patched model and `UnsupportedError`
    where tokens were dropped.
    """
    if "_tokenmerge_handle" in model.__dict__:
        raise AlreadyPatchedError("simulate() runs the unmerged model; call unpatch(model) first.")
    if any(bool((assign < 0).any()) for assign in groups):
        raise UnsupportedError("a method that drops tokens has no group-mean simulation.")
    adapter = adapters.find(model)
    batch_first = adapter.layout(model).batch_first
    hooks = []
    try:
        for (_, block), assign in zip(adapter.blocks(model), groups, strict=True):
            mean = _GroupMean(assign, batch_first)
            # x + f(mean(x)) leaves the block, and its group mean is mean(x) + f(mean(x)): what merging computes
            first = getattr(block, adapter.spec(block).mlp[0])
            hooks.append(first.register_forward_pre_hook(lambda module, args, mean=mean: (mean(args[0]), *args[1:])))
            hooks.append(block.register_forward_hook(lambda module, args, out, mean=mean: mean(out)))
        with torch.no_grad():
            return model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()


class _GroupMean:
    def __init__(self, assign: Tensor, batch_first: bool) -> None:
        self.assign, self.batch_first = assign, batch_first

    def __call__(self, x: Tensor) -> Tensor:
        tokens = x if self.batch_first else x.transpose(0, 1)  # [B, N, C]
        same = (self.assign[:, :, None] == self.assign[:, None, :]).to(tokens.dtype)  # [B, N, N]
        mean = (same @ tokens) / same.sum(dim=-1, keepdim=True)
        return mean if self.batch_first else mean.transpose(0, 1)
