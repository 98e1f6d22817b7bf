"""`tokenmerge vlm`."""

from __future__ import annotations

import argparse
import json

from tokenmerge.cli.options import read_r
from tokenmerge.errors import ConfigError
from tokenmerge.schedule import TEXT_FORMS

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `tokenmerge vlm`."""
    parser.add_argument("model", help="a folder that save_pretrained wrote, or a repository: llava-hf/llava-1.5-7b-hf")
    parser.add_argument("--image", nargs="+", required=True, metavar="FILE", help="the images, in order")
    parser.add_argument("--prompt", required=True, help="the question about them")
    text = "shares of the visual tokens, 1 is all of them; with --count how many of each image"
    parser.add_argument("--keep", type=float, nargs="+", default=[1.0, 0.5, 0.25], metavar="KEEP", help=text)
    parser.add_argument("--count", action="store_true", help="read --keep as numbers of tokens")
    parser.add_argument("-m", "--method", default="divprune", help="how they are chosen (%(default)s)")
    parser.add_argument("-r", type=read_r, default=0, help=f"also merge in the vision tower; {TEXT_FORMS}")
    parser.add_argument("--new-tokens", type=int, default=64, help="how long the answer may be (%(default)s)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16 (that of the weights)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds per row (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Ask with every `--keep` and print answers, tokens and times side by side."""
    from tokenmerge.report.progress import Progress
    from tokenmerge.report.table import show
    from tokenmerge.vlm.ask import ask, load_vlm

    keep = _read_keep(arguments.keep, arguments.count)
    model, processor = load_vlm(arguments.model, device=arguments.device, dtype=arguments.dtype)
    with Progress("rounds") as progress:
        rows = ask(
            model,
            processor,
            arguments.image,
            arguments.prompt,
            keep=keep,
            method=arguments.method,
            r=arguments.r,
            new_tokens=arguments.new_tokens,
            rounds=arguments.rounds,
            progress=progress,
        )
    if arguments.json:
        print(json.dumps({"rows": rows}, indent=2))
    else:
        numbers = [{name: value for name, value in row.items() if name != "answer"} for row in rows]
        show(numbers, f"{arguments.model}, {arguments.method}", wide=arguments.wide)
        for row in rows:
            print(f"\nkeep {row['keep']}: {row['answer'] or '(an empty answer)'}")
    return 0


def _read_keep(values: list[float], are_counts: bool) -> list[float | int]:
    """Return the values of --keep; raises `ConfigError` before a model is loaded."""
    for value in values:
        if are_counts and not (value.is_integer() and value >= 1):
            raise ConfigError(
                f"--keep is {value:g}, and --count reads numbers of tokens. Give whole ones of at least 1."
            )
        if not are_counts and not 0 < value <= 1:
            raise ConfigError(
                f"--keep is {value:g}. Give a share of the visual tokens, above 0 and up to 1, or numbers of tokens "
                "with --count."
            )
    return [int(value) for value in values] if are_counts else list(values)
