"""Options that several commands share: the method, the images and how they are prepared."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tokenmerge.cli.models import open_model

__all__ = ["calibration_of", "method_of", "model_and_data", "preparation_of", "preparing", "preparing_arguments"]


def preparing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what changes how images are prepared; without these the model's own way is taken."""
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
    """Return the method that was named and the r it was saved with, if it was."""
    from tokenmerge.errors import DataError
    from tokenmerge.tools.data import check_source
    from tokenmerge.tools.models import AUTO, own_r, read_method

    method = read_method(arguments.method)
    if arguments.calibrate is not None:
        if method != AUTO:
            raise DataError(f"--calibrate goes with --method {AUTO}, not with {arguments.method}.")
        check_source(arguments.calibrate, "--calibrate")
    return method, own_r(method)


def calibration_of(arguments: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Return the images for auto as the option that takes them, where they were asked for."""
    from tokenmerge.tools.data import calibration_images

    if arguments.calibrate is None:
        return {}
    return {"calibrate": calibration_images(arguments.calibrate, model, **preparing(arguments))}


def preparing(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was said of preprocessing, as the options that `find_preprocessing` takes."""
    names = ("mean", "std", "resize", "crop_pct", "interpolation")
    given = {name: getattr(arguments, name, None) for name in names}
    beside = arguments.model if Path(arguments.model).exists() else None
    return {"beside": beside, **{name: value for name, value in given.items() if value is not None}}


def preparation_of(arguments: argparse.Namespace, model: Any) -> Any:
    """Return how the model's images are prepared; None where even their size is unknown."""
    from tokenmerge.errors import ConfigError, TokenMergeError
    from tokenmerge.tools.prepare import find_preprocessing

    try:
        return find_preprocessing(model, **preparing(arguments))
    except ConfigError:  # a file that is there and cannot be read
        raise
    except TokenMergeError:
        return None


def model_and_data(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Open the model and the labelled images that were named; both names are looked at before either is opened."""
    from tokenmerge.tools.data import check_source, open_data

    check_source(arguments.data)
    if arguments.calibrate is not None:
        check_source(arguments.calibrate, "--calibrate")
    model = open_model(arguments.model, pretrained=not arguments.no_pretrained, trust_pickle=arguments.trust_pickle)
    options = {"batch_size": arguments.batch_size, "workers": arguments.workers, "limit": arguments.limit}
    return model, open_data(arguments.data, model, **options, **preparing(arguments))
