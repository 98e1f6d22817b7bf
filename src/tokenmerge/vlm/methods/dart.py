"""DART: a few large tokens, and those that are least like them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmerge.errors import ConfigError
from tokenmerge.vlm.methods.base import Chooser, Visual, cosine, in_order

__all__ = ["Dart", "dart"]


def dart(features: Tensor, k: int, text: Tensor | None = None, *, pivots: int = 4, text_pivots: int = 4) -> Tensor:
    """Return `k` indices of the tokens `[N, C]`: the pivots, and for each pivot the tokens least similar to it.

    Pivots are the tokens with the largest L1 norm, `pivots` of the image and `text_pivots` of the text `[L, C]`. The
    budget that is left is divided equally, earlier pivots first; each takes the tokens not yet taken with the smallest
    cosine to it.

    Source: DART, arXiv:2502.11494. The paper ranks by the keys of a layer inside the language model; this is its form
    on the embeddings, as in TensorRT Edge-LLM.
    """
    units, norms = cosine(features), features.float().abs().sum(dim=1)
    own = norms.topk(min(pivots, k)).indices
    points = [units[own]]
    if text is not None and text.shape[0]:
        points.append(cosine(text[text.float().abs().sum(dim=1).topk(min(text_pivots, text.shape[0])).indices]))
    similarity = torch.cat(points) @ units.T  # [pivots, N]
    taken = torch.zeros_like(norms, dtype=torch.bool)
    taken[own] = True
    left, shares = k - own.shape[0], similarity.shape[0]
    for number, row in enumerate(similarity):
        share = left // shares + (number < left % shares)
        if share:
            taken[row.masked_fill(taken, torch.inf).topk(share, largest=False).indices] = True
    return in_order(taken.nonzero().squeeze(1))


@dataclass(frozen=True)
class Dart(Chooser):
    """Keep large tokens and those least like them."""

    name = "dart"
    source = "DART, arXiv:2502.11494"
    pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pivots < 1 or self.text_pivots < 0:
            raise ConfigError(
                f"dart: pivots is {self.pivots} and text_pivots {self.text_pivots}; it takes at least 1 and 0."
            )

    def choose(self, visual: Visual, k: int) -> Tensor:
        return dart(visual.features, k, visual.text, pivots=self.pivots, text_pivots=self.text_pivots)
