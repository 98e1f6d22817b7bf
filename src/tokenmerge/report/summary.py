"""The report of a patched model, and the candidates of "auto"."""

from __future__ import annotations

import html
from dataclasses import dataclass, field

from tokenmerge.methods import Reduction
from tokenmerge.schedule import R

__all__ = ["Calibration", "Candidate", "Report"]

# a candidate tried later must have at most this share of the damage to be preferred
_MARGIN = 0.9


@dataclass(frozen=True, repr=False)
class Report:
    """What was patched in a model and its limits; `str()` is a table."""

    model: str
    adapter: str
    method: str
    r: str
    blocks: int
    tokens: list[int]  # after each block
    planned: bool  # True: no forward has run yet; tokens are those planned for the model's own input size
    prop_attn: bool
    attention: str  # how the tap reads the attention
    kernels: dict[str, str]  # kernel of the last forward by operation, for operations with several versions
    fallbacks: list[str]  # operations without a fused kernel on their device, and what that kernel needs
    parity: float  # largest difference of a re-composed block from its own forward, when patching; NaN: not checked
    limits: list[str]  # limitations
    choice: str = ""  # what "auto" chose and why
    untouched: list[str] = field(default_factory=list)  # parts with attention that nothing is merged in: a text tower

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
        if self.untouched:
            rows.insert(2, ("left alone", ", ".join(self.untouched)))
        if self.choice:
            rows.insert(next(i for i, (name, _) in enumerate(rows) if name == "r"), ("chosen", self.choice))
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
    """One way to spend the MACs: a method, its schedule, and its effect on the outputs."""

    method: Reduction
    shape: str
    r: R
    macs: int
    damage: float


@dataclass
class Calibration:
    """All candidates in the order of trial, the number of images, and the choice."""

    images: int
    tried: list[Candidate] = field(default_factory=list)

    @property
    def first(self) -> Candidate:
        """The baseline: ToMe at the given `r`."""
        return self.tried[0]

    @property
    def best(self) -> Candidate:
        """The candidate with the least damage; among nearly equal ones the first one tried."""
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
