"""A-ViT: every token halts when the scores it has collected reach one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenmerge import matching
from tokenmerge.methods.base import FROM_ZERO, SHARE, Limits, ModelShape, TokenView, batch_count
from tokenmerge.methods.learned import Learned, MaskedPlan, latest, module_of, noted, restricted, share_of
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
        none = torch.zeros_like(score)
        before = latest(view.memory, view.layer, "sum", none)
        total, runs = before + score, before < 1 - self.epsilon
        halts = total >= 1 - self.epsilon
        # the step at which a token halts counts for all that is missing to one
        step = torch.where(runs, torch.where(halts, 1 - before, score), none)  # [B, N]
        note = {"sum": total, "step": step[:, 0]}
        if halting.training:
            share = share_of(view)
            mask = restricted(view, (~halts).float())
            running = share * runs
            rest = torch.where(runs, 1 - before, latest(view.memory, view.layer, "rest", none))
            steps = latest(view.memory, view.layer, "steps", none) + running
            here = latest(view.memory, view.layer, "here", share)
            spent = (step * here).sum() / here.sum().clamp_min(1.0)
            note |= {"share": share * mask, "rest": rest, "steps": steps, "here": here}
            note |= {"spent": spent, "depth": (view.layer + 1) / view.depth, "blocks": view.depth}
            found: AnyPlan = MaskedPlan.of(mask)
        else:
            wants = halts if view.valid is None else halts | ~view.valid
            order = -total if view.valid is None else (-total).masked_fill(~view.valid, float("-inf"))
            count = batch_count(wants[:, view.prefix :].sum(dim=1), r, order)
            found = matching.prune(order, count, prefix=view.prefix)
            note["sum"] = total.gather(1, found.keep)
        if view.memory is not None:
            view.memory[view.layer] = note
        return found

    def after_mlp(self, x: Tensor, before: Tensor, layer: int, depth: int, memory: dict[int, Any]) -> Tensor:
        note = memory.setdefault(layer, {})
        state, spent = latest(memory, layer, "class", (0.0, 0.0))
        if "step" in note:
            step = note["step"][:, None]  # [B, 1]
            state, spent = state + step * x[:, 0], spent + step
        note["class"] = (state, spent)
        if layer < depth - 1:
            return x
        state = state + (1 - spent) * x[:, 0]
        return torch.cat((state[:, None].to(x.dtype), x[:, 1:]), dim=1)

    def loss(self, memory: dict[int, Any]) -> Tensor:
        here = noted(memory, "here")[-1]
        ponder = ((noted(memory, "steps")[-1] + noted(memory, "rest")[-1]) * here).sum() / here.sum().clamp_min(1.0)
        # what a token has not spent when the scores end counts for the end of the model: scores near 0 cost, too
        depths = torch.tensor([*noted(memory, "depth"), 1.0], device=here.device)
        wanted = (-0.5 * ((depths - self.target) * noted(memory, "blocks")[-1]).square()).log_softmax(dim=0)
        spent = torch.stack(noted(memory, "spent"))
        spent = torch.cat((spent, 1 - spent.sum(dim=0, keepdim=True))).clamp_min(1e-12)
        loss: Tensor = self.ponder_weight * ponder + self.prior_weight * (spent * (spent.log() - wanted)).sum()
        return loss


class _Halting(nn.Module):
    """The two scalars of all blocks."""

    def __init__(self, gamma: float, beta: float) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.tensor(float(gamma))), nn.Parameter(torch.tensor(float(beta)))

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C]
        score: Tensor = (self.gamma.float() * x[..., 0].float() + self.beta.float()).sigmoid()
        return score
