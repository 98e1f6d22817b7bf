"""What `tune` finds and what that is worth on other images: write `results/tune-*.md` and every candidate.

small    the bundled model and two others, three shares of the MACs, three seeds; beside "auto" and constant r of tome
clip     the same on a CLIP tower (a file of weights for timm) and photographs in class folders, with a linear probe
speed    targets of speed on two models, measured again in fresh processes
drop     drop=0.5 with ten seeds: the accuracy lost on the images of the report
killed   a search that is killed five times and goes on, beside one that is not
cost     what a search takes: the seconds foretold and seen, those of a second target, and the peak of the memory
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from auto import SHARES, SIZE, answers, divergence, load
from photographs import features, percent, photographs, probe, relative_error, scores, tower
from tables import RESULTS, write
from torch import Tensor, nn

import tokenmerge
from tokenmerge import assets
from tokenmerge.data.labelled import normalise
from tokenmerge.measure.outputs import shared_copy
from tokenmerge.measure.timing import environment
from tokenmerge.report.journal import Journal
from tokenmerge.report.table import as_csv

MODELS = ("reference", "pooled", "registers")
HERE = Path(__file__).parent
OLDER = HERE / "models" / "auto-0.5.0.json"  # what "auto" of 0.5.0 chose on 64 training images


def main() -> None:
    """Run one of the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("small", "clip", "speed", "drop", "killed", "cost"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, help="to tune on (512; drop: 1500, because fewer prove nothing)")
    parser.add_argument("--limit", type=int, default=10_000, help="images to report on (%(default)s)")
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--journals", type=Path, help="folder of journals: one search for all shares, resumable")
    parser.add_argument("--weights", type=Path, help="clip: the tower's weights, .safetensors")
    parser.add_argument("--dtype", default="float32", help="clip: of the tower, searched and measured (%(default)s)")
    parser.add_argument("--photographs", type=Path, help="clip: a folder with train/CLASS/x.jpg and val/CLASS/x.jpg")
    arguments = parser.parse_args()
    arguments.images = arguments.images or (1500 if arguments.part == "drop" else 512)
    with tempfile.TemporaryDirectory() as folder:
        arguments.journals = arguments.journals or Path(folder)
        arguments.journals.mkdir(parents=True, exist_ok=True)
        _PARTS[arguments.part](arguments)


def small(arguments: argparse.Namespace) -> None:
    """Tune on training images, report the KL divergence on test images."""
    whole, _ = assets.fashion_mnist("train")
    images, labels = (part[: arguments.limit] for part in assets.fashion_mnist("test"))
    notes = [
        f"Tuned on {arguments.images} training images without labels, budget {arguments.budget}, measured on "
        f"{len(images)} test images. auto 0.5.0: what that release chose on 64 training images; tome: constant r."
    ]
    older = {(row["model"], row["MACs"]): row["config"] for row in json.loads(OLDER.read_text())}
    rows, tried = [], []
    for name in MODELS:
        model = load(name)
        unmerged = answers(model, images)
        for share in arguments.shares:
            constant = _constant(model, SIZE, share)
            plain = _small_figures(model, constant, images, labels, unmerged)
            found = older[name, share]
            old = _small_figures(model, tokenmerge.MergeConfig(found["method"], r=found["r"]), images, labels, unmerged)
            auto = shared_copy(model)
            handle = tokenmerge.patch(auto, "auto", r=constant.r, calibrate=normalise(whole[:64]))
            chosen = _small_figures(model, handle.config, images, labels, unmerged)
            for seed in range(arguments.seeds):
                part = normalise(whole[seed * arguments.images : (seed + 1) * arguments.images])
                journal = arguments.journals / f"{name}-{seed}.json"
                start = time.perf_counter()
                found = tokenmerge.tune(
                    model, part, f"macs={share}", seed=seed, budget=arguments.budget, journal=journal
                )
                seconds = time.perf_counter() - start
                tuned = _small_figures(model, found.config, images, labels, unmerged)
                rows.append(
                    {
                        "model": name,
                        "MACs": share,
                        "seed": seed,
                        **{f"KL {key}": f"{one['KL']:.3g}" for key, one in _named(plain, old, chosen, tuned)},
                        "tuned / tome": round(tuned["KL"] / plain["KL"], 3),
                        "tuned / auto 0.5.0": round(tuned["KL"] / old["KL"], 3),
                        **{f"top-1 % {key}": one["top-1 %"] for key, one in _named(plain, old, chosen, tuned)},
                        "seconds": round(seconds),
                        "method": repr(found.config.method),
                        "r": str(found.config.r),
                    }
                )
                tried += [{"model": name, "MACs": share, "seed": seed, **row} for row in found.tried.rows]
                print(rows[-1], flush=True)
                _write("tune-small", "What tune finds on small models, beside auto and tome", rows, tried, notes)


