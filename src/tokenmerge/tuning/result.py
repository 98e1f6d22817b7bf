"""What `tune` returns: a configuration, the front, every candidate, and a sentence."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenmerge.config import MergeConfig
from tokenmerge.errors import UnsupportedError
from tokenmerge.files import write_file
from tokenmerge.report import columns
from tokenmerge.report.columns import Record
from tokenmerge.report.plots import plot_front
from tokenmerge.report.table import PICTURES, Table, as_html

__all__ = ["Front", "FrontRow", "Tried", "TriedRow", "Tuning"]


class FrontRow(Record):
    """One configuration on the images to select on. Figures that do not apply, or were not measured, are None."""

    __slots__ = ()
    method = columns.METHOD
    r = columns.R
    macs_share = columns.MACS_SHARE
    damage = columns.DAMAGE
    agreement = columns.AGREEMENT.or_none()
    top1 = columns.TOP1.or_none()
    speed_up = columns.SPEED_UP.or_none()
    estimated_speed_up = columns.ESTIMATED
    tokens = columns.TOKENS
    note = columns.NOTE


class TriedRow(Record):
    """One candidate on one part of the images."""

    __slots__ = ()
    split = columns.SPLIT
    method = columns.METHOD
    r = columns.R
    macs_share = columns.MACS_SHARE
    damage = columns.DAMAGE


@dataclass(repr=False)
class Front(Table[FrontRow]):
    """The configurations that no other one beats in MACs and damage, from most MACs to least, and constant ones."""

    rows: list[FrontRow]
    environment: dict[str, str]


@dataclass(repr=False)
class Tried(Table[TriedRow]):
    """Every candidate that was tried, in order."""

    rows: list[TriedRow]
    environment: dict[str, str]


@dataclass(repr=False)
class Tuning:
    """The configuration that `tune` found: pass `config` to `patch`. Printed, it is the report and the front.

    `reached` is False where the targets cannot be had; `config` is then the nearest that keeps the losses asked for.
    `remarks` are what to know of the figures, `figures` those of the configuration by name.
    """

    config: MergeConfig
    front: Front
    tried: Tried
    reached: bool
    report: str
    figures: dict[str, Any]
    remarks: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n\n".join([self.report, *self.remarks, str(self.front)])

    __repr__ = __str__

    def save(self, path: str | Path) -> list[Path]:
        """Write the configuration, and beside it the front (.html, .csv, .tex, .png, .svg, .pdf) and all candidates.

        Returns what was written; without matplotlib there are no pictures.
        """
        path = Path(path)
        self.config.save(path)
        page, pictures = path.with_suffix(".html"), [path.with_suffix(kind) for kind in PICTURES]
        tables, tried = [path.with_suffix(kind) for kind in (".csv", ".tex")], path.with_name(f"{path.stem}-tried.csv")
        written = [path, page, *tables, tried]
        for table in tables:
            self.front.save(table)
        self.tried.save(tried)
        content = b""
        try:
            plot_front(pictures, self.front.rows, self.report)
            content = pictures[0].read_bytes()
            written += pictures
        except UnsupportedError:
            pass
        facts = [self.report, *self.remarks, *self.front._said()]
        write_file(page, as_html(f"Tuned: {path.stem}", self.front.rows, facts, content))
        return written
