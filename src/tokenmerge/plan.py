"""Plans: which tokens a reduction keeps, and which kept token absorbs each of the others.

Shapes: B batch, N tokens in, M tokens out, R absorbed tokens, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor, nn

from tokenmerge import kernels

__all__ = [
    "AnyPlan",
    "DroppingPlan",
    "MatrixPlan",
    "Plan",
    "WeightedPlan",
    "assignment",
    "compose",
    "keep_behind",
    "lead_by_real",
    "merge",
    "merge_average",
    "merge_weighted",
    "merged_size",
    "unmerge",
]


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """The fate of `n` tokens: `keep` stay, in order; output slot `dst` absorbs `src`; the others are dropped.

    All shapes depend on the number of tokens and `r` only, never on values, so graphs can be captured.

    >>> plan = Plan(keep=torch.tensor([[0, 2]]), src=torch.tensor([[1]]), dst=torch.tensor([[1]]), n=3)
    >>> merge(plan, torch.tensor([[[1.0], [2.0], [4.0]]])).flatten().tolist()
    [1.0, 3.0]
    """

    keep: Tensor  # [B, M]
    src: Tensor  # [B, R]
    dst: Tensor  # [B, R]
    n: int

    def __repr__(self) -> str:
        batch, left = self.keep.shape
        return f"{type(self).__name__}({batch} x {self.n} tokens, {left} left, {self.src.shape[1]} absorbed)"


@dataclass(frozen=True, eq=False, repr=False)
class WeightedPlan(Plan):
    """A plan whose groups are averaged by its own positive weights; sizes count only as far as these contain them."""

    weight: Tensor  # [B, N]


@dataclass(frozen=True, eq=False, repr=False)
class DroppingPlan(Plan):
    """A plan that drops some of `src`, so that images that merge and images that prune have plans of one shape.

    >>> plan = DroppingPlan(torch.tensor([[0, 2]]), torch.tensor([[1]]), torch.tensor([[0]]), 3, torch.tensor([[True]]))
    >>> assignment(plan).tolist()
    [[0, -1, 1]]
    """

    dropped: Tensor  # [B, R] bool: True for tokens of `src` that are dropped; their `dst` is ignored


@dataclass(frozen=True, eq=False, repr=False)
class MatrixPlan:
    """A plan for `n` tokens in which each output token may contain a part of each input token.

    Row m of `weight` holds the weight of each token in output m, which is the mean by weight and size. A token's size
    is divided among the outputs in proportion to its column; a token with a zero column is dropped. `keep` is the input
    token whose place each output takes. A `Plan` is a matrix of zeros and ones with a single 1 per column.

    >>> plan = MatrixPlan(weight=torch.tensor([[[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]]]), keep=torch.tensor([[0, 2]]), n=3)
    >>> x, size = merge_weighted(plan, torch.tensor([[[0.0], [3.0], [6.0]]]))
    >>> x.flatten().tolist(), size.tolist()
    ([1.0, 5.0], [[1.5, 1.5]])
    """

    weight: Tensor  # [B, M, N]
    keep: Tensor  # [B, M]
    n: int

    def __repr__(self) -> str:
        batch, left = self.keep.shape
        return f"{type(self).__name__}({batch} x {self.n} tokens, {left} left)"


AnyPlan = Plan | MatrixPlan


def merge(plan: Plan, x: Tensor, mode: str = "mean") -> Tensor:  # [B, N, C]
    """Combine each group by `mode` (`mean`, `sum`, `amax`, `amin`, `prod`) with equal weights: `[B, M, C]`."""
    if not isinstance(plan, DroppingPlan):
        return kernels.reduce(x, plan.keep, plan.src, plan.dst, mode)
    # dropped tokens go into one extra slot
    left = plan.keep.shape[1]
    keep, dst = torch.cat((plan.keep, plan.keep[:, :1]), dim=1), plan.dst.masked_fill(plan.dropped, left)
    return kernels.reduce(x, keep, plan.src, dst, mode)[:, :left]


def merge_weighted(
    plan: AnyPlan,
    x: Tensor,  # [B, N, C]
    size: Tensor | None = None,  # [B, N]
    branch: Tensor | None = None,  # [B, N, C]
) -> tuple[Tensor, Tensor]:
    """Average each group of `x + branch` by size, or by the plan's own weights; return `[B, M, C]` and sizes `[B, M]`.

    The new sizes are the sums of the groups' sizes.
    """
    if isinstance(plan, MatrixPlan):
        return _mix(plan, x if branch is None else x + branch, size)
    if isinstance(plan, WeightedPlan):
        merged, _ = kernels.merge(x, plan.weight.float(), plan.keep, plan.src, plan.dst, branch)
        return merged, merged_size(plan, x, size)
    return kernels.merge(x, _counted(plan, x, size), plan.keep, plan.src, plan.dst, branch)


def merge_average(
    plan: Plan,
    x: Tensor,  # [B, N, C]
    size: Tensor | None = None,  # [B, N]
    branch: Tensor | None = None,  # [B, N, C]
) -> tuple[Tensor, Tensor]:
    """Average each group of `x + branch` with equal weights, without padding (size 0); new sizes are sums of sizes."""
    ones = None if size is None else size.clamp_max(1)
    merged, _ = kernels.merge(x, _counted(plan, x, ones), plan.keep, plan.src, plan.dst, branch)
    return merged, merged_size(plan, x, size)


def merged_size(plan: Plan, x: Tensor, size: Tensor | None) -> Tensor:
    """Return the sizes after the plan, `[B, M]`: sums over groups."""
    size = _counted(plan, x, x.new_ones(x.shape[:2], dtype=torch.float32) if size is None else size)
    return size.gather(1, plan.keep).scatter_add(1, plan.dst, size.gather(1, plan.src))


@overload
def _counted(plan: Plan, x: Tensor, size: Tensor) -> Tensor: ...
@overload
def _counted(plan: Plan, x: Tensor, size: Tensor | None) -> Tensor | None: ...
def _counted(plan: Plan, x: Tensor, size: Tensor | None) -> Tensor | None:
    """Return the sizes, with 0 for tokens that the plan drops."""
    if not isinstance(plan, DroppingPlan):
        return size
    size = x.new_ones(x.shape[:2], dtype=torch.float32) if size is None else size
    return size.scatter(1, plan.src, size.gather(1, plan.src) * ~plan.dropped)


def _mix(plan: MatrixPlan, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    weight = plan.weight.float()  # [B, M, N]
    size = x.new_ones(x.shape[:2], dtype=torch.float32) if size is None else size
    share = weight / weight.sum(dim=1, keepdim=True).clamp_min(1e-12)
    weighted = weight * size[:, None]
    weighted = weighted / weighted.sum(dim=2, keepdim=True).clamp_min(1e-12)
    return (weighted.to(x.dtype) @ x), (share @ size[..., None])[..., 0]


def unmerge(plan: AnyPlan, y: Tensor) -> Tensor:  # [B, M, C]
    """Copy to every input token its group's row, `[B, N, C]`; dropped tokens get zeros."""
    return kernels.unmerge(y, assignment(plan))


