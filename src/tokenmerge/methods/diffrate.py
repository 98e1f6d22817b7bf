"""DiffRate: prunes the least important tokens of a block and merges the next least important into the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenmerge import matching
from tokenmerge import plan as plans
from tokenmerge.errors import UnsupportedError
from tokenmerge.methods.base import Reduction, TokenView, Variants
from tokenmerge.plan import AnyPlan, Plan

__all__ = ["DiffRate"]


@dataclass(frozen=True)
class DiffRate(Reduction):
    """Prune, then merge what ranks next. Chen et al., ICCV 2023, arXiv:2305.17997.

    Tokens are ranked by `score`. Of the `r` removed tokens, the lowest-ranked are dropped: `prune` is their share (0 to
    1), or a tuple of counts per block. Each other one merges into the most similar (`metric`) remaining token, as a
    plain mean. Raises `UnknownNameError` for a value that is not a choice and `UnsupportedError` for counts that do not
    fit the model or its `r`. The paper learns both counts per block on a thousand images; pass them as `r` and `prune`:

    >>> DiffRate(prune=(0, 0, 8, 2)).prune  # with r=[0, 3, 20, 15]
    (0, 0, 8, 2)

    Published with frozen weights: DeiT-S 79.58 at 2.9 GFLOPs (ToMe 78.89), MAE ViT-H 86.40 at 93.2 (ToMe 86.01).
    Differs from the paper: the default share is ours, and sizes are plain sums, where the paper discounts dissimilar
    tokens.
    """

    name: ClassVar[str] = "diffrate"
    leaves = "one"
    variants: ClassVar[Variants] = ({}, {"prune": 0.0, "score": "received"}, {"prune": 1.0})

    prune: float | tuple[int, ...] = 0.5
    metric: str = "x"
    score: str = "class"

    def __post_init__(self) -> None:
        super().__post_init__()
        shown = self.prune if isinstance(self.prune, tuple) else (self.prune, 1 - self.prune)
        if min(shown, default=0) < 0:
            raise UnsupportedError(
                f"DiffRate prune is {self.prune!r}: give a share from 0 to 1, or a tuple of counts of 0 and more."
            )

    def plan(self, view: TokenView, r: int) -> Plan:
        score = view.score(self.score)[:, view.prefix :]
        n, merged = score.shape[1], r - self._prune_count(view, r)
        order = score.argsort(dim=1, descending=True, stable=True) + view.prefix
        stays, src, gone = order[:, : n - r], order[:, n - r : n - r + merged], order[:, n - r + merged :]
        if not merged:
            return matching.absorb(src, src, n + view.prefix, gone)
        into, _ = matching.nearest(getattr(view, self.metric), src, stays, valid=view.valid)
        return matching.absorb(src, into, n + view.prefix, gone)

    def merge(
        self, plan: AnyPlan, x: Tensor, size: Tensor | None, branch: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        assert isinstance(plan, Plan)
        return plans.merge_average(plan, x, size, branch)

    def _prune_count(self, view: TokenView, r: int) -> int:
        if not isinstance(self.prune, tuple):
            return int(self.prune * r + 0.5)
        if len(self.prune) != view.depth:
            raise UnsupportedError(
                f"DiffRate prune names {len(self.prune)} counts and the model has {view.depth} blocks: give one for "
                "each block, 0 where nothing is dropped."
            )
        count = self.prune[view.layer]
        if count > r:
            raise UnsupportedError(
                f"DiffRate is to drop {count} tokens in block {view.layer}, where r removes {r} in all: prune counts "
                "among r. Give a larger r there, or a smaller count."
            )
        return count
