"""VidCom2: more tokens for the frames that stand out, and in each frame those that stand out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenmerge.vlm.methods.base import Chooser, Visual, frames_of, in_order

__all__ = ["VidCom2", "vidcom2"]

_WIDTHS = tuple(2.0**power for power in range(-3, 2))
_TEMPERATURE = 0.01


def vidcom2(features: Tensor, k: int, frames: int) -> Tensor:
    """Return `k` indices of the tokens `[N, C]` of `frames` equal frames.

    On the half of the channels that vary least, as vectors of length one, a token's likeness to a mean is
    `sum_a exp(-d^2 / 2a)` of its distance d, over widths a = 1/8 .. 2. A frame's budget is `k / T * (1 + w - mean(w))`
    with w the softmax over frames of -(mean likeness to the video's mean) / 0.01. In each frame the tokens least like
    the means of video and frame are kept.

    Source: VidCom2, EMNLP 2025, arXiv:2505.14454. Written from the paper's steps; budgets are rounded so that their sum
    is k, the largest remainders first.
    """
    values = features.float()
    calm = values.var(dim=0, correction=0).argsort(stable=True)[: max(1, values.shape[1] // 2)]
    units = normalize(values[:, calm], dim=-1).view(frames, -1, calm.shape[0])  # [T, n, c]
    of_video = _likeness(units, units.mean(dim=(0, 1), keepdim=True))
    of_frame = _likeness(units, units.mean(dim=1, keepdim=True))
    weights = (-of_video.mean(dim=1) / _TEMPERATURE).softmax(dim=0)
    counts = _whole(k / frames * (1 + weights - weights.mean()), k, units.shape[1])
    order = (of_video + of_frame).argsort(dim=1, stable=True)  # [T, n], least like the means first
    chosen = [order[frame, :count] + frame * units.shape[1] for frame, count in enumerate(counts)]
    return in_order(torch.cat(chosen))


def _likeness(units: Tensor, mean: Tensor) -> Tensor:  # [T, n]
    distance = (units - mean).square().sum(dim=-1)
    return torch.stack([(-distance / (2 * width)).exp() for width in _WIDTHS]).sum(dim=0)


def _whole(budgets: Tensor, total: int, most: int) -> list[int]:
    """Round budgets to whole numbers of 0 .. `most` whose sum is `total`."""
    # rounded, so that equal remainders are equal on every device
    wanted = (budgets.clamp(0, most) * 1e4).round() / 1e4
    counts = wanted.floor()
    order = (wanted - counts).argsort(descending=True, stable=True).tolist()
    whole = [int(count) for count in counts.tolist()]
    while sum(whole) < total:
        for frame in order:
            if sum(whole) < total and whole[frame] < most:
                whole[frame] += 1
    for frame in reversed(order):
        while sum(whole) > total and whole[frame] > 0:
            whole[frame] -= 1
    return whole


@dataclass(frozen=True)
class VidCom2(Chooser):
    """Keep what stands out in each frame, more of the frames that stand out."""

    name = "vidcom2"
    source = "VidCom2, EMNLP 2025, arXiv:2505.14454"

    def choose(self, visual: Visual, k: int) -> Tensor:
        return vidcom2(visual.features, k, frames_of(visual, self.name))
