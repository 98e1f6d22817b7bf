"""A-ViT: every token halts when the scores it has collected reach one."""

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

    The score is sigmoid(`gamma` * first channel + `beta`), two scalars that all blocks share and learn from here; a
    token halts at 1 - `epsilon`. Every block that `r` names scores; `r` is the most it removes, and training does not
    depend on it. The class token that leaves the last block is the mean of its states by the class token's own scores.
    The loss is `ponder_weight` times the mean halting depth, and `prior_weight` times the divergence of what tokens
    spend of their one per depth (what is left of it at the end) from a Gaussian of width 1 around `target` (a share of
    the depth). Needs training of the whole model, and a class token. DeiT-S has 78.6 % in the paper (79.8 without),
    38 % faster.
    Differs from the paper: scores are read between attention and MLP, tokens go before the MLP, and of a batch every
    image loses as many tokens as the one that wants least: the others' halted tokens stay visible; the prior is over
    what is spent and not over scores made to sum to one, which could shrink at no cost until nothing halts.
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
        # the step at which a token halts counts for all that is missing to one
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
        # what a token has not spent when the scores end counts for the end of the model: scores near 0 cost, too
        depths = torch.tensor([*(note.depth for note in notes), 1.0], device=last.here.device)
        wanted = (-0.5 * ((depths - self.target) * last.blocks).square()).log_softmax(dim=0)
        spent = torch.stack([note.spent for note in notes])
        spent = torch.cat((spent, 1 - spent.sum(dim=0, keepdim=True))).clamp_min(1e-12)
        loss: Tensor = self.ponder_weight * ponder + self.prior_weight * (spent * (spent.log() - wanted)).sum()
        return loss


@dataclass(frozen=True, eq=False)
class _ClassNote:
    # class token's states by what it spent, and what it has spent, [B, C] and [B, 1]; None before the block's MLP
    mixed: tuple[Any, Any] | None


@dataclass(frozen=True, eq=False)
class _HaltNote(_ClassNote):
    total: Tensor  # [B, N] scores that each token has collected
    step: Tensor  # [B] what the class token spends here


@dataclass(frozen=True, eq=False)
class _PonderNote(MaskNote, _HaltNote):
    """What training counts: how long tokens run, and where they spend their one."""

    remainder: Tensor  # [B, N] what was missing to one when a token ran last
    steps: Tensor  # [B, N] blocks in which it ran
    here: Tensor  # [B, N] unprotected tokens of the first of the blocks
    spent: Tensor  # mean that a token spends here
    depth: float  # share of the model's blocks that this one ends
    blocks: int  # of the model


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
    """The two scalars of all blocks."""

    def __init__(self, gamma: float, beta: float) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.tensor(float(gamma))), nn.Parameter(torch.tensor(float(beta)))

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C]
        score: Tensor = (self.gamma.float() * x[..., 0].float() + self.beta.float()).sigmoid()
        return score
