"""Adapters from outside that were written for 0.6 and before: what they say is taken over, and a warning names its new
place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from tokenmerge.errors import ConfigError

__all__ = ["Older", "adopt", "check_value", "read"]

# class attributes that are fields of `host`
_DATA = (
    *("followers", "is_positional", "token_methods", "restored_methods", "may_match_features", "ignores_rest"),
    *("cut_by", "package", "loops", "heads"),
)
# methods that are fields of what `surroundings` returns
_FIELDS = {
    "looping_parts": "loops",
    "loop_methods": "trusted",
    "cutter": "cutter",
    "collects": "every",
    "grid_head": "last",
    "hands_out": "handed_out",
}
_OVERRIDES = ("head", "guards", "finish")
_METHODS = (*_FIELDS, "core", "trained_without_merging", *_OVERRIDES)
# what nobody asks any more, and could go wrong unseen
_GONE = {
    "valid": "host.padding",
    "placed": "placed() of the tap",
    "grid_of": "host.grid_of",
    "pooling_parts": "surroundings(model).part",
}
# what `super()` of an older method returns, by its name, while one is asked
_asked: ContextVar[dict[str, Any] | None] = ContextVar("asked", default=None)


class _Before:
    """An older method of the base class: for `super()` in an adapter's own; others are told the successor."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, adapter: Any, owner: type | None = None) -> Any:
        if adapter is None:
            return self
        before = _asked.get()
        return read(adapter, self.name) if before is None else lambda *given: before[self.name]


class Older:
    """The methods that adapters of older releases override."""


for _name in _METHODS:
    _before = _Before()
    _before.__set_name__(Older, _name)
    setattr(Older, _name, _before)


def adopt(cls: Any) -> None:
    """Take over what a class and its mixins say by older names; raises `ConfigError` for what cannot be taken over.

    A class is asked again when it is used: names may have been set since.
    """
    for name, successor in _GONE.items():
        if _owner(cls, name) is not None:
            raise ConfigError(f"{cls.__qualname__}.{name} is not asked any more: say it as {successor}.")
    done = vars(cls).get("_adopted", frozenset())
    data = {name: getattr(cls, name) for name in _DATA if _is_newer(cls, name, "host")}
    if data:
        cls.host = replace(cls.host, **data)
    fields = [name for name in _METHODS if name not in _OVERRIDES and _is_newer(cls, name, "surroundings")]
    if fields and not hasattr(vars(cls).get("surroundings"), "asks"):
        cls.surroundings = _surroundings(cls.surroundings)
    bound = [name for name in _OVERRIDES if _is_newer(cls, name, "overrides")]
    if bound and not hasattr(cls.overrides, "asks"):
        if cls.overrides.__module__ != "tokenmerge.adapters.base":
            raise ConfigError(
                f"{cls.__qualname__} has overrides(), and {', '.join(bound)} besides: say all of it there. "
                "def overrides(self, model, context): return [*super().overrides(model, context), ...]"
            )
        cls.overrides = _overrides
    cls._adopted = done | {*data, *fields, *bound}
    for names, successor in ((data, "host"), (fields, "surroundings()"), (bound, "overrides()")):
        new = [name for name in names if name not in done]
        if new:
            text = f"{cls.__qualname__}: {', '.join(new)} is said in {successor} now (CONTRIBUTING.md, 'A new family')."
            warnings.warn(text, DeprecationWarning, stacklevel=4)


def check_value(adapter: Any, name: str, value: Any) -> None:
    """Take over an older name that is set on an instance; raises `ConfigError` for a method."""
    if name in _DATA:
        adapter.host = replace(adapter.host, **{name: value})
        warnings.warn(f"{type(adapter).__qualname__}.{name} is host.{name} now.", DeprecationWarning, stacklevel=3)
    elif name in _METHODS or name in _GONE:
        raise ConfigError(
            f"{type(adapter).__qualname__}: {name} was set on an instance, and is asked of its class: {_place(name)}."
        )


