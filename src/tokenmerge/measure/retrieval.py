"""How a search by embeddings changes: which of the nearest images are still found."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["LEAST", "MOST", "NEAREST", "found_again", "nearest", "recalls"]

NEAREST = 10  # neighbours that are looked for
LEAST = 50  # images: among fewer, chance finds many of the neighbours
MOST = 20_000  # images: every one is compared with every other
_AT_ONCE = 1024  # queries: the scores of all would not fit in memory


def recalls(merged: Tensor, unmerged: Tensor, k: int = NEAREST) -> tuple[float, float]:
    """Return recall@k of a merged model's embeddings `[N, C]`, where every image is searched for among the others.

    It is the share of the `k` images nearest by cosine in the unmerged model (`[N, C]`) that are found too: with all
    images embedded by the merged model, and with its embeddings as queries in an index of the unmerged one.
    """
    wanted = nearest(unmerged, unmerged, k)
    anew, mixed = (found_again(wanted, nearest(merged, index, k)) for index in (merged, unmerged))
    return anew, mixed


def found_again(wanted: Tensor, found: Tensor) -> float:
    """Return the share of the neighbours that are wanted, `[N, k]`, that are among those found, `[N, k]`."""
    return float((wanted[:, :, None] == found[:, None, :]).any(dim=2).float().mean())


def nearest(queries: Tensor, index: Tensor, k: int) -> Tensor:
    """Return the rows of an index `[N, C]` nearest to each query `[N, C]` by cosine, `[N, k]`; none is its own."""
    queries, index = (nn.functional.normalize(x.float(), dim=1) for x in (queries, index))
    found = []
    for start in range(0, queries.shape[0], _AT_ONCE):
        scores = queries[start : start + _AT_ONCE] @ index.T
        own = torch.arange(scores.shape[0])
        scores[own, start + own] = -torch.inf
        found.append(scores.topk(k, dim=1).indices)
    return torch.cat(found)
