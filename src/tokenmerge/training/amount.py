"""How much is merged at each step of a training: growing from nothing, drawn at random, off at the end."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tokenmerge.errors import InvalidScheduleError
from tokenmerge.schedule import PlainR, R, Schedule

__all__ = ["Amount"]


class Amount:
    """The `r` of every step, in the form that was given: `handle.r = amount.at(step)` before the step's forward.

    `warmup` and `off` are shares of all steps: in the first, r grows in a straight line from 0; in the last, nothing is
    merged. With `draw`, every step takes a share of its r, drawn evenly from (seed, step): each count from 0 to r
    alike. A compiled model is traced anew for every count: give it an r without `draw`, and a short `warmup`.

    >>> amount = Amount(8, steps=100, warmup=0.5, off=0.1)
    >>> amount.at(0), amount.at(25), amount.at(50), amount.at(99)
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
        """Return the r of a step, from 0 to `steps` - 1."""
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
    """Return a share of any form of r."""
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
    """A share of tokens stays one, unless it is nothing; a count is rounded."""
    if isinstance(amount, float):
        return amount * share or 0
    return round(amount * share)
