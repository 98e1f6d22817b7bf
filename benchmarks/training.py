"""Training with merging against merging a model that was trained without: write `results/training-STUDY.*`.

Cut off, the same command goes on: runs have their checkpoints, finished measurements are kept beside them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tables import write
from torch import Tensor

import tokenmerge
from tokenmerge.data.loader import Loader, evaluation, open_source
from tokenmerge.data.transforms import eval_transform, train_transform
from tokenmerge.files import write_file
from tokenmerge.measure.timing import Timing, environment, interleave, training_memory
from tokenmerge.report.progress import Progress
from tokenmerge.tools.models import apply_method
from tokenmerge.training.build import build_network
from tokenmerge.training.distributed import World
from tokenmerge.training.loop import train
from tokenmerge.training.optimizer import Optimization
from tokenmerge.training.recipe import Merge, Recipe, read_recipe
from tokenmerge.training.run_folder import load

RUNS = Path("runs")


@dataclass(frozen=True)
class Study:
    """A recipe trained at every r, and without merging; `start` are the runs it starts from."""

    title: str
    recipe: str
    rs: tuple[int, ...]
    start: tuple[str, ...] = ()
    # changes in [merge], for rows compared at the same r
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    folder: str = ""  # folder of another study, whose runs are reused


STUDIES = {
    "scratch": Study("From scratch with merging, a ViT of 49 patches on Fashion-MNIST", "scratch", (8, 13, 16)),
    "finetune": Study(
        "Fine-tuning with merging, the bundled model (196 patches) on Fashion-MNIST", "finetune", (8, 13, 16, 24)
    ),
    "mae": Study(
        "A masked autoencoder on Fashion-MNIST, fine-tuned with and without merging",
        "mae-finetune",
        (13,),
        ("mae-pretrain", "mae-start"),
        {"-on": {"prop_attn": True}, "-off": {"prop_attn": False}},
    ),
    "combine": Study(
        "Fine-tuning with other ways to combine tokens, the bundled model on Fashion-MNIST",
        "finetune",
        (16,),
        variants={
            "": {},
            **{f"-{way}": {"method": f"tome(combine='{way}')"} for way in ("average", "max", "keep_one")},
        },
        folder="finetune",
    ),
    "video": Study(
        "Clips of moving Fashion-MNIST, fine-tuned with and without merging",
        "video",
        (42, 72),
        ("video-pretrain", "video-start"),
    ),
    "audio": Study("Synthesised sounds, fine-tuned with and without merging", "audio", (55, 85), ("audio-start",)),
}


def main() -> None:
    """Train and measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=7, help="timed training steps of each row (%(default)s)")
    parser.add_argument("--train-only", action="store_true", help="leave measuring for a quiet machine")
    arguments = parser.parse_args()
    name, study = arguments.study, STUDIES[arguments.study]
    for start in study.start:
        train(read_recipe(start), RUNS / start)
    work = RUNS / (study.folder or name)
    folders = {key: work / f"r{key[0]}{key[1]}-seed{key[2]}" for key in _keys(study, arguments.seeds)}
    for (r, variant, seed), folder in folders.items():
        with Progress(f"r = {r}{variant}, seed {seed}") as progress:
            train(recipe_of(study, r, variant, seed), folder, progress=progress)
    if arguments.train_only:
        return
    kept, speeds = _Kept(work / "measured.json"), Speeds(study, arguments.rounds)
    rows = []
    for r, variant in dict.fromkeys((r, variant) for r, variant, _ in folders):
        merge = recipe_of(study, r, variant, 0).merge
        before = [kept.accuracy(folders[0, "", seed], merge) for seed in arguments.seeds]
        after = [kept.accuracy(folders[r, variant, seed], merge) for seed in arguments.seeds]
        row = {"r": r, **({"variant": variant.strip("-") or "as it is"} if len(study.variants) > 1 else {})}
        rows.append(row | {"inference only %": _mean(before), "trained %": _mean(after), **speeds.row(r, variant)})
        print(rows[-1], flush=True)
    about = environment(torch.device("cpu"))
    write(f"training-{name}", study.title, rows, about, _notes(study, rows, arguments.seeds))


def _keys(study: Study, seeds: list[int]) -> list[tuple[int, str, int]]:
    merged = [(r, variant) for r in study.rs for variant in study.variants]
    return [(r, variant, seed) for seed in seeds for r, variant in [(0, ""), *merged]]


def recipe_of(study: Study, r: int, variant: str, seed: int) -> Recipe:
    """Return the recipe of the study for one row: the same steps, batches and learning rates for every r."""
    found = read_recipe(study.recipe, [f"seed={seed}"])
    # evaluations during training use 500 samples; the whole test set is measured here
    found = replace(found, data=replace(found.data, held=500))
    changes = study.variants[variant] if r else {}
    return replace(found, merge=replace(found.merge, r=r, **changes))


