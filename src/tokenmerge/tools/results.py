"""Show tables and write them: Markdown, CSV, JSON, and rich on a terminal that has it."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenmerge.errors import DataError

__all__ = ["Progress", "as_csv", "as_markdown", "check_writable", "save_rows", "show"]

Row = Mapping[str, Any]


def as_markdown(rows: Sequence[Row]) -> str:
    """Return rows of equal keys as a Markdown table, numbers to the right."""
    names = list(rows[0])
    cells = [[_text(row[name]) for name in names] for row in rows]
    widths = [max(2, len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]
    numeric = [all(isinstance(row[name], (int, float, type(None))) for row in rows) for name in names]
    rule = [("-" * (width - 1) + ":") if right else "-" * width for width, right in zip(widths, numeric, strict=True)]
    lines = [[name.ljust(width) for name, width in zip(names, widths, strict=True)], rule]
    for line in cells:
        lines.append([c.rjust(w) if right else c.ljust(w) for c, w, right in zip(line, widths, numeric, strict=True)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_csv(rows: Sequence[Row]) -> str:
    """Return rows of equal keys as CSV with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def check_writable(path: str | Path, kinds: Sequence[str] = (".json", ".csv", ".md")) -> Path:
    """Return the path if a file can be written there; raises `DataError` before any work is done."""
    path = Path(path)
    if path.suffix not in kinds:
        raise DataError(f"cannot write results to {path}: the name must end in {', '.join(kinds)}.")
    existed = path.exists()
    try:
        with path.open("a"):
            pass
    except OSError as error:
        raise DataError(f"cannot write results to {path}: {error.strerror}.") from error
    if not existed:
        path.unlink()
    return path


def save_rows(path: Path, rows: Sequence[Row], about: Mapping[str, Any], notes: Sequence[str] = ()) -> None:
    """Write rows in the format the name ends in; `about` is the environment, `notes` plain sentences."""
    if path.suffix == ".json":
        path.write_text(json.dumps({"environment": about, "rows": rows, "notes": notes}, indent=2) + "\n")
    elif path.suffix == ".csv":
        path.write_text(as_csv([{**row, **about} for row in rows]))
    else:
        facts = ", ".join(f"{name} {value}" for name, value in about.items())
        path.write_text("\n\n".join([as_markdown(rows), *notes, f"Measured on: {facts}."]) + "\n")


def show(rows: Sequence[Row], title: str) -> None:
    """Print a table to stdout, with rich where it is installed and stdout is a terminal."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table(title=title, title_justify="left")
            for name in rows[0]:
                table.add_column(name, justify="right" if isinstance(rows[0][name], (int, float)) else "left")
            for row in rows:
                table.add_row(*(_text(value) for value in row.values()))
            Console().print(table)
            return
    print(f"{title}\n\n{as_markdown(rows)}")


class Progress:
    """A progress line on stderr: a rich bar on a terminal, else one plain line per step of a tenth."""

    def __init__(self, label: str) -> None:
        self.label = label
        self._tenth = -1
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import Progress as Bar
            except ImportError:
                return self
            self._bar = Bar(console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=None)
        return self

    def __call__(self, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif 10 * done // total > self._tenth:
            self._tenth = 10 * done // total
            print(f"{self.label}: {done}/{total}", file=sys.stderr, flush=True)

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        decimals = 3 if abs(value) < 10 else 2 if abs(value) <= 100 else 1
        return f"{value:.{decimals}f}"
    return str(value)
