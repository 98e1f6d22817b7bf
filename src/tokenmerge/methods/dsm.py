"""Delayed spatial merging (DSM): merges within four windows of the image first, over the whole image later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from tokenmerge import matching
from tokenmerge.methods.base import FROM_ZERO, Limits, Reduction, TokenView, Variants
from tokenmerge.plan import Plan

__all__ = ["DSM"]


@dataclass(frozen=True)
class DSM(Reduction):
    """Bipartite matching inside windows, then without. Heo et al., 2023, arXiv:2303.02331.

    In the first `windowed` blocks that remove tokens, pairs lie within one quadrant of the image. They are taken
    round-robin over the four quadrants, best first, until `r` are merged. Later blocks match as ToMe does. `metric` is
    the feature compared. Raises `UnknownNameError` for an unknown metric, `UnsupportedError` for a model without a
    patch grid. The paper does not merge in the first third of the blocks; set this with `r`:
    `patch(model, "dsm", r=[0, 0, 0, 0] + [20] * 8)`.

    Published: DeiT-S 79.2 at 2.8 GFLOPs delayed, 78.6 at 2.5 delayed and windowed (ToMe 78.9 at 2.8). Differs from the
    paper: the default of `windowed` is ours, and a token keeps the window of its input position.
    """

    name: ClassVar[str] = "dsm"
    limits: ClassVar[Limits] = {"windowed": FROM_ZERO}
    variants: ClassVar[Variants] = ({}, {"windowed": 0})

    windowed: int = 4
    metric: str = "k"

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"places"}

    def plan(self, view: TokenView, r: int) -> Plan:
        before = view.last_note(_MergeNote)
        merged = 0 if before is None else before.merged
        view.note(_MergeNote(merged + 1))
        if merged < self.windowed:
            return self._match_in_windows(view, r)
        return matching.bipartite(getattr(view, self.metric), r, prefix=view.prefix, valid=view.valid)

    def _match_in_windows(self, view: TokenView, r: int) -> Plan:
        cells, (rows, columns) = view.cells()
        window = 2 * (cells // columns >= (rows + 1) // 2) + (cells % columns >= (columns + 1) // 2).long()
        is_in = (F.pad(window, (view.prefix, 0))[..., None] == torch.arange(4, device=window.device)).float()
        unit = matching.unit(getattr(view, self.metric))
        n = unit.shape[1]
        side_a, side_b = matching.alternating(n, view.prefix)
        # append the one-hot window times 2: products within a window are raised by 4, above all others
        metric = torch.cat((unit, 2 * is_in), dim=2)
        best, partner = matching.match(metric, side_a, side_b, "dot", view.valid)  # [B, A]
        order = best.argsort(dim=1, descending=True, stable=True)
        best, is_in = best.gather(1, order), is_in[:, side_a].gather(1, order[..., None].expand(-1, -1, 4))
        is_in = is_in * best.isfinite()[..., None]
        # rank in its window: 1 for the best; 0 for padding, which is merged first
        rank = (is_in.cumsum(dim=1) * is_in).sum(dim=2)
        # tokens without a partner in their window rank last
        rank = rank.masked_fill(best < 2, float("inf"))
        chosen = order.gather(1, rank.argsort(dim=1, stable=True)[:, :r])
        places = torch.arange(n, device=unit.device)
        return matching.absorb(places[side_a][chosen], places[side_b][partner.gather(1, chosen)], n)


@dataclass(frozen=True)
class _MergeNote:
    merged: int  # number of blocks that removed tokens, including this one
