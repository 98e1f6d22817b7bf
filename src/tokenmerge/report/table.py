"""Print and save results: rows with their environment, in every format, and with rich on a terminal."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from tokenmerge.errors import DataError, UnsupportedError
from tokenmerge.files import new_part, write_file
from tokenmerge.report.axes import Chart
from tokenmerge.report.columns import Record, find_column
from tokenmerge.report.formats import (
    Number,
    as_csv,
    as_latex,
    as_markdown,
    as_text,
    html_table,
    plain,
    with_environment,
)
from tokenmerge.report.page import paragraphs
from tokenmerge.report.results import results_page

if TYPE_CHECKING:
    import pandas

__all__ = [
    "KINDS",
    "PICTURES",
    "Table",
    "as_csv",
    "as_latex",
    "as_markdown",
    "check_writable",
    "html_table",
    "measured_on",
    "plain",
    "save_rows",
    "show",
]

Row = Mapping[str, Any]
KINDS = (".json", ".csv", ".md", ".html", ".tex")  # file formats
PICTURES = (".png", ".svg", ".pdf")  # of the results that can be drawn
_MOST = 6  # columns that are printed unless more are asked for
_ACCURACY, _ERROR = "top-1 %", "top-1 ±"
_Record = TypeVar("_Record", bound=Record)


class Table(Generic[_Record]):
    """Measured rows with their environment: print, show in notebooks, save in any format, or convert to pandas."""

    rows: list[_Record]
    environment: Any  # a dict for all rows, or one per row
    kinds: ClassVar[tuple[str, ...]] = KINDS  # what `save` can write
    chart: ClassVar[Chart | None] = None  # what is drawn on the page

    @property
    def table(self) -> Sequence[Row]:
        """The rows as printed."""
        return self.rows

    @property
    def remarks(self) -> list[str]:
        """Notes for the reader, in sentences."""
        return []

    @property
    def lead(self) -> list[str]:
        """What the figures come to, in sentences: the first lines of the page."""
        return []

    def _said(self) -> list[str]:
        """Return the lines below the table."""
        one = isinstance(self.environment, Mapping)
        return [*self.remarks, *([measured_on(self.environment)] if one else [])]

    def to_pandas(self) -> pandas.DataFrame:
        """Return a DataFrame with the column names of the files; needs pandas."""
        try:
            import pandas
        except ImportError as error:
            raise UnsupportedError("to_pandas() needs pandas: pip install pandas") from error
        return pandas.DataFrame(self.rows, columns=list(self.rows[0]) if self.rows else None)

    def save(self, path: str | Path, title: str = "") -> None:
        """Write rows, environment and notes in the format of the suffix, one of `kinds`, or draw them with a title.

        Raises `DataError` for other formats and where there are no rows, `UnsupportedError` to draw without matplotlib.
        """
        path = check_writable(path, self.kinds)
        if not self.rows:
            raise DataError(f"there are no rows to write to {path}.")
        if path.suffix in PICTURES:
            self._draw(path, title)
        elif path.suffix == ".html":
            write_file(path, self.page(title or path.stem))
        else:
            save_rows(path, self.rows, self.environment, self.remarks)

    def page(self, title: str) -> str:
        """Return the rows as one HTML file: a plot to point at, tables that sort and filter, notes and environment."""
        return results_page(
            title,
            self.rows,
            environment=self.environment,
            notes=[note for note in self.remarks if note not in self.lead],
            lead=self.lead,
            chart=self.chart,
        )

    def _draw(self, path: Path, title: str) -> None:
        """Draw the rows into a file; results that can be drawn have `PICTURES` among their `kinds`."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join([as_markdown(self.table) if self.rows else "no rows", *self._said()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Show the table in a notebook."""
        return "".join([html_table(self.table) if self.rows else "", paragraphs(self._said())])


def check_writable(path: str | Path, kinds: Sequence[str] = KINDS) -> Path:
    """Return the path if it can be written; raise `DataError` before any work is done."""
    path = Path(path)
    if path.suffix not in kinds:
        raise DataError(f"cannot write results to {path}: the name must end in {', '.join(kinds)}.")
    try:
        new_part(path).unlink()
    except OSError as error:
        raise DataError(f"cannot write results to {path}: {error.strerror}.") from error
    return path


