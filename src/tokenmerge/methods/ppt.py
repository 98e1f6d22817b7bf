"""PPT: for each image and block either prunes or pools, by how clearly some tokens matter more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenmerge import matching
from tokenmerge.methods.base import FROM_ZERO, Choices, Limits, Reduction, TokenView, Variants
from tokenmerge.plan import DroppingPlan

__all__ = ["PPT"]

# of `SCORES` those that are shares of attention: they are divided by their sum
_SCORES = ("class_value", "class", "received")


@dataclass(frozen=True)
class PPT(Reduction):
    """Token pruning and pooling. Wu et al., 2023, arXiv:2310.01812.

    The `score` of the unprotected tokens is divided by its sum; where its variance in an image is below `threshold`,
    nothing stands out and the `r` best pairs of ToMe by `metric` are merged, else the `r` lowest tokens are dropped.
    The policy is one image's own, the count is not. Raises `UnknownNameError` for a value that is not a choice. The
    paper removes 50 tokens in each of three blocks, `r=[0, 0, 0, 50, 0, 0, 50, 0, 0, 50, 0, 0]`: published without
    training DeiT-S 79.50 at 2.94 GMACs. Differs from the paper: at most half of the tokens go in a block, since that
    many can be paired.
    """

    name: ClassVar[str] = "ppt"
    limits: ClassVar[Limits] = {"threshold": FROM_ZERO}
    choices: ClassVar[Choices] = {"score": _SCORES}
    variants: ClassVar[Variants] = ({}, {"threshold": 1.0}, {"score": "received"})

    threshold: float = 7e-5
    metric: str = "k"
    score: str = "class_value"

    def plan(self, view: TokenView, r: int) -> DroppingPlan:
        score = view.score(self.score)
        prunes = ~(_variance(score[:, view.prefix :]) < self.threshold)[:, None]  # [B, 1]
        pooled = matching.bipartite(getattr(view, self.metric), r, prefix=view.prefix, valid=view.valid)
        order = score[:, view.prefix :].argsort(dim=1, descending=True, stable=True) + view.prefix
        src = order[:, order.shape[1] - r :]
        pruned = matching.absorb(src[:, :0], src[:, :0], score.shape[1], src)
        return DroppingPlan(
            keep=torch.where(prunes, pruned.keep, pooled.keep),
            src=torch.where(prunes, src, pooled.src),
            dst=torch.where(prunes, 0, pooled.dst),
            n=score.shape[1],
            dropped=prunes.expand(-1, r),
        )


def _variance(score: Tensor) -> Tensor:  # [B, N]
    """Return the variance of the scores divided by their sum, `[B]`; padding, at minus infinity, is left out."""
    is_real = score.isfinite()
    score = torch.where(is_real, score, 0.0)
    share = score / score.sum(dim=1, keepdim=True).clamp_min(1e-12)
    count = is_real.sum(dim=1, keepdim=True).clamp_min(1)
    mean = share.sum(dim=1, keepdim=True) / count
    return ((share - mean).square() * is_real).sum(dim=1) / count[:, 0]
