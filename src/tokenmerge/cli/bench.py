"""`tokenmerge bench`."""

from __future__ import annotations

import argparse

from tokenmerge.cli.models import open_model
from tokenmerge.cli.options import calibration_of, method_of, model_arguments, preparing_arguments, said_of
from tokenmerge.cli.printing import OUT_HELP, check_out, print_table

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `tokenmerge bench`."""
    model_arguments(parser)
    parser.add_argument("-b", "--batch", type=int, nargs="+", default=[1, 8], help="batch sizes (%(default)s)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--compile", action="store_true", help="torch.compile all variants")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds per row (%(default)s)")
    parser.add_argument("--input-size", type=int, nargs=3, metavar=("C", "H", "W"))
    parser.add_argument("--out", nargs="+", metavar="FILE", help=OUT_HELP)
    parser.add_argument("--compare", action="store_true", help="also time the merged model on the reference kernels")
    parser.add_argument("--training", action="store_true", help="also the peak memory of a training step")
    preparing_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Time the model; rows that are finished are kept when it is interrupted."""
    from tokenmerge.report.progress import Progress
    from tokenmerge.tools.bench import Bench, bench

    out = check_out(arguments.out)
    method, own = method_of(arguments)
    model = open_model(arguments.model, trust_pickle=arguments.trust_pickle)
    seen: list[Bench] = []
    title = f"{arguments.model}, medians of interleaved rounds"
    try:
        with Progress("rounds") as progress:
            result = bench(
                model,
                rs=arguments.r or ([0, 8, 16] if own is None else [own]),
                batches=arguments.batch,
                method=method,
                restore=arguments.restore,
                device=arguments.device,
                dtype=arguments.dtype,
                compiled=arguments.compile,
                compare=arguments.compare,
                training=arguments.training,
                rounds=arguments.rounds,
                input_size=arguments.input_size,
                label=arguments.model,
                progress=progress,
                so_far=seen.append,
                **calibration_of(arguments, model),
            )
    except KeyboardInterrupt:
        if seen:
            print_table(arguments, seen[-1], f"{title}, interrupted", out)
            arguments.left = f"{len(seen[-1].rows)} rows were finished"
        raise
    result.verdicts[:0] = said_of(arguments, model)
    print_table(arguments, result, title, out)
    return 0
