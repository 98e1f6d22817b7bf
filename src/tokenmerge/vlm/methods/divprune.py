"""DivPrune: the tokens that differ most from each other (max-min diversity)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmerge.vlm.methods.base import Chooser, Visual, cosine, in_order

__all__ = ["DivPrune", "divprune"]

_TILE = 1024  # rows of the similarity at a time: a video has tens of thousands of tokens


def divprune(features: Tensor, k: int) -> Tensor:
    """Return `k` indices of the tokens `[N, C]` such that the smallest cosine distance between any two is large.

    The first token is the one whose nearest other token is furthest away. Each next one is the token that is furthest
    from the nearest of those already chosen; equal distances go to the first token. Time O(N^2 C) for the first,
    O(N k C) for the others; memory O(N).

    Source: DivPrune, CVPR 2025, arXiv:2503.02175. Written from the paper.
    """
    units = cosine(features)
    nearest = torch.cat([_nearest(units, start) for start in range(0, units.shape[0], _TILE)])
    chosen = [nearest.argmin()]
    # the largest similarity of each token to a chosen one
    closest = units @ units[chosen[0]]
    taken = torch.zeros_like(closest, dtype=torch.bool)
    for _ in range(k - 1):
        taken[chosen[-1]] = True
        chosen.append(closest.masked_fill(taken, torch.inf).argmin())
        closest = torch.maximum(closest, units @ units[chosen[-1]])
    return in_order(torch.stack(chosen))


def _nearest(units: Tensor, start: int) -> Tensor:
    """Return the similarity of each token of a tile to its nearest other token."""
    similarity = units[start : start + _TILE] @ units.T
    rows = torch.arange(similarity.shape[0], device=units.device)
    similarity[rows, rows + start] = -torch.inf
    return similarity.amax(dim=1)


@dataclass(frozen=True)
class DivPrune(Chooser):
    """Keep the tokens that differ most from each other."""

    name = "divprune"
    source = "DivPrune, CVPR 2025, arXiv:2503.02175"

    def choose(self, visual: Visual, k: int) -> Tensor:
        return divprune(visual.features, k)
