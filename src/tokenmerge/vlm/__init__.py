"""Vision-language models of transformers with fewer visual tokens.

`patch(model, keep=0.25)` changes a model in place, `compact(model, inputs, keep=0.25)` returns shorter inputs and
changes nothing, and `tokenmerge.vlm.methods` has the methods as pure functions.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenmerge.vlm import methods
    from tokenmerge.vlm.families import list_families
    from tokenmerge.vlm.handle import VLMHandle, VLMReport, patch
    from tokenmerge.vlm.inputs import compact
    from tokenmerge.vlm.methods import Chooser, list_methods

__all__ = ["Chooser", "VLMHandle", "VLMReport", "compact", "list_families", "list_methods", "methods", "patch"]

# imported on first use
_HOMES = {
    "Chooser": "methods",
    "VLMHandle": "handle",
    "VLMReport": "handle",
    "compact": "inputs",
    "list_families": "families",
    "list_methods": "methods",
    "patch": "handle",
}

if not TYPE_CHECKING:  # hidden from type checkers, so that they report unknown names

    def __getattr__(name: str) -> Any:
        if name == "methods":
            return importlib.import_module("tokenmerge.vlm.methods")
        if name not in _HOMES:
            raise AttributeError(f"module 'tokenmerge.vlm' has no attribute {name!r}; there are: {', '.join(__all__)}.")
        return getattr(importlib.import_module(f"tokenmerge.vlm.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
