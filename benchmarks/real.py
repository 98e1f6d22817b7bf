"""What merging costs on real weights and real photographs: write `results/real-*.md`.

images     every method that needs no training, "auto" and tune at three shares of the MACs: probe, class means, nearest
           neighbour, cosine, KL
speed      the same rows again: time, over the unmerged model and the free bound (nothing else may run beside it)
ablation   ToMe's Table 1 and Table 2 on this model
front      constant r of tome (or --methods, "auto" too), with time: the table of the README

CLIP's ViT-B/16 from a file (--weights), or a pretrained model of timm (--model NAME); photographs in folders of
CLASS/*.jpg (--photographs DIR..., their classes are put together). Cut off, each part goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ablation import ROWS
from photographs import (
    BATCH,
    Photographs,
    by_means,
    by_neighbour,
    features,
    percent,
    photographs,
    probe,
    relative_error,
    scores,
    tower,
)
from tables import orders, write
from torch import Tensor, nn
from zoo import TABLE_2

import tokenmerge
from tokenmerge import MergeConfig, ToMe
from tokenmerge.data.batches import Batches
from tokenmerge.errors import TokenMergeError
from tokenmerge.measure.outputs import find_device, shared_copy
from tokenmerge.measure.timing import environment
from tokenmerge.measure.trial import Trial
from tokenmerge.methods import Drop, Learned, find
from tokenmerge.report.journal import Journal
from tokenmerge.tools.models import AUTO, apply_method, read_method

SHARES = (0.75, 0.5, 0.35)
CALIBRATION = 64
TUNED = "tune"


class Features:
    """What the unmerged features of the photographs tell, and how merged ones differ."""

    def __init__(self, model: nn.Module, data: Photographs) -> None:
        self.model, self.data = model, data
        self.unmerged = features(model, data.images)
        self.splits = data.splits()
        self.probes = [probe(self.unmerged[fit], data.labels[fit]) for fit, _ in self.splits]
        self.right = self._right(self.unmerged, [self.unmerged] * len(self.splits))

    def _right(self, got: Tensor, fitted: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return which test photographs each way classifies rightly; the ways are fitted on the features `fitted`."""
        labels, right = self.data.labels, {}
        ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"means": by_means, "nearest": by_neighbour}
        for name, way in ways.items():
            parts = zip(self.splits, fitted, strict=True)
            right[name] = torch.cat([way(x[fit], labels[fit], got[test]) == labels[test] for (fit, test), x in parts])
        parts = zip(self.splits, self.probes, strict=True)
        right["probe"] = torch.cat([scores(one, got[test]).argmax(1) == labels[test] for (_, test), one in parts])
        return right

    def figures(self, twin: nn.Module | None = None) -> dict[str, Any]:
        """Return the figures of a patched copy of the model, or of the unmerged model."""
        return self.of(self.unmerged if twin is None else features(twin, self.data.images))

    def of(self, got: Tensor) -> dict[str, Any]:
        """Return the figures of embeddings `[N, C]` of the photographs."""
        right = self._right(got, [self.unmerged] * len(self.splits))
        both = self._right(got, [got] * len(self.splits))
        changed = (right["probe"] != self.right["probe"]).sum().item()
        cosine = nn.functional.cosine_similarity(got, self.unmerged).mean().item()
        logits = [(scores(one, x[test]) for x in (got, self.unmerged)) for one, (_, test) in self._dealt()]
        kl = [
            nn.functional.kl_div(a.log_softmax(1), b.log_softmax(1), log_target=True, reduction="batchmean").item()
            for a, b in logits
        ]
        same = [
            scores(one, got[test]).argmax(1) == scores(one, self.unmerged[test]).argmax(1)
            for one, (_, test) in self._dealt()
        ]
        return {
            "probe %": percent(right["probe"]),
            # of the difference to the unmerged model; the splits test the same photographs, so they count once
            "±": round(100 * (changed / len(self.splits)) ** 0.5 / (len(right["probe"]) / len(self.splits)), 2),
            "means %": percent(right["means"]),
            "nearest %": percent(right["nearest"]),
            "means %, both merged": percent(both["means"]),
            "nearest %, both merged": percent(both["nearest"]),
            "agree %": percent(torch.cat(same)),
            "cosine": round(cosine, 4),
            "error": round(relative_error(got, self.unmerged), 4),
            "KL": round(sum(kl) / len(kl), 4),
        }

    def _dealt(self) -> Iterable[tuple[nn.Module, tuple[Tensor, Tensor]]]:
        return zip(self.probes, self.splits, strict=True)


