"""The reduction methods, in the order the documentation shows them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokenmerge.errors import ConfigError, UnknownNameError, unknown_name
from tokenmerge.fields import check_options, read_call
from tokenmerge.methods.base import Reduction as Reduction
from tokenmerge.methods.base import TokenView as TokenView
from tokenmerge.methods.learned import NEW as NEW
from tokenmerge.methods.learned import Learned as Learned
from tokenmerge.methods.tome import ToMe as ToMe

if TYPE_CHECKING:
    from tokenmerge.methods.catalog import *  # noqa: F403  one line per method, there


def _known() -> dict[str, type[Reduction]]:
    """Return every method by its name. The catalog makes 30 dataclasses: too slow for `import tokenmerge`."""
    known: dict[str, type[Reduction]] = import_module("tokenmerge.methods.catalog").METHODS
    return known


def list_methods() -> list[str]:
    """Return the names that `patch` accepts."""
    return list(_known())


def find(name: str) -> type[Reduction]:
    """Return the method class of that name; raises `UnknownNameError` with the nearest one."""
    if name == ToMe.name:
        return ToMe
    known = _known()
    if name not in known:
        raise unknown_name("method", name, known)
    return known[name]


def parse(text: str) -> Reduction:
    """Return the method for a name, or for a name with options.

    Raises `UnknownNameError` (with the nearest name) for an unknown name or option, and `ConfigError` for any other
    text.

    >>> parse("tome(metric='x')")
    ToMe(metric='x', heads='mean', distance='cosine', combine='weighted', partition='alternating', seed=0)
    """
    shown = text if len(text) < 200 else f"{text[:200]} ..."
    if "(" not in text:
        return find(shown)()
    try:
        name, given = read_call(text)
    except ValueError as error:
        raise ConfigError(
            f"{shown!r} is no method: give a name (`tokenmerge list`), one with options as tome(metric='x'), each "
            "once, by its name and with a plain value, a saved configuration (.json), or a folder that "
            "`tokenmerge train` wrote."
        ) from error
    method = find(name)
    check_options(method, given)
    return method(**given)


def register(method: type[Reduction]) -> type[Reduction]:
    """Add a method from outside the library under its `name` (a class decorator); raises if the name is taken."""
    known = _known()
    if method.name in known:
        raise UnknownNameError(f"method name {method.name!r} is taken by {known[method.name].__qualname__}.")
    known[method.name] = method
    return method


if not TYPE_CHECKING:  # hidden from type checkers, so that they report unknown names

    def __getattr__(name: str) -> Any:
        if name == "__all__":
            return [name for name in __dir__() if not name.startswith("_")]
        if not name.startswith("_"):
            for names in (vars(import_module("tokenmerge.methods.catalog")), globals()):
                if name in names:
                    return names[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(kind.__name__ for kind in _known().values())})
