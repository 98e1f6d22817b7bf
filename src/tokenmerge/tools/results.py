"""Show tables and write them: Markdown, CSV, JSON, and rich on a terminal that has it."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tokenmerge.errors import DataError
from tokenmerge.files import new_part, write_file

__all__ = ["Progress", "as_csv", "as_html", "as_latex", "as_markdown", "check_writable", "plain", "save_rows", "show"]

Row = Mapping[str, Any]
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2em auto; padding: 0 1.5em }
h1 { font-size: 1.4em } img { max-width: 100% } .table { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: 3px 9px; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
th { border-bottom: 2px solid #999 } .number { text-align: right; white-space: nowrap }
""".strip()


def as_markdown(rows: Sequence[Row]) -> str:
    """Return rows of equal keys as a Markdown table, numbers to the right."""
    names = list(rows[0])
    cells = [[_cell(_text(row[name], name)) for name in names] for row in rows]
    widths = [max(2, len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]
    numeric = [all(isinstance(row[name], (int, float, type(None))) for row in rows) for name in names]
    rule = [("-" * (width - 1) + ":") if right else "-" * width for width, right in zip(widths, numeric, strict=True)]
    lines = [[name.ljust(width) for name, width in zip(names, widths, strict=True)], rule]
    for line in cells:
        lines.append([c.rjust(w) if right else c.ljust(w) for c, w, right in zip(line, widths, numeric, strict=True)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# marks anywhere, an underscore at the edge of a word, an entity
_MARKED = re.compile(r"[\\|`<>\[\]*~]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)")
# what makes a heading or a list, and the closing marks of a heading
_LEADING = re.compile(r"^[#+-](?=\s|#|$)|^\d+[.)](?=\s|$)|#(?=#*$)")


def plain(text: str) -> str:
    """Return a line that Markdown shows as it is: names come from files and command lines of anybody's."""
    return _LEADING.sub(_escape, _cell(text))


def _cell(text: str) -> str:
    return _MARKED.sub(_escape, text.replace("\r", " ").replace("\n", " "))


def _escape(found: re.Match[str]) -> str:
    return f"{found[0][:-1]}\\{found[0][-1]}"


def as_csv(rows: Sequence[Row]) -> str:
    """Return rows of equal keys as CSV with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_latex(rows: Sequence[Row]) -> str:
    """Return rows of equal keys as a LaTeX table (booktabs), numbers to the right."""
    names = list(rows[0])
    numeric = [all(isinstance(row[name], (int, float, type(None))) for row in rows) for name in names]
    lines = [names, *([_text(row[name], name) for name in names] for row in rows)]
    head, *body = (" & ".join(_escaped(cell) for cell in line) + r" \\" for line in lines)
    places = "".join("r" if right else "l" for right in numeric)
    parts = [rf"\begin{{tabular}}{{{places}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    return "\n".join(parts) + "\n"


_LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    # behind the end of a row these would be an option of it
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
    """Write a cell as LaTeX reads it."""
    return " ".join("".join(_LATEX.get(char, char) for char in text).split("\n"))


def as_html(title: str, rows: Sequence[Row], facts: Sequence[str], picture: bytes) -> str:
    """Return one page that needs no other file: facts as sentences, a picture (PNG), and rows of equal keys."""
    names = list(rows[0])
    numeric = {name: all(isinstance(row[name], (int, float, type(None))) for row in rows) for name in names}

    def line(cells: Mapping[str, str], tag: str) -> str:
        style = {name: ' class="number"' if numeric[name] else "" for name in names}
        return "<tr>" + "".join(f"<{tag}{style[name]}>{escape(cells[name])}</{tag}>" for name in names) + "</tr>"

    lines = [line({name: name for name in names}, "th")]
    lines += [line({name: _text(row[name], name) for name in names}, "td") for row in rows]
    encoded = base64.b64encode(picture).decode()
    parts = [
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(title)}</title>',
        f"<style>\n{_STYLE}\n</style>\n<h1>{escape(title)}</h1>",
        *(f"<p>{escape(fact)}</p>" for fact in facts),
        f'<p><img alt="The rows of the table as a plot" src="data:image/png;base64,{encoded}"></p>',
        '<div class="table"><table>',
        *lines,
        "</table></div>\n</html>\n",
    ]
    return "\n".join(parts)


def check_writable(path: str | Path, kinds: Sequence[str] = (".json", ".csv", ".md")) -> Path:
    """Return the path if a file can be written there; raises `DataError` before any work is done."""
    path = Path(path)
    if path.suffix not in kinds:
        raise DataError(f"cannot write results to {path}: the name must end in {', '.join(kinds)}.")
    try:
        new_part(path).unlink()
    except OSError as error:
        raise DataError(f"cannot write results to {path}: {error.strerror}.") from error
    return path


def save_rows(path: Path, rows: Sequence[Row], about: Mapping[str, Any], notes: Sequence[str] = ()) -> None:
    """Write rows in the format the name ends in; `about` is the environment, `notes` plain sentences."""
    if path.suffix == ".json":
        text = json.dumps({"environment": about, "rows": rows, "notes": notes}, indent=2) + "\n"
    elif path.suffix == ".csv":
        text = as_csv([{**row, **about} for row in rows])
    else:
        facts = ", ".join(f"{name} {value}" for name, value in about.items())
        text = "\n\n".join([as_markdown(rows), *map(plain, notes), plain(f"Measured on: {facts}.")]) + "\n"
    write_file(path, text)


def show(rows: Sequence[Row], title: str, *, wide: bool = False) -> None:
    """Print a table to stdout, with rich where it is installed and stdout is a terminal.

    Numbers are never shortened: without `wide` the columns are left out that do not fit into the terminal, the least
    important first, and a line says so.
    """
    width = shutil.get_terminal_size().columns
    shown = rows if wide else fitting(rows, width)
    left_out = [name for name in rows[0] if name not in shown[0]]
    if not sys.stdout.isatty() or not _show_richly(shown, title, width):
        print(f"{title}\n\n{as_markdown(shown)}")
    if left_out:
        print(f"Not shown: {', '.join(left_out)} (--wide, --json or the files that are written have them).")


def _show_richly(rows: Sequence[Row], title: str, width: int) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return False
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        justify: Any = "right" if isinstance(rows[0][name], (int, float)) else "left"
        table.add_column(name, justify=justify, no_wrap=True, overflow="ignore")
    for row in rows:
        table.add_row(*(_text(value, name) for name, value in row.items()))
    Console(width=max(width, _width(rows, list(rows[0])))).print(table)
    return True


# what a reader looks for first; other columns come after these, in their own order
_IMPORTANCE: tuple[str, ...] = (
    "method",
    "r",
    "batch",
    "split",
    "top-1 %",
    "accuracy",
    "error %",
    "speed-up",
    "agreement %",
    "cosine",
)
_IMPORTANCE += ("images/s", "tokens", "top-1 ±", "noise %", "over bound", "ms", "unmerged ms", "KL")
_LAST = ("model", "asked")  # they repeat what stands in the title, or beside it


def fitting(rows: Sequence[Row], width: int) -> list[dict[str, Any]]:
    """Return rows with as many of the columns, the important ones first, as fit into a width."""
    names = list(rows[0])
    order = [name for name in _IMPORTANCE if name in names]
    order += [name for name in names if name not in (*order, *_LAST)] + [name for name in _LAST if name in names]
    chosen: list[str] = []
    for name in order:
        if _width(rows, [*chosen, name]) <= width or not chosen:
            chosen.append(name)
    return [{name: row[name] for name in names if name in chosen} for row in rows]


def _width(rows: Sequence[Row], names: Sequence[str]) -> int:
    """Return how many characters a table of these columns takes."""
    return 1 + sum(3 + max(2, len(name), *(len(_text(row[name], name)) for row in rows)) for name in names)


class Progress:
    """A progress line on stderr, with the time left: a rich bar on a terminal, else plain lines.

    A plain line comes with every tenth, and where that takes longer, every minute.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self._tenth = -1
        self._bar: Any = None
        self._first: tuple[float, int] | None = None  # when it began, with how much done before
        self._shown = 0.0

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import MofNCompleteColumn
                from rich.progress import Progress as Bar
            except ImportError:
                return self
            # steps may take minutes: of a shorter period no speed could be told
            columns = (*Bar.get_default_columns(), MofNCompleteColumn())
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=3600)
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=None)
        return self

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        self._first = self._first or (now, done)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif 10 * done // total > self._tenth or now - self._shown > 60:
            self._tenth, self._shown = 10 * done // total, now
            print(f"{self.label}: {done}/{total}{self._left(now, done, total)}", file=sys.stderr, flush=True)

    def _left(self, now: float, done: int, total: int) -> str:
        assert self._first is not None
        start, before = self._first
        seconds = (now - start) / max(1, done - before) * (total - done)
        if seconds < 10:
            return ""
        return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _text(value: Any, name: str = "") -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        if name == "top-1 ±":
            return f"{value:.1f}"
        if 0 < abs(value) < 0.01:
            return f"{value:.2g}"
        decimals = 3 if abs(value) < 10 else 2 if abs(value) <= 100 else 1
        return f"{value:.{decimals}f}"
    return str(value)
