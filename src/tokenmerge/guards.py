"""Refuse calls that would hand out merged tokens where one token per place is expected."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import nn

from tokenmerge.adapters.base import Original, Replacement
from tokenmerge.errors import UnsupportedError
from tokenmerge.state import ForwardState

__all__ = ["guard_methods"]


def guard_methods(model: nn.Module, names: tuple[str, ...], state: ForwardState) -> list[Replacement]:
    """Guard the methods of these names; a name with dots is a method of a module inside.

    The forward of a module whose methods are guarded may go on calling them; a guarded forward may be called by that
    of the model.
    """
    guards: list[Replacement] = []
    entries: dict[str, _Entry] = {}
    for name in names:
        path, _, method = name.rpartition(".")
        owner = _find(model, path)
        if owner is None or not callable(getattr(owner, method, None)):
            continue
        caller, path = (model, "") if method == "forward" else (owner, path)
        if path not in entries:
            entries[path] = _Entry(caller)
            guards.append(Replacement(caller, "forward", entries[path]))
        guards.append(Replacement(owner, method, _Guard(owner, method, entries[path], state)))
    return guards


def _find(model: nn.Module, path: str) -> nn.Module | None:
    owner = model
    for name in filter(None, path.split(".")):
        owner = getattr(owner, name, None)  # type: ignore[assignment]
    return owner


class _Entry(Original):
    """The model's instance `forward`: marks the time that its own forward runs in this thread."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.__signature__ = inspect.signature(model.forward)
        self._local = threading.local()

    @property
    def __code__(self) -> Any:
        """What `torch.export` names the model's forward by."""
        return type(self.owner).forward.__code__

    @property
    def is_running(self) -> bool:
        # a tracer cannot read thread-local storage
        return torch.compiler.is_compiling() or getattr(self._local, "is_running", False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        before, self._local.is_running = self.is_running, True
        try:
            return self.original(*args, **kwargs)
        finally:
            self._local.is_running = before

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_local"}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)
        self._local = threading.local()


class _Guard(Original):
    def __init__(self, model: nn.Module, name: str, entry: _Entry, state: ForwardState) -> None:
        super().__init__(model, name)
        self.entry, self.state = entry, state
        if name == "forward":
            self.__signature__ = inspect.signature(model.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.is_merging() and not self.entry.is_running:
            raise UnsupportedError(
                f"{self.attribute}() hands out one token per place, and tokens are merged (r is not 0). Patch with "
                "restore='dense' to get every token back in its place, with restore='merged' to get the merged "
                "tokens as they are (weigh them with handle.sizes), or call the model itself."
            )
        return self.original(*args, **kwargs)
