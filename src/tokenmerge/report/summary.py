"""What `handle.report()` says, and what "auto" has tried."""

from __future__ import annotations

import html
from dataclasses import dataclass, field

from tokenmerge.methods import Reduction
from tokenmerge.schedule import R

__all__ = ["Calibration", "Candidate", "Report"]

# one that is simpler is preferred to one whose damage is less by no more than this
_MARGIN = 0.9


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


@dataclass(frozen=True)
class Candidate:
    """One way to spend the MACs: a method, the tokens that go per block, and what that did to the answers."""

    method: Reduction
    shape: str
    r: R
    macs: int
    damage: float


@dataclass
class Calibration:
    """What was tried on how many images, in the order of trial, and what was chosen."""

    images: int
    tried: list[Candidate] = field(default_factory=list)

    @property
    def first(self) -> Candidate:
        """The paper's method at the `r` that was asked for, which all are compared with."""
        return self.tried[0]

    @property
    def best(self) -> Candidate:
        """The candidate of least damage; of nearly equal ones the one tried first."""
        least = min(candidate.damage for candidate in self.tried)
        return next(candidate for candidate in self.tried if candidate.damage * _MARGIN <= least)

    def __str__(self) -> str:
        best, first = self.best, self.first
        if best is first:
            return f"tome as asked: it changes the output least of {len(self.tried)} candidates on {self.images} images"
        return (
            f"{best.method!r}, {best.shape} r: changes the output by {best.damage:.2g} (squared, relative) where tome "
            f"with the r asked for does by {first.damage:.2g}, on {self.images} images; {len(self.tried)} candidates "
            "at equal MACs"
        )
