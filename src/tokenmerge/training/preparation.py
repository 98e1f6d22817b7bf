"""Choose the preprocessing of a run: the one the model declares, or a default for a new model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from tokenmerge.data.prepare import find_preprocessing
from tokenmerge.data.preprocessing import Preprocessing
from tokenmerge.data.transforms import eval_transform, statistics
from tokenmerge.errors import ConfigError, TokenMergeError
from tokenmerge.tools.models import BUNDLED
from tokenmerge.training.models import VIT

__all__ = ["preparation", "statistics_of"]


def preparation(model: nn.Module, name: str, kind: str, size: tuple[int, ...]) -> Preprocessing | None:
    """Return the evaluation preprocessing of the model `name`; None for clips and sounds.

    It is the preprocessing that the model declares, at this size. A model that declares none gets ImageNet's constants
    (Fashion-MNIST's for one channel), a resize of the shorter side and a centre crop. That default counts as known,
    unless the model was trained before.
    """
    if kind != "image":
        return None
    try:
        found = find_preprocessing(model, beside=name if Path(name).exists() else None)
    except ConfigError:
        raise
    except TokenMergeError:  # no adapter, or the input size is unknown
        found = None
    if found is not None and found.is_known and (not found.size or found.size == size):
        return found
    is_known = found is not None and found.is_known and found.mean is not None and len(found.mean) == size[0]
    mean, std = (found.mean, found.std) if is_known and found is not None else ((), ())
    means, stds = statistics(size[0], mean or (), std or ())
    own = eval_transform(kind, size, mean=means, std=stds)
    source = "as this run prepares them"
    # a model trained elsewhere may have been trained with other constants
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
    """Return mean, std and interpolation as arguments of `train_transform`."""
    if prepared is None or prepared.mean is None:
        return {}
    return {"mean": prepared.mean, "std": prepared.std, "interpolation": prepared.interpolation}
