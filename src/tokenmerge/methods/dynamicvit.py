"""DynamicViT: a small predictor in a few blocks decides which tokens are dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenmerge import matching
from tokenmerge.methods.base import ABOVE_ZERO, FROM_ZERO, Limits, ModelShape, TokenView
from tokenmerge.methods.learned import (
    Learned,
    MaskedPlan,
    alive_share,
    budget,
    gumbel_sigmoid,
    mask_alive,
    module_of,
    ratio_loss,
)
from tokenmerge.plan import AnyPlan

__all__ = ["DynamicViT"]


@dataclass(frozen=True)
class DynamicViT(Learned):
    """Drop the tokens a learned predictor wants least. Rao et al., NeurIPS 2021, arXiv:2106.02034.

    `ratio_weight` weights `(kept share - planned share)^2` in the loss; `temperature` is that of the Gumbel-softmax.
    The paper removes tokens before blocks 4, 7 and 10 of 12 and keeps 70 % each time. For 196 patches this is
    `r=[0, 0, 0, 59, 0, 0, 41, 0, 0, 29]`; published: DeiT-S 79.3 % at 2.9 GMACs (79.8 at 4.6).

    Differs from the paper: tokens are removed between attention and MLP. In training, a dropped token is hidden from
    itself too, which no kept token can see. Distillation of the kept tokens is left to the training loop.
    """

    name: ClassVar[str] = "dynamicvit"
    leaves = "one"
    limits: ClassVar[Limits] = {"ratio_weight": FROM_ZERO, "temperature": ABOVE_ZERO}

    ratio_weight: float = 2.0
    temperature: float = 1.0

    def make(self, shape: ModelShape) -> nn.ModuleDict:
        return nn.ModuleDict({str(layer): _Predictor(shape.width) for layer in shape.active})

    def plan(self, view: TokenView, r: int) -> AnyPlan:
        predictor = module_of(view, self)
        share = alive_share(view)
        logit = predictor(view.x, share).float()  # [B, N]
        if not predictor.training:
            return matching.prune(matching.sink_padding(logit, view.valid), r, prefix=view.prefix)
        mask = mask_alive(view, gumbel_sigmoid(logit, self.temperature))
        view.note(budget(view, self, r, share * mask))
        return MaskedPlan.of(mask)

    def loss(self, memory: dict[int, Any]) -> Tensor:
        return self.ratio_weight * ratio_loss(memory)


class _Predictor(nn.Module):
    """The paper's predictor: half the features are the token's own, half the mean of the tokens that are left."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = max(1, width // 2)
        self.embed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * half), nn.GELU())
        quarter = max(1, half // 2)
        self.decide = nn.Sequential(
            nn.Linear(2 * half, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 1)
        )

    def forward(self, x: Tensor, share: Tensor) -> Tensor:  # [B, N, C], [B, N]
        local, whole = self.embed(x).chunk(2, dim=-1)
        share = (share / share.sum(dim=1, keepdim=True).clamp_min(1.0)).to(whole.dtype)
        mean = (whole * share[..., None]).sum(dim=1, keepdim=True)
        logit: Tensor = self.decide(torch.cat((local, mean.expand_as(local)), dim=-1))
        return logit[..., 0]