def save_rows(
    path: Path, rows: Sequence[Row], about: Mapping[str, Any] | Sequence[Row], notes: Sequence[str] = ()
) -> None:
    """Write rows in the format of the file suffix, one of `KINDS`.

    `about` is the environment, of all rows or one per row; `notes` are plain sentences.
    """
    if path.suffix == ".json":
        text = json.dumps({"environment": about, "rows": rows, "notes": notes}, indent=2) + "\n"
    elif path.suffix == ".csv":
        text = as_csv(with_environment(rows, about))
    elif path.suffix == ".html":
        text = results_page(path.stem, rows, environment=about, notes=notes)
    elif path.suffix == ".tex":
        text = as_latex(rows)
    else:
        text = "\n\n".join([as_markdown(rows), *map(plain, [*notes, *_measured(about)])]) + "\n"
    write_file(path, text)


def _measured(about: Mapping[str, Any] | Sequence[Row]) -> list[str]:
    """Return the environment as a sentence if all rows share one."""
    return [f"{measured_on(about)}."] if isinstance(about, Mapping) else []


def measured_on(about: Mapping[str, Any]) -> str:
    """Return the environment of the figures as one line."""
    return "Measured on: " + ", ".join(f"{name} {value}" for name, value in about.items())


def show(rows: Sequence[Row], title: str, *, wide: bool = False) -> None:
    """Print a table to stdout, with rich if it is installed and stdout is a terminal.

    Numbers are never shortened. Without `wide` the six most important columns are printed, or fewer where the terminal
    is too narrow for them, with the standard error of an accuracy beside it; a line names what was left out.
    """
    width = shutil.get_terminal_size().columns
    shown = rows if wide else fitting(_with_errors(rows), width, _MOST)
    left_out = [name for name in rows[0] if name not in (*shown[0], *([_ERROR] if _ACCURACY in shown[0] else ()))]
    if not sys.stdout.isatty() or not _show_richly(shown, title, width):
        print(f"{title}\n\n{as_markdown(shown, is_read_as_text=True)}")
    if left_out:
        print(f"Not shown: {', '.join(left_out)} (--wide, --json or the files that are written have them).")


def _with_errors(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows with the standard error of each accuracy in one cell with it."""
    if _ERROR not in rows[0] or _ACCURACY not in rows[0]:
        return [dict(row) for row in rows]
    accuracy, error = find_column(_ACCURACY), find_column(_ERROR)
    found = []
    for row in rows:
        both = (
            None if row[_ACCURACY] is None else Number(f"{accuracy.text(row[_ACCURACY])} ± {error.text(row[_ERROR])}")
        )
        found.append({name: both if name == _ACCURACY else value for name, value in row.items() if name != _ERROR})
    return found


def _show_richly(rows: Sequence[Row], title: str, width: int) -> bool:
    try:
        from rich.console import Console
        from rich.markup import escape as literal
        from rich.table import Table
    except ImportError:
        return False
    table = Table(title=literal(title), title_justify="left")
    columns = as_text(rows)
    for column in columns:
        table.add_column(column.title, justify="right" if column.is_number else "left", no_wrap=True, overflow="ignore")
    for line in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(literal, line))
    Console(width=max(width, _width(rows, list(rows[0])))).print(table)
    return True


def fitting(rows: Sequence[Row], width: int, most: int | None = None) -> list[dict[str, Any]]:
    """Return the rows with as many columns as fit into a width, at most `most`, the most important first."""
    names = list(rows[0])
    chosen: list[str] = []
    for name in sorted(names, key=lambda name: find_column(name).rank):
        if len(chosen) != most and (_width(rows, [*chosen, name]) <= width or not chosen):
            chosen.append(name)
    return [{name: row[name] for name in names if name in chosen} for row in rows]


def _width(rows: Sequence[Row], names: Sequence[str]) -> int:
    """Return the width in characters of a table with these columns."""
    columns = as_text([{name: row[name] for name in names} for row in rows])
    return 1 + sum(3 + max(2, len(column.title), *map(len, column.cells)) for column in columns)
