"""Random tokens: the baseline that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmerge.vlm.methods.base import Chooser, Visual, in_order

__all__ = ["Random", "random"]


def random(features: Tensor, k: int, *, seed: int = 0) -> Tensor:
    """Return `k` random indices of the tokens `[N, C]`, equal for equal seeds on every device."""
    order = torch.randperm(features.shape[0], generator=torch.Generator().manual_seed(seed))
    return in_order(order[:k].to(features.device))


@dataclass(frozen=True)
class Random(Chooser):
    """Keep random tokens."""

    name = "random"
    seed: int = 0

    def choose(self, visual: Visual, k: int) -> Tensor:
        return random(visual.features, k, seed=self.seed)
