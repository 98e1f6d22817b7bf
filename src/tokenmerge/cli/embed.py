"""`tokenmerge embed`."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from contextlib import redirect_stdout

from tokenmerge.cli.options import METHOD_HELP, model_argument, preparing, preparing_arguments, read_r
from tokenmerge.schedule import TEXT_FORMS

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `tokenmerge embed`."""
    model_argument(parser)
    text = (
        "a folder (all below it, or what datasets saved there), a text file of paths, 'shards-{000..009}.tar', "
        "'*.parquet', or a URL (s3://...)"
    )
    parser.add_argument("--data", required=True, metavar="SOURCE", help=text)
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder that is written, and gone on with")
    parser.add_argument(
        "--config", metavar="METHOD", help=f"how it merges: {METHOD_HELP} (without it and -r: not at all)"
    )
    parser.add_argument("-r", type=read_r, metavar="R", help=TEXT_FORMS)
    text = "embedding, logits (labels with scores are written) or dense, a feature for every place (%(default)s)"
    parser.add_argument("--output", default="embedding", help=text)
    text = "local (processes of this machine) or ray (the cluster of RAY_ADDRESS, else this machine) (%(default)s)"
    parser.add_argument("--engine", default="local", metavar="NAME", help=text)
    text = "models at once: a process and a GPU for each (1); of ray, actors at most (GPUs, or half of the CPUs)"
    parser.add_argument("--models", type=int, metavar="N", help=text)
    parser.add_argument("-b", "--batch-size", type=int, default=32, help="images in a forward (%(default)s)")
    parser.add_argument("--workers", type=int, help="processes that decode images (one for each core)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="run the model by torch.compile")
    parser.add_argument("--no-pretrained", action="store_true", help="random weights for a name of a host")
    parser.add_argument("--image-column", metavar="NAME", help="of Parquet: bytes or paths (the only such column)")
    parser.add_argument("--id-column", metavar="NAME", help="of Parquet (without it an id is FILE#ROW)")
    text = "ids that are there twice: refuse, or suffix them with #2, #3, ... (%(default)s)"
    parser.add_argument("--duplicates", default="refuse", metavar="WAY", help=text)
    text = "larger images are refused by their header, before they are decoded (178,956,970)"
    parser.add_argument("--max-pixels", type=int, metavar="N", help=text)
    text = (
        "exact, or fast: large JPEGs at 1/2, 1/4 or 1/8, with at least twice the pixels that the model needs (or sides "
        "of N pixels); embeddings change a little (%(default)s)"
    )
    parser.add_argument("--decode", default="exact", metavar="WAY", help=text)
    parser.add_argument("--shard-rows", type=int, default=10_000, metavar="N", help="rows of a file (%(default)s)")
    parser.add_argument("--retry-failures", action="store_true", help="read again what could not be read before")
    preparing_arguments(parser)
    parser.set_defaults(left="what was written is kept, and the same command goes on")


def run(arguments: argparse.Namespace) -> int:
    """Embed a source into a folder and say what bounded it; 1 if no image could be read."""
    from tokenmerge.batch.decoding import MAX_PIXELS, draft_of
    from tokenmerge.batch.embedder import Embedder
    from tokenmerge.batch.folder import check_folder
    from tokenmerge.batch.inputs import check_unique, open_inputs
    from tokenmerge.batch.job import check_engine, embed
    from tokenmerge.report.progress import Progress

    check_engine(arguments.engine)
    check_folder(arguments.out)
    inputs = open_inputs(arguments.data, image=arguments.image_column, ids=arguments.id_column)
    inputs = check_unique(inputs, arguments.duplicates)
    changes = {name: value for name, value in preparing(arguments).items() if name != "beside"}
    # what a host or a function of the user's prints is no result, and what is to be known is said at the end
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*: the configuration was made ")
        embedder = Embedder(
            arguments.model,
            arguments.config,
            r=arguments.r,
            output=arguments.output,
            device=arguments.device,
            dtype=arguments.dtype,
            compile=arguments.compile,
            preprocessing=changes or None,
            pretrained=not arguments.no_pretrained,
            trust_pickle=arguments.trust_pickle,
        )
    with Progress("images") as progress:
        done = embed(
            embedder,
            inputs,
            arguments.out,
            engine=arguments.engine,
            models=arguments.models,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            shard_rows=arguments.shard_rows,
            max_pixels=MAX_PIXELS if arguments.max_pixels is None else arguments.max_pixels,
            draft=draft_of(arguments.decode, embedder.prepare),
            retry=arguments.retry_failures,
            progress=progress,
        )
    print(json.dumps(done.as_dict(), indent=2) if arguments.json else "\n".join(done.lines()))
    if not done.rows:
        print(f"tokenmerge: none of {done.failures} images could be read; nothing was embedded.", file=sys.stderr)
    return 0 if done.rows else 1
