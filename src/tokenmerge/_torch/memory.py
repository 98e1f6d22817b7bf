"""Attach a note to the memory of a tensor, for as long as its storage lives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenmerge._torch.tracing import is_compiling

__all__ = ["is_same", "recall", "remember", "watched"]

_NAME = "_tokenmerge"


def remember(x: Tensor, thing: Any) -> None:
    """Attach `thing` to the storage of `x`; views, detached tensors and checkpointed inputs share it."""
    owner = _owner(x)
    if owner is not None:
        setattr(owner, _NAME, (thing, _geometry(x)))


def recall(x: Tensor) -> tuple[Any, bool]:
    """Return the last note on the storage of `x` (or None), and whether `x` is unchanged since."""
    thing, geometry = getattr(_owner(x), _NAME, (None, None))
    return thing, thing is not None and geometry == _geometry(x)


def is_same(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors are the same memory: a module with backward hooks gets views of its arguments."""
    return x is y or (not is_compiling() and _owner(x) is _owner(y) and _geometry(x) == _geometry(y))


def watched(make: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """Return `make(x, ...)` as a tensor with a version counter, which inference mode would not give it."""
    if is_compiling() or not torch.is_inference_mode_enabled():
        return make(x, *args)
    with torch.inference_mode(False), torch.no_grad():
        return make(x, *args)


def _owner(x: Tensor) -> Any:
    # torch keeps the Python object of a storage for as long as the storage lives
    try:
        return x.untyped_storage() if isinstance(x, Tensor) else None  # torch.fx traces with proxies
    except (RuntimeError, NotImplementedError):  # wrappers of functorch have no storage
        return x


def _geometry(x: Tensor) -> tuple[Any, ...]:
    try:
        # an in-place write makes the note invalid; see `watched`
        version = None if x.is_inference() else x._version
        return x.shape, x.stride(), x.storage_offset(), version
    except RuntimeError:  # wrappers of functorch
        return (x.shape,)
