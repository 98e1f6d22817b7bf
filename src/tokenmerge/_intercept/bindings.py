"""Bind attributes on module instances and undo it. Notes are kept on each module, so copies can be undone too."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from tokenmerge._intercept.override import Binding, Override

__all__ = ["bind", "is_bound", "notes", "undo"]

_NOTES = "_tokenmerge_bound"


class _Note(NamedTuple):
    attribute: str
    existed: bool
    previous: Any
    value: Any


def bind(replacement: Binding) -> None:
    """Set an attribute on a module instance and note its previous value on the module."""
    owner, attribute, value = replacement
    previous = owner.__dict__.get(attribute)
    note = _Note(attribute, attribute in owner.__dict__, previous, value)
    if isinstance(value, Override) and value.owner is owner:
        value.previous = previous  # several overrides may be created before the first is bound
    owner.__dict__.setdefault(_NOTES, []).append(note)
    owner.__dict__[attribute] = value


def is_bound(module: nn.Module) -> bool:
    """Return whether anything is bound on this module."""
    return _NOTES in module.__dict__


def notes(module: nn.Module) -> list[_Note]:
    """Return the notes of all bindings on this module, in the order they were made."""
    found: list[_Note] = module.__dict__.get(_NOTES, [])
    return found


def undo(modules: Iterable[nn.Module]) -> None:
    """Remove all bindings from these modules.

    A wrapper that other code put on top of a binding stays, with a warning; it then calls the module's own code.
    """
    for module in modules:
        for attribute, existed, previous, value in reversed(module.__dict__.pop(_NOTES, [])):
            now = module.__dict__.get(attribute)
            if now is not value:
                if not isinstance(now, Override):
                    _warn(module, attribute, now)
            elif existed:
                module.__dict__[attribute] = previous
            else:  # a parameter hidden by None may have been set again since
                module.__dict__.pop(attribute, None)


def _warn(module: nn.Module, attribute: str, now: Any) -> None:
    if now is None:  # other code removed it
        return
    name = getattr(now, "__qualname__", None) or type(now).__qualname__
    warnings.warn(
        f"{attribute} of a {type(module).__qualname__} was replaced by {getattr(now, '__module__', '')}.{name} after "
        "the model was patched. That stays, and calls the unpatched code now.",
        stacklevel=4,
    )
