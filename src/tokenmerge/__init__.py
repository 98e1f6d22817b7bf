"""Make pretrained vision transformers faster by merging similar tokens: one line, no training."""

from tokenmerge.adapters import list_adapters
from tokenmerge.api import Handle, handle_of, patch, patched, supports, unpatch
from tokenmerge.config import MergeConfig
from tokenmerge.errors import TokenMergeError
from tokenmerge.methods import Drop, Reduction, ToMe, list_methods
from tokenmerge.schedule import Schedule
from tokenmerge.tools.flops import flops
from tokenmerge.tools.simulate import simulate

__version__ = "0.6.0"

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
