"""ALGM: merges 2 x 2 windows of similar tokens in the first block, and similar tokens anywhere in later blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenmerge import matching
from tokenmerge.methods.base import Reduction, TokenView, Variants, batch_count
from tokenmerge.plan import Plan

__all__ = ["ALGM"]


@dataclass(frozen=True)
class ALGM(Reduction):
    """Adaptive local-then-global merging. Norouzi et al., CVPR 2024, arXiv:2406.09936.

    The first block that removes tokens merges each 2 x 2 window of the grid into one token if the mean cosine of its
    six pairs is at least `threshold`. Later blocks merge those of ToMe's pairs with `cos >= mean + std` over all
    cosines between the two sides. `metric` is the feature compared.

    `r` is the maximum removed per block. All images of a batch lose as many tokens as the one with the fewest, best
    first; compiled, exactly `r`. The paper merges in blocks 1 and 5: `r=[n, 0, 0, 0, n]` with any large n. Raises
    `UnknownNameError` for an unknown metric, `UnsupportedError` for a model without a grid.

    Published with training, Segmenter on ADE20k: ViT-S from 45.3 to 46.4 mIoU, from 134 to 192 images per second.
    Differs from the paper: a block loses at most half of its tokens, the default metric is ours, and with padding the
    first block merges as later ones do.
    """

    name: ClassVar[str] = "algm"
    is_adaptive: ClassVar[bool] = True
    variants: ClassVar[Variants] = ({}, {"threshold": -1.0, "metric": "x"})

    threshold: float = 0.88
    metric: str = "k"

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"places"}

    def plan(self, view: TokenView, r: int) -> Plan:
        unit = matching.unit(getattr(view, self.metric))
        if view.places is None and view.valid is None:
            return self._local(view, unit, r)
        token, into, best = matching.partners(unit, prefix=view.prefix, valid=view.valid)
        threshold = _threshold(unit, view.prefix, view.valid)
        count = batch_count((best >= threshold[:, None]).sum(dim=1), r, best)
        chosen = best.argsort(dim=1, descending=True, stable=True)[:, :count]
        return matching.absorb(token[chosen], into.gather(1, chosen), unit.shape[1])

    def _local(self, view: TokenView, unit: Tensor, r: int) -> Plan:
        n, (_, (rows, columns)) = unit.shape[1], view.cells()
        places = torch.arange(view.prefix, n, device=unit.device).view(rows, columns)
        windows = places[: rows // 2 * 2, : columns // 2 * 2].unflatten(0, (-1, 2)).unflatten(2, (-1, 2))
        windows = windows.transpose(1, 2).reshape(-1, 4)  # [W, 4]
        tokens = unit[:, windows.flatten()].unflatten(1, (-1, 4))  # [B, W, 4, D]
        # |sum u|^2 = sum |u|^2 + 2 * (sum of the six products)
        squares = tokens.square().sum(dim=(2, 3))
        mean = (tokens.sum(dim=2).square().sum(dim=2) - squares) / 12  # [B, W]
        r = min(r, 3 * windows.shape[0])
        count = batch_count(3 * (mean >= self.threshold).sum(dim=1), r, mean)
        # if 3 does not divide the count, the last window is merged in part
        chosen = windows[mean.argsort(dim=1, descending=True, stable=True)[:, : (count + 2) // 3]]  # [B, W, 4]
        src = chosen[..., 1:].flatten(1)[:, :count]
        into = chosen[..., :1].expand(-1, -1, 3).flatten(1)[:, :count]
        return matching.absorb(src, into, n)


def _threshold(unit: Tensor, prefix: int, valid: Tensor | None) -> Tensor:  # [B, N, D]
    """Return the mean plus the standard deviation of the cosines between the two sides, without padding, `[B]`.

    Computed from sums and second moments of the sides, without the matrix of cosines.
    """
    real = unit if valid is None else unit * valid[..., None]
    sides = [real[:, side] for side in matching.alternating(unit.shape[1], prefix)]
    sums, moments = [side.sum(dim=1) for side in sides], [matching.cosines(side.mT, side.mT) for side in sides]
    counts = [(side.square().sum(dim=2) > 0).sum(dim=1) for side in sides]
    count = (counts[0] * counts[1]).clamp_min(1)
    mean = (sums[0] * sums[1]).sum(dim=1) / count
    second = (moments[0] * moments[1]).sum(dim=(1, 2)) / count
    return mean + (second - mean.square()).clamp_min(0).sqrt()
