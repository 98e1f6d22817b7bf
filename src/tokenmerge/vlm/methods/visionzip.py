"""VisionZip: the tokens that get most of the tower's attention, and a few that the others are merged into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenmerge.errors import ConfigError
from tokenmerge.vlm.methods.base import Chooser, Merged, Visual, cosine, in_order, needs_tower

__all__ = ["VisionZip", "visionzip"]

_DOMINANT = 27 / 32  # 54 of 64, 108 of 128 and 162 of 192, as published


def visionzip(
    features: Tensor, k: int, attention: Tensor, keys: Tensor, *, dominant: float = _DOMINANT, merge: str = "sum"
) -> Merged:
    """Return `k` places of the tokens `[N, C]`, and the weights `[k, N]` of the tokens that are merged there.

    The share `dominant` of the `k` are the tokens with the most `attention` `[N]`, as they are; equal ones in their
    order. Of the rest, every n-th is a target. Each other one goes to the target with the most similar key, by the
    cosine of `keys` `[N, D]`. A target becomes its own features plus the mean of those that went to it (`merge="sum"`,
    as published), or the mean of all of them (`"mean"`). `weights @ features` are the tokens.

    Source: VisionZip, CVPR 2025, arXiv:2412.04467. The paper merges before the projector, and counts the class token
    among the dominant ones; it takes crops of one image by themselves. Here tokens are merged as the language model
    would get them, and an image's tokens are chosen together.
    """
    total = features.shape[0]
    count = round(dominant * k)
    order = attention.float().argsort(descending=True, stable=True)
    top, rest = in_order(order[:count]), in_order(order[count:])
    targets = rest[:: max(1, rest.shape[0] // max(1, k - count))][: k - count]
    places, rank = torch.cat((top, targets)).sort()
    weights = torch.zeros(k, total, device=features.device)
    weights[torch.arange(k, device=features.device), places] = 1
    others = rest[~torch.isin(rest, targets)]
    if targets.shape[0]:
        units = cosine(keys)
        nearest = (units[others] @ units[targets].T).argmax(dim=1)
        row = rank.argsort()[count + nearest]  # of each other token
        taken = torch.bincount(row, minlength=k)
        if merge == "mean":
            weights /= 1 + taken[:, None]
        weights[row, others] = 1 / (taken[row] + (merge == "mean")).float()
    return Merged(places, weights)


@dataclass(frozen=True)
class VisionZip(Chooser):
    """Keep what the tower attends to, and merge the others into a few."""

    name = "visionzip"
    source = "VisionZip, CVPR 2025, arXiv:2412.04467"
    reads_tower = True
    dominant: float = _DOMINANT
    merge: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dominant <= 1:
            raise ConfigError(f"visionzip: dominant is {self.dominant}; it takes a share from 0 to 1.")

    def choose(self, visual: Visual, k: int) -> Merged:
        attention, keys = needs_tower(visual, self.name)
        return visionzip(visual.features, k, attention, keys, dominant=self.dominant, merge=self.merge)
