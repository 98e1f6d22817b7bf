"""Least loss: the pairs of ToMe, ranked by what is lost where one token of a pair is absorbed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenmerge import matching
from tokenmerge import plan as plans
from tokenmerge.methods.base import CAPTURED, FROM_ZERO, POSITIVE, SCORES, Choices, Limits, TokenView, Variants
from tokenmerge.methods.tofu import ToFu, ToFuPlan

__all__ = ["LeastLoss"]


@dataclass(frozen=True)
class LeastLoss(ToFu):
    """Merge the pairs that lose least by similarity, size and importance. Our own, after ToFu, MCTF and ToMeCIS.

    Each token of side A is matched with its most similar token of side B, as in ToMe. The `r` pairs with the lowest
    `(1 - cos) * s ** size * a ** importance` are merged, where s is the size and a the `score` of the absorbed token.
    Sources: arXiv:2312.01026, arXiv:2403.10030, doi:10.1109/IECON51785.2023.10312420. `metric`, `early` and `combine`
    are those of ToFu; `combine="weighted"` is the size-weighted mean, so that `early`, `size` and `importance` of 0
    give ToMe. `heads` is that of ToMe. Raises `UnknownNameError` for a value that is not a choice.
    """

    name: ClassVar[str] = "least_loss"
    limits: ClassVar[Limits] = {**ToFu.limits, "size": FROM_ZERO, "importance": FROM_ZERO}
    choices: ClassVar[Choices] = {
        "combine": ("mlerp", "average", "weighted"),
        "heads": matching.HEADS,
        "score": POSITIVE,
    }
    variants: ClassVar[Variants] = (
        {},
        {"size": 0.0, "importance": 1.0, "score": "received"},
        {"importance": 0.0, "early": 0.0, "combine": "weighted", "heads": "concat"},
    )

    heads: str = "mean"
    size: float = 0.5
    importance: float = 0.5
    score: str = "class"

    @property
    def needs(self) -> frozenset[str]:
        return (frozenset({self.metric}) & CAPTURED) | (SCORES[self.score] if self.importance else frozenset())

    def plan(self, view: TokenView, r: int) -> ToFuPlan:
        metric = getattr(view, self.metric)
        metric = matching.join_heads(metric, self.heads) if self.metric in CAPTURED else metric
        n = metric.shape[-2]
        side_a, side_b = matching.alternating(n, view.prefix)
        best, partner = matching.match(metric, side_a, side_b, "cosine", view.valid)  # [B, A]
        loss = 1 - best
        if self.size and view.size is not None:
            loss = loss * view.size[:, side_a] ** self.size
        if self.importance:
            loss = loss * view.score(self.score)[:, side_a].clamp_min(1e-12) ** self.importance
        # infinite where padding is involved
        score = torch.where(best.isinf(), best, -loss)
        keep, src, dst = matching.choose(score, partner, side_a, side_b, r, view.prefix)
        return ToFuPlan(keep, src, dst, n, is_early=view.layer < self.early * view.depth)

    def merge(
        self, plan: Any, x: Tensor, size: Tensor | None, branch: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if self.combine == "weighted" and not plan.is_early:
            return plans.merge_weighted(plan, x, size, branch)
        return super().merge(plan, x, size, branch)
