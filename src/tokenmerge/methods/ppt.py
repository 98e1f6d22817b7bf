"""PPT: for each image and block either prunes or pools, by how clearly some tokens matter more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenmerge import matching
from tokenmerge import plan as plans
from tokenmerge.methods.base import FROM_ZERO, Choices, Limits, Reduction, TokenView
from tokenmerge.plan import Plan

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

    threshold: float = 7e-5
    metric: str = "k"
    score: str = "class_value"

    def plan(self, view: TokenView, r: int) -> Plan:
        """Return a plan whose `dst` is -1 in images that drop their `src`."""
        score = view.score(self.score)
        pools = _variance(score[:, view.prefix :]) < self.threshold
        pooled = matching.bipartite(getattr(view, self.metric), r, prefix=view.prefix, valid=view.valid)
        order = score[:, view.prefix :].argsort(dim=1, descending=True, stable=True) + view.prefix
        src = order[:, order.shape[1] - r :]
        pruned = matching.absorb(src[:, :0], src[:, :0], score.shape[1], src)
        return Plan(
            keep=torch.where(pools[:, None], pooled.keep, pruned.keep),
            src=torch.where(pools[:, None], pooled.src, src),
            dst=torch.where(pools[:, None], pooled.dst, -1),
            n=score.shape[1],
        )

    def merge(
        self, plan: Any, x: Tensor, size: Tensor | None, branch: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        # what is dropped joins a group without weight
        size = x.new_ones(x.shape[:2], dtype=torch.float32) if size is None else size
        weight = size.scatter(1, plan.src, size.gather(1, plan.src) * (plan.dst >= 0))
        return plans.merge_weighted(replace(plan, dst=plan.dst.clamp_min(0)), x, weight, branch)


def _variance(score: Tensor) -> Tensor:  # [B, N]
    """Return the variance of the scores divided by their sum, `[B]`; padding, at minus infinity, is left out."""
    is_real = score.isfinite()
    score = torch.where(is_real, score, 0.0)
    share = score / score.sum(dim=1, keepdim=True).clamp_min(1e-12)
    count = is_real.sum(dim=1, keepdim=True).clamp_min(1)
    mean = share.sum(dim=1, keepdim=True) / count
    return ((share - mean).square() * is_real).sum(dim=1) / count[:, 0]
