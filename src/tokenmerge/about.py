"""Describe a reduction method, for choosing one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tokenmerge.config import MergeConfig
from tokenmerge.methods import Learned, Reduction

__all__ = ["MethodInfo", "describe"]


@dataclass(frozen=True)
class MethodInfo:
    """What a method does and what it needs from a model; `str()` returns a table."""

    name: str
    summary: str  # a sentence
    paper: str  # authors, place, year and identifier; "" where there is none
    needs: tuple[str, ...]  # q, k, v of the attention, a class token, the places of tokens on the grid of patches
    is_adaptive: bool  # the number of removed tokens depends on the images: at most `r`
    is_learned: bool  # it has weights of its own: trained, or read from a file
    is_proportional: bool  # what prop_attn="auto" means for it
    options: dict[str, Any]  # by name, with their values

    def __str__(self) -> str:
        removes = "at most r tokens per block" if self.is_adaptive else "r tokens per block"
        rows = [
            ("method", self.name),
            ("what it does", self.summary),
            ("paper", self.paper or "-"),
            ("needs", ", ".join(self.needs) or "nothing"),
            ("removes", removes),
            ("weights", "its own" if self.is_learned else "none"),
            ("proportional attention", "on" if self.is_proportional else "off"),
            ("options", ", ".join(f"{name}={value!r}" for name, value in self.options.items()) or "none"),
        ]
        return "\n".join(f"{name:<23} {value}" for name, value in rows)


def describe(method: str | Reduction) -> MethodInfo:
    """Return the description of a method: a name (`list_methods()`), a name with options, or an object.

    Raises `UnknownNameError` (with the nearest name) for an unknown name or option, and `ConfigError` for anything that
    is no method.

    >>> describe("tofu").paper, describe("tofu").needs
    ('Kim et al., WACV 2024, arXiv:2312.01026.', ('k',))
    """
    method = MergeConfig(method).method
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
    first, *_ = (type(method).__doc__ or "").strip().splitlines() or [""]
    summary, dot, paper = first.partition(". ")
    return MethodInfo(
        name=method.name,
        summary=summary + dot.strip(),
        paper=paper,
        needs=tuple(sorted(method.needs)),
        is_adaptive=method.is_adaptive,
        is_learned=isinstance(method, Learned),
        is_proportional=method.is_proportional,
        options={field.name: getattr(method, field.name) for field in fields},
    )
