"""`tokenmerge viz`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from tokenmerge.cli.models import open_model
from tokenmerge.cli.options import (
    MODEL_HELP,
    TRUST_HELP,
    method_arguments,
    preparing_arguments,
    read_r,
)
from tokenmerge.schedule import TEXT_FORMS

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `tokenmerge viz`."""
    parser.add_argument("sources", nargs="+", metavar="FILE", help="photos, videos (.mp4, ...) and sounds (.wav)")
    parser.add_argument("-m", "--model", required=True, help=MODEL_HELP)
    parser.add_argument("--trust-pickle", action="store_true", help=TRUST_HELP)
    parser.add_argument("-r", type=read_r, metavar="R", help=f"{TEXT_FORMS} (that of a saved method, else 16)")
    method_arguments(parser)
    text = "after which blocks: 1 is the first, -1 the last, several, or all (%(default)s)"
    parser.add_argument("--block", nargs="+", default=["-1"], metavar="N", help=text)
    text = "groups, size, similarity, attention, or several; of videos and sounds groups alone (groups)"
    parser.add_argument("--show", nargs="+", default=["groups"], metavar="WHAT", help=text)
    parser.add_argument("--cut", action="store_true", help="leave out what the model is not given of a photo")
    parser.add_argument("-o", "--out", default="tokenmerge-viz", help="the folder to write (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    text = "frames of a video that a model of images is given (%(default)s)"
    parser.add_argument("--frames", type=int, default=32, metavar="N", help=text)
    parser.add_argument("--video", default="mp4", metavar="FORM", help="mp4 or gif (%(default)s)")
    parser.add_argument("--no-pretrained", action="store_true", help="random weights for a name of a host")
    preparing_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Draw, and print what was written."""
    from tokenmerge.cli.options import calibration_of, method_of, preparing
    from tokenmerge.report.progress import Progress
    from tokenmerge.report.table import show
    from tokenmerge.tools.models import has_weights
    from tokenmerge.tools.viz import checked_folder, viz

    folder, block = checked_folder(arguments.out), _blocks(arguments.block)
    method, _ = method_of(arguments)
    model = open_model(arguments.model, pretrained=not arguments.no_pretrained, trust_pickle=arguments.trust_pickle)
    is_random = arguments.no_pretrained and not has_weights(arguments.model)
    with Progress("files") as progress:
        found = viz(
            model,
            arguments.sources,
            folder,
            r=arguments.r,
            method=method,
            block=block,
            shows=arguments.show,
            cut=arguments.cut,
            preprocessing=preparing(arguments),
            restore=arguments.restore,
            device=arguments.device,
            frames=arguments.frames,
            video=arguments.video,
            notes=["Random weights, as asked with --no-pretrained."] if is_random else [],
            force=arguments.force,
            progress=progress,
            **calibration_of(arguments, model),
        )
    if arguments.json:
        content = {"rows": found.rows, "notes": found.notes, "facts": found.facts, "files": found.files}
        print(json.dumps({**content, "folder": str(found.folder)}, indent=2))
        return 0
    count = len(arguments.sources)
    show(found.rows, f"{arguments.model}: what merges in {count} file{'s' * (count != 1)}", wide=arguments.wide)
    print("\n".join([*found.notes, *found.facts]))
    print(f"Written to {found.folder}: {', '.join(found.files)}", file=sys.stderr)
    return 0


def _blocks(words: list[str]) -> Any:
    """Return the numbers of blocks from 0, or "all"; raises `DataError`."""
    from tokenmerge.errors import DataError

    if words == ["all"]:
        return "all"
    try:
        found = [int(word) for word in words]
    except ValueError as error:
        raise DataError(f"--block takes numbers, or all; got {' '.join(words)}.") from error
    if 0 in found:
        raise DataError("--block counts from 1: block 1 is the first, -1 the last. Before it there is the photo.")
    return [number - (number > 0) for number in found]
