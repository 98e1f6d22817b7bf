"""Make pretrained vision transformers faster by merging similar tokens: one line, no training.

Here are the functions that take a model, and the types they take and return. Five modules hold the rest, and are
there after `import tokenmerge`: `tokenmerge.errors` every error, `tokenmerge.methods` every method,
`tokenmerge.tools` every tool, each a module of its own (`tokenmerge.tools.bench.bench`), `tokenmerge.vlm`
vision-language models, `tokenmerge.testing` checks of methods, models and kernels of your own.
"""

import importlib as _importlib
import typing as _typing

from tokenmerge import errors as errors
from tokenmerge import functional as functional
from tokenmerge import kernels as kernels
from tokenmerge import methods as methods
from tokenmerge import testing as testing
from tokenmerge import tools as tools
from tokenmerge import vlm as vlm
from tokenmerge._moved import find_moved as _find_moved
from tokenmerge._version import __version__ as __version__
from tokenmerge.about import describe
from tokenmerge.adapters import list_adapters
from tokenmerge.api import Handle, handle_of, patch, patched, supports, unpatch
from tokenmerge.config import MergeConfig
from tokenmerge.errors import TokenMergeError
from tokenmerge.measure.counting import flops, macs
from tokenmerge.measure.simulate import simulate
from tokenmerge.methods import Reduction, ToMe, list_methods
from tokenmerge.methods.drop import Drop
from tokenmerge.schedule import Schedule

if _typing.TYPE_CHECKING:
    from tokenmerge.batch.embedder import Embedder
    from tokenmerge.tools.explore import explore
    from tokenmerge.tools.models import load
    from tokenmerge.tools.pretrained import from_pretrained, save_pretrained
    from tokenmerge.tools.visualize import visualize
    from tokenmerge.tuning.tune import tune

__all__ = [
    "Drop",
    "Embedder",
    "Handle",
    "MergeConfig",
    "Reduction",
    "Schedule",
    "ToMe",
    "TokenMergeError",
    "describe",
    "explore",
    "flops",
    "from_pretrained",
    "handle_of",
    "list_adapters",
    "list_methods",
    "load",
    "macs",
    "patch",
    "patched",
    "save_pretrained",
    "simulate",
    "supports",
    "tune",
    "unpatch",
    "visualize",
]

_find_moved()

# imported on first use
_LATER = {
    "Embedder": "tokenmerge.batch.embedder",
    "explore": "tokenmerge.tools.explore",
    "from_pretrained": "tokenmerge.tools.pretrained",
    "load": "tokenmerge.tools.models",
    "save_pretrained": "tokenmerge.tools.pretrained",
    "tune": "tokenmerge.tuning.tune",
    "visualize": "tokenmerge.tools.visualize",
}

if not _typing.TYPE_CHECKING:  # hidden from type checkers, so that they report unknown names

    def __getattr__(name: str) -> _typing.Any:
        if name not in _LATER:
            raise AttributeError(f"module 'tokenmerge' has no attribute {name!r}")
        return getattr(_importlib.import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