def _named(*figures: Any) -> Iterator[tuple[str, Any]]:
    return zip(("tome", "auto 0.5.0", "auto", "tuned"), figures, strict=True)


def _small_figures(
    model: nn.Module, config: tokenmerge.MergeConfig, images: Tensor, labels: Tensor, unmerged: Tensor
) -> dict[str, Any]:
    twin = shared_copy(model)
    tokenmerge.patch(twin, config)
    got = answers(twin, images)
    return {
        "KL": divergence(got, unmerged),
        "top-1 %": round(100 * (got.argmax(1) == labels).float().mean().item(), 2),
    }


def _constant(model: nn.Module, size: Sequence[int], share: float) -> tokenmerge.MergeConfig:
    """Return tome with the smallest constant r that leaves at most a share of the MACs."""
    whole, twin = tokenmerge.flops(model, size), shared_copy(model)
    handle, r = tokenmerge.patch(twin, r=0), 0
    while tokenmerge.flops(twin, size) > share * whole:
        r += 1
        handle.r = r
    return tokenmerge.MergeConfig("tome", r=r)


def clip(arguments: argparse.Namespace) -> None:
    """Tune on photographs, report the feature error and a linear probe on others."""
    dtype = getattr(torch, arguments.dtype)
    model = tower(arguments.weights, dtype=dtype)
    train, val = (photographs(model, [arguments.photographs / split]) for split in ("train", "val"))
    unmerged = features(model, val.images)
    probes = [probe(features(model, train.images[half::2]), train.labels[half::2]) for half in (0, 1)]

    def figures(config: tokenmerge.MergeConfig | None) -> dict[str, float]:
        twin = shared_copy(model)
        if config is not None:
            tokenmerge.patch(twin, config)
        got = features(twin, val.images)
        right = torch.stack([scores(one, got).argmax(1) == val.labels for one in probes])
        same = torch.stack([scores(one, got).argmax(1) == scores(one, unmerged).argmax(1) for one in probes])
        return {"error": relative_error(got, unmerged), "probe %": percent(right), "agree %": percent(same)}

    plain = figures(None)
    rows, tried = [], []
    notes = [
        f"CLIP ViT-B/16, 8-bit weights, {arguments.dtype}. Tuned on {arguments.images} photographs without labels, "
        f"budget {arguments.budget}; error (squared, relative) and the mean of two linear probes, fitted on unmerged "
        f"features of {len(train.images) // 2} photographs each, on {len(val.images)} others. agree: photographs of "
        "which a probe says what it says unmerged. kept: of the accuracy that tome loses."
    ]
    tome = {}
    for share in arguments.shares:
        tome[share] = figures(_constant(model, (3, 224, 224), share))
    for seed in range(arguments.seeds):
        order = torch.randperm(len(train.images), generator=torch.Generator().manual_seed(seed))[: arguments.images]
        journal = arguments.journals / f"clip-{seed}.json"
        for share, constant in tome.items():
            foretold: list[float] = []
            start = time.perf_counter()
            found = tokenmerge.tune(
                model,
                train.images[order].to(dtype),
                f"macs={share}",
                seed=seed,
                budget=arguments.budget,
                batch_size=16,
                journal=journal,
                expect=foretold.append,
            )
            seconds = time.perf_counter() - start
            tuned = figures(found.config)
            lost = plain["probe %"] - constant["probe %"]
            rows.append(
                {
                    "MACs": share,
                    "seed": seed,
                    "error of tome": round(constant["error"], 4),
                    "error tuned": round(tuned["error"], 4),
                    "tuned / tome": round(tuned["error"] / constant["error"], 3),
                    "probe % unmerged": plain["probe %"],
                    "probe % tome": constant["probe %"],
                    "probe % tuned": tuned["probe %"],
                    "kept %": round(100 * (tuned["probe %"] - constant["probe %"]) / lost) if lost > 0 else None,
                    "agree % tome": constant["agree %"],
                    "agree % tuned": tuned["agree %"],
                    "foretold s": round(foretold[0]),
                    "seconds": round(seconds),
                    "method": repr(found.config.method),
                    "r": str(found.config.r),
                }
            )
            tried += [{"MACs": share, "seed": seed, **row} for row in found.tried.rows]
            print(rows[-1], flush=True)
            _write("tune-clip", "What tune finds on a CLIP tower, beside constant r of tome", rows, tried, notes)