class Work:
    """The model, the photographs, and a journal of rows for one part."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        dtype = getattr(torch, arguments.dtype)
        self.arguments = arguments
        self.device = find_device(arguments.device)
        self.model = tower(arguments.weights, arguments.model, dtype).to(self.device)
        self.data = photographs(self.model, arguments.photographs, arguments.per_class)
        batch = [(self.data.images[:BATCH], self.data.labels[:BATCH])]
        self.trial = Trial(
            self.model, Batches(batch, int(self.data.labels.max()) + 1), self.device, rounds=arguments.rounds
        )
        self.calibration = self.data.images[:: len(self.data.images) // CALIBRATION][:CALIBRATION].to(
            self.device, dtype
        )
        self._features: Features | None = None
        weights = arguments.weights.name if arguments.weights else arguments.model
        self.about = {**environment(self.device), "weights": weights, "dtype": arguments.dtype}
        self.notes = [
            f"{len(self.data.images)} photographs of {int(self.data.labels.max()) + 1} classes, dealt three ways: half "
            "of each class to fit on, by unmerged features, half to test on. ± is the standard error of the difference "
            f"in probe % to the unmerged model. {CALIBRATION} photographs for auto and tune, without labels."
        ]

    @property
    def features(self) -> Features:
        if self._features is None:
            self._features = Features(self.model, self.data)
        return self._features

    def journal(self, part: str, columns: Sequence[str]) -> Journal:
        """Return the rows of a part that are done."""
        settings = {"photographs": self.data.digest, **{name: self.about[name] for name in ("weights", "dtype")}}
        if self.device.type != "cpu":
            settings["device"] = self.about["device"]
        path = self.arguments.work / f"{part}.json"
        return Journal(path, "measurement", settings, version=1, columns=columns, hint="Give another folder (--work).")

    def place(self, key: str) -> Path:
        """Return the file of a row's configuration."""
        path: Path = self.arguments.work / "configs" / f"{key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, name: str, title: str, rows: list[dict[str, Any]], notes: Sequence[str]) -> None:
        """Write a table; of another device than the CPU beside that of the CPU."""
        name += "" if self.device.type == "cpu" else f"-{self.device.type}"
        write(name, title, rows, self.about, notes)

    def reduced(self, method: str, r: int) -> nn.Module:
        """Return a patched copy of the model."""
        twin = shared_copy(self.model)
        apply_method(twin, method, r=r, calibrate=self.calibration)
        return twin

    def at_share(self, method: str, share: float) -> nn.Module:
        """Return a copy of the model, patched to leave at most a share of the MACs."""
        if method == TUNED:
            found = tokenmerge.tune(self.model, self.calibration, f"macs={share}", batch_size=BATCH, budget=2)
            return self.trial.reduced(found.config)
        r = self.trial.smallest_r(partial(self.reduced, "tome" if method == AUTO else method), share)
        return self.reduced(method, r)


def images(work: Work) -> None:
    """Compare every method at each share of the MACs."""
    names = [n for n in tokenmerge.list_methods() if n != Drop.name and not issubclass(find(n), Learned)]
    names = work.arguments.methods or [*names, AUTO, TUNED]
    journal = work.journal("images", ["method"])
    work.trial.rounds = 1  # of the figures of a trial only the MACs are used
    if "unmerged" not in journal.rows:
        journal.add("unmerged", {"method": "unmerged", "asked": 1.0, "MACs": 1.0, **work.features.figures()})
    for share in work.arguments.shares:
        for name in names:
            key = f"{name}, {share:g}"
            if key in journal.rows:
                continue
            row: dict[str, Any] = {"method": name, "asked": share}
            try:
                twin = work.at_share(name, share)
                row |= {"MACs": work.trial.measure(twin)["MACs share"], **work.features.figures(twin)}
                config = tokenmerge.handle_of(twin).config
                config.save(work.place(key))
                row |= {"chosen": repr(config.method), "r": str(config.r)}
            except TokenMergeError as error:
                row["note"] = " ".join(str(error).split())
            journal.add(key, row)
            print(row, flush=True)
    rows = [{k: v for k, v in row.items() if k != "key"} for row in journal.rows.values()]
    notes = [f"{row['method']} at {row['asked']}: {row['note']}" for row in rows if row.get("note")]
    shown = [row for row in rows if "note" not in row]
    work.write("real-images", "Every method on a real tower, at equal MACs", shown, [*work.notes, *notes])


