"""SPViT: a multi-head selector drops tokens and keeps their mean as one package token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenmerge import matching
from tokenmerge.errors import ConfigError
from tokenmerge.methods.base import ABOVE_ZERO, FROM_ONE, FROM_ZERO, Limits, ModelShape, TokenView
from tokenmerge.methods.learned import (
    Learned,
    MaskedPlan,
    alive_share,
    budget,
    clamp_keep_grad,
    gumbel_sigmoid,
    mask_alive,
    module_of,
    ratio_loss,
)
from tokenmerge.plan import WeightedPlan

__all__ = ["SPViT"]


@dataclass(frozen=True)
class SPViT(Learned):
    """Drop tokens by a multi-head selector and keep their mean. Kong et al., ECCV 2022, arXiv:2112.13890.

    `heads` is the number of feature groups that vote. `ratio_weight` weights the squared difference between the kept
    and the planned share. `temperature` is that of the Gumbel-softmax. A block drops r + 1 tokens and puts their
    score-weighted mean, the package token, at the position of the best of them. Raises `ConfigError` if `heads` does
    not divide the width. Published: DeiT-S 79.3 % at 2.6 GMACs (79.8 at 4.6).

    Differs from the paper: the next selector treats a package token as an ordinary one. Its size counts in attention.
    The places of the selectors and what they keep follow from `r`, not from a latency table.
    """

    name: ClassVar[str] = "spvit"
    leaves = "one"
    limits: ClassVar[Limits] = {"heads": FROM_ONE, "ratio_weight": FROM_ZERO, "temperature": ABOVE_ZERO}

    heads: int = 4
    ratio_weight: float = 2.0
    temperature: float = 1.0

    def make(self, shape: ModelShape) -> nn.ModuleDict:
        if shape.width % self.heads:
            raise ConfigError(f"SPViT has {self.heads} heads, which do not divide the model's width {shape.width}.")
        return nn.ModuleDict({str(layer): _Selector(shape.width, self.heads) for layer in shape.active})

    def plan(self, view: TokenView, r: int) -> MaskedPlan | WeightedPlan:
        selector = module_of(view, self)
        share = alive_share(view)
        logit = selector(view.x, share)  # [B, N]
        if selector.training:
            mask = mask_alive(view, gumbel_sigmoid(logit, self.temperature))
            goes = (mask < 0.5) & (share > 0.5)
            best = logit.masked_fill(~goes, float("-inf")).argmax(dim=1, keepdim=True)
            package = torch.zeros_like(goes).scatter(1, best, True) & goes  # [B, N], one per image that drops any
            view.note(budget(view, self, r, share * mask + package))
            plan = MaskedPlan.of(mask)
            return _PackagePlan(plan.keep, plan.src, plan.dst, plan.n, mask, logit.sigmoid(), package)
        rank = matching.sink_padding(logit, view.valid)
        kept = matching.prune(rank, r, prefix=view.prefix).keep  # includes the best dropped token
        B, n = rank.shape
        order = rank[:, view.prefix :].argsort(dim=1, descending=True, stable=True) + view.prefix
        leader, src = order[:, n - view.prefix - r - 1, None], order[:, n - view.prefix - r :]
        dst = (kept < leader).sum(dim=1, keepdim=True).expand(B, r)
        weight = logit.sigmoid() if view.valid is None else logit.sigmoid() * view.valid + 1e-6
        return WeightedPlan(kept, src, dst, n, weight)

    def merge(
        self, plan: Any, x: Tensor, size: Tensor | None, branch: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(plan, WeightedPlan):
            return super().merge(plan, x, size, branch)
        x = x if branch is None else x + branch
        size = x.new_ones(x.shape[:2], dtype=torch.float32) if size is None else size
        gone = 1 - plan.mask  # [B, N]
        weight = gone * plan.weight
        weight = weight / weight.sum(dim=1, keepdim=True).clamp_min(1e-12)
        mean = (weight[..., None] * x.float()).sum(dim=1, keepdim=True).to(x.dtype)
        total = (gone * size).sum(dim=1, keepdim=True)
        left = size * clamp_keep_grad(plan.mask)
        return torch.where(plan.package[..., None], mean, x), torch.where(plan.package, total, left)

    def loss(self, memory: dict[int, Any]) -> Tensor:
        return self.ratio_weight * ratio_loss(memory)


@dataclass(frozen=True, eq=False)
class _PackagePlan(MaskedPlan):
    """Masks, the weight of each token in the package token, and the package token's place."""

    weight: Tensor | None = None  # [B, N]
    package: Tensor | None = None  # [B, N] bool: True at the package token's place


class _Selector(nn.Module):
    """Scores tokens per head, from that head's part of the token and of the mean; learned weights average the heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        part = width // heads
        half = max(1, part // 2)
        self.norm = nn.LayerNorm(width)
        self.embed = nn.Sequential(nn.Linear(part, 2 * half), nn.GELU())
        self.decide = nn.Sequential(nn.Linear(2 * half, half), nn.GELU(), nn.Linear(half, 1))
        self.weigh = nn.Sequential(nn.Linear(heads, heads), nn.GELU(), nn.Linear(heads, heads), nn.Sigmoid())

    def forward(self, x: Tensor, share: Tensor) -> Tensor:  # [B, N, C], [B, N]
        x = self.norm(x).unflatten(-1, (self.heads, -1))  # [B, N, H, D]
        local, whole = self.embed(x).chunk(2, dim=-1)
        share = (share / share.sum(dim=1, keepdim=True).clamp_min(1.0)).to(whole.dtype)
        mean = (whole * share[..., None, None]).sum(dim=1, keepdim=True)
        score = self.decide(torch.cat((local, mean.expand_as(local)), dim=-1))[..., 0].float().sigmoid()  # [B, N, H]
        weight = self.weigh(x.mean(dim=-1)).float()
        chance = (score * weight).sum(dim=-1) / weight.sum(dim=-1).clamp_min(1e-6)
        logit: Tensor = chance.clamp(1e-6, 1 - 1e-6).logit()
        return logit
