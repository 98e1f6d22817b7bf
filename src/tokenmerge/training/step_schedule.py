"""The `r` of each training step: warm-up from 0, random draws, and no merging at the end."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tokenmerge.errors import InvalidScheduleError
from tokenmerge.schedule import PlainR, R, Schedule

__all__ = ["StepSchedule"]


class StepSchedule:
    """The `r` of each step: set `handle.r = schedule.at(step)` before the forward.

    `at` returns r in the form that was given. `warmup` and `off` are shares of all steps: r grows linearly from 0 in
    the first, and is 0 in the second, at the end. With `draw`, each step uses a random share of its r, drawn uniformly
    from (seed, step): every count from 0 to r is equally likely. `torch.compile` traces a model again for every new
    count: for compiled models leave out `draw` and keep `warmup` short.

    >>> schedule = StepSchedule(8, steps=100, warmup=0.5, off=0.1)
    >>> schedule.at(0), schedule.at(25), schedule.at(50), schedule.at(99)
    (0, 4, 8, 0)
    """

    def __init__(
        self, r: R, steps: int, *, warmup: float = 0.0, draw: bool = False, off: float = 0.0, seed: int = 0
    ) -> None:
        if steps < 1 or not (0 <= warmup <= 1 and 0 <= off <= 1 and warmup + off <= 1):
            raise InvalidScheduleError(
                f"steps {steps}, warmup {warmup} and off {off}: steps must be at least 1, warmup and off shares of "
                "them whose sum is at most 1."
            )
        self.r, self.steps, self.seed = Schedule.check(r), steps, seed
        self.warmup, self.off, self.draw = warmup, off, draw

    def at(self, step: int) -> PlainR:
        """Return the r of a step, 0 to `steps` - 1."""
        if step >= self.steps * (1 - self.off):
            return 0
        share = min(1.0, step / (self.warmup * self.steps)) if self.warmup else 1.0
        if not self.draw:
            return _scaled(self.r, share)
        chance = random.Random(f"{self.seed} {step}").random()
        if isinstance(self.r, int):
            return int(chance * (_scaled_count(self.r, share) + 1))
        return _scaled(self.r, share * chance)


def _scaled(r: PlainR, share: float) -> PlainR:
    """Scale any form of r by a share."""
    if share == 1:
        return r
    if callable(r):
        return lambda block, tokens: int(share * r(block, tokens))
    if isinstance(r, tuple):
        return (_scaled_count(r[0], share), r[1])
    if isinstance(r, Sequence):
        return [_scaled_count(entry, share) for entry in r]
    return _scaled_count(r, share)


def _scaled_count(amount: int | float, share: float) -> int | float:
    """Scale one entry of r: a float (share of the tokens) stays a float unless it becomes 0; a count is rounded."""
    if isinstance(amount, float):
        return amount * share or 0
    return round(amount * share)
