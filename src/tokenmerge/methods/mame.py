"""MaMe: merges by one thresholded matrix, in which a source may go to several destinations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenmerge import matching
from tokenmerge.methods.base import Reduction, TokenView, Variants, batch_count
from tokenmerge.plan import MatrixPlan

__all__ = ["MaMe"]


@dataclass(frozen=True)
class MaMe(Reduction):
    """Matrix merging. Huo and Li, CVPR Findings 2026, arXiv:2604.13432.

    Destinations are the tokens at odd places. The weight of source i in destination j is `w = relu(cos_ij - tau)`, then
    `w /= sum_i w`, `w = relu(w - mean of those above 0)` and `w /= sum_i w` again; the destination becomes the mean of
    itself and of the mean of its sources. Sources without weight anywhere stay. `r` is the most that goes in a block:
    the sources most similar to any destination. Every image of a batch loses as many as the one with the fewest, and
    exactly `r` when compiled: what the thresholds would keep then goes whole into its most similar destination.
    `metric` is what tokens are compared by; raises `UnknownNameError` for an unknown one. Published without training:
    DeiT-B 79.80 at 8.7 GFLOPs (ToMe 77.84), MAE ViT-L 84.81 at 31.0 (ToMe 84.25). Differs from the paper: there a batch
    keeps whatever one of its images keeps, tokens count by their sizes here, and the default `tau` is ours.
    """

    name: ClassVar[str] = "mame"
    is_adaptive: ClassVar[bool] = True
    variants: ClassVar[Variants] = ({}, {"tau": 0.1, "metric": "k"}, {"tau": -2.0})

    metric: str = "x"
    tau: float = 0.5

    def plan(self, view: TokenView, r: int) -> MatrixPlan:
        unit = matching.unit(getattr(view, self.metric))
        B, n, _ = unit.shape
        side_a, side_b = matching.alternating(n, view.prefix)
        cosine = matching.cosines(unit[:, side_a], unit[:, side_b])  # [B, A, E]
        # what takes part in no pair of real tokens has no weight, whatever the threshold
        cosine = matching.mask_pairs(cosine, view.valid, side_a, side_b, alike=float("-inf"), unlike=float("-inf"))
        weight, is_merged = self._weights(cosine)
        best, partner = cosine.max(dim=2)
        # those with weights come first, by how similar they are
        rank = matching.lift_padding(best + 4 * is_merged, view.valid, side_a)
        count = batch_count((rank > 2).sum(dim=1), r, best)
        order = rank.argsort(dim=1, descending=True, stable=True)
        gone, stays = order[:, :count], order[:, count:].sort(dim=1).values
        is_gone = torch.zeros_like(best).scatter_add(1, gone, torch.ones_like(best[:, :count]))
        places = torch.arange(n, device=unit.device)
        front, tokens_b = (part.expand(B, -1) for part in (places[: view.prefix], places[side_b]))
        keep = torch.cat((front, places[side_a][stays], tokens_b), dim=1)
        whole = partner[..., None] == torch.arange(cosine.shape[2], device=unit.device)
        weight = _shares(weight * is_gone[..., None]) + whole * (is_gone * ~is_merged)[..., None]
        matrix = (keep[..., None] == places).float()  # [B, M, N]
        matrix[:, matrix.shape[1] - cosine.shape[2] :, side_a] += weight.mT
        return MatrixPlan(weight=matrix, keep=keep, n=n)

    def _weights(self, cosine: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight of each source in each destination, `[B, A, E]`, and which have any, `[B, A]`."""
        weight = _shares((cosine - self.tau).relu())
        mean = weight.sum(dim=1, keepdim=True) / (weight > 0).sum(dim=1, keepdim=True).clamp_min(1)
        weight = (weight - mean).relu()
        return weight, (weight > 0).any(dim=2)


def _shares(weight: Tensor) -> Tensor:  # [B, A, E]
    """Divide the weights of each destination by their sum."""
    return weight / weight.sum(dim=1, keepdim=True).clamp_min(1e-12)
