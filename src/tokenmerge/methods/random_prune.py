"""Random pruning: the baseline that every choice of tokens has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokenmerge import matching
from tokenmerge.methods.base import Reduction, TokenView, Variants
from tokenmerge.plan import Plan

__all__ = ["RandomPrune"]


@dataclass(frozen=True)
class RandomPrune(Reduction):
    """Drop random tokens. A baseline of Bolya et al., ICLR 2023, arXiv:2210.09461, Table 2.

    The choice depends on `seed` and the block, and is the same for every image; padding is dropped first. Published:
    MAE ViT-L 79.22 at r=8 (merging 84.25).
    """

    name: ClassVar[str] = "random"
    leaves = "one"
    is_proportional: ClassVar[bool] = False
    variants: ClassVar[Variants] = ({}, {"seed": 3})

    seed: int = 0

    def plan(self, view: TokenView, r: int) -> Plan:
        B, n, _ = view.stream.shape
        score = matching.shuffle(n, self.seed + view.layer, view.stream.device).expand(B, -1).float()
        return matching.prune(matching.sink_padding(score, view.valid), r, prefix=view.prefix)
