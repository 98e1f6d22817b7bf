"""Repeat the ablation of ToMe's Table 1 and the accuracy per r on the bundled model; write `results/ablation.*`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tokenmerge import ToMe
from tokenmerge.tools.data import FashionMNIST
from tokenmerge.tools.evaluate import evaluate
from tokenmerge.tools.models import load_model
from tokenmerge.tools.results import Progress, as_csv, as_markdown
from tokenmerge.tools.timing import environment

RESULTS = Path(__file__).parent / "results"
# part of the table, choice, options, proportional attention, the paper's top-1 (ViT-L/16 MAE, r = 8; (f) AugReg)
ROWS: tuple[tuple[str, str, dict[str, str], bool, float], ...] = (
    ("feature", "x_pre", {"metric": "x_pre"}, True, 83.02),
    ("feature", "x", {"metric": "x"}, True, 83.70),
    ("feature", "k", {}, True, 84.25),
    ("feature", "q", {"metric": "q"}, True, 84.04),
    ("feature", "v", {"metric": "v"}, True, 83.80),
    ("distance", "euclidean", {"distance": "euclidean"}, True, 84.26),
    ("distance", "cosine", {}, True, 84.25),
    ("distance", "dot", {"distance": "dot"}, True, 82.78),
    ("distance", "softmax", {"distance": "softmax"}, True, 82.00),
    ("heads", "concat", {"heads": "concat"}, True, 84.32),
    ("heads", "mean", {}, True, 84.25),
    ("combine", "keep one", {"combine": "keep_one"}, True, 81.01),
    ("combine", "max", {"combine": "max"}, True, 83.50),
    ("combine", "average", {"combine": "average"}, True, 83.57),
    ("combine", "weighted", {}, True, 84.25),
    ("partition", "sequential", {"partition": "sequential"}, True, 81.07),
    ("partition", "alternating", {}, True, 84.25),
    ("partition", "random", {"partition": "random"}, True, 83.80),
    ("prop. attention", "without", {}, False, 82.15),
    ("prop. attention", "with", {}, True, 83.51),
)


def main() -> None:
    """Evaluate every row of the table at `-r` (which halves the work) and the default at r = 0..16."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-r", type=int, default=16, help="tokens per block in the ablation (%(default)s)")
    parser.add_argument("--limit", type=int, help="use only the first LIMIT test images")
    arguments = parser.parse_args()
    model, data = load_model("reference"), FashionMNIST(batch_size=200, limit=arguments.limit)
    with Progress("r = 0..16") as progress:
        curve = evaluate(model, data, rs=range(17), progress=progress)
    _write("accuracy", curve.rows, "Accuracy of the bundled model per r", curve.environment, [])
    results = _results(model, data, arguments.r)
    rows = []
    for part, choice, options, prop_attn, paper in ROWS:
        found = results[_key(options, prop_attn)]
        rows.append({"part": part, "choice": choice, "top-1 %": found["top-1 %"], "agreement %": found["agreement %"]})
        rows[-1]["paper top-1 %"] = paper
    title = f"ToMe's Table 1 on the bundled model, r = {arguments.r}, {len(data)} images"
    _write("ablation", rows, title, environment(next(model.parameters()).device), _orders(rows))


def _results(model: Any, data: FashionMNIST, r: int) -> dict[str, dict[str, Any]]:
    """Evaluate each different setting once."""
    found: dict[str, dict[str, Any]] = {}
    for part, choice, options, prop_attn, _ in ROWS:
        key = _key(options, prop_attn)
        if key not in found:
            with Progress(f"{part}: {choice}") as progress:
                method = ToMe(**options)
                found[key] = evaluate(model, data, rs=[r], method=method, prop_attn=prop_attn, progress=progress).rows[
                    1
                ]
    return found


def _key(options: dict[str, str], prop_attn: bool) -> str:
    return f"{sorted(options.items())} {prop_attn}"


def _orders(rows: list[dict[str, Any]]) -> list[str]:
    """Say for each part in which order its choices come here and in the paper."""
    said = []
    for part in dict.fromkeys(row["part"] for row in rows):
        of_part = [row for row in rows if row["part"] == part]
        here, paper = (
            " > ".join(row["choice"] for row in sorted(of_part, key=lambda row: -row[column]))
            for column in ("top-1 %", "paper top-1 %")
        )
        same = "the paper's order" if here == paper else f"NOT the paper's order ({paper})"
        said.append(f"- {part}: {here}: {same}.")
    return said


def _write(name: str, rows: list[dict[str, Any]], title: str, about: dict[str, str], notes: list[str]) -> None:
    facts = ", ".join(f"{key} {value}" for key, value in about.items())
    text = "\n\n".join([f"# {title}", as_markdown(rows), *(["\n".join(notes)] if notes else []), f"Run on: {facts}."])
    (RESULTS / f"{name}.md").write_text(text + "\n")
    (RESULTS / f"{name}.csv").write_text(as_csv([{**row, **about} for row in rows]))
    print(text)


if __name__ == "__main__":
    main()
