"""Shared by the scripts that repeat a paper's table: write the table, and describe differences in its order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenmerge.report.table import as_csv, as_markdown

RESULTS = Path(__file__).parent / "results"


def write(name: str, title: str, rows: list[dict[str, Any]], about: dict[str, str], notes: Sequence[str] = ()) -> None:
    """Write a table as Markdown and CSV into `results`, and print it."""
    facts = ", ".join(f"{key} {value}" for key, value in about.items())
    text = "\n\n".join([f"# {title}", as_markdown(rows), *(["\n".join(notes)] if notes else []), f"Run on: {facts}."])
    (RESULTS / f"{name}.md").write_text(text + "\n")
    (RESULTS / f"{name}.csv").write_text(as_csv([{**row, **about} for row in rows]))
    print(text)


def orders(rows: list[dict[str, Any]], images: int) -> list[str]:
    """Describe, for each part, the order of its choices here, and the pairs that the paper has the other way round."""
    said = []
    for part in dict.fromkeys(row["part"] for row in rows):
        of_part = sorted((row for row in rows if row["part"] == part), key=lambda row: -row["top-1 %"])
        order = of_part[0]["choice"]
        for before, row in itertools.pairwise(of_part):
            order += (" = " if row["top-1 %"] == before["top-1 %"] else " > ") + row["choice"]
        other = [
            f"{b['choice']} > {a['choice']}"
            for a, b in itertools.combinations(of_part, 2)
            if a["top-1 %"] > b["top-1 %"] and a["paper top-1 %"] < b["paper top-1 %"]
        ]
        verdict = f"NOT the paper's order, which has {', '.join(other)}" if other else "the paper's order"
        said.append(f"- {part}: {order}: {verdict}.")
    error = (sum(100 - row["agreement %"] for row in rows) / len(rows) / images) ** 0.5 * 10
    said.append(f"- Chance: one standard error of a difference between two rows is about {error:.2f} points here.")
    return said
