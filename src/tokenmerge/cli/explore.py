"""`tokenmerge explore`."""

from __future__ import annotations

import argparse
import json
import sys

from tokenmerge.cli.models import open_model
from tokenmerge.cli.options import (
    CALIBRATE_HELP,
    METHOD_HELP,
    RESTORE_HELP,
    model_argument,
    preparing_arguments,
    read_r,
)
from tokenmerge.schedule import TEXT_FORMS

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `tokenmerge explore`."""
    model_argument(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="the files of photos")
    parser.add_argument("-r", type=read_r, nargs="+", default=[4, 8, 16], metavar="R", help=f"{TEXT_FORMS} (4 8 16)")
    parser.add_argument("--methods", nargs="+", default=["tome"], metavar="METHOD", help=f"each {METHOD_HELP} (tome)")
    parser.add_argument("-o", "--out", default="explore.html", help="the page to write, a .html (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace an existing page")
    parser.add_argument("--labels", metavar="FILE", help="names of the classes, one a line (those of the model)")
    parser.add_argument("--label", metavar="TEXT", help="what the model is called on the page (MODEL)")
    parser.add_argument("--restore", choices=("dense", "merged"), help=RESTORE_HELP)
    without = "without these, the photos themselves"
    parser.add_argument(
        "--calibrate", metavar="SOURCE", help=CALIBRATE_HELP.replace("without these auto is tome", without)
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (%(default)s)")
    parser.add_argument("--no-pretrained", action="store_true", help="random weights for a name of a host")
    preparing_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the page and print its figures."""
    from tokenmerge.cli.options import calibration_of, preparing
    from tokenmerge.data.labelled import check_source
    from tokenmerge.data.prepare import find_preprocessing
    from tokenmerge.report.progress import Progress
    from tokenmerge.report.table import show
    from tokenmerge.tools.explore import checked_page, explore
    from tokenmerge.tools.models import has_weights, read_method

    out = checked_page(arguments.out, force=arguments.force)
    methods = [read_method(method) for method in arguments.methods]
    if arguments.calibrate is not None:
        check_source(arguments.calibrate, "--calibrate")
    model = open_model(arguments.model, pretrained=not arguments.no_pretrained, trust_pickle=arguments.trust_pickle)
    is_random = arguments.no_pretrained and not has_weights(arguments.model)
    with Progress("photos") as progress:
        found = explore(
            model,
            arguments.images,
            out,
            rs=arguments.r,
            methods=methods,
            labels=arguments.labels,
            preprocessing=find_preprocessing(model, **preparing(arguments)),
            restore=arguments.restore,
            device=arguments.device,
            rounds=arguments.rounds,
            label=arguments.label or arguments.model,
            notes=["Random weights, as asked with --no-pretrained."] if is_random else [],
            force=True,
            progress=progress,
            **calibration_of(arguments, model),
        )
    if arguments.json:
        print(
            json.dumps(
                {"rows": found.rows, "notes": found.notes, "facts": found.facts, "file": str(found.path)}, indent=2
            )
        )
        return 0
    show(found.rows, f"{arguments.model}, {len(arguments.images)} photos", wide=arguments.wide)
    print("\n".join([*found.notes, *found.facts]))
    print(f"Written: {found.path}. Open it in a browser.", file=sys.stderr)
    return 0
