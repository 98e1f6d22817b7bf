"""For test suites, also those of others: what every model family, method and kernel promises, checked in one line.

check_adapter   a family, or a model of it: r = 0 is the original, merging is the group mean, removal leaves no trace
check_method    a reduction method: tokens are accounted for, padding goes first, graphs can be captured
check_kernel    an implementation of an operation: it equals the reference, forward and backward
tiny_model      a small random model of a family, by the family's name, and an input for it
tiny_vit        a small random timm VisionTransformer
randomised      a model with every parameter drawn, so that a forgotten one shows
view_of         what a method is shown, of random tokens
assert_close    two tensors are equal to the rounding of their type

A broken promise is an `AssertionError` that names the promise, the case and the numbers. No test runner is needed.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenmerge.testing.comparing import assert_close as assert_close
    from tokenmerge.testing.families import check_adapter as check_adapter
    from tokenmerge.testing.families import tiny_model as tiny_model
    from tokenmerge.testing.kernels import check_kernel as check_kernel
    from tokenmerge.testing.methods import check_method as check_method
    from tokenmerge.testing.models.drawn import randomised as randomised
    from tokenmerge.testing.models.drawn import tiny_vit as tiny_vit
    from tokenmerge.testing.views import view_of as view_of

# the module that holds each name
_HOLDS = {
    "assert_close": "comparing",
    "check_adapter": "families",
    "check_kernel": "kernels",
    "check_method": "methods",
    "randomised": "models.drawn",
    "tiny_model": "families",
    "tiny_vit": "models.drawn",
    "view_of": "views",
}

if not TYPE_CHECKING:  # a name that does not exist is an error for type checkers

    def __getattr__(name: str) -> Any:
        if name not in _HOLDS:
            raise AttributeError(
                f"module 'tokenmerge.testing' has no attribute {name!r}; there are: {', '.join(_HOLDS)}."
            )
        return getattr(importlib.import_module(f"tokenmerge.testing.{_HOLDS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOLDS})
