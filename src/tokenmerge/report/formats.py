"""Rows as text: Markdown, CSV, LaTeX and HTML."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenmerge.report.columns import find_column
from tokenmerge.report.page import escaped

__all__ = ["Number", "as_csv", "as_latex", "as_markdown", "as_text", "html_table", "plain", "with_environment"]

Row = Mapping[str, Any]


class Number(str):
    """A number that is text already, such as an accuracy with its standard error."""

    __slots__ = ()


class Text(NamedTuple):
    """A column as text."""

    title: str
    is_number: bool  # aligned right
    cells: list[str]


def as_text(rows: Sequence[Row]) -> list[Text]:
    """Return the columns of rows with equal keys, as text."""
    found = []
    for title in rows[0]:
        column, values = find_column(title), [row[title] for row in rows]
        is_number = all(isinstance(value, (int, float, Number, type(None))) for value in values)
        found.append(Text(title, is_number, [column.text(value) for value in values]))
    return found


def as_markdown(rows: Sequence[Row], *, is_read_as_text: bool = False) -> str:
    """Return rows with equal keys as a Markdown table, numbers right-aligned.

    What Markdown would read as markup is escaped, unless the table is to be read as it is, in a terminal or a log.
    """
    lines: list[list[str]] = []
    for title, is_number, texts in as_text(rows):
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


def with_environment(rows: Sequence[Row], about: Mapping[str, Any] | Sequence[Row]) -> list[dict[str, Any]]:
    """Return each row with what it was measured on; `about` is the environment, of all rows or one per row."""
    each = [about] * len(rows) if isinstance(about, Mapping) else about
    names = dict.fromkeys(name for one in each for name in one)
    return [{**row, **names, **own} for row, own in zip(rows, each, strict=True)]


def as_latex(rows: Sequence[Row]) -> str:
    """Return rows with equal keys as a LaTeX table (booktabs), numbers right-aligned."""
    columns = as_text(rows)
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
    for title, is_number, cells in as_text(rows):
        style = ' class="number"' if is_number else ""
        tagged = [f"<td{style}>{escaped(cell)}</td>" for cell in cells]
        styled.append([f"<th{style}>{escaped(title)}</th>", *tagged])
    lines = ("<tr>" + "".join(line) + "</tr>" for line in zip(*styled, strict=True))
    return "\n".join(["<table>", *lines, "</table>"])
