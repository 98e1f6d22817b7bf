"""LTMP: two learned thresholds per block decide which tokens are merged and which are dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenmerge import importance, matching
from tokenmerge._torch.tracing import is_compiling
from tokenmerge.methods.base import ABOVE_ZERO, FROM_ZERO, Limits, ModelShape, TokenView, Variants, batch_count
from tokenmerge.methods.learned import (
    BudgetNote,
    Learned,
    MaskedPlan,
    alive_share,
    budget,
    clamp_keep_grad,
    mask_alive,
    module_of,
    notes_of,
    straight_through,
)
from tokenmerge.plan import AnyPlan, Plan

__all__ = ["LTMP"]


@dataclass(frozen=True)
class LTMP(Learned):
    """Merge above one learned threshold and prune below another. Bonnaerens and Dambre, TMLR 2023, arXiv:2307.10780.

    Each block merges tokens with their best partner if the keys' cosine exceeds its first threshold (initially
    `merge_at`). It then drops tokens whose mean attention received is below its second threshold (initially
    `prune_at`). `temperature` is that of the sigmoid masks in training. `budget_weight` weights the squared difference
    between the blocks' share of FLOPs and `flops` (None: the share that `r` plans). `r` is the maximum that a block
    removes. The paper's numbers were not found in text.

    Differs from the paper: a token that absorbed another is not dropped in the same block. All images of a batch lose
    as many tokens as the one with the fewest to remove.
    """

    name: ClassVar[str] = "ltmp"
    leaves = "one"
    limits: ClassVar[Limits] = {"temperature": ABOVE_ZERO, "budget_weight": FROM_ZERO, "flops": ABOVE_ZERO}
    needs = frozenset({"q", "k"})
    is_adaptive: ClassVar[bool] = True
    variants: ClassVar[Variants] = ({"merge_at": 0.96, "prune_at": 0.003},)

    merge_at: float = 0.9
    prune_at: float = 0.0
    temperature: float = 0.1
    budget_weight: float = 10.0
    flops: float | None = None

    def make(self, shape: ModelShape) -> nn.ModuleDict:
        return nn.ModuleDict({str(layer): _Thresholds(self.merge_at, self.prune_at) for layer in shape.active})

    def plan(self, view: TokenView, r: int) -> AnyPlan:
        thresholds = module_of(view, self)
        assert view.k is not None and isinstance(thresholds, _Thresholds)
        share = alive_share(view)
        valid = share > 0.5 if thresholds.training else view.valid
        pairs = matching.partners(view.k.detach(), prefix=view.prefix, valid=valid)
        received = _received_attention(view, share)
        if thresholds.training:
            return self._mask(view, r, thresholds, share, pairs, received)
        return self._remove(view, r, thresholds, pairs, received)

    def _remove(
        self,
        view: TokenView,
        r: int,
        thresholds: _Thresholds,
        pairs: tuple[Tensor, Tensor, Tensor],  # [A], [B, A], [B, A]
        received: Tensor,  # [B, N]
    ) -> Plan:
        side_a, partner, cosine = pairs
        n = received.shape[1]
        most = min(r, side_a.shape[0])
        if is_compiling() or received.is_meta:  # exactly r are removed then: leave enough tokens to drop
            most = min(most, n - view.prefix - r)
        merges = batch_count((cosine > thresholds.merge.float()).sum(dim=1), most, cosine)
        chosen = cosine.argsort(dim=1, descending=True, stable=True)[:, :merges]
        src, to = side_a[chosen], partner.gather(1, chosen)
        received = matching.sink_padding(received, view.valid)
        received = received.scatter(1, torch.cat((src, to), dim=1), float("inf"))
        received[:, : view.prefix] = float("inf")
        prunes = batch_count((received < thresholds.prune.float()).sum(dim=1), r - merges, received)
        pruned = received.argsort(dim=1, stable=True)[:, :prunes]
        order = _order(side_a, torch.zeros_like(received).scatter(1, torch.cat((src, pruned), dim=1), 1.0), view.prefix)
        return Plan(order[:, : n - merges - prunes], src, order.argsort(dim=1).gather(1, to), n)

    def _mask(
        self,
        view: TokenView,
        r: int,
        thresholds: _Thresholds,
        share: Tensor,  # [B, N]
        pairs: tuple[Tensor, Tensor, Tensor],
        received: Tensor,
    ) -> MaskedPlan:
        side_a, partner, cosine = pairs
        merged = self._step(cosine - thresholds.merge.float()) * share[:, side_a]  # [B, A]
        given = torch.zeros_like(share).index_copy(1, side_a, merged)
        to = torch.arange(share.shape[1], device=share.device).repeat(share.shape[0], 1)
        to[:, side_a] = partner
        absorbed = torch.zeros_like(share).scatter_add(1, partner, merged.detach()) > 0.5
        kept = self._step(received - thresholds.prune.float(), at_border=True)
        kept = torch.where((given > 0.5) | absorbed, torch.ones_like(kept), kept)
        mask = mask_alive(view, (1 - given) * kept)
        left = share * mask
        order = _order(side_a, (left < 0.5).float(), view.prefix)
        view.note(self._count_cost(view, budget(view, self, r, left), share, order))
        return _ThresholdPlan(order, order[:, :0], order[:, :0], share.shape[1], clamp_keep_grad(mask), given, to)

    def merge(
        self, plan: Any, x: Tensor, size: Tensor | None, branch: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(plan, _ThresholdPlan):
            return super().merge(plan, x, size, branch)
        assert plan.given is not None and plan.to is not None and plan.mask is not None
        x = x if branch is None else x + branch
        size = x.new_ones(x.shape[:2], dtype=torch.float32) if size is None else size
        moved = plan.given * size  # [B, N]
        total = size.scatter_add(1, plan.to, moved)
        to = plan.to[..., None].expand_as(x)
        added = (size[..., None] * x.float()).scatter_add(1, to, moved[..., None] * x.float())
        mean = (added / total[..., None].clamp_min(1e-12)).to(x.dtype)
        return mean.gather(1, plan.keep[..., None].expand_as(x)), (total * plan.mask).gather(1, plan.keep)

    def loss(self, memory: dict[int, Any]) -> Tensor:
        notes = notes_of(memory, _CostNote)
        cost, full = torch.stack([note.cost for note in notes]).sum(dim=0), sum(note.full for note in notes)
        planned = sum(note.planned for note in notes) / full if self.flops is None else self.flops
        loss: Tensor = self.budget_weight * (cost / full - planned).square().mean()
        return loss

    def _step(self, x: Tensor, at_border: bool = False) -> Tensor:
        hard = x >= 0 if at_border else x > 0
        return straight_through(hard.to(x.dtype), (x / self.temperature).sigmoid())

    def _count_cost(self, view: TokenView, note: BudgetNote, share: Tensor, order: Tensor) -> _CostNote:
        """Return the note with the block's cost, and with its shares in the new `order` of tokens."""
        C, n, prefix = view.stream.shape[-1], share.shape[1], view.prefix
        after = note.count + prefix
        return _CostNote(
            share=note.share.gather(1, order),
            count=note.count,
            removed=note.removed,
            ratio=note.ratio,
            target=note.target,
            cost=_cost(share.sum(dim=1) + prefix, note.share.sum(dim=1) + prefix, C),
            planned=_cost(after + note.removed, after, C),
            full=_cost(n, n, C),
        )


