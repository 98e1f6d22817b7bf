"""ATM: merges pairs above a threshold that falls with depth; deep blocks merge small tokens into large ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenmerge import matching
from tokenmerge.methods.base import FROM_ZERO, SHARE, Limits, Reduction, TokenView, Variants, batch_count
from tokenmerge.plan import Plan

__all__ = ["ATM"]


@dataclass(frozen=True)
class ATM(Reduction):
    """Adaptive token merging, meant to be lossless without training. Lee et al., 2025, arXiv:2505.15160.

    In block l, counted from 1, a pair merges if its cosine is above `max(alpha - (exp(beta * (l - 1)) - 1), floor)`.
    After the first `distinctive` share of the blocks, the smaller half of the tokens is matched with the larger half.
    So two large tokens never merge: merging sizes n and m has an error of `n m / (n + m)`. Of equal sizes, tokens at
    even positions count as smaller. `metric` is the feature compared; raises `UnknownNameError` for an unknown one.

    `r` is the maximum removed per block. All images of a batch lose as many tokens as the one with the fewest pairs;
    compiled, exactly `r`.

    Published: more than 30 % fewer FLOPs of DeiT-T and DeiT-S without loss. Differs from the paper: its values of
    `alpha`, `beta`, `floor` and `distinctive` were not found, the defaults are ours.
    """

    name: ClassVar[str] = "atm"
    limits: ClassVar[Limits] = {"beta": FROM_ZERO, "distinctive": SHARE}
    is_adaptive: ClassVar[bool] = True
    variants: ClassVar[Variants] = (
        {},
        {"alpha": 0.4, "floor": 0.2},
        {"alpha": -2.0, "floor": -2.0},
    )  # the last variant accepts every pair

    metric: str = "k"
    alpha: float = 0.95
    beta: float = 0.02
    floor: float = 0.7
    distinctive: float = 0.5

    def threshold(self, layer: int) -> float:
        """Return the cosine threshold of a block, counted from 0.

        >>> ATM(alpha=0.95, beta=0.02).threshold(0)
        0.95
        """
        return max(self.alpha - math.expm1(self.beta * layer), self.floor)

    def plan(self, view: TokenView, r: int) -> Plan:
        metric = getattr(view, self.metric)
        side_a, side_b = self._sides(view)
        into, best = matching.nearest(metric, side_a, side_b, valid=view.valid)
        # padding has size 0, so it is merged first, into any token
        best = matching.lift_padding(best, view.valid, side_a)
        count = batch_count((best > self.threshold(view.layer)).sum(dim=1), r, best)
        chosen = best.argsort(dim=1, descending=True, stable=True)[:, :count]
        return matching.absorb(side_a.gather(1, chosen), into.gather(1, chosen), metric.shape[-2])

    def _sides(self, view: TokenView) -> tuple[Tensor, Tensor]:  # [B, A], [B, E]
        B, n, _ = view.stream.shape
        places = torch.arange(n, device=view.stream.device)
        even, odd = (places[side] for side in matching.alternating(n, view.prefix))
        order = torch.cat((even, odd)).expand(B, -1)
        if view.size is not None and view.layer >= self.distinctive * view.depth:
            order = order.gather(1, view.size.gather(1, order).argsort(dim=1, stable=True))
        return order[:, : even.shape[0]], order[:, even.shape[0] :]
