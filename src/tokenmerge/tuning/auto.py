"""Choose a method and a schedule for a given model: `patch(model, "auto", r=..., calibrate=images)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge.config import MergeConfig
from tokenmerge.errors import ConfigError
from tokenmerge.measure.outputs import answer, shared_copy
from tokenmerge.methods import LeastLoss, ToMe
from tokenmerge.report import Calibration, Candidate
from tokenmerge.schedule import R
from tokenmerge.tuning.parts import whole
from tokenmerge.tuning.search import Search
from tokenmerge.tuning.space import starts
from tokenmerge.tuning.subject import Subject

__all__ = ["calibrate"]

_BATCH = 32


def calibrate(model: nn.Module, r: R, images: Tensor, options: Mapping[str, Any]) -> Calibration:
    """Try candidates at the MACs of ToMe with `r`; return how much each changes the unmerged outputs.

    This is the first step of `tune`, on all images: which family of schedules, which options of `least_loss`, one pass
    over them, and the schedule that merges the pairs above one similarity. `damage = |y - y0|^2 / |y0|^2`, with y0 the
    unmerged output. This also holds for logits, because the KL divergence of a few images is dominated by the one or
    two that the model is unsure of.

    `options` are those of `MergeConfig` besides the method and `r`. The model is not changed. Raises `ConfigError` for
    images it cannot use.
    """
    if not isinstance(images, Tensor) or images.dim() < 2 or len(images) == 0:
        seen = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ConfigError(
            f"calibrate takes a batch of the model's inputs as one tensor, e.g. [64, 3, 224, 224]; got {seen}."
        )
    parameter, own = next(model.parameters()), shared_copy(model).eval()
    with torch.no_grad():
        _check(own, images.to(parameter.device, parameter.dtype))
    subject = Subject(own, whole(images, _BATCH), parameter.device, options)
    found = Calibration(len(images))

    def add(method: Any, shape: str, r: R, damage: float) -> None:
        found.tried.append(Candidate(method, shape, r, subject.cost(r), damage))

    given = MergeConfig(ToMe(), r=r, **options)
    add(given.method, "given", r, subject.outcome(given, "screen").mean)
    usable = [method for method in starts(subject, [LeastLoss.name]) if subject.accepts(method)]
    if usable and subject.share(r) < 1:
        search = Search(subject, usable, 0, subject.share(r), passes=1)
        _ = search.start
        for one, outcome in search.tried.items():
            add(one.method, one.name, outcome.config.r, outcome.mean)
    return found


def _check(model: nn.Module, images: Tensor) -> None:
    """Raise `ConfigError` if the unmerged model does not take the images, or answers with NaN or infinity."""
    try:
        answers = torch.cat([answer(model(batch)).float() for batch in images.split(_BATCH)])
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"calibrate takes a batch of the model's inputs, and this model does not take {list(images.shape[1:])} in "
            f"a batch: {type(error).__name__}: {error}"
        ) from error
    is_bad = ~answers.flatten(1).isfinite().all(dim=1)
    if is_bad.any():
        raise ConfigError(
            f"the unmerged model answers {int(is_bad.sum())} of {len(is_bad)} images of calibrate with NaN or "
            f"infinity, first image {int(is_bad.nonzero()[0])}: nothing can be compared with that. Leave them out."
        )
