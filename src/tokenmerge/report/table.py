"""Print and save tables: Markdown, CSV, JSON, HTML, LaTeX, and rich on a terminal."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

from tokenmerge.errors import DataError, UnsupportedError
from tokenmerge.files import new_part, write_file
from tokenmerge.report.columns import Record, find_column
from tokenmerge.report.page import as_page, escaped, paragraphs

if TYPE_CHECKING:
    import pandas

__all__ = [
    "KINDS",
    "PICTURES",
    "Table",
    "as_csv",
    "as_html",
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
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2em auto; padding: 0 1.5em }
h1 { font-size: 1.4em } img { max-width: 100% } .table { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: 3px 9px; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
th { border-bottom: 2px solid #999 } .number { text-align: right; white-space: nowrap }
""".strip()


class Table(Generic[_Record]):
    """Measured rows with their environment: print, show in notebooks, save in any format, or convert to pandas."""

    rows: list[_Record]
    environment: Any  # a dict for all rows, or one per row
    kinds: ClassVar[tuple[str, ...]] = KINDS  # what `save` can write

    @property
    def table(self) -> Sequence[Row]:
        """The rows as printed."""
        return self.rows

    @property
    def remarks(self) -> list[str]:
        """Notes for the reader, in sentences."""
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
        else:
            save_rows(path, self.rows, self.environment, self.remarks)

    def _draw(self, path: Path, title: str) -> None:
        """Draw the rows into a file; results that can be drawn have `PICTURES` among their `kinds`."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join([as_markdown(self.table) if self.rows else "no rows", *self._said()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Show the table in a notebook."""
        return "".join([html_table(self.table) if self.rows else "", paragraphs(self._said())])


class _Number(str):
    """A number that is text already, such as an accuracy with its standard error."""

    __slots__ = ()


class _Text(NamedTuple):
    """A column as text."""

    title: str
    is_number: bool  # aligned right
    cells: list[str]


def _as_text(rows: Sequence[Row]) -> list[_Text]:
    """Return the columns of rows with equal keys, as text."""
    found = []
    for title in rows[0]:
        column, values = find_column(title), [row[title] for row in rows]
        is_number = all(isinstance(value, (int, float, _Number, type(None))) for value in values)
        found.append(_Text(title, is_number, [column.text(value) for value in values]))
    return found


def as_markdown(rows: Sequence[Row], *, is_read_as_text: bool = False) -> str:
    """Return rows with equal keys as a Markdown table, numbers right-aligned.

    What Markdown would read as markup is escaped, unless the table is to be read as it is, in a terminal or a log.
    """
    lines: list[list[str]] = []
    for title, is_number, texts in _as_text(rows):
        cells = [_on_one_line(text) if is_read_as_text else _cell(text) for text in texts]
        width = max(2, len(title), *map(len, cells))
        rule = ("-" * (width - 1) + ":") if is_number else "-" * width
        lines.append([title.ljust(width), rule, *(c.rjust(width) if is_number else c.ljust(width) for c in cells)])
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*lines, strict=True))


# markup characters anywhere, an underscore at the edge of a word, an entity
_MARKED = re.compile(r"[\\|`<>\[\]*~]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)")
# the start of a heading or list item, and the closing marks of a heading
_LEADING = re.compile(r"^[#+-](?=\s|#|$)|^\d+[.)](?=\s|$)|#(?=#*$)")


def plain(text: str) -> str:
    """Escape a line so that Markdown shows it literally; names come from user files and command lines."""
    return _LEADING.sub(_escape, _cell(text))


def _cell(text: str) -> str:
    return _MARKED.sub(_escape, _on_one_line(text))


def _on_one_line(text: str) -> str:
    return text.replace("\r", " ").replace("\n", " ")


def _escape(found: re.Match[str]) -> str:
    return f"{found[0][:-1]}\\{found[0][-1]}"


def as_csv(rows: Sequence[Row]) -> str:
    """Return rows with equal keys as CSV with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_latex(rows: Sequence[Row]) -> str:
    """Return rows with equal keys as a LaTeX table (booktabs), numbers right-aligned."""
    columns = _as_text(rows)
    lines = zip(*([column.title, *column.cells] for column in columns), strict=True)
    head, *body = (" & ".join(_escaped(cell) for cell in line) + r" \\" for line in lines)
    places = "".join("r" if column.is_number else "l" for column in columns)
    parts = [rf"\begin{{tabular}}{{{places}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    return "\n".join(parts) + "\n"


_LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    # after `\\` these would be read as its optional argument
    **{char: f"{{{char}}}" for char in "[]*"},
    "±": r"$\pm$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\r": " ",
}


def _escaped(text: str) -> str:
    """Escape a cell for LaTeX."""
    return " ".join("".join(_LATEX.get(char, char) for char in text).split("\n"))


def html_table(rows: Sequence[Row]) -> str:
    """Return rows with equal keys as an HTML table."""
    styled = []
    for title, is_number, cells in _as_text(rows):
        style = ' class="number"' if is_number else ""
        tagged = [f"<td{style}>{escaped(cell)}</td>" for cell in cells]
        styled.append([f"<th{style}>{escaped(title)}</th>", *tagged])
    lines = ("<tr>" + "".join(line) + "</tr>" for line in zip(*styled, strict=True))
    return "\n".join(["<table>", *lines, "</table>"])


def as_html(title: str, rows: Sequence[Row], facts: Sequence[str], picture: bytes = b"") -> str:
    """Return a self-contained HTML page: sentences, an optional PNG picture, and a table."""
    encoded = base64.b64encode(picture).decode()
    drawn = f'<p><img alt="The rows of the table as a plot" src="data:image/png;base64,{encoded}"></p>'
    parts = [f"<h1>{escaped(title)}</h1>", paragraphs(facts), *([drawn] if picture else [])]
    return as_page(title, "\n".join([*parts, f'<div class="table">{html_table(rows)}</div>']), style=_STYLE)


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
    said = [*notes, *_measured(about)]
    if path.suffix == ".json":
        text = json.dumps({"environment": about, "rows": rows, "notes": notes}, indent=2) + "\n"
    elif path.suffix == ".csv":
        each = [about] * len(rows) if isinstance(about, Mapping) else about
        text = as_csv([{**row, **own} for row, own in zip(rows, each, strict=True)])
    elif path.suffix == ".html":
        text = as_html(path.stem, rows, said)
    elif path.suffix == ".tex":
        text = as_latex(rows)
    else:
        text = "\n\n".join([as_markdown(rows), *map(plain, said)]) + "\n"
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
            None if row[_ACCURACY] is None else _Number(f"{accuracy.text(row[_ACCURACY])} ± {error.text(row[_ERROR])}")
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
    columns = _as_text(rows)
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
    columns = _as_text([{name: row[name] for name in names} for row in rows])
    return 1 + sum(3 + max(2, len(column.title), *map(len, column.cells)) for column in columns)
