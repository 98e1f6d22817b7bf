"""What a user asks of `tune`, in the words people own: "2x", "12ms", "macs=0.5", "drop=0.5", "agreement=99"."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tokenmerge.errors import ConfigError

__all__ = ["Target", "read_targets"]

FORMS = (
    "2x (times as fast here), 12ms (a forward of one batch here), macs=0.5 (the share that is left), memory=0.7 (the "
    "share of the peak memory), drop=0.5 (points of accuracy lost at most, needs labels), agreement=99 (percent of "
    "answers that stay)"
)
_NUMBER = r"(-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))"
# what a number may be: more than the first, at most the second; a drop may be 0 too
_LIMITS = {
    "speed": (1.0, 100.0),
    "ms": (0.0, math.inf),
    "macs": (0.0, 1.0),
    "memory": (0.0, 1.0),
    "drop": (0.0, 100.0),
    "agreement": (0.0, 100.0),
}
_COSTS = ("speed", "ms", "macs", "memory")


@dataclass(frozen=True)
class Target:
    """One thing that is asked for: a cost that is reached (speed, ms, macs, memory), or a loss that is not exceeded."""

    kind: str
    value: float

    @property
    def is_cost(self) -> bool:
        """Whether it limits what a forward takes, not what merging damages."""
        return self.kind in _COSTS

    @property
    def points(self) -> float:
        """The points of accuracy or agreement that a loss may be at most."""
        return self.value if self.kind == "drop" else 100 - self.value

    def __str__(self) -> str:
        return {"speed": f"{self.value:g}x", "ms": f"{self.value:g}ms"}.get(self.kind, f"{self.kind}={self.value:g}")


def read_targets(target: str | float | Target | Sequence[str | Target]) -> tuple[Target, ...]:
    """Return the targets that a text, or several, ask for; raises `ConfigError` that says which there are.

    >>> [str(target) for target in read_targets("2x drop=0.5")]
    ['2x', 'drop=0.5']
    """
    given = target.split() if isinstance(target, str) else target if isinstance(target, Sequence) else [target]
    found = tuple(one if isinstance(one, Target) else _read(str(one)) for one in given)
    kinds = [one.kind for one in found]
    if not found:
        raise ConfigError(f"target is {target!r}; give {FORMS}.")
    twins = [str(one) for one in found if kinds.count(one.kind) > 1]
    if twins:
        raise ConfigError(f"{' and '.join(twins)} ask for the same thing twice: keep one. Several must differ in kind.")
    return found


def _read(text: str) -> Target:
    match = re.fullmatch(rf"{_NUMBER}(x|ms)|([a-z]+)={_NUMBER}(%?)", text.strip().lower())
    kind = "" if match is None else {"x": "speed", "ms": "ms"}.get(match[2] or "", match[3] or "")
    if match is None or kind not in _LIMITS:
        raise ConfigError(f"{text!r} is no target; give {FORMS}. Several with spaces between.")
    value = float(match[1] or match[4])
    low, high = _LIMITS[kind]
    is_within = low < value <= high or (kind == "drop" and value == low)
    if not is_within or (match[5] and kind not in ("drop", "agreement")):
        between = f"{'at least' if kind == 'drop' else 'more than'} {low:g}"
        between += "" if high == math.inf else f", at most {high:g}"
        raise ConfigError(f"target {text!r}: the number must be {between}.")
    return Target(kind, value)
