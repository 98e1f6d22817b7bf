"""What `tune` returns: a configuration, the front, every candidate, and a sentence."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenmerge.config import MergeConfig
from tokenmerge.errors import UnsupportedError
from tokenmerge.files import write_file
from tokenmerge.report import columns
from tokenmerge.report.axes import Chart, Row
from tokenmerge.report.columns import Record
from tokenmerge.report.plots import plot_front
from tokenmerge.report.results import results_page
from tokenmerge.report.table import PICTURES, Table

__all__ = ["Front", "FrontRow", "Tried", "TriedRow", "Tuning", "beside"]


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


def _name(row: Row) -> str:
    """Return what a point is called: its speed-up, as it was measured or else estimated."""
    speed = row["speed-up"] if row["speed-up"] is not None else row["speed-up est."]
    return f"{row['note']} {speed:.2f}x" if row["note"] in ("chosen", "unmerged") else f"{speed:.2f}x"


@dataclass(repr=False)
class Front(Table[FrontRow]):
    """The configurations that no other one beats in MACs and damage, from most MACs to least, and constant ones."""

    rows: list[FrontRow]
    environment: dict[str, str]
    chart = Chart(
        x=("MACs share", "speed-up est."),
        y=("agreement %", "top-1 %", "damage"),
        label=_name,
        series=lambda row: row["note"] if "constant" in row["note"] else "tuned",
        is_unmerged=lambda row: row["note"] == "unmerged",
    )


@dataclass(repr=False)
class Tried(Table[TriedRow]):
    """Every candidate that was tried, in order."""

    rows: list[TriedRow]
    environment: dict[str, str]


def beside(path: Path) -> list[Path]:
    """Return the files that `Tuning.save` writes beside a configuration: page, tables and pictures."""
    tables = [path.with_suffix(kind) for kind in (".html", ".csv", ".tex")]
    return [*tables, path.with_name(f"{path.stem}-tried.csv"), *(path.with_suffix(kind) for kind in PICTURES)]


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
        page, *tables, tried = beside(path)[: -len(PICTURES)]
        pictures = beside(path)[-len(PICTURES) :]
        self.config.save(path)
        for table in tables:
            self.front.save(table)
        self.tried.save(tried)
        written = [path, page, *tables, tried]
        with suppress(UnsupportedError):
            plot_front(pictures, self.front.rows, self.report)
            written += pictures
        write_file(page, self._page(f"Tuned: {path.stem}"))
        return written

    def _page(self, title: str) -> str:
        """Return the front and all candidates as one HTML file."""
        return results_page(
            title,
            self.front.rows,
            environment=self.front.environment,
            lead=[self.report, *self.remarks],
            chart=self.front.chart,
            more={"Every candidate that was tried": self.tried.rows},
        )
