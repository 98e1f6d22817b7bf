"""Greedy matching: merges the most similar of all pairs, then the next; the slow baseline in ToMe's paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokenmerge import matching
from tokenmerge.methods.base import Reduction, TokenView
from tokenmerge.plan import Plan

__all__ = ["Greedy"]


@dataclass(frozen=True)
class Greedy(Reduction):
    """Merge the `r` most similar pairs over all pairs. Table 2 of Bolya et al., ICLR 2023, arXiv:2210.09461.

    Pairs are taken one after another, without the tokens of earlier pairs; the later token of a pair merges into the
    earlier. `metric` is the feature compared; raises `UnknownNameError` for an unknown one. Published: MAE ViT-L 84.36
    at r=8 (bipartite matching 84.25). It stores the cosines of all pairs of an image and takes `r` sequential steps.
    """

    name: ClassVar[str] = "greedy"

    metric: str = "k"

    def plan(self, view: TokenView, r: int) -> Plan:
        unit = matching.unit(getattr(view, self.metric))[:, view.prefix :]
        n = unit.shape[1]
        places = torch.arange(n, device=unit.device)
        patches = slice(view.prefix, None)
        scores = matching.mask_pairs(matching.cosines(unit, unit), view.valid, patches, patches)  # [B, n, n]
        scores = scores.masked_fill(places[:, None] >= places, float("-inf"))
        pairs = []
        for _ in range(r):
            best = scores.flatten(1).argmax(dim=1, keepdim=True)  # [B, 1]
            pair = torch.cat((best // n, best % n), dim=1)
            pairs.append(pair)
            is_taken = (places == pair[:, :1]) | (places == pair[:, 1:])  # [B, n]
            scores = scores.masked_fill(is_taken[:, None] | is_taken[..., None], float("-inf"))
        into, src = (torch.stack(pairs, dim=1) + view.prefix).unbind(dim=2)  # [B, r]
        return matching.absorb(src, into, n + view.prefix)
