"""The methods that choose visual tokens. Each is a pure function of features, and a value that `vlm.patch` takes.

The functions (`divprune(features, k)` and so on) import torch only: a server can call them without transformers.
"""

from __future__ import annotations

from tokenmerge.errors import ConfigError, unknown_name
from tokenmerge.fields import check_options, read_call
from tokenmerge.vlm.methods.base import Chooser, Merged, Visual
from tokenmerge.vlm.methods.cdpruner import CDPruner, cdpruner
from tokenmerge.vlm.methods.dart import Dart, dart
from tokenmerge.vlm.methods.divprune import DivPrune, divprune
from tokenmerge.vlm.methods.evs import EVS, evs
from tokenmerge.vlm.methods.fastv import FastV, fastv
from tokenmerge.vlm.methods.random import Random, random
from tokenmerge.vlm.methods.tome import ToMe, tome
from tokenmerge.vlm.methods.uniform import Uniform, uniform
from tokenmerge.vlm.methods.vidcom2 import VidCom2, vidcom2
from tokenmerge.vlm.methods.visionzip import VisionZip, visionzip

__all__ = [
    "METHODS",
    "CDPruner",
    "Chooser",
    "Dart",
    "DivPrune",
    "EVS",
    "FastV",
    "Merged",
    "Random",
    "ToMe",
    "Uniform",
    "VidCom2",
    "VisionZip",
    "Visual",
    "cdpruner",
    "dart",
    "divprune",
    "evs",
    "fastv",
    "find",
    "list_methods",
    "random",
    "tome",
    "uniform",
    "vidcom2",
    "visionzip",
]

METHODS: tuple[type[Chooser], ...] = (Random, Uniform, DivPrune, CDPruner, Dart, EVS, VidCom2, VisionZip, ToMe, FastV)


def list_methods() -> list[str]:
    """Return the names of the methods."""
    return [cls.name for cls in METHODS]


def find(method: str | Chooser) -> Chooser:
    """Return the method for a name, with or without options as in `"dart(pivots=8)"`, or the method that is given.

    Raises `UnknownNameError` (with the nearest name) for an unknown name or option, `ConfigError` for anything else.
    """
    if isinstance(method, Chooser):
        return method
    if isinstance(method, type) and issubclass(method, Chooser):
        raise ConfigError(f"method is the class {method.__name__}. Give an object of it: {method.__name__}().")
    try:
        name, options = read_call(method if "(" in method else f"{method}()")
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"method is {method!r}; it takes a name ({', '.join(list_methods())}), one with options as "
            "dart(pivots=8), or a Chooser."
        ) from error
    known = {cls.name: cls for cls in METHODS}
    if name not in known:
        raise unknown_name("method for visual tokens", name, known)
    check_options(known[name], options)
    return known[name](**options)
