"""Make pretrained vision transformers faster by merging similar tokens: one line, no training."""

from tokenmerge._moved import find_moved as _find_moved
from tokenmerge._version import __version__ as __version__
from tokenmerge.adapters import list_adapters
from tokenmerge.api import Handle, handle_of, patch, patched, supports, unpatch
from tokenmerge.config import MergeConfig
from tokenmerge.errors import TokenMergeError
from tokenmerge.measure.counting import flops
from tokenmerge.measure.simulate import simulate
from tokenmerge.methods import Drop, Reduction, ToMe, list_methods
from tokenmerge.schedule import Schedule

__all__ = [
    "Drop",
    "Handle",
    "MergeConfig",
    "Reduction",
    "Schedule",
    "ToMe",
    "TokenMergeError",
    "flops",
    "handle_of",
    "list_adapters",
    "list_methods",
    "patch",
    "patched",
    "simulate",
    "supports",
    "unpatch",
]

_find_moved()
