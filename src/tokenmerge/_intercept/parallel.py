"""Taps of timm's parallel blocks: several attentions side by side, or attention and MLP in one step.

Shapes: B batch, N tokens, C channels, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge._intercept.override import Binding, ChildOverride
from tokenmerge._intercept.taps import Attending, AttentionTap, SeamTap, Slot

__all__ = ["BranchesTap", "ScalingTap"]


class BranchesTap(AttentionTap):
    """Runs a list of branches, each a sequence with a child `attn`, and sums them; captures the heads of all."""

    kind = "seam"

    def __init__(self, block: nn.Module, path: str) -> None:
        super().__init__(block, path)
        self.taps = [SeamTap(block, f"{path}.{name}.attn") for name, _ in self.attn.named_children()]
        self.takes_bias = all(tap.takes_bias for tap in self.taps)

    def __call__(self, x: Tensor, bias: Tensor | None, kept: Tensor | None = None, **given: Any) -> Tensor:
        outs = []
        for branch, tap in zip(self.found(), self.taps, strict=True):
            out = x
            for name, child in branch.named_children():
                out = tap(out, bias, kept, **given) if name == "attn" else child(out)
            outs.append(out)
        return torch.stack(outs).sum(dim=0)

    def take(self) -> dict[str, Tensor]:
        seen = [tap.take() for tap in self.taps]
        return {name: torch.cat([one[name] for one in seen], dim=1) for name in seen[0]}  # [B, all heads, N, D]

    def seams(self, needs: frozenset[str]) -> list[Binding]:
        return [replacement for tap in self.taps for replacement in tap.seams(needs)]

    def settle(self, where: str) -> None:
        for tap in self.taps:
            tap.settle(where)

    def release(self) -> None:
        for tap in self.taps:
            tap.release()


class ScalingTap(SeamTap):
    """The tap of a whole block whose `in_proj` returns the MLP's input, q, k and v at once.

    `has_heads_last`: its `q_norm` and `k_norm` get `[B, N, H, D]`.
    """

    def __init__(self, block: nn.Module, has_heads_last: bool) -> None:
        super().__init__(block, "")
        self.has_heads_last = has_heads_last
        self.own = Attending(block, self)

    def call(self, attention: Callable[..., Any], x: Tensor, given: dict[str, Any]) -> Any:
        # the block is already being called
        return self.own(x, **given)

    def take(self) -> dict[str, Tensor]:
        seen = super().take()
        return {name: x.transpose(1, 2) if self.has_heads_last and name != "v" else x for name, x in seen.items()}

    def seams(self, needs: frozenset[str]) -> list[Binding]:
        found = super().seams(needs - {"v"})[1:]
        self.needs = tuple(sorted(needs))
        if "v" in needs:
            values = _Values(self.block, self.slot)
            self.following.append(values)
            found.append(Binding(values.owner, "forward", values))
        return found


class _Values(ChildOverride):
    """The instance `forward` of a block's `in_proj`: captures the values, the last part of its output."""

    def __init__(self, block: Any, slot: Slot) -> None:
        super().__init__(block, "in_proj")
        self.slot, self.heads, self.width = slot, block.num_heads, block.in_split[-1]

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self.original(x)
        self.slot.put({"v": out[..., -self.width :].unflatten(-1, (self.heads, -1)).transpose(1, 2)})  # [B, H, N, D]
        return out
