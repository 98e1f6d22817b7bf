"""vid-TLDR: merges as ToMe does, with absorbed background tokens weighted 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenmerge import matching
from tokenmerge.methods.base import Reduction, TokenView, Variants
from tokenmerge.plan import WeightedPlan

__all__ = ["VidTLDR"]


@dataclass(frozen=True)
class VidTLDR(Reduction):
    """Saliency-aware merging, meant for the first blocks of video models. Choi et al., CVPR 2024, arXiv:2403.13347.

    The saliency w of a token comes from the negative entropy of its attention (`score`), per image:
    `s = (score - min) / (max - min); w = clamp((s - mean(s)) / (1 - mean(s)), 0, 1)`. Pairs are those of ToMe by
    `metric`. An absorbed token is weighted by `w * size`, so background is in effect dropped. Raises `UnknownNameError`
    for a value that is not a choice. The paper removes many tokens in the first blocks, on UMT-B `r=[600, 200, 100]`.
    Differs from the paper: sizes are summed as if every token had counted.
    """

    name: ClassVar[str] = "vid_tldr"
    variants: ClassVar[Variants] = ({}, {"metric": "k", "score": "class"})

    metric: str = "x"
    score: str = "entropy"

    def plan(self, view: TokenView, r: int) -> WeightedPlan:
        pairs = matching.bipartite(getattr(view, self.metric), r, prefix=view.prefix, valid=view.valid)
        score = view.score(self.score)
        # the paper's (cos + 1) / 2 ranks pairs as the cosine does
        is_src = torch.zeros_like(score).scatter_add(1, pairs.src, torch.ones_like(pairs.src, dtype=score.dtype)) > 0
        weight = torch.where(is_src, _saliency(score, view.prefix), 1.0)
        weight = weight if view.size is None else weight * view.size
        return WeightedPlan(pairs.keep, pairs.src, pairs.dst, pairs.n, weight)


def _saliency(score: Tensor, prefix: int) -> Tensor:  # [B, N]
    """Map scores to 0 (background) to 1, `[B, N]`; prefix and padding get 0 and do not enter the statistics."""
    is_real = score.isfinite()
    is_real = is_real & (torch.arange(score.shape[1], device=score.device) >= prefix)
    low = score.masked_fill(~is_real, float("inf")).amin(dim=1, keepdim=True)
    high = score.masked_fill(~is_real, float("-inf")).amax(dim=1, keepdim=True)
    scaled = ((score - low) / (high - low).clamp_min(1e-12)).masked_fill(~is_real, 0.0)
    mean = scaled.sum(dim=1, keepdim=True) / is_real.sum(dim=1, keepdim=True).clamp_min(1)
    return ((scaled - mean) / (1 - mean).clamp_min(1e-12)).clamp(0, 1)
