"""MCTF: pairs tokens by similarity, importance and size at once, and merges in both directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenmerge import matching
from tokenmerge.methods.base import ABOVE_ZERO, POSITIVE, Choices, Limits, Reduction, TokenView, Variants
from tokenmerge.plan import WeightedPlan

__all__ = ["MCTF"]


@dataclass(frozen=True)
class MCTF(Reduction):
    """Multi-criteria token fusion. Lee et al., CVPR 2024, arXiv:2403.10030.

    Tokens i and j attract by
    `((cos_ij + 1) / 2)^(1 / tau_sim) / ((a_i a_j)^(1 / tau_info) * (s_i s_j)^(1 / tau_size))`, with importances a and
    sizes s; an infinite tau disables a criterion. Half of `r` (rounded up) merges from side A into side B. The rest
    merges from tokens of B that absorbed nothing into the remaining tokens of A, by the same scores. A group becomes
    the mean weighted by `a * s`.

    `metric` is the feature of the cosine. `score` is the importance: the mean attention received, or any other positive
    score. Raises `UnknownNameError` for a value that is not a choice. The mean attention received costs a second
    attention map: it takes 25 times as long as `tome` (197 tokens, one CPU thread).

    Published without training: DeiT-S 79.2 at r=16. Differs from the paper: importance comes from the attention of this
    block, not of one step ahead, and the next block computes its own; tokens of B that absorbed are not merged again.
    """

    name: ClassVar[str] = "mctf"
    limits: ClassVar[Limits] = {"tau_sim": ABOVE_ZERO, "tau_info": ABOVE_ZERO, "tau_size": ABOVE_ZERO}
    choices: ClassVar[Choices] = {"score": POSITIVE}
    variants: ClassVar[Variants] = ({}, {"score": "norm", "metric": "k"})

    metric: str = "x"
    score: str = "received"
    tau_sim: float = 1.0
    tau_info: float = 20.0
    tau_size: float = 40.0

    def plan(self, view: TokenView, r: int) -> WeightedPlan:
        unit = matching.unit(getattr(view, self.metric))
        n = unit.shape[1]
        # padding scores minus infinity
        importance = view.score(self.score).clamp_min(1e-12)
        side_a, side_b = matching.alternating(n, view.prefix)
        cost = importance.log() / self.tau_info
        if view.size is not None:
            cost = cost + view.size.clamp_min(1e-12).log() / self.tau_size
        cosine = matching.cosines(unit[:, side_a], unit[:, side_b])  # [B, A, E]
        similarity = ((cosine + 1) / 2).clamp_min(1e-12).log() / self.tau_sim
        attraction = similarity - cost[:, side_a, None] - cost[:, None, side_b]
        attraction = matching.mask_pairs(attraction, view.valid, side_a, side_b)
        places = torch.arange(n, device=unit.device)
        src, into = _both_ways(attraction, r, places[side_a], places[side_b])
        plan = matching.absorb(src, into, n)
        return WeightedPlan(
            plan.keep, plan.src, plan.dst, n, importance if view.size is None else importance * view.size
        )


def _both_ways(
    attraction: Tensor,  # [B, A, E]
    r: int,
    token_a: Tensor,  # [A]
    token_b: Tensor,  # [E]
) -> tuple[Tensor, Tensor]:
    """Return the absorbed and the absorbing tokens, `[B, r]` each: the best pairs from A into B, then from B into A."""
    first = (r + 1) // 2
    best, partner = attraction.max(dim=2)
    from_a = best.argsort(dim=1, descending=True, stable=True)[:, :first]
    into_b = partner.gather(1, from_a)
    if first == r:
        return token_a[from_a], token_b[into_b]
    ones = torch.ones_like(from_a)
    is_gone = torch.zeros_like(best, dtype=torch.long).scatter_add(1, from_a, ones) > 0  # [B, A]
    has_absorbed = torch.zeros_like(attraction[:, 0], dtype=torch.long).scatter_add(1, into_b, ones) > 0  # [B, E]
    best, partner = attraction.masked_fill(is_gone[..., None], float("-inf")).max(dim=1)
    best = best.masked_fill(has_absorbed, float("-inf"))
    from_b = best.argsort(dim=1, descending=True, stable=True)[:, : r - first]
    into_a = partner.gather(1, from_b)
    return torch.cat((token_a[from_a], token_b[from_b]), dim=1), torch.cat((token_b[into_b], token_a[into_a]), dim=1)
