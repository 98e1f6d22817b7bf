"""MaMe: merges with one thresholded matrix, in which a source may go to several destinations."""

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

    Destinations j are the tokens at odd positions, sources i the others. Each destination averages its sources by w:
    `w = relu(cos_ij - tau); w /= sum_i(w); w = relu(w - mean_i(w[w > 0])); w /= sum_i(w)`. The result is averaged with
    the destination itself. Sources with all weights 0 stay.

    `r` is the maximum removed per block: the sources most similar to any destination. All images of a batch lose as
    many tokens as the one with the fewest. Compiled, exactly `r` are removed: a source that the thresholds would keep
    then goes entirely into its most similar destination. `metric` is the feature compared; raises `UnknownNameError`
    for an unknown one.

    Published without training: DeiT-B 79.80 at 8.7 GFLOPs (ToMe 77.84), MAE ViT-L 84.81 at 31.0 (ToMe 84.25). Differs
    from the paper: it keeps every token that any image of the batch keeps. Here tokens count by their sizes, and the
    default `tau` is ours.
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
        # pairs with padding get weight 0 for any threshold
        cosine = matching.mask_pairs(cosine, view.valid, side_a, side_b, alike=float("-inf"), unlike=float("-inf"))
        weight, is_merged = self._weights(cosine)
        best, partner = cosine.max(dim=2)
        # sources with weights first, most similar first
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
        """Return the weight of each source in each destination, `[B, A, E]`, and which sources have one, `[B, A]`."""
        weight = _shares((cosine - self.tau).relu())
        mean = weight.sum(dim=1, keepdim=True) / (weight > 0).sum(dim=1, keepdim=True).clamp_min(1)
        weight = (weight - mean).relu()
        return weight, (weight > 0).any(dim=2)


def _shares(weight: Tensor) -> Tensor:  # [B, A, E]
    """Divide the weights of each destination by their sum."""
    return weight / weight.sum(dim=1, keepdim=True).clamp_min(1e-12)
