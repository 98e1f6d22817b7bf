"""Efficient video sampling: the first frame, and what changes from frame to frame."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmerge.vlm.methods.base import Chooser, Visual, cosine, frames_of, in_order

__all__ = ["EVS", "evs"]


def evs(features: Tensor, k: int, frames: int) -> Tensor:
    """Return the indices of the tokens `[N, C]` of `frames` equal frames that differ most from the frame before.

    A token's change is 1 - cosine to the token at its place in the frame before. The whole first frame is kept, so at
    least N / frames indices are returned, also where `k` is less. Equal changes go to the first token.

    Source: Efficient Video Sampling, arXiv:2510.14624, in the form of vLLM: on embeddings, not on pixels.
    """
    units = cosine(features).view(frames, -1, features.shape[-1])  # [T, n, C]
    change = 1 - (units[1:] * units[:-1]).sum(dim=-1)
    first = torch.full_like(units[:1, :, 0], torch.inf)
    order = torch.cat((first, change)).flatten().argsort(descending=True, stable=True)
    return in_order(order[: max(k, units.shape[1])])


@dataclass(frozen=True)
class EVS(Chooser):
    """Keep the first frame of a video and what changes after it."""

    name = "evs"
    source = "Efficient Video Sampling, arXiv:2510.14624"

    def choose(self, visual: Visual, k: int) -> Tensor:
        return evs(visual.features, k, frames_of(visual, self.name))
