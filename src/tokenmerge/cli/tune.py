"""`tokenmerge tune`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from tokenmerge.cli.models import open_model
from tokenmerge.cli.options import data_arguments, model_argument, preparing

__all__ = ["add", "run"]

_IMAGES = 512
_TARGET_HELP = (
    "one or more of 2x (times as fast here), 12ms (for a batch of BATCH_SIZE), macs=0.5 (the share left), memory=0.7 "
    "(the share left), drop=0.5 (points of accuracy that may be lost, needs labels), agreement=99 (percent of answers "
    "that stay); several with spaces between, each of another kind (2x)"
)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `tokenmerge tune`."""
    model_argument(parser)
    data_arguments(parser, f"{_IMAGES}, or twice what a drop or an agreement needs")
    parser.add_argument("--target", nargs="+", default=["2x"], metavar="TARGET", help=_TARGET_HELP)
    parser.add_argument(
        "-o",
        "--out",
        default="merge.json",
        help="the configuration to write, a .json; pages go beside it (%(default)s)",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace an existing configuration, and the pages beside it"
    )
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="where the search starts (least_loss)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (that of the model)")
    parser.add_argument("--compile", action="store_true", help="time the model under torch.compile")
    parser.add_argument(
        "--budget",
        type=int,
        default=64,
        help="candidates to try for the target; more find better ones, in more time (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="deals the images (%(default)s)")
    journal = "keeps what was measured: the same command goes on from it, another target starts from it"
    parser.add_argument("--journal", help=f"{journal} (OUT with .journal.json)")
    parser.set_defaults(
        left="what was measured is kept in the journal, and the same command goes on from it",
    )


def run(arguments: argparse.Namespace) -> int:
    """Tune, print the report and the front, write the configuration and its pages; 1 where a target is missed."""
    from tokenmerge.data.labelled import check_source, sample_data
    from tokenmerge.report.progress import Progress
    from tokenmerge.tuning.losses import least_images
    from tokenmerge.tuning.target import read_targets
    from tokenmerge.tuning.tune import tune

    targets = read_targets(arguments.target)
    out = _checked_out(Path(arguments.out), arguments.force)
    check_source(arguments.data)
    model = open_model(arguments.model, pretrained=not arguments.no_pretrained, trust_pickle=arguments.trust_pickle)
    needed = max((least_images(target.points) for target in targets if not target.is_cost), default=0)
    limit = max(_IMAGES, 0 if needed == math.inf else 2 * int(needed)) if arguments.limit is None else arguments.limit
    options = {"batch_size": arguments.batch_size, "workers": arguments.workers, "limit": limit}
    data = sample_data(arguments.data, model, **options, **preparing(arguments))

    journal = Path(arguments.journal or out.with_suffix(".journal.json"))
    known = f", less what {journal} holds" if journal.exists() else ""

    def expect(seconds: float) -> None:
        text = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(1.0, seconds):.0f} s"
        print(f"This will take about {text}{known}.", file=sys.stderr, flush=True)

    more = {} if arguments.methods is None else {"methods": arguments.methods}
    with Progress("images") as progress:
        found = tune(
            model,
            data,
            targets,
            device=arguments.device,
            dtype=arguments.dtype,
            batch_size=arguments.batch_size,
            compile=arguments.compile,
            budget=arguments.budget,
            seed=arguments.seed,
            journal=journal,
            progress=progress,
            expect=expect,
            **more,
        )
    _show(found, [str(path) for path in found.save(out)], arguments)
    return 0 if found.reached else 1


def _show(found: Any, written: list[str], arguments: argparse.Namespace) -> None:
    from tokenmerge.report.table import show

    if arguments.json:
        content = {name: getattr(found, name) for name in ("report", "reached", "figures", "remarks")}
        print(json.dumps({**content, "front": found.front.rows, "files": written}, indent=2))
        return
    front = found.front.rows
    names = [name for name in front[0] if any(row[name] is not None for row in front)]
    if not arguments.wide:  # what each row is must fit beside its figures; the files have the rest
        less = ("method", "r", "tokens", "speed-up", *(("agreement %",) if "top-1 %" in names else ()))
        names = [name for name in names if name not in less]
    show([{name: row[name] for name in names} for row in front], found.report, wide=arguments.wide)
    chosen = f"Chosen: {found.config}"
    print("\n".join(["", chosen, *found.remarks, f"Written: {', '.join(written)}"]))


def _checked_out(out: Path, is_forced: bool) -> Path:
    from tokenmerge.errors import DataError
    from tokenmerge.report.table import check_writable
    from tokenmerge.tuning.result import beside

    check_writable(out, (".json",))
    for path in (out, *beside(out)):
        if path.exists() and not is_forced:
            raise DataError(f"{path} exists already: give another name (-o), or --force to replace it.")
        check_writable(path, (path.suffix,))
    return out
