"""Drop the last tokens: not a method to use, but the free bound that other methods are timed against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenmerge.methods.base import Reduction, TokenView
from tokenmerge.plan import Plan

__all__ = ["Drop"]


@dataclass(frozen=True)
class Drop(Reduction):
    """Keep the first tokens and forget the rest: what a reduction would cost if choosing and merging were free.

    It reads no keys, moves no rows and adds no bias: the time of a method beyond this one is its overhead. Its outputs
    are meaningless.
    """

    name: ClassVar[str] = "drop"
    is_proportional: ClassVar[bool] = False

    def largest_r(self, n: int, prefix: int) -> int:
        return max(0, n - max(1, prefix))

    def plan(self, view: TokenView, r: int) -> Plan:
        B, n, _ = view.stream.shape
        keep = torch.arange(n - r, device=view.stream.device).expand(B, -1)
        return Plan(keep=keep, src=keep[:, :0], dst=keep[:, :0], n=n)

    def merge(
        self, plan: Plan, x: Tensor, size: Tensor | None, branch: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        left = plan.keep.shape[1]
        x = x if branch is None else x + branch
        return x[:, :left], None if size is None else size[:, :left]
