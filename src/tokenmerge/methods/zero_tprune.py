"""Zero-TPrune: prunes by the PageRank of the attention graph, and by similarity among low-ranked tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenmerge import importance, matching
from tokenmerge.methods.base import FROM_ZERO, SHARE, Limits, Reduction, TokenView, Variants
from tokenmerge.plan import Plan

__all__ = ["ZeroTPrune"]


@dataclass(frozen=True)
class ZeroTPrune(Reduction):
    """Prune by graph importance and similarity. Wang et al., CVPR 2024, arXiv:2305.17328.

    Importance is PageRank on each head's attention graph (initial mass 1, class token sqrt(N)); `iterations` gives the
    steps for the first, middle and last third of the blocks. Heads are combined by root mean square, without heads
    whose variance over tokens lies outside `variance` (all heads, if none is inside). First `similar * r` tokens are
    removed: those of the less important half most similar (`metric`) to a token of the other half. PageRank continues
    on the remaining tokens, and the lowest are removed. Raises `UnknownNameError` for an unknown metric.

    Published without training (read off a figure): DeiT-S 79.3 at 2.8 GFLOPs, 78.3 at 2.2. Differs from the paper: its
    share of similar tokens was not found, so the default is ours; of its ranges of 30 to 50 and 5 to 10 iterations we
    use the minimum.
    """

    name: ClassVar[str] = "zero_tprune"
    leaves = "one"
    limits: ClassVar[Limits] = {"iterations": FROM_ZERO, "similar": SHARE, "variance": FROM_ZERO}
    is_proportional: ClassVar[bool] = False
    variants: ClassVar[Variants] = (
        {},
        {"iterations": (2, 2, 2), "similar": 0.0},
        {"similar": 1.0, "metric": "x"},
    )

    iterations: tuple[int, int, int] = (30, 5, 1)
    similar: float = 0.5
    variance: tuple[float, float] = (0.01, 0.7)
    metric: str = "k"

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"q", "k"}

    def plan(self, view: TokenView, r: int) -> Plan:
        B, n, _ = view.stream.shape
        is_class = torch.arange(n, device=view.stream.device) < min(1, view.prefix)
        start = torch.where(is_class, n**0.5, 1.0).expand(B, -1)
        score = self._rank(view, start, view.bias)
        similar = min(int(self.similar * r + 0.5), (n - view.prefix) // 2)
        if similar:
            gone = self._similar(view, score, similar)
            is_gone = gone.new_zeros(B, n).scatter_add(1, gone, torch.ones_like(gone)) > 0
            bias = torch.zeros_like(score) if view.bias is None else view.bias.float()
            if similar < r:
                start, bias = score.masked_fill(is_gone, 0.0), bias.masked_fill(is_gone, float("-inf"))
                score = self._rank(view, start, bias)
            score = score.masked_fill(is_gone, float("-inf"))
        return matching.prune(matching.sink_padding(score, view.valid), r, prefix=view.prefix)

    def _rank(self, view: TokenView, start: Tensor, bias: Tensor | None) -> Tensor:
        steps = self.iterations[min(2, 3 * view.layer // view.depth)]
        mass = importance.page_rank(view.q, view.k, start, steps, view.scale, bias)  # type: ignore[arg-type]
        patches = mass[..., view.prefix :]
        # not with `var`, which warns for empty batches
        spread = (patches - patches.mean(dim=2, keepdim=True)).square().mean(dim=2)  # [B, H]
        is_heard = (spread >= self.variance[0]) & (spread <= self.variance[1])
        heard = torch.where(is_heard.any(dim=1, keepdim=True), is_heard, True).float()
        combined: Tensor = (mass.square() * heard[..., None]).sum(dim=1) / heard.sum(dim=1, keepdim=True)
        return combined.sqrt()

    def _similar(self, view: TokenView, score: Tensor, count: int) -> Tensor:  # [B, N]
        """Return the tokens of the less important half that are most similar to one of the other half, `[B, count]`."""
        score = matching.sink_padding(score, view.valid)
        order = score[:, view.prefix :].argsort(dim=1, stable=True) + view.prefix
        low, high = order[:, : order.shape[1] // 2], order[:, order.shape[1] // 2 :]
        _, best = matching.nearest(getattr(view, self.metric), low, high, valid=view.valid)
        best = matching.lift_padding(best, view.valid, low)
        return low.gather(1, best.argsort(dim=1, descending=True, stable=True)[:, :count])
