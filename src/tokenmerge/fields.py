"""Check the settings of methods, configurations and recipes against their annotated types."""

from __future__ import annotations

import ast
import dataclasses
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tokenmerge.errors import unknown_name

__all__ = ["check_options", "checked", "fitted", "named", "read_call"]


def fitted(value: Any, hint: Any) -> Any:
    """Return a value converted to the type of a field; raises `TypeError` for a value of another type.

    Numbers of other libraries become Python's own, and lists become tuples in tuple fields. NaN and `True` are no
    numbers, and 1 is not `True`. Types that are not plain accept any value.
    """
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return _fitted_to_one(value, get_args(hint))
    if origin is Literal:
        # 1 == True
        if any(value == allowed and type(value) is type(allowed) for allowed in get_args(hint)):
            return value
        raise TypeError(f"{value!r} is not {named(hint)}")
    if origin is tuple or hint is tuple:
        return _fitted_tuple(value, get_args(hint))
    accepts, made = _PLAIN.get(origin or hint, (_anything, _itself))
    if not accepts(value):
        raise TypeError(f"{value!r} is no {named(hint)}")
    try:
        return made(value)
    except OverflowError as error:
        raise TypeError(f"{value!r} is too large for a float") from error


def _anything(value: Any) -> bool:
    return True


def _itself(value: Any) -> Any:
    return value


# for each plain type: whether it accepts a value, and the conversion
_PLAIN: dict[Any, tuple[Callable[[Any], bool], Callable[[Any], Any]]] = {
    bool: (lambda value: isinstance(value, bool), bool),
    int: (lambda value: isinstance(value, Integral) and not isinstance(value, bool), int),
    float: (lambda value: isinstance(value, Real) and not isinstance(value, bool) and value == value, float),
    str: (lambda value: isinstance(value, str | os.PathLike), os.fspath),
    dict: (lambda value: isinstance(value, Mapping), dict),
    type(None): (lambda value: value is None, _itself),
}


def checked(owner: object) -> dict[str, Any]:
    """Return the plain values of those fields of a dataclass that hold something else; raises `TypeError`.

    The error's arguments are the field's name, its value, and its type in words.
    """
    changed = {}
    for name, hint in _hints(type(owner)).items():  # type: ignore[arg-type]
        value = getattr(owner, name)
        try:
            plain = fitted(value, hint)
        except TypeError as error:
            raise TypeError(name, value, named(hint, value)) from error
        if type(plain) is not type(value) or isinstance(value, tuple):
            changed[name] = plain
    return changed


def named(hint: Any, value: Any = None) -> str:
    """Return a type in words; for a value of NaN, also that NaN is no number."""
    if get_origin(hint) in (Union, UnionType) and any(get_origin(part) is Literal for part in get_args(hint)):
        parts = [named(part) if part is not bool else "True, False" for part in get_args(hint)]
        return ", ".join(parts)
    if hint is type(None):
        return "None"
    if get_origin(hint) is Literal:
        return ", ".join(map(repr, get_args(hint)))
    name = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("NoneType", "None")
    return f"{name}, and NaN is no number" if isinstance(value, Real) and value != value else name


def _fitted_to_one(value: Any, hints: tuple[Any, ...]) -> Any:
    """Fit a value to the first type that accepts it; the value's own type is tried first."""
    for hint in sorted(hints, key=lambda hint: type(value) is not hint):
        try:
            return fitted(value, hint)
        except TypeError:
            continue
    raise TypeError(f"{value!r} is none of {', '.join(map(named, hints))}")


def _fitted_tuple(value: Any, hints: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{value!r} is no list")
    hints = hints[:1] * len(value) if Ellipsis in hints else hints
    if len(hints) != len(value):
        raise TypeError(f"{value!r} has {len(value)} entries, not {len(hints)}")
    return tuple(map(fitted, value, hints))


@lru_cache
def _hints(kind: Any) -> dict[str, Any]:
    try:
        found = get_type_hints(kind)
    except NameError:  # a class defined inside a function, whose names cannot be resolved here
        return {}
    return {part.name: found[part.name] for part in dataclasses.fields(kind)}


def read_call(text: str) -> tuple[str, dict[str, Any]]:
    """Return name and options of a text like `"tome(metric='x')"`: options by name, once each, with plain values.

    Raises `ValueError` for any other text.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError(f"{text!r} is no name with options")
        names = [part.arg for part in call.keywords]
        if call.args or None in names or len(set(names)) < len(names):
            raise ValueError(f"{text!r} has options without a name, or twice")
        return call.func.id, {str(part.arg): ast.literal_eval(part.value) for part in call.keywords}
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text!r} is no name with options") from error


def check_options(kind: Any, options: Mapping[str, Any]) -> None:
    """Raise `UnknownNameError` for options that are no fields of a dataclass with a `name`."""
    fields = [field.name for field in dataclasses.fields(kind)]
    for option in options:
        if option not in fields:
            raise unknown_name(f"option of {kind.name}", option, fields)
