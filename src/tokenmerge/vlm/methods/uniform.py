"""Evenly spaced tokens: the baseline that looks at nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmerge.vlm.methods.base import Chooser, Visual

__all__ = ["Uniform", "uniform"]


def uniform(features: Tensor, k: int) -> Tensor:
    """Return `k` evenly spaced indices of the tokens `[N, C]`: the middle of each of k equal pieces."""
    n = features.shape[0]
    # (2i + 1) n / 2k, in whole numbers
    return (2 * torch.arange(k, device=features.device) + 1) * n // (2 * k)


@dataclass(frozen=True)
class Uniform(Chooser):
    """Keep evenly spaced tokens."""

    name = "uniform"

    def choose(self, visual: Visual, k: int) -> Tensor:
        return uniform(visual.features, k)
