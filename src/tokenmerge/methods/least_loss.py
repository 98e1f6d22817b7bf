"""Least loss: the pairs of ToMe, ranked by what is lost where one token of a pair is absorbed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokenmerge import matching
from tokenmerge.methods.base import CAPTURED, FROM_ZERO, POSITIVE, SCORES, SHARE, Choices, Limits, TokenView, Variants
from tokenmerge.methods.tofu import ToFu, ToFuPlan

__all__ = ["LeastLoss"]


@dataclass(frozen=True)
class LeastLoss(ToFu):
    """ToFu that ranks pairs by what is lost. Our own, after MCTF (arXiv:2403.10030) and ToMeCIS.

    Each token of side A is matched with its most similar of side B, as in ToMe. The `r` pairs of the lowest
    `(1 - cos) * s ** size * a ** importance` are merged, for the size s and the `score` a of the token that is
    absorbed. With both powers at 0 it is ToFu, whose other options it has. Raises `UnknownNameError` for a value that
    is not a choice.
    """

    name: ClassVar[str] = "least_loss"
    limits: ClassVar[Limits] = {"early": SHARE, "size": FROM_ZERO, "importance": FROM_ZERO}
    choices: ClassVar[Choices] = {**ToFu.choices, "score": POSITIVE}
    variants: ClassVar[Variants] = ({}, {"size": 0.0, "importance": 1.0, "score": "received"}, {"importance": 0.0})

    size: float = 0.5
    importance: float = 0.5
    score: str = "class"

    @property
    def needs(self) -> frozenset[str]:
        return (frozenset({self.metric}) & CAPTURED) | (SCORES[self.score] if self.importance else frozenset())

    def plan(self, view: TokenView, r: int) -> ToFuPlan:
        metric = getattr(view, self.metric)
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
