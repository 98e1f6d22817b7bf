"""Repeat the ablation of ToMe's Table 1 and the accuracy per r on the bundled model; write `results/ablation.*`."""

from __future__ import annotations

import argparse

import torch
from tables import orders, write
from torch import nn

import tokenmerge
from tokenmerge import ToMe
from tokenmerge.data.labelled import FashionMNIST
from tokenmerge.measure.outputs import shared_copy
from tokenmerge.measure.timing import environment
from tokenmerge.report.progress import Progress
from tokenmerge.tools.evaluate import evaluate
from tokenmerge.tools.models import load_model

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
    """Evaluate every row of the table at `-r` (16 halves the MACs), and the default at r = 0..16."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-r", type=int, default=16, help="tokens per block in the ablation (%(default)s)")
    parser.add_argument("--limit", type=int, help="use only the first LIMIT test images")
    arguments = parser.parse_args()
    model, data = load_model("reference"), FashionMNIST(batch_size=32, limit=arguments.limit)
    with Progress("ablation") as progress:
        found = _results(model, data, arguments.r, progress)
    rows = []
    for part, choice, options, prop_attn, paper in ROWS:
        top1, agreement = found[_key(options, prop_attn)]
        row = {"part": part, "choice": choice, "top-1 %": top1, "agreement %": agreement, "paper top-1 %": paper}
        rows.append(row)
    title = f"ToMe's Table 1 on the bundled model, r = {arguments.r}, {len(data)} images"
    write("ablation", title, rows, environment(torch.device("cpu")), orders(rows, len(data)))
    with Progress("r = 0..16") as progress:
        curve = evaluate(model, data, rs=range(17), progress=progress)
    write("accuracy", "Accuracy of the bundled model per r, batch 32", curve.rows, curve.environment)


def _results(model: nn.Module, data: FashionMNIST, r: int, progress: Progress) -> dict[str, tuple[float, float]]:
    """Return top-1 and agreement with the unmerged model, in percent, for each distinct setting, in one pass."""
    variants = {}
    for _, _, options, prop_attn, _ in ROWS:
        twin = shared_copy(model)
        tokenmerge.patch(twin, ToMe(**options), r=r, prop_attn=prop_attn)
        variants[_key(options, prop_attn)] = twin
    hits = {key: torch.zeros(2) for key in variants}
    seen = 0
    with torch.inference_mode():
        for images, labels in data:
            unmerged = model(images).argmax(dim=1)
            for key, variant in variants.items():
                answers = variant(images).argmax(dim=1)
                hits[key] += torch.tensor([(answers == labels).sum(), (answers == unmerged).sum()])
            seen += len(labels)
            progress(seen, len(data))
    return {key: (_percent(count[0], seen), _percent(count[1], seen)) for key, count in hits.items()}


def _percent(count: torch.Tensor, of: int) -> float:
    return round(100 * count.item() / of, 2)


def _key(options: dict[str, str], prop_attn: bool) -> str:
    return f"{sorted(options.items())} {prop_attn}"


if __name__ == "__main__":
    main()
