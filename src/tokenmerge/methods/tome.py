"""Token Merging (ToMe), with every choice of its paper's ablation as an option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenmerge import matching
from tokenmerge import plan as plans
from tokenmerge.methods.base import Choices, Reduction, TokenView, Variants
from tokenmerge.plan import Plan

__all__ = ["ToMe"]


@dataclass(frozen=True)
class ToMe(Reduction):
    """Bipartite soft matching on attention keys. Bolya et al., ICLR 2023, arXiv:2210.09461.

    The defaults are the paper's. `metric` is the feature compared (`x_pre`: the block's input, `x`: after the attention
    residual), `heads` how its heads are joined, `distance` the similarity, `combine` how a group becomes one token.
    `partition` divides the tokens into two sides (`random`: one fixed permutation per layer and `seed`). Raises
    `UnknownNameError` for a value that is not a choice. Differs from the paper's code in one point: all prefix tokens
    are protected.

    >>> ToMe(metric="x").needs
    frozenset()
    """

    name: ClassVar[str] = "tome"
    choices: ClassVar[Choices] = {
        "heads": matching.HEADS,
        "distance": matching.DISTANCES,
        "combine": ("weighted", "average", "max", "keep_one"),
        "partition": matching.PARTITIONS,
    }
    variants: ClassVar[Variants] = (
        {},
        *({"metric": metric} for metric in ("q", "v", "x", "x_pre")),
        {"heads": "concat"},
        *({"distance": distance} for distance in matching.DISTANCES[1:]),
        *({"combine": combine} for combine in ("average", "max", "keep_one")),
        *({"partition": partition} for partition in matching.PARTITIONS[1:]),
    )

    metric: str = "k"
    heads: str = "mean"
    distance: str = "cosine"
    combine: str = "weighted"
    partition: str = "alternating"
    seed: int = 0

    def features(self, view: TokenView) -> Tensor:
        metric = super().features(view)
        return matching.join_heads(metric, self.heads) if self.metric in self.captures else metric

    def plan(self, view: TokenView, r: int) -> Plan:
        return matching.bipartite(
            self.features(view),
            r,
            prefix=view.prefix,
            distance=self.distance,
            partition=self.partition,
            seed=self.seed + view.layer,
            valid=view.valid,
        )

    def merge(
        self, plan: Plan, x: Tensor, size: Tensor | None, branch: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if self.combine == "weighted":
            return plans.merge_weighted(plan, x, size, branch)
        x = x if branch is None else x + branch
        if self.combine == "keep_one":
            merged = x.gather(1, plan.keep[..., None].expand(-1, -1, x.shape[-1]))
        else:
            merged = plans.merge(plan, x, "mean" if self.combine == "average" else "amax")
        return merged, plans.merged_size(plan, x, size)
