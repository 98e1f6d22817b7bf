"""What commands print, and the files they write it into."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenmerge.report.table import Table

__all__ = ["OUT_HELP", "check_out", "print_table"]

OUT_HELP = "also write the rows to these .csv, .json, .md, .html, .tex, and draw them into these .png, .svg, .pdf"


def check_out(paths: Sequence[str] | None) -> list[Path]:
    """Return the files to write; raises before any work for those that cannot be written."""
    from tokenmerge.report.plots import require_viz
    from tokenmerge.report.table import KINDS, PICTURES, check_writable

    found = [check_writable(path, (*KINDS, *PICTURES)) for path in paths or ()]
    if any(path.suffix in PICTURES for path in found):
        require_viz()
    return found


def print_table(arguments: argparse.Namespace, result: Table[Any], title: str, out: Sequence[Path] = ()) -> None:
    """Print a table with its notes, or as JSON, and save it into the files."""
    from tokenmerge.report.table import measured_on, show

    with ExitStack() as after:
        for path in out:
            # save even if printing fails (closed pipe), and print even if saving fails (full disk)
            after.callback(result.save, path, title)
        if arguments.json:
            content = {"title": title, "environment": result.environment, "rows": result.rows, "notes": result.remarks}
            print(json.dumps(content, indent=2))
            return
        show(result.table, title, wide=arguments.wide)
        for note in result.remarks:
            print(note)
        print(measured_on(result.environment))
