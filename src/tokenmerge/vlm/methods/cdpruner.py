"""CDPruner: diverse tokens, weighted by their relevance to the prompt (a determinantal point process)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmerge.vlm.methods.base import Chooser, Visual, cosine, in_order, needs_text

__all__ = ["CDPruner", "cdpruner"]

_SMALLEST = 1e-6


def cdpruner(features: Tensor, k: int, text: Tensor) -> Tensor:
    """Return `k` indices of the tokens `[N, C]` that are diverse and relevant to the text `[L, C]`.

    The relevance r of a token is its mean cosine to the text, scaled to 0 .. 1 over the tokens. The kernel is
    `r_i * cos(i, j) * r_j`, and the tokens are chosen one by one, each the one that makes the determinant of the
    kernel of the chosen ones largest. Time and memory O(N^2), then O(N k^2).

    Source: CDPruner, NeurIPS 2025, arXiv:2506.10967; greedy search by Chen et al., 2018, arXiv:1709.05135. The paper
    takes the relevance from CLIP's text tower, which most of these models do not have: here it is from the embeddings
    of the prompt, as in OpenVINO GenAI.
    """
    units = cosine(features)
    relevance = (units @ cosine(text).T).mean(dim=1)
    spread = relevance.max() - relevance.min()
    relevance = (relevance - relevance.min()) / spread.clamp_min(_SMALLEST) + _SMALLEST
    kernel = relevance[:, None] * (units @ units.T) * relevance
    gain = kernel.diagonal().clone()
    rows = torch.zeros(k, gain.shape[0], device=gain.device)  # of the Cholesky factor of the chosen tokens' kernel
    chosen: list[Tensor] = []
    for step in range(k):
        best = gain.argmax()
        chosen.append(best)
        rows[step] = (kernel[best] - rows[:step, best] @ rows[:step]) / gain[best].clamp_min(_SMALLEST**2).sqrt()
        gain = gain - rows[step].square()
        gain[torch.stack(chosen)] = -torch.inf
    return in_order(torch.stack(chosen))


@dataclass(frozen=True)
class CDPruner(Chooser):
    """Keep diverse tokens that are relevant to the prompt."""

    name = "cdpruner"
    source = "CDPruner, NeurIPS 2025, arXiv:2506.10967"

    def choose(self, visual: Visual, k: int) -> Tensor:
        return cdpruner(visual.features, k, needs_text(visual, self.name))
