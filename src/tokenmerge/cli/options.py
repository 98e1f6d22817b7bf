"""Options shared by several commands: the model, the method, the images and their preprocessing."""

from __future__ import annotations

import argparse
from typing import Any

from tokenmerge.cli.models import open_model
from tokenmerge.schedule import TEXT_FORMS, Schedule

__all__ = [
    "CALIBRATE_HELP",
    "METHOD_HELP",
    "MODEL_HELP",
    "RESTORE_HELP",
    "TRUST_HELP",
    "calibration_of",
    "data_arguments",
    "method_arguments",
    "method_of",
    "model_and_data",
    "model_argument",
    "model_arguments",
    "preparation_of",
    "preparing",
    "preparing_arguments",
    "read_r",
    "said_of",
]


MODEL_HELP = (
    "timm:NAME or timm:NAME/FILE (weights of your own), hf:ID_OR_FOLDER, open_clip:ARCH/TAG or open_clip:ARCH/FILE, "
    "torchvision:NAME, or a name or folder alone; FILE.py:FUNCTION, which returns it; a folder of `tokenmerge train`; "
    "a file of torch.save(model) (with --trust-pickle); 'reference'"
)
TRUST_HELP = "load a model that is a pickle, which runs the code it holds: for files whose maker you trust"
_DATA_HELP = (
    "'fashion-mnist', a folder with one sub-folder per class, or any source of images: hf:NAME, wds:PATTERN, ..."
)
METHOD_HELP = (
    "a name of `tokenmerge list`, with options as \"tome(metric='x')\", a saved configuration (.json), a folder of "
    "`tokenmerge train`, or auto"
)
RESTORE_HELP = "dense: every token in its place wherever the model hands tokens out; merged: the merged ones"
CALIBRATE_HELP = (
    "images that auto is tuned on (64 are used): 'fashion-mnist' (its training images) or a folder; without these "
    "auto is tome"
)


def model_argument(parser: argparse.ArgumentParser) -> None:
    """Add the model, and the option to trust a pickle."""
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--trust-pickle", action="store_true", help=TRUST_HELP)


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, `r` and the method."""
    model_argument(parser)
    parser.add_argument(
        "-r", type=read_r, nargs="+", metavar="R", help=f"{TEXT_FORMS} (that of a saved method, else 0 8 16)"
    )
    method_arguments(parser)


def method_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the method, `--restore` and `--calibrate`."""
    parser.add_argument("--method", default="tome", help=f"{METHOD_HELP} (%(default)s)")
    parser.add_argument("--restore", choices=("dense", "merged"), help=RESTORE_HELP)
    parser.add_argument("--calibrate", metavar="SOURCE", help=CALIBRATE_HELP)


def data_arguments(parser: argparse.ArgumentParser, limit: str = "all") -> None:
    """Add the source of the labelled images, and how many to use; `limit` says how many without `--limit`."""
    parser.add_argument("--data", required=True, help=_DATA_HELP)
    parser.add_argument("-b", "--batch-size", type=int, default=64, help="images in a batch (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode images (%(default)s)")
    parser.add_argument(
        "--limit",
        type=int,
        help="use only LIMIT images: of a folder spread over the classes, of fashion-mnist and streams the first "
        f"({limit})",
    )
    parser.add_argument("--no-pretrained", action="store_true", help="random weights for a name of a host")
    preparing_arguments(parser)


def read_r(text: str) -> Any:
    """Parse r as a Python literal; `16,-1` is a pair."""
    try:
        return Schedule.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def preparing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add options that change the preprocessing; the default is that of the model."""
    group = parser.add_argument_group("preprocessing (without these, as the model says)")
    group.add_argument(
        "--mean", type=float, nargs="+", metavar="M", help="of pixels on the scale 0 to 1: 1 or 3 numbers"
    )
    group.add_argument("--std", type=float, nargs="+", metavar="S", help="the same")
    group.add_argument("--resize", type=int, nargs="+", metavar="N", help="the shorter side, or height and width")
    group.add_argument(
        "--crop-pct", type=float, metavar="P", help="shorter side = model's size / P; its middle is cut out"
    )
    group.add_argument("--interpolation", metavar="MODE", help="nearest, bilinear, bicubic, lanczos, box, hamming")


def method_of(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Return the method, and the r it was saved with, if any."""
    from tokenmerge.data.labelled import check_source
    from tokenmerge.errors import DataError
    from tokenmerge.tools.models import AUTO, own_r, read_method

    method = read_method(arguments.method)
    if arguments.calibrate is not None:
        if method != AUTO:
            raise DataError(f"--calibrate goes with --method {AUTO}, not with {arguments.method}.")
        check_source(arguments.calibrate, "--calibrate")
    return method, own_r(method)


def calibration_of(arguments: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Return the images for auto as a keyword argument, or {} if none were given."""
    from tokenmerge.data.labelled import calibration_images

    if arguments.calibrate is None:
        return {}
    return {"calibrate": calibration_images(arguments.calibrate, model, **preparing(arguments))}


def preparing(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the preprocessing options as arguments of `find_preprocessing`."""
    from tokenmerge.tools.models import place_of

    names = ("mean", "std", "resize", "crop_pct", "interpolation")
    given = {name: getattr(arguments, name, None) for name in names}
    return {"beside": place_of(arguments.model), **{name: value for name, value in given.items() if value is not None}}


def preparation_of(arguments: argparse.Namespace, model: Any) -> Any:
    """Return the preprocessing of the model; None if even its input size is unknown."""
    from tokenmerge.data.prepare import find_preprocessing
    from tokenmerge.errors import ConfigError, TokenMergeError

    try:
        return find_preprocessing(model, **preparing(arguments))
    except ConfigError:  # a file that exists but cannot be read
        raise
    except TokenMergeError:
        return None


def said_of(arguments: argparse.Namespace, model: Any) -> list[str]:
    """Return notes for a command that downloads no weights: on random weights, and on the images of auto."""
    from tokenmerge.tools.models import has_weights

    said = []
    if not has_weights(arguments.model):
        said.append("Random weights: a name is built without a download, which neither times nor exactness need.")
    if getattr(arguments, "calibrate", None) is not None:
        said += getattr(preparation_of(arguments, model), "notes", list)()
    return said


def model_and_data(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Open the model and the labelled images; both names are checked first."""
    from tokenmerge.data.labelled import check_source, open_data

    check_source(arguments.data)
    if arguments.calibrate is not None:
        check_source(arguments.calibrate, "--calibrate")
    model = open_model(arguments.model, pretrained=not arguments.no_pretrained, trust_pickle=arguments.trust_pickle)
    options = {"batch_size": arguments.batch_size, "workers": arguments.workers, "limit": arguments.limit}
    return model, open_data(arguments.data, model, **options, **preparing(arguments))
