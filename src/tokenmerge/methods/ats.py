"""ATS: samples tokens at fixed quantiles of their cumulative importance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from tokenmerge import matching
from tokenmerge.errors import UnsupportedError
from tokenmerge.methods.base import POSITIVE, Choices, Reduction, TokenView, Variants, batch_count
from tokenmerge.plan import Plan

__all__ = ["ATS"]


@dataclass(frozen=True)
class ATS(Reduction):
    """Adaptive token sampling. Fayyaz et al., ECCV 2022, arXiv:2111.15667.

    With `p = score / sum(score)` over the N unprotected tokens, token i is drawn if `cumsum(p)` passes a quantile
    (k - 1/2) / K at i, for k = 1 to K. A token drawn twice counts once, so an image draws at most K tokens. All images
    of a batch must keep the same number and lose at most `r`, so the most important tokens not drawn fill the rest.

    `samples` is K / N, above 0 and at most 1: every image loses as many tokens as the image with the fewest to lose, at
    most `r`. Compiled, exactly `r` are removed, possibly the least important of those drawn. With None, K = N - r and
    exactly `r` are removed: the paper's draw for this K, filled up to K.

    Scores must be positive. Raises `UnknownNameError` for `entropy`, which is not, or an unknown score, and
    `UnsupportedError` for `samples` out of range. Published with training: DeiT-S 79.7 at 2.9 GMACs. Differs from the
    paper: tokens not drawn fill the rest.
    """

    name: ClassVar[str] = "ats"
    leaves = "one"
    choices: ClassVar[Choices] = {"score": POSITIVE}
    is_proportional: ClassVar[bool] = False
    is_adaptive: ClassVar[bool] = True
    variants: ClassVar[Variants] = ({}, {"samples": 1.0}, {"samples": 0.5, "score": "received"})

    samples: float | None = None
    score: str = "class_value"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples is not None and not 0 < self.samples <= 1:
            raise UnsupportedError(f"ATS samples is {self.samples!r}: give a share of the tokens above 0, at most 1.")

    def plan(self, view: TokenView, r: int) -> Plan:
        share = view.score(self.score)[:, view.prefix :].clamp_min(0)
        share = share / share.sum(dim=1, keepdim=True).clamp_min(1e-30)
        n = share.shape[1]
        count = n - r if self.samples is None else max(1, int(self.samples * n + 0.5))
        is_drawn = _is_drawn(share, count)
        if self.samples is not None:
            r = batch_count(n - is_drawn.sum(dim=1), r, share)
        rank = share + 2 * is_drawn
        rank = matching.sink_padding(rank, view.valid, slice(view.prefix, None))
        return matching.prune(F.pad(rank, (view.prefix, 0)), r, prefix=view.prefix)


def _is_drawn(share: Tensor, count: int) -> Tensor:  # [B, N]
    """Return which tokens are drawn at `count` quantiles of shares that sum to 1, `[B, N]` bool."""
    # floor(cumsum * count + 1/2) is the number of quantiles (k - 1/2) / count passed so far
    passed = (share.cumsum(dim=1) * count + 0.5).floor()
    return passed.diff(dim=1, prepend=passed.new_zeros(passed.shape[0], 1)) > 0
