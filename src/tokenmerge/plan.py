"""The recipe of one reduction: which tokens stay, which are absorbed by whom.

Shapes: B batch, N tokens in, M tokens out, R absorbed tokens, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmerge import kernels

__all__ = ["Plan", "assignment", "compose", "lead_by_real", "merge", "merge_weighted", "unmerge"]


@dataclass(frozen=True, eq=False)
class Plan:
    """What happens to `n` tokens: `keep` stay, in order; `src` are absorbed by output slot `dst`; others are dropped.

    All shapes are fixed by the number of tokens and `r`, never by values, so graphs can be captured.

    >>> plan = Plan(keep=torch.tensor([[0, 2]]), src=torch.tensor([[1]]), dst=torch.tensor([[1]]), n=3)
    >>> merge(plan, torch.tensor([[[1.0], [2.0], [4.0]]])).flatten().tolist()
    [1.0, 3.0]
    """

    keep: Tensor  # [B, M]
    src: Tensor  # [B, R]
    dst: Tensor  # [B, R]
    n: int


def merge(plan: Plan, x: Tensor, mode: str = "mean") -> Tensor:  # [B, N, C]
    """Combine each group by `mode` (`mean`, `sum`, `amax`, `amin`, `prod`), members counting equally: `[B, M, C]`."""
    return kernels.reduce(x, plan.keep, plan.src, plan.dst, mode)


def merge_weighted(
    plan: Plan,
    x: Tensor,  # [B, N, C]
    size: Tensor | None = None,  # [B, N]
    branch: Tensor | None = None,  # [B, N, C]
) -> tuple[Tensor, Tensor]:
    """Combine each group of `x + branch` as its size-weighted mean: `[B, M, C]` and the new sizes `[B, M]`."""
    return kernels.merge(x, size, plan.keep, plan.src, plan.dst, branch)


def unmerge(plan: Plan, y: Tensor) -> Tensor:  # [B, M, C]
    """Give every input token its group's row, `[B, N, C]`; dropped tokens get zeros."""
    return kernels.unmerge(y, assignment(plan))


def assignment(plan: Plan) -> Tensor:
    """Return the output slot of each input token, `[B, N]`; -1 for dropped ones."""
    B, M = plan.keep.shape
    slots = torch.arange(M, device=plan.keep.device).expand(B, M)
    groups = torch.full((B, plan.n), -1, dtype=torch.long, device=plan.keep.device)
    return groups.scatter(1, plan.keep, slots).scatter(1, plan.src, plan.dst)


def lead_by_real(plan: Plan, valid: Tensor) -> Plan:  # [B, N] bool
    """Let a real token lead each group that has one, so that masks at the kept places say whether a group is real.

    Padding (not `valid`) that was to absorb real tokens changes places with the first of them.
    """
    R = plan.src.shape[1]
    if R == 0:
        return plan
    leader = plan.keep.gather(1, plan.dst)  # [B, R]
    is_real = valid.gather(1, plan.src) & ~valid.gather(1, leader)
    rank = torch.arange(R, device=plan.src.device).expand_as(plan.src).masked_fill(~is_real, R)
    # compared rather than scattered: an exported graph shall hold no scatter but sums
    slots = torch.arange(plan.keep.shape[1], device=rank.device)[:, None]
    first = torch.where(plan.dst[:, None] == slots, rank[:, None], R).amin(dim=2)  # [B, M]
    src = torch.where(is_real & (rank == first.gather(1, plan.dst)), leader, plan.src)
    keep = torch.where(first < R, plan.src.gather(1, first.clamp_max(R - 1)), plan.keep)
    return Plan(keep=keep, src=src, dst=plan.dst, n=plan.n)


def compose(previous: Tensor | None, plan: Plan) -> Tensor:  # [B, N0] or None
    """Follow the tokens of the first layer through one more plan: `[B, N0]` of slots after it, -1 for dropped."""
    groups = assignment(plan)
    if previous is None:
        return groups
    return groups.gather(1, previous.clamp_min(0)).masked_fill(previous < 0, -1)
