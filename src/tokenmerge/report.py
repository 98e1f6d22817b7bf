"""What `handle.report()` says."""

from __future__ import annotations

import html
from dataclasses import dataclass

__all__ = ["Report"]


@dataclass(frozen=True, repr=False)
class Report:
    """What was put into a model and what is limited; `str()` is a table."""

    model: str
    adapter: str
    method: str
    r: str
    blocks: int
    tokens: list[int]  # after each block
    planned: bool  # True: no forward has run, the tokens are those planned for the model's own input size
    prop_attn: bool
    attention: str  # how the tap sees the attention
    kernels: dict[str, str]  # what the last forward ran on, by operation: of those with more than one version
    fallbacks: list[str]  # operations that ran without the fused version for their device, and what that needs
    parity: float  # largest difference of a re-composed block from its own forward, when attaching; NaN: not proved
    limits: list[str]  # what could not be done
    choice: str = ""  # what "auto" chose and why

    def _rows(self) -> list[tuple[str, str]]:
        unseen = "known after a forward" if self.planned else "none: nothing was merged"
        used = ", ".join(f"{op} {name}" for op, name in self.kernels.items()) or unseen
        rows = [
            ("model", self.model),
            ("adapter", f"{self.adapter}, {self.blocks} blocks, attention seen by {self.attention}"),
            ("method", self.method),
            ("r", self.r),
            (
                "tokens",
                " ".join(map(str, self.tokens)) + (" (planned)" if self.planned else "") if self.tokens else "-",
            ),
            ("proportional attention", "on" if self.prop_attn else "off"),
            ("kernels", "; ".join((used, *self.fallbacks))),
            (
                "parity when attached",
                "not proved" if self.parity != self.parity else f"max |difference| {self.parity:.2g}",
            ),
            ("limitations", "; ".join(self.limits) or "none"),
        ]
        if self.choice:
            rows.insert(3, ("chosen", self.choice))
        return rows

    def __str__(self) -> str:
        return "\n".join(f"{name:<23} {value}" for name, value in self._rows())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Show the table in a notebook."""
        cells = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in self._rows())
        return f"<table>{''.join(cells)}</table>"
