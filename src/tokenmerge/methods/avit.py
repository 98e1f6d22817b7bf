"""A-ViT: each token halts when its accumulated halting score reaches one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenmerge import matching
from tokenmerge.methods.base import FROM_ZERO, SHARE, Limits, ModelShape, TokenView, Variants, batch_count, last_note
from tokenmerge.methods.learned import Learned, MaskedPlan, MaskNote, alive_share, mask_alive, module_of, notes_of
from tokenmerge.plan import AnyPlan

__all__ = ["AViT"]


@dataclass(frozen=True)
class AViT(Learned):
    """Drop tokens whose halting scores have added up to one. Yin et al., CVPR 2022, arXiv:2112.07658.

    Each active block adds `h = sigmoid(gamma * x[0] + beta)` to a token's total, with x[0] the first channel; the token
    halts when `sum(h) >= 1 - epsilon`. All blocks share `gamma` and `beta`, which are the initial values of learned
    scalars. A block is active if `r` is not 0 there; it removes at most `r`, and training does not depend on the value.
    A token spends h in each block, and in the block where it halts the remainder: 1 minus the h before. The output
    class token is the sum of its states, each weighted by what it spent in that block.

    The loss is `ponder_weight * mean(steps + remainder) + prior_weight * KL(spent || N(target, 1))`. `spent` is the
    mean spent per block, its unspent rest counted at the end; the Gaussian is centred at `target` (a share of the
    depth), with a width of one block. Needs training of the whole model, and a class token. Published: DeiT-S 78.6 %
    (79.8 without), 38 % faster.

    Differs from the paper: scores are read between attention and MLP, and tokens are removed before the MLP. All images
    of a batch lose as many tokens as the one with the fewest halted; other halted tokens stay visible. The prior is
    over spent scores, not over scores normalised to sum to one, which could shrink at no cost until nothing halts.
    """

    name: ClassVar[str] = "avit"
    leaves = "one"
    limits: ClassVar[Limits] = {
        "epsilon": SHARE,
        "ponder_weight": FROM_ZERO,
        "prior_weight": FROM_ZERO,
        "target": SHARE,
    }
    needs = frozenset({"class"})
    is_adaptive: ClassVar[bool] = True
    follows_mlp: ClassVar[bool] = True
    variants: ClassVar[Variants] = ({"gamma": 2.0, "beta": 0.0},)

    gamma: float = 5.0
    beta: float = -10.0
    epsilon: float = 0.01
    ponder_weight: float = 5e-4
    prior_weight: float = 0.1
    target: float = 0.67

    def make(self, shape: ModelShape) -> nn.ModuleDict:
        halting = _Halting(self.gamma, self.beta)
        return nn.ModuleDict({str(layer): halting for layer in shape.active})

    def plan(self, view: TokenView, r: int) -> AnyPlan:
        halting = module_of(view, self)
        score = halting(view.x)  # [B, N]
        before, none = view.last_note(_HaltNote), torch.zeros_like(score)
        collected = none if before is None else before.total
        total, runs = collected + score, collected < 1 - self.epsilon
        halts = total >= 1 - self.epsilon
        # the step at which a token halts spends the whole remainder
        step = torch.where(runs, torch.where(halts, 1 - collected, score), none)  # [B, N]
        if halting.training:
            mask = mask_alive(view, (~halts).float())
            view.note(_ponder(view, mask, total, step, runs, collected))
            return MaskedPlan.of(mask)
        wants = halts if view.valid is None else halts | ~view.valid
        order = matching.sink_padding(-total, view.valid)
        count = batch_count(wants[:, view.prefix :].sum(dim=1), r, order)
        plan = matching.prune(order, count, prefix=view.prefix)
        view.note(_HaltNote(None, total.gather(1, plan.keep), step[:, 0]))
        return plan

    def after_mlp(self, x: Tensor, before: Tensor, layer: int, depth: int, memory: dict[int, Any]) -> Tensor:
        note, mixed = memory.get(layer, _ClassNote(None)), last_note(memory, layer, _ClassNote)
        state, spent = (0.0, 0.0) if mixed is None or mixed.mixed is None else mixed.mixed
        if isinstance(note, _HaltNote):
            step = note.step[:, None]  # [B, 1]
            state, spent = state + step * x[:, 0], spent + step
        memory[layer] = replace(note, mixed=(state, spent))
        if layer < depth - 1:
            return x
        state = state + (1 - spent) * x[:, 0]
        return torch.cat((state[:, None].to(x.dtype), x[:, 1:]), dim=1)

    def loss(self, memory: dict[int, Any]) -> Tensor:
        notes = notes_of(memory, _PonderNote)
        last = notes[-1]
        ponder = ((last.steps + last.remainder) * last.here).sum() / last.here.sum().clamp_min(1.0)
        # the unspent rest counts at the end of the model, so that scores near 0 cost too
        depths = torch.tensor([*(note.depth for note in notes), 1.0], device=last.here.device)
        wanted = (-0.5 * ((depths - self.target) * last.blocks).square()).log_softmax(dim=0)
        spent = torch.stack([note.spent for note in notes])
        spent = torch.cat((spent, 1 - spent.sum(dim=0, keepdim=True))).clamp_min(1e-12)
        loss: Tensor = self.ponder_weight * ponder + self.prior_weight * (spent * (spent.log() - wanted)).sum()
        return loss


@dataclass(frozen=True, eq=False)
class _ClassNote:
    # the class token's weighted sum of states [B, C] and the total it spent [B, 1]; None before the block's MLP
    mixed: tuple[Any, Any] | None


@dataclass(frozen=True, eq=False)
class _HaltNote(_ClassNote):
    total: Tensor  # [B, N] sum of each token's scores
    step: Tensor  # [B] what the class token spends in this block


@dataclass(frozen=True, eq=False)
class _PonderNote(MaskNote, _HaltNote):
    """Training statistics: how many blocks each token ran, and how much it spent in each."""

    remainder: Tensor  # [B, N] 1 - sum(h) before the last block in which the token ran
    steps: Tensor  # [B, N] number of active blocks in which the token ran
    here: Tensor  # [B, N] unprotected tokens at the first active block
    spent: Tensor  # mean over tokens of what they spend in this block
    depth: float  # (layer + 1) / blocks
    blocks: int  # number of the model's blocks


def _ponder(view: TokenView, mask: Tensor, total: Tensor, step: Tensor, runs: Tensor, collected: Tensor) -> _PonderNote:
    share, before = alive_share(view), view.last_note(_PonderNote)
    none = torch.zeros_like(total)
    remainder, steps, here = (none, none, share) if before is None else (before.remainder, before.steps, before.here)
    return _PonderNote(
        mixed=None,
        total=total,
        step=step[:, 0],
        share=share * mask,
        remainder=torch.where(runs, 1 - collected, remainder),
        steps=steps + share * runs,
        here=here,
        spent=(step * here).sum() / here.sum().clamp_min(1.0),
        depth=(view.layer + 1) / view.depth,
        blocks=view.depth,
    )


class _Halting(nn.Module):
    """The halting score with its two scalars, shared by all blocks."""

    def __init__(self, gamma: float, beta: float) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.tensor(float(gamma))), nn.Parameter(torch.tensor(float(beta)))

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C]
        score: Tensor = (self.gamma.float() * x[..., 0].float() + self.beta.float()).sigmoid()
        return score
