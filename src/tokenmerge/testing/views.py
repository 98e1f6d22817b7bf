"""What a reduction method is shown in tests: random tokens in any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge import plan as plans
from tokenmerge.methods import Reduction, TokenView
from tokenmerge.methods.base import ModelShape

__all__ = ["LAYOUTS", "WIDTH", "Case", "Prepare", "moved", "view_of"]

# B, N, prefix, r
LAYOUTS = (
    *((2, 17, 0, 4), (2, 17, 1, 4), (1, 18, 2, 3), (3, 21, 5, 8), (2, 17, 1, 100), (1, 4, 1, 1)),
    *((2, 16, 0, 4), (3, 21, 5, 7)),
)
WIDTH = 24
Prepare = Callable[[nn.Module], Any]


def view_of(B: int = 3, N: int = 26, prefix: int = 1, dtype: torch.dtype = torch.float32, **given: Any) -> TokenView:
    """A view of the second of four blocks with every field set; a square grid where one fits."""
    q, k, v = (torch.randn(B, 3, N, 8, dtype=dtype) for _ in range(3))
    x, x_pre = torch.randn(B, N, WIDTH, dtype=dtype), torch.randn(B, N, WIDTH, dtype=dtype)
    size = torch.randint(1, 5, (B, N)).float()
    n = N - prefix
    rows = next(row for row in range(int(n**0.5), 0, -1) if n % row == 0)
    view = TokenView(x, x_pre, q, k, v, size, prefix, (rows, n // rows), layer=1, depth=4, memory={})
    return replace(view, **given)


@dataclass(frozen=True)
class Case:
    """A method, and what its fresh modules need before they say anything."""

    method: Reduction
    prepare: Prepare

    def ready(self, view: TokenView, r: int) -> TokenView:
        """The view with what a learned method has learned for its layer, in the view's dtype."""
        _, n, width = view.stream.shape
        shape = ModelShape(width, 3, view.prefix, view.prefix > 0, (0, r, 0), (n, n, n - r), (1,))
        modules = self.method.build(shape)
        if modules is None:
            return view
        self.prepare(modules)
        return replace(view, module=modules.eval().to(view.stream)["1"])

    def reduce(self, view: TokenView, r: int) -> tuple[plans.AnyPlan, Tensor, Tensor | None]:
        plan = self.method.plan(replace(view, memory={}), r)
        return plan, *self.method.merge(plan, view.stream, view.size, view.branch)

    def views(self) -> Iterator[tuple[str, TokenView, int]]:
        """A view of every layout in two precisions, in words, and how many tokens shall go."""
        for B, N, prefix, r in LAYOUTS:
            for dtype in (torch.float32, torch.bfloat16):
                r = min(r, self.method.largest_r(N, prefix))
                view = view_of(B, N, prefix, dtype)
                assert view.k is not None
                # keys alike, so that thresholds find something
                view = replace(view, k=view.k + 1, stream=view.stream + 1, branch=torch.randn_like(view.stream))
                yield f"B={B} N={N} prefix={prefix} r={r}, {dtype}", self.ready(view, r), r


def moved(view: TokenView, move: Callable[[Tensor], Tensor]) -> TokenView:
    """The view with every tensor of it moved."""
    parts: dict[str, Any] = {field.name: getattr(view, field.name) for field in fields(view)}
    parts |= {name: move(part) for name, part in parts.items() if isinstance(part, Tensor)}
    return TokenView(**parts)
