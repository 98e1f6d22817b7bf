"""Adapters from outside that were written for 0.6 and before: what they say is taken over, and a warning names its new
place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tokenmerge.errors import ConfigError

__all__ = ["adopt", "read"]

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
# what nobody asks any more, and could go wrong unseen
_GONE = {
    "valid": "host.padding",
    "placed": "placed() of the tap",
    "grid_of": "host.grid_of",
    "pooling_parts": "surroundings(model).part",
}


def adopt(cls: Any) -> None:
    """Take over what a class says by older names; raises `ConfigError` for what cannot be taken over."""
    own = vars(cls)
    for name, successor in _GONE.items():
        if name in own:
            raise ConfigError(f"{cls.__qualname__}.{name} is not asked any more: say it as {successor}.")
    data = {name: own[name] for name in _DATA if name in own}
    if data:
        cls.host = replace(cls.host, **data)
    fields = {name: own[name] for name in (*_FIELDS, "core", "trained_without_merging") if name in own}
    if fields:
        cls.surroundings = _surroundings(cls.surroundings, fields)
    bound = {name: own[name] for name in _OVERRIDES if name in own}
    if bound:
        if "overrides" in own or any(
            "overrides" in vars(base) and base.__module__ != "tokenmerge.adapters.base" for base in cls.__mro__[1:]
        ):
            raise ConfigError(
                f"{cls.__qualname__} has overrides(), and {', '.join(bound)} besides: say all of it there."
            )
        cls.overrides = _overrides(bound)
    for names, successor in ((data, "host"), (fields, "surroundings()"), (bound, "overrides()")):
        if names:
            text = (
                f"{cls.__qualname__}: {', '.join(names)} is said in {successor} now (CONTRIBUTING.md, 'A new family')."
            )
            warnings.warn(text, DeprecationWarning, stacklevel=4)


def read(adapter: Any, name: str) -> Any:
    """Return what an adapter had by an older name; raises `AttributeError` for a name that it never had."""
    if name in _DATA:
        found, successor = getattr(adapter.host, name), f"host.{name}"
    elif name in _FIELDS:
        found, successor = (
            lambda model: getattr(adapter.surroundings(model), _FIELDS[name]),
            f"surroundings(model).{_FIELDS[name]}",
        )
    else:
        raise AttributeError(f"{type(adapter).__name__!r} object has no attribute {name!r}")
    warnings.warn(f"{type(adapter).__name__}.{name} is {successor} now.", DeprecationWarning, stacklevel=3)
    return found


def _surroundings(before: Callable[..., Any], own: dict[str, Any]) -> Callable[..., Any]:
    def surroundings(self: Any, model: Any) -> Any:
        found = before(self, model)
        given = {_FIELDS[name]: method(self, model) for name, method in own.items() if name in _FIELDS}
        if "core" in own:
            given["adapter"], given["part"] = own["core"](self, model)
        if "trained_without_merging" in own:
            is_so, doubt = own["trained_without_merging"](self, model)
            given["without_merging"] = True if is_so else None if doubt else False
        return replace(found, **given)

    return surroundings


def _overrides(own: dict[str, Any]) -> Callable[..., Any]:
    def overrides(self: Any, model: Any, context: Any) -> Any:
        found = []
        if "head" in own and context.sizes is not None:
            found += own["head"](self, model, context.sizes)[0]
        if "guards" in own and context.must_refuse:
            found += own["guards"](self, model, context.is_merging)
        if "finish" in own:
            found += own["finish"](self, model, context.is_merging, context.restore)
        return found

    return overrides