class _Kept:
    """Measured accuracies, saved in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    def accuracy(self, folder: Path, merge: Merge) -> float:
        """Return the share of right answers on the test samples, in per cent."""
        key = f"{folder.name}: {merge.method} r={merge.r} prop_attn={merge.prop_attn}"
        if key not in self.values:
            self.values[key] = 100 * accuracy(folder, merge)
            write_file(self.path, json.dumps(self.values, indent=2))
        return self.values[key]


@torch.inference_mode()
def accuracy(folder: Path, merge: Merge) -> float:
    """Return the share of right answers on all test samples of a run's source."""
    recipe, model = read_recipe(folder / "recipe.json"), load(folder, merged=False)
    size = tuple(json.loads((folder / "model.json").read_text())["size"])
    source = open_source(recipe.data.source, "test", replace(recipe.data, held=None))
    apply_method(model, merge.method, r=merge.r, prop_attn=merge.prop_attn)
    hits = total = 0
    for batch in evaluation(source, eval_transform(source.kind, size), batch_size=100):
        hits += int((model(batch.inputs).argmax(-1) == batch.labels).sum())
        total += len(batch.labels)
    return hits / total


class Speeds:
    """Times of training steps at every r and of its free bound, in turn, and the peak memory of a step of each."""

    def __init__(self, study: Study, rounds: int) -> None:
        self.models, steps = {}, dict[Any, Callable[[], None]]()
        rows = list(dict.fromkeys((r, variant) for r, variant, _ in _keys(study, [0])))
        for r, variant, is_bound in [(*row, bound) for row in rows for bound in (False, True)]:
            recipe = recipe_of(study, r, variant, 0)
            if is_bound:
                recipe = replace(recipe, merge=replace(recipe.merge, method="drop"))
            source = open_source(recipe.data.source, "train", recipe.data)
            self.size = recipe.data.size or source.size
            network = build_network(recipe, self.size, source.classes, torch.device("cpu"))
            transform = train_transform(recipe.augment, source.kind, self.size, flippable=source.flippable)
            batch = next(Loader(source, transform, batch_size=recipe.batch_size, seed=0).batches())
            self.batch = batch.inputs
            self.models[r, variant] = network.model if not is_bound else self.models[r, variant]
            optimization = Optimization(network, recipe, 1, World("cpu"))
            steps[r, variant, is_bound] = _step(optimization, batch.inputs, batch.labels)
        self.times: dict[Any, Timing] = interleave(steps, torch.device("cpu"), rounds=rounds, warmup=2)

    def row(self, r: int, variant: str) -> dict[str, Any]:
        """Return the columns of speed, memory and MACs for one row."""
        model, time = self.models[r, variant], self.times[r, variant, False]
        return {
            "training images/s": round(len(self.batch) / time.median, 1),
            "training speed-up": round(self.times[0, "", False].over(time), 2),
            "over free bound": round(time.over(self.times[r, variant, True]), 3) if r else None,
            "spread %": round(100 * (time.spread or 0), 1),
            "peak MB": round(training_memory(model, self.batch) / 1e6, 1),
            "GMACs": round(tokenmerge.flops(model, self.size) / 1e9, 4),
        }


def _step(optimization: Optimization, inputs: Tensor, labels: Tensor) -> Callable[[], None]:
    def step() -> None:
        # `interleave` turns gradients off
        with torch.inference_mode(False), torch.enable_grad():
            optimization.backward(0, inputs, labels)
            optimization.update(0)

    return step


def _mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _notes(study: Study, rows: list[dict[str, Any]], seeds: list[int]) -> list[str]:
    recipe = read_recipe(study.recipe)
    found = [
        f"`{study.recipe}`: {recipe.steps} steps of {recipe.batch_size}, "
        + (f"after {', '.join(f'`{name}`' for name in study.start)}, " if study.start else "")
        + (f"seeds {', '.join(map(str, seeds))} (mean ± standard deviation)" if len(seeds) > 1 else f"seed {seeds[0]}")
        + ". Inference only: trained without merging, "
        "merged at inference. Trained: with merging, the same steps. Test samples: all."
    ]
    for row in rows[1:]:
        none, before, after = (
            float(text.split()[0]) for text in (rows[0]["trained %"], row["inference only %"], row["trained %"])
        )
        how = f" ({row['variant']})" if "variant" in row else ""
        found.append(
            f"- r = {row['r']}{how}: {none - before:+.2f} points lost at inference, {none - after:+.2f} when trained "
            f"with merging, {row['training speed-up']} times as fast."
        )
    return found


if __name__ == "__main__":
    main()
