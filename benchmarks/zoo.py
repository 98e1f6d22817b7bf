"""Compare the methods: train the learned ones, ToMe's Tables 2 and 4, the time of each, all of them at equal MACs."""

from __future__ import annotations

import argparse
import os
import shutil
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tables import RESULTS, orders, write
from torch import nn

import tokenmerge
from tokenmerge.data.labelled import FashionMNIST, calibration_images
from tokenmerge.errors import TokenMergeError
from tokenmerge.measure.outputs import shared_copy
from tokenmerge.measure.timing import environment, interleave
from tokenmerge.methods import NEW, Drop, Learned, find
from tokenmerge.report.progress import Progress
from tokenmerge.tools.compare import Comparison, compare
from tokenmerge.tools.models import AUTO, apply_method, load_model
from tokenmerge.training.loop import train
from tokenmerge.training.recipe import read_recipe

LEARNED = Path(os.path.relpath(Path(__file__).parent / "models" / "learned"))  # relative, as shown in tables
# choice, method, the paper's top-1 % on ViT-L/16 MAE with r = 8
TABLE_2 = (
    ("random pruning", "random", 79.22),
    ("attention pruning", "attention", 79.48),
    ("k-means, 2 iterations", "token_pooling(iterations=2, weight='none')", 80.19),
    ("k-means, 5 iterations", "token_pooling(iterations=5, weight='none')", 80.29),
    ("greedy", "greedy", 84.36),
    ("bipartite", "tome", 84.25),
)
# name in models/learned -> recipe and changes
TRAINED: dict[str, tuple[str, list[str]]] = {
    **{name: (name, []) for name in ("dynamicvit", "spvit", "avit", "adavit", "tokenlearner", "dtem", "ltmp")},
    "tome": ("finetune", []),
    # the same stages, steps and teacher, but random tokens are dropped
    "random": ("dynamicvit", ["merge.method=random"]),
    "random-spvit": ("spvit", ["merge.method=random"]),
}
# choice, method or folder, the paper's top-1 % and share of the MACs of DeiT-S (79.8 %, 4.6 G), where it has them; ToMe
# untrained is on AugReg's ViT-S there
DEIT = (
    ("A-ViT", str(LEARNED / "avit"), 78.6, 0.63),
    ("DynamicViT", str(LEARNED / "dynamicvit"), 79.3, 0.63),
    ("SPViT", str(LEARNED / "spvit"), 79.3, 0.57),
    ("ToMe, trained", str(LEARNED / "tome"), 79.4, 0.59),
    ("ToMe, untrained", "tome", 79.3, 0.59),
    ("AdaViT", str(LEARNED / "adavit"), None, None),
    ("TokenLearner", str(LEARNED / "tokenlearner"), None, None),
    ("DTEM", str(LEARNED / "dtem"), None, None),
    ("LTMP", str(LEARNED / "ltmp"), None, None),
    ("random pruning, trained as DynamicViT", str(LEARNED / "random"), None, None),
    ("random pruning, trained as SPViT", str(LEARNED / "random-spvit"), None, None),
    ("random pruning, untrained, r = 13", "random", None, None),
)


def main() -> None:
    """Run the named parts in order; each resumes where it was interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts = {"learn": learn, "speed": speed, "table2": table_2, "deit": deit, "all": everything}
    parser.add_argument("parts", nargs="*", default=list(parts), metavar="PART", help=f"any of {', '.join(parts)}")
    parser.add_argument("--limit", type=int, help="use only the first LIMIT test images")
    parser.add_argument(
        "--work", type=Path, default=Path("runs"), help="where unfinished comparisons lie (%(default)s)"
    )
    arguments = parser.parse_args()
    unknown = [part for part in arguments.parts if part not in parts]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(parts)}")
    for part in arguments.parts:
        parts[part](arguments)


def learn(arguments: argparse.Namespace) -> None:
    """Train every method with its recipe, and keep the results; models in half precision."""
    for name, (recipe, changes) in TRAINED.items():
        wanted, run, kept = read_recipe(recipe, changes), arguments.work / name, LEARNED / name
        with Progress(name) as progress:
            train(wanted, run, progress=progress)
        kept.mkdir(parents=True, exist_ok=True)
        for file in ("merge.json", "merge.safetensors", "recipe.json", "metrics.jsonl"):
            if (run / file).is_file():
                shutil.copy(run / file, kept / file)
        if not wanted.model.only_modules:
            state = load_file(run / "model.safetensors")
            halves = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
            save_file(halves, kept / "model.safetensors")


def table_2(arguments: argparse.Namespace) -> None:
    """Repeat the paper's Table 2 at the r that halves the MACs of the bundled model."""
    found = _compare(arguments, "table2", [method for _, method, _ in TABLE_2], rs=[16])
    rows = [
        {"part": "matching", "choice": choice, **_figures(found, method), "paper top-1 %": paper}
        for choice, method, paper in TABLE_2
    ]
    title = f"ToMe's Table 2 on the bundled model, r = 16, {found.images} images"
    write("table2", title, rows, environment(torch.device("cpu")), orders(rows, found.images))


