"""How a run prepares its images: as the model says, and what a new model is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from tokenmerge.data.prepare import find_preprocessing
from tokenmerge.data.preprocessing import Preprocessing
from tokenmerge.data.transforms import eval_transform, statistics
from tokenmerge.errors import ConfigError, TokenMergeError
from tokenmerge.tools.models import BUNDLED
from tokenmerge.training.nets import VIT

__all__ = ["preparation", "statistics_of"]


def preparation(model: nn.Module, name: str, kind: str, size: tuple[int, ...]) -> Preprocessing | None:
    """Return what images go through before a model called `name` in an evaluation; None for clips and sounds.

    That is what the model says, for images of this size. One that says nothing gets ImageNet's constants (for one
    channel those of Fashion-MNIST), the shorter side resized and the middle cut out; it is known then, unless the
    model was trained before.
    """
    if kind != "image":
        return None
    try:
        found = find_preprocessing(model, beside=name if Path(name).exists() else None)
    except ConfigError:
        raise
    except TokenMergeError:  # no adapter, or no known input size
        found = None
    if found is not None and found.is_known and (not found.size or found.size == size):
        return found
    is_known = found is not None and found.is_known and found.mean is not None and len(found.mean) == size[0]
    mean, std = (found.mean, found.std) if is_known and found is not None else ((), ())
    means, stds = statistics(size[0], mean or (), std or ())
    own = eval_transform(kind, size, mean=means, std=stds)
    source = "as this run prepares them"
    # what was trained elsewhere may have seen other pixels
    is_sure = is_known or name in (BUNDLED, VIT)
    is_square = size[1] == size[2]
    return Preprocessing(
        size=size,
        resize=size[1] if is_square else (size[1], size[2]),
        crops=True,
        interpolation="bicubic",
        mean=tuple(means),
        std=tuple(stds),
        source=source,
        is_known=is_sure,
        extra="" if is_square else "aspect ratio kept",
        own=own,
    )


def statistics_of(prepared: Preprocessing | None) -> dict[str, Any]:
    """Return mean and std of pixels, and the interpolation, as `train_transform` takes them."""
    if prepared is None or prepared.mean is None:
        return {}
    return {"mean": prepared.mean, "std": prepared.std, "interpolation": prepared.interpolation}
