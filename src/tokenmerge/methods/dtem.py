"""DTEM: ToMe with a learned metric that is separate from the attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenmerge import matching
from tokenmerge.methods.base import ABOVE_ZERO, FROM_ONE, Limits, ModelShape, TokenView, Variants
from tokenmerge.methods.learned import Learned, module_of
from tokenmerge.plan import AnyPlan, MatrixPlan

__all__ = ["DTEM"]


@dataclass(frozen=True)
class DTEM(Learned):
    """Match tokens by a learned linear embedding. Lee and Hong, NeurIPS 2024, arXiv:2412.10569.

    `width` is the width of the embedding (the paper: 64, 128 for ViT-L). It is trained with a soft matching at
    `temperature`, in which each token considers its `nearest` partners. Published for a frozen model whose heads alone
    were trained for one epoch: DeiT-S 79.4 % at 2.9 GMACs (ToMe 79.1; 79.8 at 4.6).

    Differs from the paper: training removes the r tokens that ToMe would merge and divides them among their soft
    partners, so that training and inference have the same tokens. The paper keeps them, with the small size that is
    left.
    """

    name: ClassVar[str] = "dtem"
    limits: ClassVar[Limits] = {"width": FROM_ONE, "temperature": ABOVE_ZERO, "nearest": FROM_ONE}
    variants: ClassVar[Variants] = ({"width": 16},)

    width: int = 64
    temperature: float = 0.1
    nearest: int = 3

    def make(self, shape: ModelShape) -> nn.ModuleDict:
        return nn.ModuleDict({str(layer): nn.Linear(shape.width, self.width) for layer in shape.active})

    def plan(self, view: TokenView, r: int) -> AnyPlan:
        head = module_of(view, self)
        x = view.x_pre
        metric = head(F.layer_norm(x, x.shape[-1:]))  # [B, N, D]
        hard = matching.bipartite(metric.detach(), r, prefix=view.prefix, valid=view.valid)
        if not head.training:
            return hard
        places = torch.arange(x.shape[1], device=x.device)
        side_a, side_b = (places[side] for side in matching.alternating(x.shape[1], view.prefix))
        unit = F.normalize(metric.float(), dim=-1)
        scores = unit[:, side_a] @ unit[:, side_b].mT  # [B, Na, Nb]
        # below any cosine, so that padding gives nothing away; finite, so that an image of only padding gives no NaN
        scores = matching.mask_pairs(scores, view.valid, side_a, side_b, alike=-4.0, unlike=-4.0)
        given = soft_matching(scores, hard.src.shape[1], self.temperature, self.nearest)
        B, n, _ = x.shape
        weight = given.new_zeros(B, n, n)
        weight[:, side_b[:, None], side_a] = given.mT
        own = given.new_ones(B, n)
        # not 0, so that the logarithm of a size is finite
        own[:, side_a] = (1 - given.sum(dim=-1)).clamp_min(1e-6)
        weight = weight + torch.diag_embed(own)
        left = weight.gather(1, hard.keep[..., None].expand(-1, -1, n))  # [B, M, N]
        left = left / left.sum(dim=1, keepdim=True).clamp_min(1e-12)
        return MatrixPlan(weight=left, keep=hard.keep, n=n)


def soft_matching(scores: Tensor, r: int, temperature: float, nearest: int) -> Tensor:  # [B, Na, Nb]
    """Return how much each token of side A gives to each of side B in `r` rounds, `[B, Na, Nb]`; a row gives at most 1.

    Each round is a softmax over the `nearest` pairs of all rows, weighted by what each row has left to give. As the
    temperature falls, the result approaches the `r` best pairs.
    """
    B, rows, _ = scores.shape
    best, index = scores.topk(min(nearest, scores.shape[-1]), dim=-1)  # [B, Na, nearest]
    given = torch.zeros_like(best)
    for _ in range(r):
        free = (1 - given.sum(dim=-1, keepdim=True)).clamp_min(1e-6)
        pairs = ((best + free.log()) / temperature).flatten(1).softmax(dim=-1).view(B, rows, -1)
        given = given + pairs
        given = given / given.sum(dim=-1, keepdim=True).clamp_min(1.0)
    return torch.zeros_like(scores).scatter(2, index, given)