def assignment(plan: AnyPlan) -> Tensor:
    """Return each input token's output slot, or that of its largest part, `[B, N]`; dropped tokens have -1."""
    if isinstance(plan, MatrixPlan):
        most, slot = plan.weight.max(dim=1)
        return slot.masked_fill(most <= 0, -1)
    B, M = plan.keep.shape
    slots = torch.arange(M, device=plan.keep.device).expand(B, M)
    dst = plan.dst.masked_fill(plan.dropped, -1) if isinstance(plan, DroppingPlan) else plan.dst
    groups = torch.full((B, plan.n), -1, dtype=torch.long, device=plan.keep.device)
    return groups.scatter(1, plan.keep, slots).scatter(1, plan.src, dst)


def lead_by_real(plan: AnyPlan, valid: Tensor) -> AnyPlan:  # [B, N] bool
    """Make a real token lead each group that has one, so that a mask at the kept places tells real groups from padding.

    Padding (not `valid`) that would absorb real tokens swaps places with the first of them.
    """
    if isinstance(plan, MatrixPlan) or plan.src.shape[1] == 0:
        return plan
    R = plan.src.shape[1]
    leader = plan.keep.gather(1, plan.dst)  # [B, R]
    is_real = valid.gather(1, plan.src) & ~valid.gather(1, leader)
    if isinstance(plan, DroppingPlan):
        is_real = is_real & ~plan.dropped
    rank = torch.arange(R, device=plan.src.device).expand_as(plan.src).masked_fill(~is_real, R)
    # compare instead of scatter: an exported graph may contain scatter-adds only
    slots = torch.arange(plan.keep.shape[1], device=rank.device)[:, None]
    first = torch.where(plan.dst[:, None] == slots, rank[:, None], R).amin(dim=2)  # [B, M]
    src = torch.where(is_real & (rank == first.gather(1, plan.dst)), leader, plan.src)
    keep = torch.where(first < R, plan.src.gather(1, first.clamp_max(R - 1)), plan.keep)
    return replace(plan, keep=keep, src=src)


def keep_behind(plan: AnyPlan, n: int) -> AnyPlan:
    """Extend a plan to `n` tokens: the tokens behind those it was made for stay, in order, at the end.

    >>> plan = Plan(keep=torch.tensor([[0, 2]]), src=torch.tensor([[1]]), dst=torch.tensor([[1]]), n=3)
    >>> keep_behind(plan, 5).keep.tolist()
    [[0, 2, 3, 4]]
    """
    more = n - plan.n
    keep = torch.cat(
        (plan.keep, torch.arange(plan.n, n, device=plan.keep.device).expand(plan.keep.shape[0], -1)), dim=1
    )
    if isinstance(plan, MatrixPlan):
        weight = nn.functional.pad(plan.weight, (0, more, 0, more))
        behind = nn.functional.pad(torch.eye(more, device=weight.device), (plan.n, 0, plan.keep.shape[1], 0))
        return replace(plan, weight=weight + behind.to(weight.dtype), keep=keep, n=n)
    if isinstance(plan, WeightedPlan):
        return replace(plan, keep=keep, n=n, weight=nn.functional.pad(plan.weight, (0, more), value=1.0))
    return replace(plan, keep=keep, n=n)


def compose(previous: Tensor | None, plan: AnyPlan) -> Tensor:  # [B, N0] or None
    """Return the slots of the first layer's tokens after one more plan, `[B, N0]`; dropped tokens have -1."""
    groups = assignment(plan)
    if previous is None:
        return groups
    return groups.gather(1, previous.clamp_min(0)).masked_fill(previous < 0, -1)