@dataclass(frozen=True, eq=False)
class _CostNote(BudgetNote):
    """MACs of a block, divided by the width: for the tokens that are left, for the planned number, and for all."""

    cost: Tensor  # [B]
    planned: float
    full: float


@dataclass(frozen=True, eq=False)
class _ThresholdPlan(MaskedPlan):
    """Masks, the share that each token gives away, and its receiver; tokens are in the order that removal gives."""

    given: Tensor | None = None  # [B, N]
    to: Tensor | None = None  # [B, N]


class _Thresholds(nn.Module):
    def __init__(self, merge: float, prune: float) -> None:
        super().__init__()
        self.merge, self.prune = nn.Parameter(torch.tensor(float(merge))), nn.Parameter(torch.tensor(float(prune)))


def _cost(attended: Any, left: Any, C: int) -> Any:
    """Return MACs divided by the width: attention over the tokens that enter, MLP over the tokens that are left."""
    return 4 * C * attended + 2 * attended * attended + 8 * C * left


def _order(side_a: Tensor, gone: Tensor, prefix: int) -> Tensor:  # [A], [B, N]
    """Return the places in the order of a merged sequence, `[B, N]`: prefix, side A, side B, removed tokens."""
    rank = torch.full_like(gone, 2.0)
    rank[:, side_a] = 1.0
    rank = rank + 3 * gone
    rank[:, :prefix] = 0.0
    return rank.argsort(dim=1, stable=True)


def _received_attention(view: TokenView, share: Tensor) -> Tensor:
    """Return the mean attention that each token receives from the tokens that are left, `[B, N]`."""
    assert view.q is not None and view.k is not None
    there = share.detach().clone()  # [B, N]
    there[:, : view.prefix] = 1.0
    total, start = torch.zeros_like(there), 0
    bias = None if view.bias is None else view.bias.detach()
    for rows in importance.attention_rows(view.q.detach(), view.k.detach(), view.scale, bias):
        asked = there[:, start : start + rows.shape[2]]
        total, start = total + torch.einsum("bhqn,bq->bn", rows, asked), start + rows.shape[2]
    return total / (view.q.shape[1] * there.sum(dim=1, keepdim=True))
