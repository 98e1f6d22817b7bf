"""The `tokenmerge` command: one sub-command per tool, arguments to function calls."""

from __future__ import annotations

import argparse
import ast
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit code: 0, 1 where a check failed, 2 for a mistake in what was asked."""
    # silences kineto's start-up lines on stderr; read by torch when it loads
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    arguments = _parser().parse_args(argv)
    from tokenmerge.errors import TokenMergeError

    try:
        return int(arguments.run(arguments))
    except TokenMergeError as error:
        print(f"tokenmerge: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tokenmerge: interrupted, nothing more was written.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenmerge", description="Make vision transformers faster by merging similar tokens, and see what it did."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = _command(commands, "demo", _demo, "the bundled model on the bundled images, for several r")
    demo.add_argument("--out", default="tokenmerge-demo", help="folder for table, plot and pictures (%(default)s)")
    demo.add_argument("--limit", type=int, help="use only the first LIMIT of the 10,000 images")
    demo.add_argument("-b", "--batch-size", type=int, default=32, help="%(default)s is fastest unmerged on a CPU")
    demo.add_argument("-r", type=_r, nargs="+", default=[0, 4, 8, 12, 16], metavar="R", help=_R_HELP)

    _bench_parser(commands)
    evaluate = _command(commands, "eval", _evaluate, "accuracy and speed over labelled images, several r in one pass")
    _model_arguments(evaluate)
    evaluate.add_argument("--data", required=True, help="'fashion-mnist' or a folder with one sub-folder per class")
    evaluate.add_argument("-b", "--batch-size", type=int, default=64)
    evaluate.add_argument("--workers", type=int, default=2, help="processes that decode images (%(default)s)")
    evaluate.add_argument("--limit", type=int, help="use only LIMIT images, spread over the classes")
    evaluate.add_argument("--bound", action="store_true", help="time the free bound of each r beside it")
    evaluate.add_argument("--no-pretrained", action="store_true", help="random weights for a timm name")
    evaluate.add_argument("--out", help="also write the rows to this .csv, .json or .md")

    doctor = _command(
        commands, "doctor", _doctor, "examine a model: described, right, how fast, what could not be done"
    )
    doctor.add_argument("model", help=_MODEL_HELP)
    doctor.add_argument("-r", type=_r, default=8, help=_R_HELP)
    doctor.add_argument("-b", "--batch-size", type=int, default=2)

    _export_parser(commands)
    _command(commands, "list", _list, "the methods and the model families")
    return parser


_R_HELP = "tokens removed per block: 8, a share 0.1, a pair 16,-1 (amount, inflection), or a list [25,25,10]"
_MODEL_HELP = "a timm name, a file written by torch.save(model) (a pickle: trust it), or 'reference', the bundled model"


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print JSON to stdout")
    if name not in ("export", "list"):
        parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (%(default)s)")
    return parser


def _bench_parser(commands: Any) -> None:
    bench = _command(commands, "bench", _bench, "time a model merged, unmerged and at the free bound")
    _model_arguments(bench)
    bench.add_argument("-b", "--batch", type=int, nargs="+", default=[1, 8], help="batch sizes (%(default)s)")
    bench.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    bench.add_argument("--compile", action="store_true", help="torch.compile all variants")
    bench.add_argument("--rounds", type=int, default=20, help="timed rounds per row (%(default)s)")
    bench.add_argument("--input-size", type=int, nargs=3, metavar=("C", "H", "W"))
    bench.add_argument("--out", help="also write the rows to this .csv, .json or .md")
    bench.add_argument("--compare", action="store_true", help="also time the merged model on the reference kernels")
    bench.add_argument("--training", action="store_true", help="also the peak memory of a training step")


def _export_parser(commands: Any) -> None:
    export = _command(commands, "export", _export, "write a merged model for another engine, checked in that engine")
    export.add_argument("model", help=_MODEL_HELP)
    export.add_argument("-r", type=_r, default=8, help=_R_HELP)
    export.add_argument("--to", required=True, help="onnx, openvino or torch-export")
    export.add_argument("--out", help="the file to write (the model's name, in this folder)")
    export.add_argument("--method", default="tome", help="a name of `tokenmerge list` (%(default)s)")
    export.add_argument("--input-size", type=int, nargs=3, metavar=("C", "H", "W"))
    export.add_argument("-b", "--batch", type=int, help="the only batch size the file takes (without it: any)")
    export.add_argument("--matmul", action="store_true", help="merge by products, for engines that get scatter wrong")
    export.add_argument("--opset", type=int, help="of ONNX, 18 or later (without it: torch's choice)")
    export.add_argument("--no-pretrained", action="store_true", help="random weights for a timm name")


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=_MODEL_HELP)
    parser.add_argument("-r", type=_r, nargs="+", default=[0, 8, 16], metavar="R", help=_R_HELP)
    parser.add_argument("--method", default="tome", help="a name of `tokenmerge list` (%(default)s)")


def _r(text: str) -> Any:
    """Read an r as Python would write it; `16,-1` is a pair."""
    from tokenmerge.schedule import Schedule

    try:
        value = ast.literal_eval(text)
        Schedule.of(value, depth=len(value) if isinstance(value, list) else 1)
    except (ValueError, SyntaxError) as error:
        raise argparse.ArgumentTypeError(
            str(error) if "Allowed" in str(error) else f"{text!r} is no r: {_R_HELP}"
        ) from None
    return value


def _demo(arguments: argparse.Namespace) -> int:
    from tokenmerge.tools.demo import demo
    from tokenmerge.tools.results import Progress

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
    _print(arguments, result.rows, title, result.environment, [])
    print(f"Written to {arguments.out}: table.md, table.json, plot.png, merged.png", file=sys.stderr)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from tokenmerge.tools.bench import bench
    from tokenmerge.tools.models import load_model
    from tokenmerge.tools.results import Progress

    out = _out(arguments.out)
    with Progress("rounds") as progress:
        result = bench(
            load_model(arguments.model),
            rs=arguments.r,
            batches=arguments.batch,
            method=arguments.method,
            device=arguments.device,
            dtype=arguments.dtype,
            compiled=arguments.compile,
            compare=arguments.compare,
            training=arguments.training,
            rounds=arguments.rounds,
            input_size=arguments.input_size,
            label=arguments.model,
            progress=progress,
        )
    _print(
        arguments,
        result.rows,
        f"{arguments.model}, medians of interleaved rounds",
        result.environment,
        result.verdicts,
        out,
    )
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from tokenmerge.tools.data import check_source, open_data
    from tokenmerge.tools.evaluate import evaluate
    from tokenmerge.tools.models import load_model
    from tokenmerge.tools.results import Progress

    out = _out(arguments.out)
    check_source(arguments.data)
    model = load_model(arguments.model, pretrained=not arguments.no_pretrained)
    data = open_data(
        arguments.data, model, batch_size=arguments.batch_size, workers=arguments.workers, limit=arguments.limit
    )
    with Progress("images") as progress:
        result = evaluate(
            model,
            data,
            rs=arguments.r,
            method=arguments.method,
            device=arguments.device,
            bound=arguments.bound,
            progress=progress,
        )
    notes = (
        [f"{len(result.corrupt)} of {len(data)} images could not be read and were left out:"] if result.corrupt else []
    )
    notes += [f"  {line}" for line in result.corrupt]
    title = f"{arguments.model} on {result.images} images of {arguments.data}"
    _print(arguments, result.rows, title, result.environment, notes, out)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from tokenmerge.tools.doctor import examine
    from tokenmerge.tools.models import load_model

    diagnosis = examine(load_model(arguments.model), r=arguments.r, device=arguments.device, batch=arguments.batch_size)
    if arguments.json:
        print(json.dumps(diagnosis.as_dict(), indent=2))
    else:
        marks = {True: "ok  ", False: "FAIL", None: "    "}
        for name, good, sentence in diagnosis.findings:
            print(f"{marks[good]} {name:<18} {sentence}")
        print("Measured on: " + ", ".join(f"{name} {value}" for name, value in diagnosis.environment.items()))
    return 0 if diagnosis.is_healthy else 1


def _export(arguments: argparse.Namespace) -> int:
    from tokenmerge.tools.export import export, find_target
    from tokenmerge.tools.models import load_model
    from tokenmerge.tools.results import check_writable

    suffix = find_target(arguments.to).suffix
    name = Path(arguments.model)
    out = check_writable(arguments.out or (name.stem if name.is_file() else name.name) + suffix, (suffix,))
    found = export(
        load_model(arguments.model, pretrained=not arguments.no_pretrained),
        out,
        r=arguments.r,
        to=arguments.to,
        method=arguments.method,
        input_size=arguments.input_size,
        batch=arguments.batch,
        matmul=arguments.matmul,
        opset=arguments.opset,
    )
    print(json.dumps(found.as_dict(), indent=2) if arguments.json else found)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from tokenmerge.adapters import ADAPTERS
    from tokenmerge.methods import find, list_methods

    methods = {name: (find(name).__doc__ or "").splitlines()[0] for name in list_methods()}
    families = {adapter.name: adapter.families for adapter in ADAPTERS}
    if arguments.json:
        print(json.dumps({"methods": methods, "families": families}, indent=2))
        return 0
    for title, entries in (("methods", methods), ("families", families)):
        print(title)
        for name, text in entries.items():
            print(f"  {name:<16} {text}")
    return 0


def _out(path: str | None) -> Path | None:
    from tokenmerge.tools.results import check_writable

    return check_writable(path) if path else None


def _print(
    arguments: argparse.Namespace,
    rows: list[dict[str, Any]],
    title: str,
    about: dict[str, str],
    notes: list[str],
    out: Path | None = None,
) -> None:
    from tokenmerge.tools.results import save_rows, show

    if out is not None:
        save_rows(out, rows, about, notes)
    if arguments.json:
        print(json.dumps({"title": title, "environment": about, "rows": rows, "notes": notes}, indent=2))
        return
    show(rows, title)
    for note in notes:
        print(note)
    print("Measured on: " + ", ".join(f"{name} {value}" for name, value in about.items()))


if __name__ == "__main__":
    sys.exit(main())