_AGAIN = """
import sys, torch, tokenmerge
sys.path.insert(0, {here!r})
from auto import load
from tokenmerge.measure.outputs import shared_copy
from tokenmerge.measure.timing import interleave
model = load({name!r})
merged = shared_copy(model)
tokenmerge.patch(merged, {config!r})
x = torch.randn(32, 1, 28, 28)
timed = interleave({{"unmerged": lambda: model(x), "merged": lambda: merged(x)}}, torch.device("cpu"), rounds=30)
print(timed["unmerged"].over(timed["merged"]))
"""


def speed(arguments: argparse.Namespace) -> None:
    """Tune for five speeds on two models, and measure each again in a fresh process."""
    images = normalise(assets.fashion_mnist("train")[0][: arguments.images])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("reference", "registers"):
            for target in ("1.25x", "1.5x", "1.75x", "2x", "2.5x"):
                journal = Path(folder, f"{name}.json")
                found = tokenmerge.tune(load(name), images, target, budget=1, journal=journal)
                config = Path(folder, "merge.json")
                found.config.save(config)
                code = _AGAIN.format(here=str(HERE), name=name, config=str(config))
                again = float(
                    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
                )
                figures = found.figures
                row = {"model": name, "target": target, "reached": found.reached, "tuned": figures["speed-up"]}
                short = round(100 * (again / float(target[:-1]) - 1), 1)
                rows.append(
                    {**row, "fresh process": round(again, 3), "above target %": short, "r": str(found.config.r)}
                )
                print(rows[-1], flush=True)
    _write("tune-speed", "Targets of speed, measured again in a fresh process", rows, [], ["Batch 32."])


def drop(arguments: argparse.Namespace) -> None:
    """Ask for at most half a point lost, with ten seeds, and look at the images of the report."""
    images, labels = (part[: arguments.images] for part in assets.fashion_mnist("train"))
    model = load("reference")
    settings = {"images": arguments.images, "tokenmerge": tokenmerge.__version__}
    path = arguments.journals / "drop.json"
    journal = Journal(path, "seed", settings, version=1, columns=["seed"], hint="Give another folder (--journals).")
    for seed in range(10):
        if str(seed) in journal.rows:
            continue
        found = tokenmerge.tune(
            model, normalise(images), "drop=0.5", labels=labels.long(), seed=seed, budget=1, methods=("least_loss",)
        )
        lost = round(found.figures["unmerged top-1 %"] - found.figures["top-1 %"], 2)
        figures = {name: found.figures[name] for name in ("images", "MACs share", "speed-up", "agreement %")}
        row = {"seed": seed, "points lost": lost, "holds": lost <= 0.5, **figures, "reached": found.reached}
        journal.add(str(seed), row)
        print(row, flush=True)
    rows = [{name: value for name, value in row.items() if name != "key"} for row in journal.rows.values()]
    notes = [f"{sum(row['holds'] for row in rows)} of {len(rows)} seeds hold on images that nothing was chosen by."]
    _write("tune-drop", "drop=0.5 on the bundled model", rows, [], notes)


