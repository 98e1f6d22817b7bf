"""PPT: prunes an image in a block if its scores vary strongly, else pools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenmerge import matching
from tokenmerge.methods.base import FROM_ZERO, Choices, Limits, Reduction, TokenView, Variants
from tokenmerge.plan import DroppingPlan

__all__ = ["PPT"]

# scores that are attention probabilities, so that dividing by their sum makes sense
_SCORES = ("class_value", "class", "received")


@dataclass(frozen=True)
class PPT(Reduction):
    """Token pruning and pooling. Wu et al., 2023, arXiv:2310.01812.

    With `p = score / sum(score)` over the unprotected tokens: if `var(p) < threshold`, the `r` best pairs of ToMe by
    `metric` are merged, else the `r` tokens of lowest score are dropped. Each image chooses on its own; all remove `r`.
    Raises `UnknownNameError` for a value that is not a choice.

    The paper removes 50 tokens in each of three blocks, `r=[0, 0, 0, 50, 0, 0, 50, 0, 0, 50, 0, 0]`; published without
    training: DeiT-S 79.50 at 2.94 GMACs. Differs from the paper: a block removes at most half of the tokens, since no
    more can be paired.
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
    """Return `var(score / sum(score))`, `[B]`, without padding (which is at minus infinity)."""
    is_real = score.isfinite()
    score = torch.where(is_real, score, 0.0)
    share = score / score.sum(dim=1, keepdim=True).clamp_min(1e-12)
    count = is_real.sum(dim=1, keepdim=True).clamp_min(1)
    mean = share.sum(dim=1, keepdim=True) / count
    return ((share - mean).square() * is_real).sum(dim=1) / count[:, 0]
