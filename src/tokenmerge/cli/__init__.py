"""The `tokenmerge` command: one sub-command per tool, which turns arguments into function calls."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenmerge import __version__, describe, handle_of, list_methods
from tokenmerge.cli import bench, embed, explore, retrieval, train, tune, viz, vlm
from tokenmerge.cli.completion import SHELLS, PrintCompletion
from tokenmerge.cli.examples import epilog
from tokenmerge.cli.exits import ended
from tokenmerge.cli.models import open_model, unapplied
from tokenmerge.cli.options import (
    CALIBRATE_HELP,
    METHOD_HELP,
    RESTORE_HELP,
    calibration_of,
    data_arguments,
    method_arguments,
    method_of,
    model_and_data,
    model_argument,
    model_arguments,
    preparation_of,
    preparing_arguments,
    read_r,
    said_of,
)
from tokenmerge.cli.printing import OUT_HELP, check_out, print_table
from tokenmerge.cli.quiet import quiet
from tokenmerge.schedule import TEXT_FORMS

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit code; see `ended`."""
    # silences kineto's start-up messages on stderr; torch reads it on import
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = argparse.Namespace(given=given)  # arguments that `train` passes on to its processes

    def run() -> int:
        _parser().parse_args(given, arguments)
        with quiet(arguments.quiet), unapplied(arguments):
            return int(arguments.run(arguments))

    return ended(run, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenmerge", description="Make vision transformers faster by merging similar tokens, and see what it did."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    text = f"write a script for Tab completion: {', '.join(SHELLS)}"
    parser.add_argument("--print-completion", action=PrintCompletion, metavar="SHELL", help=text)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = _command(commands, "demo", _demo, "the bundled model on the bundled images, for several r")
    demo.add_argument(
        "--out", default="tokenmerge-demo", help="folder for tables, plot, pictures and two pages (%(default)s)"
    )
    demo.add_argument("--limit", type=int, help="use only the first LIMIT of the 10,000 images")
    demo.add_argument("-b", "--batch-size", type=int, default=32, help="%(default)s is fastest unmerged on a CPU")
    demo.add_argument("-r", type=read_r, nargs="+", default=[0, 4, 8, 12, 16], metavar="R", help=TEXT_FORMS)

    bench.add(_command(commands, "bench", bench.run, "time a model merged, unmerged and at the free bound"))
    evaluate = _command(commands, "eval", _evaluate, "accuracy and speed over labelled images, several r in one pass")
    model_arguments(evaluate)
    data_arguments(evaluate)
    evaluate.add_argument("--bound", action="store_true", help="time the free bound of each r beside it")
    retrieval.add(evaluate)
    evaluate.add_argument("--out", nargs="+", metavar="FILE", help=OUT_HELP)
    _compare_parser(commands)
    _doctor_parser(commands)
    _export_parser(commands)
    tune.add(_command(commands, "tune", tune.run, "say what you want, get the configuration; resumes if interrupted"))
    embed.add(
        _command(commands, "embed", embed.run, "embed or classify a million images into Parquet; goes on if killed")
    )
    text = "what merges in photos, and what it buys: one HTML file to open, to click through and to send"
    explore.add(_command(commands, "explore", explore.run, text))
    text = "pictures of what merges in photos, videos and sounds, written into a folder"
    viz.add(_command(commands, "viz", viz.run, text))
    train.add(_command(commands, "train", train.run, "fine-tune with merging by a recipe; resumes if interrupted"))
    vlm.add(_command(commands, "vlm", vlm.run, "ask a vision-language model with fewer visual tokens, side by side"))
    _command(commands, "list", _list, "the methods, the model families and the recipes")
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=epilog(name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print JSON to stdout")
    parser.add_argument("-q", "--quiet", action="store_true", help="print no progress and no notes to stderr")
    if name not in ("doctor", "embed", "export", "list"):
        parser.add_argument("--wide", action="store_true", help="print every column, not six at most")
    if name not in ("export", "list", "train"):
        default, text = ("auto", "auto, ") if name == "embed" else ("cpu", "")
        parser.add_argument("--device", default=default, help=f"{text}cpu, cuda, cuda:1, mps (%(default)s)")
    return parser


def _doctor_parser(commands: Any) -> None:
    doctor = _command(
        commands,
        "doctor",
        _doctor,
        "check a model: is it supported, are the results exact, is it faster, what is limited",
    )
    model_argument(doctor)
    doctor.add_argument("-r", type=read_r, help=f"{TEXT_FORMS} (8)")
    doctor.add_argument("--config", metavar="FILE", help="a saved configuration: does it fit, is it as fast as it says")
    doctor.add_argument("-b", "--batch-size", type=int, default=2)
    doctor.add_argument("--restore", choices=("dense", "merged"), help=RESTORE_HELP)
    preparing_arguments(doctor)


def _export_parser(commands: Any) -> None:
    export = _command(commands, "export", _export, "write a merged model for another engine, checked in that engine")
    model_argument(export)
    export.add_argument("-r", type=read_r, help=f"{TEXT_FORMS} (that of a saved method, else 8)")
    export.add_argument("--to", required=True, help="onnx, openvino or torch-export")
    export.add_argument("--out", help="the file to write (the model's name, in this folder)")
    method_arguments(export)
    export.add_argument("--input-size", type=int, nargs=3, metavar=("C", "H", "W"))
    export.add_argument("-b", "--batch", type=int, help="the only batch size the file takes (without it: any)")
    export.add_argument("--matmul", action="store_true", help="merge by products, for engines that get scatter wrong")
    export.add_argument("--opset", type=int, help="of ONNX, 18 or later (without it: torch's choice)")
    export.add_argument("--no-pretrained", action="store_true", help="random weights for a name of a host")
    preparing_arguments(export)


def _compare_parser(commands: Any) -> None:
    compare = _command(commands, "compare", _compare, "methods on one model side by side: a table, a plot and a page")
    model_argument(compare)
    compare.add_argument("--methods", nargs="+", default=["all"], metavar="METHOD", help=f"all, or each {METHOD_HELP}")
    amounts = compare.add_mutually_exclusive_group()
    amounts.add_argument("-r", type=read_r, nargs="+", metavar="R", help=f"{TEXT_FORMS} (8 13 16)")
    text = "instead of -r: for each method the smallest r that leaves at most this share of the MACs, e.g. 0.75 0.5"
    amounts.add_argument("--macs", type=float, nargs="+", metavar="SHARE", help=text)
    data_arguments(compare)
    compare.add_argument("--restore", choices=("dense", "merged"), help=RESTORE_HELP)
    compare.add_argument("--calibrate", metavar="SOURCE", help=CALIBRATE_HELP)
    compare.add_argument("--rounds", type=int, default=10, help="timed rounds per row (%(default)s)")
    compare.add_argument(
        "--out", default="tokenmerge-compare", help="folder that is written, and gone on with (%(default)s)"
    )
    compare.set_defaults(left="finished rows are kept, and the same command (without --fresh) goes on")
    compare.add_argument("--fresh", action="store_true", help="start over; the old rows are kept as rows.json.old")


def _demo(arguments: argparse.Namespace) -> int:
    from tokenmerge.report.progress import Progress
    from tokenmerge.tools.demo import EXPLORER, REPORT, demo

    with Progress("images") as progress:
        result = demo(
            arguments.out,
            rs=arguments.r,
            limit=arguments.limit,
            batch_size=arguments.batch_size,
            device=arguments.device,
            progress=progress,
        )
    title = f"Bundled ViT, {result.images} Fashion-MNIST test images"
    print_table(arguments, result, title)
    print(
        f"Written to {arguments.out}: table.md, table.json, table.tex, plot.png, .svg, .pdf, merged.png",
        file=sys.stderr,
    )
    said = {REPORT: "speed and accuracy", EXPLORER: "what merged, to click through"}
    pages = [f"  {path} ({said[path.name]})" for name in said if (path := Path(arguments.out) / name).exists()]
    print("\n".join(["Open in a browser:", *pages]), file=sys.stderr)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from tokenmerge.batch.retrieval import Retrieval, retrieve
    from tokenmerge.report.progress import Progress
    from tokenmerge.tools.evaluate import Evaluation, evaluate

    out = check_out(arguments.out)
    retrieval.check(arguments, out)
    method, own = method_of(arguments)
    model, data = model_and_data(arguments)
    options = {
        "method": method,
        "device": arguments.device,
        "rs": arguments.r or ([0, 8, 16] if own is None else [own]),
    }
    options |= calibration_of(arguments, model)
    with Progress("images") as progress:
        if arguments.retrieval:
            result: Evaluation | Retrieval = retrieve(model, data, progress=progress, **options)
        else:
            options |= {"restore": arguments.restore, "bound": arguments.bound}
            result = evaluate(model, data, progress=progress, **options)
    title = f"{arguments.model} on {result.images} images of {arguments.data}"
    print_table(arguments, result, title, out)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from tokenmerge.report.progress import Progress
    from tokenmerge.report.table import show
    from tokenmerge.tools.compare import compare

    model, data = model_and_data(arguments)
    with Progress("rows") as progress:
        found = compare(
            model,
            data,
            methods=arguments.methods,
            rs=arguments.r,
            macs=arguments.macs,
            folder=arguments.out,
            restore=arguments.restore,
            device=arguments.device,
            rounds=arguments.rounds,
            fresh=arguments.fresh,
            label=arguments.model,
            progress=progress,
            **calibration_of(arguments, model),
        )
    if arguments.json:
        content = {"title": found.title, "environment": found.environment, "rows": found.rows, "notes": found.facts}
        print(json.dumps(content, indent=2))
    else:
        show(found.table, found.title, wide=arguments.wide)
        print("\n".join([*found.notes, "", *found.facts]))
    if found.marked:
        print(f"{found.marked} of {len(found.rows)} rows have no numbers; their notes say why.", file=sys.stderr)
    print(
        f"Written to {arguments.out}: index.html, table.md, table.csv, table.tex, plot.png, .svg, .pdf, rows.json",
        file=sys.stderr,
    )
    return 0 if found.has_numbers else 1


def _doctor(arguments: argparse.Namespace) -> int:
    from tokenmerge.report.progress import Progress
    from tokenmerge.tools.doctor import Finding, examine

    model = open_model(arguments.model, trust_pickle=arguments.trust_pickle)
    with Progress("rounds") as progress:
        diagnosis = examine(
            model,
            r=arguments.r,
            config=arguments.config,
            restore=arguments.restore,
            device=arguments.device,
            batch=arguments.batch_size,
            preprocessing=preparation_of(arguments, model),
            progress=progress,
        )
    if diagnosis.is_healthy:
        diagnosis.findings[1:1] = [Finding("weights", None, said) for said in said_of(arguments, model)]
    if arguments.json:
        print(json.dumps(diagnosis.as_dict(), indent=2))
    else:
        print(diagnosis)
    return 0 if diagnosis.is_healthy else 1


def _export(arguments: argparse.Namespace) -> int:
    from tokenmerge.report.table import check_writable
    from tokenmerge.tools.export import export, find_target
    from tokenmerge.tools.models import file_name

    method, own = method_of(arguments)
    r = arguments.r if arguments.r is not None else 8 if own is None else own
    suffix = find_target(arguments.to).suffix
    out = check_writable(arguments.out or file_name(arguments.model) + suffix, (suffix,))
    model = open_model(arguments.model, pretrained=not arguments.no_pretrained, trust_pickle=arguments.trust_pickle)
    if handle_of(model, None) and arguments.r is None and arguments.method == "tome":
        r = method = None  # the model is patched already
    found = export(
        model,
        out,
        r=r,
        to=arguments.to,
        method=method,
        restore=arguments.restore,
        preprocessing=preparation_of(arguments, model),
        input_size=arguments.input_size,
        batch=arguments.batch,
        matmul=arguments.matmul,
        opset=arguments.opset,
        **calibration_of(arguments, model),
    )
    print(json.dumps(found.as_dict(), indent=2) if arguments.json else found)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from tokenmerge.adapters import ADAPTERS
    from tokenmerge.training.recipe import list_recipes

    infos = [describe(name) for name in list_methods()]
    methods = {info.name: f"{info.summary} {info.paper}".strip() for info in infos}
    families = {adapter.name: adapter.families for adapter in ADAPTERS}
    recipes = list_recipes()
    if arguments.json:
        print(json.dumps({"methods": methods, "families": families, "recipes": recipes}, indent=2))
        return 0
    for title, entries in (("methods", methods), ("families", families), ("recipes", recipes)):
        print(title)
        for name, text in entries.items():
            print(f"  {name:<16} {text}")
    return 0
