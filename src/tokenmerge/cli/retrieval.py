"""`tokenmerge eval --retrieval`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

__all__ = ["add", "check"]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the option to search instead."""
    text = "search instead: recall@1 and @10 of merged embeddings in an unmerged index, the reverse, and both merged"
    parser.add_argument("--retrieval", action="store_true", help=text)


def check(arguments: argparse.Namespace, out: Sequence[Path]) -> None:
    """Raise `DataError` for options that a search does not know."""
    from tokenmerge.errors import DataError
    from tokenmerge.report.table import PICTURES

    given = {"--bound": arguments.bound, "--restore": arguments.restore is not None}
    given |= {f"--out {path}": path.suffix in PICTURES for path in out}
    wrong = [name for name, is_given in given.items() if is_given]
    if arguments.retrieval and wrong:
        raise DataError(f"--retrieval goes without {', '.join(wrong)}: give that in a command of its own.")
