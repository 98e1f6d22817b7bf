"""Choose a method and a schedule for a given model: `patch(model, "auto", r=..., calibrate=images)`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge import matching
from tokenmerge.config import MergeConfig
from tokenmerge.errors import ConfigError
from tokenmerge.handle import Handle, attached
from tokenmerge.measure.counting import CostModel
from tokenmerge.measure.outputs import answer
from tokenmerge.methods import Reduction, ToFu, ToMe, ToMeCIS
from tokenmerge.methods.base import TokenView
from tokenmerge.plan import Plan
from tokenmerge.report import Calibration, Candidate
from tokenmerge.schedule import R, Schedule

__all__ = ["calibrate"]

_BATCH = 32
_STEPS = 10  # of the search for the similarity threshold


def calibrate(model: nn.Module, r: R, images: Tensor, options: Mapping[str, Any]) -> Calibration:
    """Try a small set of candidates at the MACs of ToMe with `r`; return how much each changes the unmerged outputs.

    First the schedules are tried, with keys and with token features as metric: `r` as given, falling linearly to 0,
    falling more steeply. With the better metric follows the schedule that merges, in each block, the pairs above one
    similarity threshold. Then the best schedule is combined with other metrics, early pruning with norms kept, and
    class importance. `damage = |y - y0|^2 / |y0|^2`, with y0 the unmerged output. This also holds for logits, because
    the KL divergence of a few images is dominated by the one or two that the model is unsure of.

    `options` are those of `MergeConfig` besides the method and `r`. The model is not changed. Raises `ConfigError` for
    images it cannot use.
    """
    if not isinstance(images, Tensor) or images.dim() < 2 or len(images) == 0:
        seen = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ConfigError(
            f"calibrate takes a batch of the model's inputs as one tensor, e.g. [64, 3, 224, 224]; got {seen}."
        )
    with _evaluating(model):
        trial = _Trial(model, images, options)
        shapes = trial.shapes(r)
        for method in (ToMe(), ToMe(metric="x")):
            for shape, amounts in shapes.items():
                trial(method, shape, amounts)
        plain = trial.found.best.method
        assert isinstance(plain, ToMe)
        alike = trial.as_alike(plain, r) if len(shapes) > 1 else None
        if alike is not None:
            trial(plain, "as alike", alike)
        best = trial.found.best
        for other in _variants(plain, trial.has_class):
            trial(other, best.shape, best.r)
    return trial.found


def _variants(best: ToMe, has_class: bool) -> list[Reduction]:
    """Return further candidates around the best metric so far."""
    others: list[Reduction] = [
        ToMe(heads="concat"),
        ToMe(metric="v"),
        ToMe(metric="x_pre"),
        replace(best, combine="average"),
    ]
    others += [ToFu(metric=best.metric), ToFu(metric=best.metric, early=0.25, combine="average")]
    return others + ([ToMeCIS(metric=best.metric, damping=0.5)] if has_class else [])


@dataclass(frozen=True)
class _AsAlike(ToMe):
    """ToMe that merges, in every image, the mean number of pairs with a cosine above a threshold."""

    is_adaptive = True

    threshold: float = 1.0
    amounts: dict[int, int] = field(default_factory=dict, compare=False)  # pairs merged per layer in the last forward

    def plan(self, view: TokenView, r: int) -> Plan:
        *_, cosine = matching.partners(self._metric(view), prefix=view.prefix, valid=view.valid)
        wanted = (cosine > self.threshold).sum(dim=1, dtype=torch.float32).mean()
        self.amounts[view.layer] = min(r, round(wanted.item()))
        return super().plan(view, self.amounts[view.layer])


class _Trial:
    def __init__(self, model: nn.Module, images: Tensor, options: Mapping[str, Any]) -> None:
        parameter = next(model.parameters())
        self.model, self.options = model, options
        self.batches = images.to(parameter.device, parameter.dtype).split(_BATCH)
        self.size = tuple(images.shape[1:])
        self.expected = self._unmerged()
        self.found = Calibration(len(images))
        with self._reduced(ToMe(), 0) as handle:
            self.depth, self.has_class = len(handle.runners), handle.has_class
            self.model(self.batches[0][:1])
            self._tokens = int(handle.tokens[0])
            self._macs = CostModel(model, self.size)

    def __call__(self, method: Reduction, shape: str, r: R) -> None:
        with self._reduced(method, r):
            answers = self._answers()
        damage = (answers - self.expected).square().sum() / self.expected.square().sum().clamp_min(1e-12)
        self.found.tried.append(Candidate(method, shape, r, self._macs(r), damage.item()))

    def _reduced(self, method: Reduction, r: R) -> Handle:
        return attached(self.model, MergeConfig(method, r=r, **self.options))

    def shapes(self, r: R) -> dict[str, R]:
        """Return the schedules to try: `r` as given, and falling ones with no more MACs."""
        shapes: dict[str, R] = {"given": r}
        if not any(Schedule.of(r, self.depth).amounts) or self.depth < 3:
            return shapes
        most = self._macs(r)
        for name, power in (("falling", 1), ("steeply falling", 2)):
            low, high = 0.0, float(max(8, self._tokens))
            # amounts are whole numbers: a finer search finds no other schedule
            while high - low > 0.1:
                middle = (low + high) / 2
                low, high = (low, middle) if self._macs(self._falling(middle, power)) <= most else (middle, high)
            shapes[name] = self._falling(high, power)
        return shapes

    def as_alike(self, method: ToMe, r: R) -> R | None:
        """Return the schedule that merges, per block, the mean number of pairs above one similarity threshold.

        The threshold is the highest whose schedule costs no more MACs than `r`; pairs are counted on 16 images. None if
        no threshold removes enough.
        """
        most, found = self._macs(r), None
        low, high = math.log(1e-5), math.log(2.0)  # bounds of log(1 - cosine)
        for _ in range(_STEPS):
            middle = (low + high) / 2
            counter = _AsAlike(**vars(method), threshold=1 - math.exp(middle))
            with self._reduced(counter, self._tokens):
                self.model(self.batches[0][:16])
            amounts: R = [counter.amounts.get(layer, 0) for layer in range(self.depth)]
            if self._macs(amounts) <= most:
                high, found = middle, amounts
            else:
                low = middle
        return found

    def _falling(self, first: float, power: int) -> list[int | float]:
        last = self.depth - 1
        return [round(first * (1 - layer / last) ** power) for layer in range(self.depth)]

    def _unmerged(self) -> Tensor:
        """Return the unmerged outputs; raise `ConfigError` if they cannot be computed or are not finite."""
        try:
            expected = self._answers()
        except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"calibrate takes a batch of the model's inputs, and this model does not take {list(self.size)} in a "
                f"batch: {type(error).__name__}: {error}"
            ) from error
        is_bad = ~expected.flatten(1).isfinite().all(dim=1)
        if is_bad.any():
            raise ConfigError(
                f"the unmerged model answers {int(is_bad.sum())} of {len(is_bad)} images of calibrate with NaN or "
                f"infinity, first image {int(is_bad.nonzero()[0])}: nothing can be compared with that. Leave them out."
            )
        return expected

    def _answers(self) -> Tensor:
        return torch.cat([answer(self.model(batch)).float() for batch in self.batches])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Run in eval mode without gradients; restore the mode of every module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
