"""What a plot of results draws, on paper and on a page: its columns, how far its axes reach, and what is marked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "COLOURS",
    "QUALITY",
    "Chart",
    "Row",
    "axis_of",
    "error_of",
    "free_bound",
    "front",
    "limits",
    "number",
    "unmerged_level",
]

Row = Mapping[str, Any]

# of Okabe and Ito, and a dark one: told apart by people who do not see red or green; plots give each a marker too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#882255")
# how good answers are, by the first of these that the rows have
QUALITY = ("top-1 %", "agreement %", "cosine", "recall@10", "error %")
_EDGE = 0.05  # of an axis, beyond the last mark


@dataclass(frozen=True)
class Axis:
    """How a column is drawn along an axis."""

    name: str  # with the unit
    better: int = 0  # 1: more is better, -1: less
    least: float = 0.0  # it spans at least this much, so that a small difference looks small; 0: half the largest value
    most: float | None = None  # no value is larger
    is_log: bool = False

    @property
    def text(self) -> str:
        """What stands beside it."""
        return self.name + {1: " (more is better)", -1: " (less is better)"}.get(self.better, "")


_AXES = {
    "r": Axis("r: what each block removes"),
    "top-1 %": Axis("top-1 accuracy, %", 1, 10.0, 100.0),
    "top-5 %": Axis("top-5 accuracy, %", 1, 10.0, 100.0),
    "agreement %": Axis("answers as the unmerged model's, %", 1, 10.0, 100.0),
    "error %": Axis("distance from the unmerged answers, %", -1, 10.0),
    "cosine": Axis("cosine similarity to the unmerged answers", 1, 0.1, 1.0),
    "recall@10": Axis("share of the 10 nearest that are found", 1, 0.1, 1.0),
    "damage": Axis("damage: squared distance of the answers, as a share", -1, is_log=True),
    "images/s": Axis("images per second", 1),
    "speed-up": Axis("speed-up: times as fast as the unmerged model", 1),
    "speed-up est.": Axis("estimated speed-up: times as fast as unmerged", 1),
    "ms": Axis("milliseconds of a forward", -1),
    "GMACs": Axis("GMACs of an image (10⁹ multiply-adds)", -1),
    "MACs share": Axis("share of the unmerged model's MACs", -1, 0.5, 1.0),
    "tokens": Axis("tokens left after the last block"),
    "peak MB": Axis("peak memory of a forward, MiB", -1),
    "seconds": Axis("seconds of work"),
    "GPU %": Axis("GPUs at work, % of the time", 1, 10.0, 100.0),
}


@dataclass(frozen=True)
class Chart:
    """Which columns of the rows are drawn, and what a row is called.

    The first of `x` and of `y` that the rows have are shown first; a reader may choose the others.
    """

    x: tuple[str, ...]
    y: tuple[str, ...]
    label: Callable[[Row], str]  # the name of a point
    series: Callable[[Row], str] = lambda row: "merged"  # what has one colour and marker
    is_unmerged: Callable[[Row], bool] = lambda row: False
    is_joined: bool = True  # a line through each series; without it through the rows that no other beats
    is_named: bool = True  # names beside the marks; without it small marks, for hundreds of them


def axis_of(title: str) -> Axis:
    """Return how a column is drawn along an axis."""
    return _AXES.get(title) or Axis(title)


def limits(title: str, values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of a column's axis. It spans enough that a difference of two points is no cliff.

    >>> limits("top-1 %", [90.0, 92.0]), limits("top-1 %", [98.0, 100.0])
    ((86.0, 96.0), (90.5, 100.5))
    """
    axis, low, high = axis_of(title), min(values), max(values)
    if axis.is_log:
        middle, half = math.sqrt(low * high), max((high / low) ** (0.5 + _EDGE), math.sqrt(10))
        return middle / half, middle * half
    span = max((1 + 2 * _EDGE) * (high - low), axis.least or max(abs(low), abs(high)) / 2 or 1.0)
    low, high = (low + high - span) / 2, (low + high + span) / 2
    if axis.most is not None and high > axis.most + _EDGE * span:
        low, high = axis.most + (_EDGE - 1) * span, axis.most + _EDGE * span
    if low < -_EDGE * span <= min(values):
        low, high = -_EDGE * span, (1 - _EDGE) * span
    return low, high


def number(value: Any) -> float | None:
    """Return a value that can be drawn; None for what is no finite number."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def free_bound(row: Row, title: str) -> float | None:
    """Return the free bound's figure in a column: that of a model which drops the row's tokens at no cost."""
    own, over = number(row.get(title)), number(row.get("over bound"))
    measured = number(row.get(f"bound {title}"))
    if measured is not None or own is None or over is None:
        return measured
    return {"images/s": own * over, "speed-up": own * over, "ms": own / over}.get(title)


def unmerged_level(row: Row, title: str) -> float | None:
    """Return the unmerged model's figure in a column, beside which the row was measured; None where it has none."""
    if title == "speed-up":
        return 1.0
    ms = number(row.get("unmerged ms"))
    if title == "images/s" and ms:
        return 1e3 * float(row["batch"]) / ms
    return ms if title == "ms" else number(row.get(f"unmerged {title}"))


def error_of(row: Row, title: str) -> float | None:
    """Return half the length of a figure's error bar: the standard error of an accuracy, the noise of a speed-up."""
    if title == "top-1 %":
        return number(row.get("top-1 ±"))
    own, noise = number(row.get(title)), number(row.get("noise %"))
    return own * noise / 100 if title == "speed-up" and own is not None and noise is not None else None


def front(rows: Sequence[Row], quality: str, column: str) -> list[Row]:
    """Return the rows that no other beats in quality and in one column, from its better end.

    The column is compared to two digits, because rows meant to be equal differ slightly. Where no end of the quality
    is better, more is.
    """
    sign, up = axis_of(column).better or 1, axis_of(quality).better or 1
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (sign * float(f"{row[column]:.2g}"), up * row[quality]), reverse=True):
        if not found or up * row[quality] > up * found[-1][quality]:
            found.append(row)
    return found
