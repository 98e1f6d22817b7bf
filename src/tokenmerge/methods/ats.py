"""ATS: draws tokens at fixed quantiles of their importance, so that few stay where few matter."""

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

    The `score` is divided by its sum over the unprotected tokens; K tokens are drawn where the running sum passes
    (k - 1/2) / K for k = 1 to K, and those drawn twice count once. Fewer than K are left so, each image its own
    number; a batch has one and no more than `r` may go, so that the most important of those not drawn fill up.

    `samples` is K as a share of the unprotected tokens (0 to 1): every image loses as many as the one with the fewest
    to lose, at most `r`; compiled it is `r`, and of those drawn the least important may go. None: as many as `r`
    leaves, which are the tokens the paper draws for this K, filled up to K, and exactly `r` go everywhere.
    Scores are positive, which `entropy` is not; raises `UnknownNameError` for it or an unknown one and
    `UnsupportedError` for a share that is none. Published with training: DeiT-S 79.7 at 2.9 GMACs. Differs from the
    paper: what was not drawn fills up.
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
    """Say which tokens are drawn at `count` quantiles of shares that sum to 1."""
    # how many of the quantiles (k - 1/2) / count the running sum has passed: no search, no table
    passed = (share.cumsum(dim=1) * count + 0.5).floor()
    return passed.diff(dim=1, prepend=passed.new_zeros(passed.shape[0], 1)) > 0
