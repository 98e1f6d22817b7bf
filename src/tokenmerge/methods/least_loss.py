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

    With `pairs="bipartite"`, each token of side A is matched with its most similar token of side B, as in ToMe, and the
    `r` pairs with the lowest `(1 - cos) * s ** size * a ** importance` are merged, where s is the size and a the
    `score` of the absorbed token. With `pairs="mutual"`, tokens that are each other's best over all tokens are matched
    (`matching.mutual`, close to `greedy`): s is that of Ward's method, `s1 * s2 / (s1 + s2)` of the two sizes, and a
    the lower of the two scores; it compares all pairs of tokens, four times as many. Sources: arXiv:2312.01026,
    arXiv:2403.10030, doi:10.1109/IECON51785.2023.10312420, doi:10.1080/01621459.1963.10500845. `metric`, `early` and
    `combine` are those of ToFu; `combine="weighted"` is the size-weighted mean, so that bipartite pairs with `early`,
    `size` and `importance` of 0 give ToMe. `heads` is that of ToMe. Raises `UnknownNameError` for a value that is not a
    choice.
    """

    name: ClassVar[str] = "least_loss"
    limits: ClassVar[Limits] = {**ToFu.limits, "size": FROM_ZERO, "importance": FROM_ZERO}
    choices: ClassVar[Choices] = {
        "combine": ("mlerp", "average", "weighted"),
        "heads": matching.HEADS,
        "pairs": ("bipartite", "mutual"),
        "score": POSITIVE,
    }
    variants: ClassVar[Variants] = (
        {},
        {"size": 0.0, "importance": 1.0, "score": "received"},
        {"importance": 0.0, "early": 0.0, "combine": "weighted", "heads": "concat"},
        {"pairs": "mutual", "early": 0.0, "combine": "weighted"},
    )

    heads: str = "mean"
    size: float = 0.5
    importance: float = 0.5
    score: str = "class"
    pairs: str = "bipartite"

    @property
    def needs(self) -> frozenset[str]:
        return (frozenset({self.metric}) & CAPTURED) | (SCORES[self.score] if self.importance else frozenset())

    def features(self, view: TokenView) -> Tensor:
        metric = super().features(view)
        return matching.join_heads(metric, self.heads) if self.metric in CAPTURED else metric

    def plan(self, view: TokenView, r: int) -> ToFuPlan:
        metric = self.features(view)
        important = view.score(self.score).clamp_min(1e-12) ** self.importance if self.importance else None  # [B, N]
        found = self._bipartite if self.pairs == "bipartite" else self._mutual
        keep, src, dst = found(metric, view, important, r)
        return ToFuPlan(keep, src, dst, metric.shape[-2], is_early=view.layer < self.early * view.depth)

    def _bipartite(self, metric: Tensor, view: TokenView, important: Tensor | None, r: int) -> tuple[Tensor, ...]:
        side_a, side_b = matching.alternating(metric.shape[-2], view.prefix)
        best, partner = matching.match(metric, side_a, side_b, "cosine", view.valid)  # [B, A]
        loss = 1 - best
        if self.size and view.size is not None:
            loss = loss * view.size[:, side_a] ** self.size
        if important is not None:
            loss = loss * important[:, side_a]
        # infinite where padding is involved
        score = torch.where(best.isinf(), best, -loss)
        return matching.choose(score, partner, side_a, side_b, r, view.prefix)

    def _mutual(self, metric: Tensor, view: TokenView, important: Tensor | None, r: int) -> tuple[Tensor, ...]:
        patches = slice(view.prefix, None)
        unit = matching.unit(metric)[:, patches]
        cosine = matching.cosines(unit, unit)
        score = torch.maximum(cosine, cosine.mT) - 1  # both, as the two halves of a product may be rounded apart
        weight = torch.ones_like(score[:, 0])  # [B, n]
        if view.size is not None:
            weight = view.size[:, patches].to(score.dtype)
            inverse = 1 / weight.clamp_min(1e-12)  # padding has no size
            score = score / (inverse[:, :, None] + inverse[:, None]) ** self.size if self.size else score
        if important is not None:
            weight = important[:, patches].to(score.dtype)
            score = score * torch.minimum(weight[:, :, None], weight[:, None])
        score = matching.mask_pairs(score, view.valid, patches, patches)
        into, score = matching.mutual(score, weight)
        src = score.topk(r, dim=1).indices
        plan = matching.absorb(src + view.prefix, into.gather(1, src) + view.prefix, metric.shape[-2])
        return plan.keep, plan.src, plan.dst

    def merge(
        self, plan: Any, x: Tensor, size: Tensor | None, branch: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if self.combine == "weighted" and not plan.is_early:
            return plans.merge_weighted(plan, x, size, branch)
        return super().merge(plan, x, size, branch)
