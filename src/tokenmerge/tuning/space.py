"""The candidates: methods, and the options of each that are worth trying on a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from tokenmerge import methods as known
from tokenmerge.errors import ConfigError
from tokenmerge.methods import LeastLoss, Reduction, ToFu, ToMe
from tokenmerge.methods.base import CAPTURED
from tokenmerge.tuning.subject import Subject

__all__ = ["cheaper", "neighbours", "read_methods", "starts"]

Values = Mapping[str, Sequence[Any]]

# the values that are tried of each option, in the order in which options are searched
_OPTIONS: dict[type[Reduction], Values] = {
    ToMe: {
        "metric": ("k", "x", "x_pre", "q", "v"),
        "heads": ("mean", "concat"),
        "combine": ("weighted", "average"),
    },
    ToFu: {"metric": ("k", "x", "x_pre", "q", "v"), "early": (0.0, 0.25, 0.5, 0.75), "combine": ("mlerp", "average")},
    LeastLoss: {
        "metric": ("k", "x", "x_pre", "q", "v"),
        "early": (0.0, 0.25, 0.5, 0.75),
        "combine": ("weighted", "mlerp", "average"),
        "pairs": ("bipartite", "mutual"),
        "importance": (0.0, 0.25, 0.5, 1.0),
        "score": ("class", "shift", "norm"),
        "size": (0.0, 0.25, 0.5, 1.0),
        "heads": ("mean", "concat"),
    },
}


def starts(subject: Subject, given: Sequence[str | Reduction]) -> list[Reduction]:
    """Return the methods to start from, of those that `read_methods` gave; the model may be unable to run some.

    `least_loss` by name starts twice: as it is, and with the options that make it ToMe.
    """
    found: list[Reduction] = []
    for one in given:
        if isinstance(one, str):
            score = "class" if subject.has_class else "shift"
            as_tome = LeastLoss(early=0.0, combine="weighted", size=0.0, importance=0.0, score=score)
            found += [LeastLoss(score=score), as_tome]
        else:
            found.append(one)
    return found


def read_methods(given: str | Reduction | Sequence[str | Reduction]) -> list[str | Reduction]:
    """Return one method or several as objects, `least_loss` by its name.

    Raises `UnknownNameError`, and `ConfigError` for no method and for adaptive ones.
    """
    listed = [given] if isinstance(given, str | Reduction) else given
    if not isinstance(listed, Sequence) or not listed or not all(isinstance(one, str | Reduction) for one in listed):
        raise ConfigError(f"methods is {given!r}; give one or more names or objects, e.g. ('least_loss', 'tofu').")
    found = [known.parse(one) if isinstance(one, str) and one != LeastLoss.name else one for one in listed]
    adaptive = [method.name for method in found if isinstance(method, Reduction) and method.is_adaptive]
    if adaptive:
        raise ConfigError(
            f"{', '.join(adaptive)}: how many tokens go depends on the images, so no share of the MACs can be planned. "
            "Give methods that remove exactly r (docs/methods.md)."
        )
    return found


def cheaper(method: Reduction) -> Reduction | None:
    """Return the method without the option that costs time beside the MACs; None where there is none."""
    has_all_pairs = isinstance(method, LeastLoss) and method.pairs == "mutual"
    return dataclasses.replace(method, pairs="bipartite") if has_all_pairs else None  # type: ignore[type-var]


def neighbours(method: Reduction) -> Iterator[Callable[[Reduction], list[Reduction]]]:
    """Yield, for each option of the kind of a method, what returns the methods that differ in this option alone.

    An option that changes nothing beside the others is left out.
    """
    for option, values in _OPTIONS.get(type(method), {}).items():
        yield partial(_others, option, values)


def _others(option: str, values: Sequence[Any], method: Reduction) -> list[Reduction]:
    has_heads = getattr(method, "metric", "") in CAPTURED
    is_idle = (option == "heads" and not has_heads) or (option == "score" and not getattr(method, "importance", 1.0))
    changed = [dataclasses.replace(method, **{option: value}) for value in values]  # type: ignore[type-var]
    return [] if is_idle else [other for other in changed if other != method]
