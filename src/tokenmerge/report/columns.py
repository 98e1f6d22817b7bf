"""The columns of all results, defined once: title, meaning, unit, format and importance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar, cast, overload

__all__ = ["Column", "Record", "find_column"]

T = TypeVar("T")
_ANY_RANK = 50


@dataclass(frozen=True, eq=False)
class Column(Generic[T]):
    """A column of a table, and a descriptor on records: `row.speed_up` is `row["speed-up"]`."""

    title: str  # the heading, and the key in a row and in files
    meaning: str = ""
    unit: str = ""
    decimals: int | None = None  # None: chosen by the size of the number
    rank: int = _ANY_RANK  # importance, smallest first: narrow terminals show only the first columns

    @overload
    def __get__(self, row: None, owner: type) -> Column[T]: ...

    @overload
    def __get__(self, row: Record, owner: type) -> T: ...

    def __get__(self, row: Record | None, owner: type) -> Column[T] | T:
        return self if row is None else cast(T, row.get(self.title))

    def __set__(self, row: Record, value: NoReturn) -> None:
        raise AttributeError(f"a column is read by its attribute and set by its key: row[{self.title!r}] = ...")

    def or_none(self) -> Column[T | None]:
        """Return this column for records that may lack it: the attribute is then None."""
        return cast("Column[T | None]", self)

    def text(self, value: Any) -> str:
        """Return a value as shown in tables.

        >>> Column("ms").text(1234.56), Column("ms").text(0.001234), Column("ms").text(None)
        ('1234.6', '0.0012', '-')
        """
        if value is None:
            return "-"
        if not isinstance(value, float):
            return str(value)
        if self.decimals is not None:
            return f"{value:.{self.decimals}f}"
        if 0 < abs(value) < 0.01:
            return f"{value:.2g}"
        decimals = 3 if abs(value) < 10 else 2 if abs(value) <= 100 else 1
        return f"{value:.{decimals}f}"


class Record(dict[str, Any]):
    """One row of a result: a dict keyed by column titles, as in files, with an attribute per column.

    An attribute is None if the row lacks its column.
    """

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        lines = [f"    {name}: {column.meaning}{_in(column.unit)}." for name, column in cls.columns().items()]
        cls.__doc__ = "\n".join([cls.__doc__ or "", "", "Attributes:", *lines])

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        super().__init__(values or {})

    @classmethod
    def columns(cls) -> dict[str, Column[Any]]:
        """Return the columns in order, by attribute name."""
        parts = reversed(cls.__mro__)
        return {name: value for part in parts for name, value in vars(part).items() if isinstance(value, Column)}

    @classmethod
    def titles(cls) -> list[str]:
        """Return the keys of a complete row, in order."""
        return [column.title for column in cls.columns().values()]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({super().__repr__()})"


def _in(unit: str) -> str:
    return f", in {unit}" if unit else ""


def find_column(title: str) -> Column[Any]:
    """Return the column with this title, or a default column."""
    return _KNOWN.get(title) or Column(title)


# what is measured
METHOD = Column[str]("method", "the method, as it was named", rank=0)
R = Column[str]("r", "what each block removes", rank=1)
BATCH = Column[int]("batch", "how many images one forward takes", "images", rank=2)
MODEL = Column[str]("model", "the name of the model", rank=99)
ASKED = Column[str]("asked", "the r, or the share of the MACs, that was asked for", rank=99)
SPLIT = Column[str]("split", "which images", rank=3)
# answers
TOP1 = Column[float]("top-1 %", "images whose first answer is right", "percent", rank=4)
ACCURACY = Column[float]("accuracy", "images whose first answer is right", "percent", rank=5)
TOP1_ERROR = Column[float]("top-1 ±", "the standard error of top1", "points", decimals=1, rank=12)
TOP5 = Column[float]("top-5 %", "images whose first five answers hold the right one", "percent")
ERROR = Column[float]("error %", "the distance from the unmerged answers, relative to their length", "percent", rank=6)
AGREEMENT = Column[float]("agreement %", "images (or pixels) that get the unmerged model's answer", "percent", rank=8)
COSINE = Column[float]("cosine", "the mean cosine similarity to the unmerged answers", decimals=5, rank=9)
RECALL = Column[float](
    "recall@10", "the share of each image's 10 nearest that are found, all images embedded merged", rank=8
)
RECALL_MIXED = Column[float](
    "recall@10 old", "the same with merged queries in an index of unmerged embeddings", rank=12
)
SEARCH = Column[str]("search", "which embeddings are searched for, in an index of which", rank=2)
RECALL_FIRST = Column[float]("recall@1", "the share of images whose nearest stays the nearest", rank=4)
RECALL_TEN = Column[float]("recall@10", "the share of each image's 10 nearest that are found", rank=5)
KL = Column[float]("KL", "the mean KL divergence from the unmerged model's answers", "nats", rank=17)
DAMAGE = Column[float]("damage", "the squared distance from the unmerged answers, relative to their length", rank=6)
# time
SPEED_UP = Column[float]("speed-up", "how many times as fast as the unmerged model", rank=7)
ESTIMATED = Column[float]("speed-up est.", "the speed-up estimated from what was timed here", rank=7)
IMAGES_PER_SECOND = Column[float]("images/s", "throughput of the merged model", "images per second", rank=10)
MS = Column[float]("ms", "median time of a merged forward", "milliseconds", rank=15)
SPREAD = Column[float | None](
    "spread %", "half the distance of the quartiles of ms; None for few rounds", "percent of ms"
)
UNMERGED_MS = Column[float]("unmerged ms", "median time of an unmerged forward", "milliseconds", rank=16)
NOISE = Column[float | None](
    "noise %", "how far the speed-up differs from round to round; None for few rounds", "percent", rank=13
)
BOUND_MS = Column[float]("bound ms", "median time of the free bound, which drops the same tokens", "milliseconds")
BOUND_IMAGES_PER_SECOND = Column[float]("bound images/s", "throughput of the free bound", "images per second")
OVER_BOUND = Column[float]("over bound", "the time of the merged model over that of the free bound", rank=14)
REFERENCE_MS = Column[float]("reference ms", "median time of the merged model on the reference kernels", "milliseconds")
REFERENCE_OVER_MERGED = Column[float]("reference / merged", "that time over the merged model's")
# size
GMACS = Column[float]("GMACs", "multiply-accumulates of one image", "10^9")
MACS_SHARE = Column[float]("MACs share", "those, as a share of the unmerged model's")
MATCHING_GMACS = Column[float]("matching GMACs", "what choosing the tokens costs on top", "10^9")
TOKENS = Column[int]("tokens", "tokens left after the last block", rank=11)
MEAN_TOKENS = Column[float]("tokens", "tokens left after the last block, the mean over images")
PEAK_MB = Column[float]("peak MB", "memory that a merged forward holds at most", "MiB")
UNMERGED_PEAK_MB = Column[float]("unmerged peak MB", "memory that an unmerged forward holds at most", "MiB")
TRAINING_PEAK_MB = Column[float]("training peak MB", "memory that a merged training step holds at most", "MiB")
UNMERGED_TRAINING_PEAK_MB = Column[float]("unmerged training peak MB", "that of an unmerged step", "MiB")
# jobs
SECONDS = Column[float]("seconds", "the time of work until then", "seconds", decimals=1)
GPU = Column[float]("GPU %", "how much of the time the GPUs were at work", "percent", decimals=1)
# remarks
ATTENTION = Column[str]("attention", "the attention kernel that the merged model ran on")
UNMERGED_ATTENTION = Column[str]("unmerged attention", "the attention kernel that the unmerged model ran on")
NOTE = Column[str]("note", 'why there are no figures, or what "auto" chose')

_KNOWN = {column.title: column for column in reversed(list(vars().values())) if isinstance(column, Column)}
