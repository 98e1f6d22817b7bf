"""What is bound on the modules of a model, noted on each of them: a model, or a copy of a part of it, can be undone."""

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
    """Set an attribute of a module's instance, and note on the module what was there."""
    owner, attribute, value = replacement
    previous = owner.__dict__.get(attribute)
    note = _Note(attribute, attribute in owner.__dict__, previous, value)
    if isinstance(value, Override) and value.owner is owner:
        value.previous = previous  # several may be made before the first is bound
    owner.__dict__.setdefault(_NOTES, []).append(note)
    owner.__dict__[attribute] = value


def is_bound(module: nn.Module) -> bool:
    """Say whether anything is bound on this module."""
    return _NOTES in module.__dict__


def notes(module: nn.Module) -> list[_Note]:
    """Return what is bound on this module, in the order it was."""
    found: list[_Note] = module.__dict__.get(_NOTES, [])
    return found


def undo(modules: Iterable[nn.Module]) -> None:
    """Take out of these modules what was bound on them.

    What somebody else put on top stays where it is, and a warning names it: it leads to the module's own code now.
    """
    for module in modules:
        for attribute, existed, previous, value in reversed(module.__dict__.pop(_NOTES, [])):
            now = module.__dict__.get(attribute)
            if now is not value:
                if not isinstance(now, Override):
                    _warn(module, attribute, now)
            elif existed:
                module.__dict__[attribute] = previous
            else:  # a parameter that was hidden by None can have been set anew
                module.__dict__.pop(attribute, None)


def _warn(module: nn.Module, attribute: str, now: Any) -> None:
    if now is None:  # taken away by somebody else
        return
    name = getattr(now, "__qualname__", None) or type(now).__qualname__
    warnings.warn(
        f"{attribute} of a {type(module).__qualname__} was replaced by {getattr(now, '__module__', '')}.{name} after "
        "the model was patched. That stays, and calls the unpatched code now.",
        stacklevel=4,
    )
