"""The number of tokens that each layer removes: checks every form of `r`, and evaluates it per layer."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from tokenmerge._moved import moved_names
from tokenmerge.errors import InvalidScheduleError

__all__ = ["TEXT_FORMS", "Amount", "PlainR", "R", "Schedule", "parse_r"]

Amount = int | float | Callable[[int, int], int]
PlainR = Amount | Sequence[int | float] | tuple[int | float, float]
R: TypeAlias = Union[PlainR, "Schedule"]

_ALLOWED = (
    "Allowed: an int >= 0 (tokens removed per block), a float in (0, 1) (share of the unprotected tokens), a list of "
    "these per block (short lists are padded with 0), a pair (r, inflection) with inflection in [-1, 1], a callable "
    "(block, tokens) -> int, or a Schedule."
)

# the forms that `Schedule.parse` reads
TEXT_FORMS = "tokens removed per block: 8, a share 0.1, a pair 16,-1 (amount, inflection), or a list [25,25,10]"


def _half(tokens: int, prefix: int) -> int:
    return max(0, (tokens - prefix) // 2)


@dataclass(frozen=True)
class Schedule:
    """One amount per layer, rounded so that `multiple_of` divides the tokens left. `Schedule.of` validates the input.

    >>> Schedule.of((16, -1.0), depth=12).amounts
    (32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0)
    """

    amounts: tuple[Amount, ...]
    multiple_of: int = 1
    largest: Callable[[int, int], int] = _half

    def __post_init__(self) -> None:
        if isinstance(self.amounts, list):
            object.__setattr__(self, "amounts", tuple(self.amounts))
        elif not isinstance(self.amounts, tuple):
            raise InvalidScheduleError(
                f"a Schedule has a tuple of amounts, one per layer, not {self.amounts!r}: Schedule.of(r, depth) makes "
                "one of any form of r."
            )

    @staticmethod
    def of(r: R, depth: int, multiple_of: int = 1, largest: Callable[[int, int], int] = _half) -> Schedule:
        """Build a schedule from any allowed form of `r`; raises `InvalidScheduleError` (a ValueError).

        Args:
            r: the amounts, in any form that `patch` takes.
            depth: the number of blocks.
            multiple_of: the number that divides the tokens left by each block.
            largest: `largest(tokens, prefix)` is the maximum that one block can remove. Default: half the unprotected.
        """
        if isinstance(multiple_of, bool) or not isinstance(multiple_of, Integral) or multiple_of < 1:
            raise InvalidScheduleError(
                f"multiple_of is {multiple_of!r}. Allowed: an int >= 1 that divides the tokens left by each block."
            )
        return Schedule(_amounts(r, depth), int(multiple_of), largest)

    @staticmethod
    def check(r: R) -> PlainR:
        """Return any allowed form of `r` as plain Python numbers, with lists copied; raises `InvalidScheduleError`.

        The number of blocks is unknown here: `Schedule.of` checks the length of a list. A schedule becomes the list of
        its amounts.

        >>> Schedule.check([8, 0.0])
        [8, 0]
        """
        if isinstance(r, Schedule):
            first = r.amounts[0] if r.amounts else 0
            return first if callable(first) else list(r.amounts)  # type: ignore[arg-type]
        if callable(r):
            return r
        if isinstance(r, tuple):
            _inflected(r, 1)
            return int(r[0]), float(r[1])
        if isinstance(r, Sequence) and not isinstance(r, str):
            return [_entry(entry) for entry in r]
        return _amount(r)

    @staticmethod
    def parse(text: str) -> PlainR:
        """Parse `r` from text in Python's notation; raises `InvalidScheduleError`.

        >>> Schedule.parse("16,-1"), Schedule.parse("[25, 0.1]"), Schedule.parse("8")
        ((16, -1), [25, 0.1], 8)
        """
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise InvalidScheduleError(f"{text!r} is no r: {TEXT_FORMS}.") from error
        Schedule.check(value)
        return value  # type: ignore[no-any-return]

    @property
    def is_merging(self) -> bool:
        """Whether any layer may remove tokens."""
        return any(amount != 0 for amount in self.amounts)

    def at(self, layer: int, tokens: int, prefix: int) -> int:
        """Return how many of `tokens` (prefix included) the layer removes, at most what the method can remove."""
        amount = self.amounts[layer]
        if callable(amount):
            amount = amount(layer, tokens)
            if isinstance(amount, bool) or not isinstance(amount, Integral) or amount < 0:
                raise InvalidScheduleError(f"the callable r returned {amount!r} for block {layer}. {_ALLOWED}")
        elif isinstance(amount, float):
            amount = int(amount * max(0, tokens - prefix))
        else:
            # one captured graph per r: with a symbolic r, tracing may take ten times as long
            amount = operator.index(amount)
        most = self.largest(tokens, prefix)
        amount = min(int(amount), most)
        return self._round(amount, tokens, most) if amount and self.multiple_of > 1 else amount

    def _round(self, amount: int, tokens: int, most: int) -> int:
        """Return the nearest amount that leaves a multiple (of two the larger), or `amount` if there is none."""
        more = amount + (tokens - amount) % self.multiple_of
        allowed = [other for other in (more, more - self.multiple_of) if 0 <= other <= most]
        return min(allowed, key=lambda other: abs(other - amount), default=amount)

    def tokens(self, tokens: int, prefix: int) -> list[int]:
        """Return the tokens left after each layer, from `tokens` at the first (prefix included)."""
        left = []
        for layer in range(len(self.amounts)):
            tokens -= self.at(layer, tokens, prefix)
            left.append(tokens)
        return left


def parse_r(num_layers: int, r: int | list[int] | tuple[int, float]) -> list[int]:
    """Return the tokens to remove per layer for an int, a list or a pair (r, inflection), before any clamping.

    >>> parse_r(4, (8, 1.0))
    [0, 5, 10, 16]
    """
    amounts = Schedule.of(r, num_layers).amounts
    counts = [amount for amount in amounts if isinstance(amount, int)]
    if len(counts) < len(amounts):
        raise InvalidScheduleError(f"parse_r counts tokens; r is {r!r}. Allowed: an int, a list of ints, a pair.")
    return counts


def _amounts(r: R, depth: int) -> tuple[Amount, ...]:
    r = Schedule.check(r) if isinstance(r, Schedule) else r
    if callable(r):
        return (r,) * depth
    if isinstance(r, tuple):
        return tuple(_inflected(r, depth))
    if isinstance(r, Sequence) and not isinstance(r, str):
        if len(r) > depth:
            raise InvalidScheduleError(f"r has {len(r)} entries, the model has {depth} blocks. {_ALLOWED}")
        return tuple(_entry(entry) for entry in r) + (0,) * (depth - len(r))
    return (_amount(r),) * depth


def _inflected(pair: tuple[Any, ...], depth: int) -> list[int]:
    """Return amounts that rise or fall linearly around `r`: from 2r to 0 at -1, from 0 to 2r at +1."""
    if len(pair) != 2:
        raise InvalidScheduleError(f"r is a tuple of {len(pair)} entries: {pair!r}. {_ALLOWED}")
    r, inflection = pair
    is_number = isinstance(inflection, Real) and not isinstance(inflection, bool)
    if not is_number or not -1 <= inflection <= 1:
        raise InvalidScheduleError(f"r has the inflection {inflection!r}. {_ALLOWED}")
    if isinstance(_amount(r), float):
        raise InvalidScheduleError(f"r is the pair {pair!r}; its first entry counts tokens, an int. {_ALLOWED}")
    first = int(r * (1 - inflection))
    last = 2 * r - first
    step = (last - first) / max(1, depth - 1)
    return [int(first + step * layer) for layer in range(depth)]


def _entry(value: Any) -> int | float:
    """Return one entry of a list: a count or a share; 0.0 means 0 tokens."""
    is_nothing = isinstance(value, Real) and not isinstance(value, bool) and value == 0
    return 0 if is_nothing else _amount(value)


def _amount(value: Any) -> int | float:
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0:
        return int(value)
    if isinstance(value, Real) and not isinstance(value, Integral) and 0 < float(value) < 1:
        return float(value)
    raise InvalidScheduleError(f"r holds {value!r}. {_ALLOWED}")


if not TYPE_CHECKING:
    __getattr__ = moved_names(__name__)
