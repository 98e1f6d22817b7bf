"""`tokenmerge train`."""

from __future__ import annotations

import argparse
import json
import os
from contextlib import nullcontext
from pathlib import Path

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `tokenmerge train`."""
    parser.add_argument("recipe", help="a name (`tokenmerge list`) or a file (.toml, .json)")
    text = "change settings of the recipe, as merge.r=13 model.name=vit_small_patch16_224 data.source=folder:PATH"
    parser.add_argument("--set", nargs="+", default=[], action="extend", metavar="KEY=VALUE", dest="changes", help=text)
    parser.add_argument("--out", help="the run's folder: written, and gone on with (runs/RECIPE)")
    text = "start from a saved module that is a pickle, which runs the code it holds"
    parser.add_argument("--trust-pickle", action="store_true", help=text)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (a GPU where there is one)")
    parser.add_argument("--processes", type=int, help="train in so many processes of this machine, by torchrun")
    parser.add_argument("--port", type=int, help="on which these meet (one that is free)")
    parser.set_defaults(left="the last checkpoint is kept, and the same command goes on from it")


def run(arguments: argparse.Namespace) -> int:
    """Train, in this process or in several started by torchrun, and print the last evaluation."""
    from tokenmerge.report.progress import Progress
    from tokenmerge.report.table import show
    from tokenmerge.training.distributed import is_started, launch
    from tokenmerge.training.loop import train
    from tokenmerge.training.recipe import read_recipe

    recipe = read_recipe(arguments.recipe, arguments.changes)
    folder = Path(arguments.out or f"runs/{Path(arguments.recipe).stem}")
    if arguments.processes is not None and not is_started():
        return launch(arguments.given, arguments.processes, arguments.port)
    is_first = os.environ.get("RANK", "0") == "0"
    with Progress("steps") if is_first else nullcontext() as progress:
        rows = train(recipe, folder, device=arguments.device, progress=progress, trust_pickle=arguments.trust_pickle)
    if not is_first:
        return 0
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)] if rows else []
    rows = [{name: row[name] for name in columns} for row in rows]
    if arguments.json:
        print(json.dumps({"folder": str(folder), "rows": rows}, indent=2))
    elif rows:
        show(rows, f"{arguments.recipe}, in {folder}", wide=arguments.wide)
    return 0
