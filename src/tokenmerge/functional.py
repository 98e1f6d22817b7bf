"""The functions of the ToMe package under their own names, built on this library's plans.

Each matching function returns `(merge, unmerge)`: `merge(x, mode="mean")` takes `[B, N, C]` to `[B, M, C]`, `unmerge`
copies each group's row back to its tokens. Bolya et al., ICLR 2023, arXiv:2210.09461.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenmerge import matching
from tokenmerge import plan as plans
from tokenmerge.plan import Plan

__all__ = [
    "bipartite_soft_matching",
    "kth_bipartite_soft_matching",
    "merge_source",
    "merge_wavg",
    "random_bipartite_soft_matching",
]

Merge = Callable[..., Tensor]


def bipartite_soft_matching(
    metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False
) -> tuple[Merge, Merge]:
    """Merge the `r` most similar pairs between even and odd tokens, at most half of the unprotected ones.

    `metric` is `[B, N, D]`. With `r <= 0` both functions return their input. Unlike the ToMe package, `unmerge` undoes
    `merge` with a distillation token too. Raises `ValueError` for a distillation token without a class token.

    >>> merge, unmerge = bipartite_soft_matching(torch.rand(1, 9, 4), r=2, class_token=True)
    >>> merge(torch.rand(1, 9, 3)).shape, unmerge(torch.rand(1, 7, 3)).shape
    (torch.Size([1, 7, 3]), torch.Size([1, 9, 3]))
    """
    if distill_token and not class_token:
        raise ValueError("distill_token=True means the second token, after the class token: pass class_token=True too.")
    prefix = int(class_token) + int(distill_token)
    if min(r, matching.largest_r(metric.shape[1], prefix)) <= 0:
        return _do_nothing, _do_nothing
    with torch.no_grad():
        plan = matching.bipartite(metric, r, prefix=prefix, by_position=class_token)
    return _closures(plan)


def kth_bipartite_soft_matching(metric: Tensor, k: int) -> tuple[Merge, Merge]:
    """Merge every token into its best among every k-th; `metric` is `[B, N, D]`, `k <= 1` does nothing.

    As in the ToMe package the last `N % k` tokens are dropped; `unmerge` gives zeros for them.
    """
    if k <= 1:
        return _do_nothing, _do_nothing
    with torch.no_grad():
        plan = matching.kth(metric, k)
    return _closures(plan)


def random_bipartite_soft_matching(metric: Tensor, r: int) -> tuple[Merge, Merge]:
    """Merge `r` tokens drawn with torch's global generator into their best among the rest; `metric` is `[B, N, D]`."""
    if r <= 0:
        return _do_nothing, _do_nothing
    with torch.no_grad():
        plan = matching.random(metric, r)
    return _closures(plan)


def merge_wavg(merge: Merge, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merge `x` `[B, N, C]` as the mean weighted by `size` `[B, N, 1]` (ones if None); returns it and the new sizes."""
    size = torch.ones_like(x[..., :1]) if size is None else size
    total = merge(x * size, mode="sum")
    size = merge(size, mode="sum")
    return total / size, size


def merge_source(merge: Merge, x: Tensor, source: Tensor | None = None) -> Tensor:
    """Return which input tokens each merged token holds, `[B, M, N0]` of 0 and 1; without `source`, N0 is N of `x`."""
    if source is None:
        B, N, _ = x.shape
        source = torch.eye(N, device=x.device)[None].expand(B, N, N)
    return merge(source, mode="amax")


def _closures(plan: Plan) -> tuple[Merge, Merge]:
    def merge(x: Tensor, mode: str = "mean") -> Tensor:
        return plans.merge(plan, x, mode)

    def unmerge(x: Tensor) -> Tensor:
        return plans.unmerge(plan, x)

    return merge, unmerge


def _do_nothing(x: Tensor, mode: Any = None) -> Tensor:
    return x