def read(adapter: Any, name: str) -> Any:
    """Return what an adapter had by an older name; raises `AttributeError` for a name that nothing answers to."""
    if name in _DATA:
        found, successor = getattr(adapter.host, name), f"host.{name}"
    elif name in _FIELDS:
        found, successor = (
            lambda model: getattr(adapter.surroundings(model), _FIELDS[name]),
            f"surroundings(model).{_FIELDS[name]}",
        )
    elif name in _METHODS or name in _GONE:
        raise AttributeError(f"{type(adapter).__name__}.{name} is not asked any more: {_place(name)}.")
    else:
        raise AttributeError(f"{type(adapter).__name__!r} object has no attribute {name!r}")
    warnings.warn(f"{type(adapter).__name__}.{name} is {successor} now.", DeprecationWarning, stacklevel=3)
    return found


def _place(name: str) -> str:
    """Say where what had this name is now."""
    if name in _OVERRIDES:
        return "it is part of overrides(model, context)"
    fields = {**_FIELDS, "core": "adapter", "trained_without_merging": "without_merging"}
    return f"it is surroundings(model).{fields[name]}" if name in fields else f"it is {_GONE[name]}"


def _owner(cls: type, name: str) -> int | None:
    """Return where in the order of a class's bases a name is found; None for what the base class has."""
    for place, base in enumerate(cls.__mro__):
        if base is Older:
            return None
        if name in vars(base):
            return place
    return None


def _is_newer(cls: type, older: str, name: str) -> bool:
    """Say whether an older name was given after its successor: in the class itself, or in a mixin before it."""
    place, successor = _owner(cls, older), _owner(cls, name)
    return place is not None and (place == 0 or successor is None or place < successor)


def _surroundings(before: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that asks the older ones, over the surroundings that a class has without them."""
    root = getattr(before, "asks", before)

    def surroundings(self: Any, model: Any) -> Any:
        found = root(self, model)
        without = found.without_merging
        answers = {name: getattr(found, field) for name, field in _FIELDS.items()}
        answers |= {"core": (found.adapter, found.part)}
        answers |= {"trained_without_merging": (without is True, None if without is not None else "not known")}
        given = {_FIELDS[name]: answer for name, answer in _ask(self, answers, _FIELDS, model).items()}
        for adapter, part in _ask(self, answers, ("core",), model).values():
            given |= {"adapter": adapter, "part": part}
        for is_so, doubt in _ask(self, answers, ("trained_without_merging",), model).values():
            given["without_merging"] = True if is_so else None if doubt else False
        return replace(found, **given)

    surroundings.asks = root  # type: ignore[attr-defined]
    return surroundings


def _overrides(self: Any, model: Any, context: Any) -> Any:
    """Return what the older `head`, `guards` and `finish` bind."""
    answers: dict[str, Any] = {"head": ([], []), "guards": [], "finish": []}
    found: list[Any] = []
    if context.sizes is not None:
        found += [
            binding for bound, _ in _ask(self, answers, ("head",), model, context.sizes).values() for binding in bound
        ]
    if context.must_refuse:
        found += [
            one for bound in _ask(self, answers, ("guards",), model, context.is_merging).values() for one in bound
        ]
    finished = _ask(self, answers, ("finish",), model, context.is_merging, context.restore)
    return [*found, *(binding for bound in finished.values() for binding in bound)]


_overrides.asks = None  # type: ignore[attr-defined]


def _ask(adapter: Any, before: dict[str, Any], names: Iterable[str], *given: Any) -> dict[str, Any]:
    """Return the answers of the older methods of these names that an adapter has."""
    token = _asked.set(before)
    try:
        return {name: getattr(adapter, name)(*given) for name in names if _owner(type(adapter), name) is not None}
    finally:
        _asked.reset(token)