def killed(arguments: argparse.Namespace) -> None:
    """Kill the command at five random moments, let it go on, and compare with one that was left alone."""
    command = [sys.executable, "-m", "tokenmerge.cli", "tune", "reference", "--data", "fashion-mnist"]
    command += ["--target", "macs=0.5", "--limit", str(arguments.images), "--budget", str(arguments.budget)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([*command, "-o", f"{folder}/whole.json"], check=True, capture_output=True)
        whole, random_moment = time.perf_counter() - start, random.Random(0)
        for number in range(5):
            seconds = random_moment.uniform(0.1, 0.3) * whole
            process = subprocess.Popen(
                [*command, "-o", f"{folder}/killed.json"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            time.sleep(seconds)
            is_running = process.poll() is None
            process.kill()
            process.wait()
            journal = Path(folder, "killed.journal.json")
            kept = len(json.loads(journal.read_text())["rows"]) if journal.exists() else 0
            rows.append(
                {"kill": number + 1, "after s": round(seconds, 1), "was running": is_running, "rows kept": kept}
            )
        subprocess.run([*command, "-o", f"{folder}/killed.json", "--force"], check=True, capture_output=True)
        one, other = (tokenmerge.MergeConfig.load(f"{folder}/{name}.json") for name in ("whole", "killed"))
    notes = [f"{'The same configuration' if one == other else 'ANOTHER CONFIGURATION'} as undisturbed: {other!r}."]
    _write("tune-killed", "A search that is killed, beside one that is not", rows, [], notes)


_COST = """
import json, resource, sys, time, torch, tokenmerge
sys.path.insert(0, {here!r})
from tune import costed
model, images, batch = costed({name!r}, {count})
figures, start = {{}}, time.perf_counter()
def expect(seconds):
    figures.update({{"foretold s": round(seconds), "foretold after s": round(time.perf_counter() - start, 1)}})
if {is_tuned}:
    asked = (("seconds", "macs=0.5", {budget}), ("second target solved s", "macs=0.7", 1),
             ("and searched s", "macs=0.7", {budget}))
    for part, target, budget in asked:
        start = time.perf_counter()
        tokenmerge.tune(model, images, target, batch_size=batch, budget=budget, journal={journal!r},
                        expect=expect if part == "seconds" else None)
        figures[part] = round(time.perf_counter() - start, 1)
else:
    with torch.inference_mode():
        for part in images.split(batch):
            model(part)
print(json.dumps({{**figures, "MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}}))
"""


def costed(name: str, count: int) -> tuple[nn.Module, Tensor, int]:
    """Return a model, images for it and a batch size; random weights and images of noise where it is a ViT-B/16."""
    if name in MODELS:
        return load(name), normalise(assets.fashion_mnist("train")[0][:count]), 32
    import timm

    return timm.create_model(name, pretrained=False).eval(), torch.randn(64, 3, 224, 224), 16


def cost(arguments: argparse.Namespace) -> None:
    """Tune two models in fresh processes, and run them plainly in others."""
    rows = []
    for name in ("reference", "vit_base_patch16_224"):
        figures = {}
        for is_tuned in (False, True):
            code = _COST.format(
                here=str(HERE),
                name=name,
                count=arguments.images,
                is_tuned=is_tuned,
                budget=arguments.budget,
                journal=str(arguments.journals / f"cost-{name}.json"),
            )
            seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
            figures[is_tuned] = json.loads(seen)
        tuned, plain = figures[True], figures[False]["MiB"]
        ratios = {
            "seconds / foretold": round(tuned["seconds"] / tuned["foretold s"], 2),
            "MiB plain": plain,
            "MiB over plain": round(tuned["MiB"] / plain, 3),
        }
        rows.append({"model": name, "images": arguments.images if name in MODELS else 64, **tuned, **ratios})
        print(rows[-1], flush=True)
    notes = [
        f"macs=0.5, then macs=0.7 from the same journal, solved from what the first target measured (budget 1), then "
        f"searched on, budget {arguments.budget}, in a fresh process. MiB: the peak "
        "of resident memory; plain: of one that runs the unmerged model over the images. Batches of 32 and 16."
    ]
    _write("tune-cost", "What a search takes", rows, [], notes)


def _write(name: str, title: str, rows: list[dict[str, Any]], tried: list[dict[str, Any]], notes: list[str]) -> None:
    about = environment(torch.device("cpu"))
    ratio = [row["tuned / tome"] for row in rows if "tuned / tome" in row]
    if len(ratio) > 1:
        notes = [*notes, f"tuned / tome: mean {statistics.mean(ratio):.3f}, largest {max(ratio):.3f}."]
    write(name, title, rows, about, notes)
    if tried:
        (RESULTS / f"{name}-tried.csv").write_text(as_csv(tried))


_PARTS = {"small": small, "clip": clip, "speed": speed, "drop": drop, "killed": killed, "cost": cost}

if __name__ == "__main__":
    main()
