"""The reduction methods, in the order the documentation shows them."""

from __future__ import annotations

from tokenmerge.errors import UnknownNameError, unknown_name
from tokenmerge.methods.base import Reduction, TokenView
from tokenmerge.methods.drop import Drop
from tokenmerge.methods.learned import NEW, Learned
from tokenmerge.methods.tome import ToMe

__all__ = ["NEW", "Drop", "Learned", "Reduction", "ToMe", "TokenView", "find", "list_methods", "register"]

_METHODS: dict[str, type[Reduction]] = {method.name: method for method in (ToMe, Drop)}


def list_methods() -> list[str]:
    """Return the names that `patch` accepts."""
    return list(_METHODS)


def find(name: str) -> type[Reduction]:
    """Return the method class of that name; raises `UnknownNameError` with the nearest one."""
    if name not in _METHODS:
        raise unknown_name("method", name, _METHODS)
    return _METHODS[name]


def register(method: type[Reduction]) -> type[Reduction]:
    """Add a method from outside the library under its `name` (a class decorator); raises if the name is taken."""
    if method.name in _METHODS:
        raise UnknownNameError(f"method name {method.name!r} is taken by {_METHODS[method.name].__qualname__}.")
    _METHODS[method.name] = method
    return method
