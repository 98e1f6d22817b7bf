"""AdaViT: in each block, linear layers decide which patches stay and whether attention and MLP are used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenmerge import matching
from tokenmerge.methods.base import ABOVE_ZERO, FROM_ZERO, SHARE, Limits, ModelShape, TokenView, batch_count
from tokenmerge.methods.learned import (
    BudgetNote,
    Learned,
    MaskedPlan,
    alive_share,
    budget,
    gumbel_sigmoid,
    mask_alive,
    module_of,
    notes_of,
    ratio_loss,
    straight_through,
)

__all__ = ["AdaViT"]


@dataclass(frozen=True)
class AdaViT(Learned):
    """Decide per image which patches and sublayers are used. Meng et al., CVPR 2022, arXiv:2111.15668.

    `r` is the maximum that a block removes, and in training the target for patches. `usage` is the target share of
    sublayers (attention, MLP) in use. `budget_weight` weights the squared differences from both targets, `temperature`
    is that of the Gumbel-sigmoid. Published: Ada-DeiT-S 77.3 % at 2.3 GMACs (79.8 at 4.6).

    Differs from the paper: patches are removed between attention and MLP, for all later blocks. A sublayer that is off
    adds nothing but is still computed, so only patches save time. There are no gates for heads, which are summed before
    tokens are removed. The budget counts decisions as made in inference, not the draws. All images of a batch lose as
    many patches as the one with the fewest to remove.
    """

    name: ClassVar[str] = "adavit"
    leaves = "one"
    limits: ClassVar[Limits] = {"usage": SHARE, "budget_weight": FROM_ZERO, "temperature": ABOVE_ZERO}
    is_adaptive: ClassVar[bool] = True
    follows_mlp: ClassVar[bool] = True

    usage: float = 0.9
    budget_weight: float = 2.0
    temperature: float = 1.0

    def make(self, shape: ModelShape) -> nn.ModuleDict:
        return nn.ModuleDict({str(layer): _Decision(shape.width, shape.has_class) for layer in shape.active})

    def plan(self, view: TokenView, r: int) -> MaskedPlan:
        decision = module_of(view, self)
        share = alive_share(view)
        patches, sublayers = decision(view.x_pre, share)  # [B, N], [B, 2]
        if decision.training:
            mask = mask_alive(view, gumbel_sigmoid(patches, self.temperature))
            gates = gumbel_sigmoid(sublayers, self.temperature)
            note, masked = budget(view, self, r, share * mask), MaskedPlan.of(mask)
            # count what inference would keep: random draws alone could meet the budget while inference removes nothing
            before = view.last_note(_DecisionNote)
            decided = (share if before is None else before.decided) * _decide(patches)
            ratio = decided.sum(dim=1) / (decided.shape[1] - view.prefix)
            view.note(
                _DecisionNote(
                    gates=gates,
                    share=note.share,
                    count=note.count,
                    removed=note.removed,
                    ratio=ratio,
                    target=note.target,
                    decided=decided,
                    used=_decide(sublayers),
                )
            )
            return _GatedPlan(masked.keep, masked.src, masked.dst, masked.n, masked.mask, gates[:, 0])
        gates = (sublayers >= 0).float()
        view.note(_GateNote(gates))
        patches = matching.sink_padding(patches, view.valid)
        count = batch_count((patches < 0)[:, view.prefix :].sum(dim=1), r, patches)
        plan = matching.prune(patches, count, prefix=view.prefix)
        return _GatedPlan(plan.keep, plan.src, plan.dst, plan.n, None, gates[:, 0])

    def merge(
        self, plan: Any, x: Tensor, size: Tensor | None, branch: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        branch = branch if branch is None else branch * plan.attention[:, None, None].to(branch.dtype)
        return super().merge(plan, x, size, branch)

    def after_mlp(self, x: Tensor, before: Tensor, layer: int, depth: int, memory: dict[int, Any]) -> Tensor:
        if layer not in memory:
            return x
        gate: Tensor = memory[layer].gates[:, 1, None, None]
        return before + (x - before) * gate.to(x.dtype)

    def loss(self, memory: dict[int, Any]) -> Tensor:
        used = torch.cat([note.used for note in notes_of(memory, _DecisionNote)], dim=1).mean(dim=1)  # [B]
        loss: Tensor = self.budget_weight * (ratio_loss(memory) + (used - self.usage).square().mean())
        return loss


@dataclass(frozen=True, eq=False)
class _GateNote:
    gates: Tensor  # [B, 2] 1 if the sublayer (attention, MLP) is used, else 0


@dataclass(frozen=True, eq=False)
class _DecisionNote(BudgetNote, _GateNote):
    """Training note that also holds the decisions without the random draw; `ratio` counts these."""

    decided: Tensor  # [B, N] 1 for each unprotected token that these decisions keep
    used: Tensor  # [B, 2] the sublayers that these decisions use


def _decide(logit: Tensor) -> Tensor:
    """Return the decisions without the random draw, with straight-through gradients."""
    return straight_through((logit >= 0).to(logit.dtype), logit.sigmoid())


@dataclass(frozen=True, eq=False)
class _GatedPlan(MaskedPlan):
    """A plan or masks, and the gate of the attention branch."""

    attention: Tensor | None = None  # [B]


class _Decision(nn.Module):
    """Linear layers on the block's input: one logit per token, and two for the sublayers from class token or mean."""

    def __init__(self, width: int, has_class: bool) -> None:
        super().__init__()
        self.has_class = has_class
        self.norm = nn.LayerNorm(width)
        self.patch, self.sublayers = nn.Linear(width, 1), nn.Linear(width, 2)
        # everything is in use at the start
        nn.init.constant_(self.patch.bias, 3.0)
        nn.init.constant_(self.sublayers.bias, 3.0)

    def forward(self, x: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:  # [B, N, C], [B, N]
        x = self.norm(x)
        share = (share / share.sum(dim=1, keepdim=True).clamp_min(1.0)).to(x.dtype)
        whole = x[:, 0] if self.has_class else (x * share[..., None]).sum(dim=1)
        return self.patch(x)[..., 0].float(), self.sublayers(whole).float()
