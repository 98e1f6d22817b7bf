"""Every error of the library, under one parent.

TokenMergeError(RuntimeError)
  UnknownNameError         a method, option or keyword that does not exist (with the nearest name)
  InvalidScheduleError     an `r` that is not one of the allowed forms (also a ValueError)
  ConfigError              a saved configuration that cannot be read or written, or is for another model
  UnsupportedModelError    no adapter describes this model
  AdapterMismatchError     a block does not behave as its adapter says
  AlreadyPatchedError      the model is patched already
  NotPatchedError          the model is not patched
  NotTrackedError          the request needs `track=True` or a forward
  UnsupportedError         the model is known, but cannot do what was requested
  DataError                images, labels or files that cannot be used
  DivergedError            the loss or the gradient of a training run is no longer finite
  StoppedError             a signal stopped a training run, which can be resumed
  LostRankError            another process of a training run stopped
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AdapterMismatchError",
    "AlreadyPatchedError",
    "ConfigError",
    "DataError",
    "DivergedError",
    "InvalidScheduleError",
    "LostRankError",
    "NotPatchedError",
    "NotTrackedError",
    "StoppedError",
    "TokenMergeError",
    "UnknownNameError",
    "UnsupportedError",
    "UnsupportedModelError",
    "unknown_name",
]


class TokenMergeError(RuntimeError):
    """Parent of every error this library raises on purpose."""


class UnknownNameError(TokenMergeError):
    """A name that is not in the list it was looked up in."""


class InvalidScheduleError(TokenMergeError, ValueError):
    """A value of `r` outside the allowed forms."""


class ConfigError(TokenMergeError):
    """A configuration file that cannot be read, written or understood, or that is for another model."""


class UnsupportedModelError(TokenMergeError):
    """A model that no adapter describes."""


class AdapterMismatchError(TokenMergeError):
    """A block that does not compute what its adapter says, with nothing merged."""


class AlreadyPatchedError(TokenMergeError):
    """A second `patch` without an `unpatch` between."""


class NotPatchedError(TokenMergeError):
    """An `unpatch` of a model that was never patched."""


class NotTrackedError(TokenMergeError):
    """A query about a forward that did not run or was not recorded."""


class UnsupportedError(TokenMergeError):
    """A request that this model or device cannot fulfil."""


class DataError(TokenMergeError):
    """Images, labels or result files that cannot be used."""


class DivergedError(TokenMergeError):
    """The loss or the gradient of a training run is no longer finite."""


class StoppedError(TokenMergeError):
    """A signal stopped a training run, which can be resumed."""

    exit_code = 2  # exit code of the command


class LostRankError(TokenMergeError):
    """Another process of a training run stopped."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """Return the error for a name that is not in `known`, with the nearest name."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if not names:
        return UnknownNameError(f"no {kind} {name!r}: it has none.")
    known_names = f"Known: {', '.join(names)}." if len(names) <= 40 else f"{len(names)} names are known."
    return UnknownNameError(f"no {kind} {name!r}.{hint} {known_names}")