def deit(arguments: argparse.Namespace) -> None:
    """Compare the learned methods with ToMe as in the paper's Table 4, one image at a time and in batches."""
    methods = [method for _, method, _, _ in DEIT]
    alone = _compare(arguments, "deit-1", methods, rs=[13], batch_size=1)
    batched = _compare(arguments, "deit-64", methods, rs=[13])
    rows = []
    for choice, method, paper, share in DEIT:
        one, many = _figures(alone, method), _figures(batched, method)
        row = {"part": "DeiT-S", "choice": choice, "top-1 %": one["top-1 %"], "agreement %": one["agreement %"]}
        row |= {"MACs share": one["MACs share"], "MACs share, batch 64": many["MACs share"]}
        row |= {"speed-up, batch 64": many["speed-up"], "over bound, batch 64": many["over bound"]}
        rows.append({**row, "paper top-1 %": paper, "paper MACs share": share})
    unmerged = alone.rows[0]["top-1 %"]
    title = f"ToMe's DeiT-S table on the bundled model ({unmerged} % unmerged), {alone.images} images"
    notes = [
        *orders([row for row in rows if row["paper top-1 %"] is not None], alone.images),
        *_beside_random({row["choice"]: row["top-1 %"] for row in rows}),
        f"- DynamicViT with its scores reversed, keeping what it learned to drop: {_reversed(arguments.limit):.2f} %.",
        "",
        "A-ViT counts by image: in a batch only what all images let go is removed.",
    ]
    notes.append("The models in `models/learned` were trained for a third of an epoch, the paper's for 100 to 300.")
    write("deit", title, rows, environment(torch.device("cpu")), notes)


def _beside_random(accuracies: dict[str, float]) -> list[str]:
    """Describe learned pruning compared with random pruning trained by the same recipe."""
    return [
        f"- {name}: {found - accuracies[random]:+.2f} points against {random}."
        for name, found in accuracies.items()
        if (random := f"random pruning, trained as {name}") in accuracies
    ]


@torch.inference_mode()
def _reversed(limit: int | None) -> float:
    """Return the accuracy of DynamicViT with the logits of its predictors negated."""
    model, data = load_model("reference"), FashionMNIST(64, limit)
    apply_method(model, str(LEARNED / "dynamicvit"))
    for predictor in model.tokenmerge_modules.values():
        for parameter in predictor.decide[-1].parameters():
            parameter.neg_()
    return 100 * sum(int((model(x).argmax(1) == labels).sum()) for x, labels in data) / len(data)


def everything(arguments: argparse.Namespace) -> None:
    """Compare every method and auto at three shares of the MACs."""
    images = calibration_images("fashion-mnist", load_model("reference"))
    methods = [n for n in tokenmerge.list_methods() if n != Drop.name and not issubclass(find(n), Learned)]
    methods += [AUTO, *(str(path.parent) for path in sorted(LEARNED.glob("*/merge.json")))]
    found = _compare(arguments, "zoo", methods, macs=[0.75, 0.5, 0.35], calibrate=images, rounds=5)
    for source, name in (("table.md", "zoo.md"), ("table.csv", "zoo.csv"), ("plot.png", "zoo.png")):
        shutil.copy(arguments.work / "compare-zoo" / source, RESULTS / name)
    print(f"{len(found.rows)} rows, {found.marked} of them marked: results/zoo.md")


def speed(arguments: argparse.Namespace) -> None:
    """Time each method on ViT-S/16 with random weights: over its free bound, and against the unmerged model."""
    model, x = load_model("vit_small_patch16_224"), torch.randn(8, 3, 224, 224)
    rows = [row for name in tokenmerge.list_methods() if name != Drop.name for row in _timed(name, model, x)]
    slower = [row["method"] for row in rows if row["speed-up"] < 1]
    notes = [
        "ViT-S/16 with random weights on noise, batch 8, r = 13 for all, whatever their papers' schedules are. "
        "Adaptive methods remove what their thresholds allow: see the tokens left.",
        f"Slower than the unmerged model: {', '.join(slower) or 'none'}.",
    ]
    write("methods", "Time of each method", rows, environment(torch.device("cpu")), notes)


@torch.inference_mode()
def _timed(name: str, model: nn.Module, x: torch.Tensor) -> list[dict[str, Any]]:
    """Return the row of a method, or no row if this model cannot run it."""
    kind = find(name)
    merged, bound = shared_copy(model), shared_copy(model)
    try:
        handle = tokenmerge.patch(merged, kind(NEW) if issubclass(kind, Learned) else kind(), r=13)  # type: ignore[call-arg]
    except TokenMergeError as error:
        print(f"{name}: {error}")
        return []
    merged.eval()(x)
    amounts = [before - after for before, after in pairwise([197, *handle.tokens])]
    tokenmerge.patch(bound, Drop(), r=amounts)
    variants = {"unmerged": partial(model, x), "merged": partial(merged, x), "bound": partial(bound, x)}
    times = interleave(variants, torch.device("cpu"), rounds=11)
    row = {
        "method": name,
        "tokens left": handle.tokens[-1],
        "ms": round(1000 * times["merged"].median, 1),
        "unmerged ms": round(1000 * times["unmerged"].median, 1),
        "speed-up": round(times["unmerged"].over(times["merged"]), 2),
        "over bound": round(times["merged"].over(times["bound"]), 3),
    }
    print(row, flush=True)
    return [row]


def _compare(
    arguments: argparse.Namespace, name: str, methods: list[str], batch_size: int = 64, **how: Any
) -> Comparison:
    data = FashionMNIST(batch_size, arguments.limit)
    folder = arguments.work / f"compare-{name}"
    with Progress(name) as progress:
        return compare(
            load_model("reference"), data, methods=methods, folder=folder, label="reference", progress=progress, **how
        )


def _figures(found: Comparison, method: str) -> dict[str, Any]:
    (row,) = (row for row in found.rows if row["method"] == method)
    names = ("top-1 %", "agreement %", "KL", "MACs share", "speed-up", "over bound")
    return {name: row[name] for name in names}


if __name__ == "__main__":
    main()