def speed(work: Work) -> None:
    """Time the rows of `images`."""
    done, journal = work.journal("images", ["method"]), work.journal("speed", ["method"])
    for key, row in done.rows.items():
        if key in journal.rows or "chosen" not in row:
            continue
        found = work.trial.measure(work.trial.reduced(MergeConfig.load(work.place(key))))
        names = ("MACs share", "images/s", "speed-up", "over bound", "tokens")
        journal.add(key, {"method": row["method"], "asked": row["asked"], **{name: found[name] for name in names}})
        print(journal.rows[key], flush=True)
    rows = [
        {**{k: v for k, v in row.items() if k != "key"}, **_quality(done, key)} for key, row in journal.rows.items()
    ]
    work.write("real-speed", "Time of every method on a real tower", rows, [*work.notes, f"Batch {BATCH}."])


def _quality(done: Journal, key: str) -> dict[str, Any]:
    return {name: done.rows[key][name] for name in ("probe %", "cosine")}


def ablation(work: Work) -> None:
    """Repeat the paper's Table 1 and Table 2."""
    journal = work.journal("ablation", ["method"])
    r = work.arguments.r
    configs = {
        (part, choice): (MergeConfig(ToMe(**options), r=r, prop_attn=prop), paper)
        for part, choice, options, prop, paper in ROWS
    }
    configs |= {("matching", choice): (MergeConfig(read_method(name), r=r), paper) for choice, name, paper in TABLE_2}
    rows = []
    for (part, choice), (config, paper) in configs.items():
        key = repr(config)
        if key not in journal.rows:
            journal.add(key, {"method": repr(config.method), **work.features.figures(work.trial.reduced(config))})
            print(part, choice, journal.rows[key], flush=True)
        found = journal.rows[key]
        figures = {"top-1 %": found["probe %"], "agreement %": found["agree %"], "cosine": found["cosine"]}
        rows.append({"part": part, "choice": choice, **figures, "KL": found["KL"], "paper top-1 %": paper})
    title = f"ToMe's Tables 1 and 2 on a real tower, r = {r}"
    work.write("real-ablation", title, rows, [*work.notes, *orders(rows, len(work.data.images) // 2)])


def front(work: Work) -> None:
    """Tell accuracy and time of constant r, with tome or the methods that are asked for."""
    journal = work.journal("front", ["method"])
    names = ("MACs share", "images/s", "speed-up", "over bound", "tokens")
    methods = work.arguments.methods or ["tome"]
    for name, r in [("unmerged", 0), *((name, r) for r in (8, 13, 16) for name in methods)]:
        key = f"{name}, {r}"
        if key not in journal.rows:
            twin = work.reduced("tome" if name == "unmerged" else name, r)
            found = work.trial.measure(twin)
            figures = work.features.figures(twin)
            journal.add(key, {"method": name, "r": r, **{name: found[name] for name in names}, **figures})
            print(journal.rows[key], flush=True)
    rows = [{k: v for k, v in row.items() if k != "key"} for row in journal.rows.values()]
    work.write("real-front", "Merging on a real tower", rows, [*work.notes, f"Times at batch {BATCH}."])


PARTS: dict[str, Callable[[Work], None]] = {"images": images, "speed": speed, "ablation": ablation, "front": front}


def reader(about: str | None, parts: Iterable[str]) -> argparse.ArgumentParser:
    """Return what reads the command line: a part, the weights, the photographs."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(parts))
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--weights", type=Path, help="CLIP ViT-B/16's image tower, .safetensors")
    weights.add_argument("--model", help="a pretrained model of timm, instead of --weights")
    parser.add_argument("--photographs", type=Path, nargs="+", required=True, help="folders of CLASS/*.jpg")
    parser.add_argument("--per-class", type=int, help="photographs of each class (all)")
    parser.add_argument("--dtype", default="float32", help="of the model (%(default)s)")
    parser.add_argument("--device", default="cpu", help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/real"), help="where unfinished rows lie (%(default)s)")
    return parser


def start(parser: argparse.ArgumentParser, parts: Mapping[str, Callable[[Work], None]]) -> None:
    """Run the part that the command line names."""
    arguments = parser.parse_args()
    try:
        parts[arguments.part](Work(arguments))
    except TokenMergeError as error:
        sys.exit(f"{parser.prog}: {error}")


def main() -> None:
    """Run one of the parts."""
    parser = reader(__doc__, PARTS)
    parser.add_argument("--methods", nargs="+", help="images, front: only these")
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES), help="of the MACs (%(default)s)")
    parser.add_argument("-r", type=int, default=16, help="of the ablation (%(default)s)")
    start(parser, PARTS)


if __name__ == "__main__":
    main()
