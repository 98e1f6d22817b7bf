"""The commands as Python functions.

Every tool is a module that is imported on first use, and its function has the module's name:
`tokenmerge.tools.bench.bench`, or `from tokenmerge.tools.bench import bench`. The function of `doctor` is `examine`.

bench      times of a merged model, the unmerged one and the free bound
evaluate   accuracy and speed on labelled images
compare    methods side by side on one model
demo       the bundled model on the bundled images
doctor     is a model supported, are its outputs right, is it faster
explore    one HTML file that shows what merges in photos
export     a merged model for another engine
visualize  a picture of what merged in a photo
viz        pictures of photos, videos and sounds, in a folder
pretrained folders and repositories of merging models: `save_pretrained`, `from_pretrained`, `push_to_hub`
models     models and methods from user input: `load_model`, `read_method`
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenmerge.tools import (
        bench,
        compare,
        demo,
        doctor,
        evaluate,
        explore,
        export,
        models,
        pretrained,
        visualize,
        viz,
    )

__all__ = [
    "bench",
    "compare",
    "demo",
    "doctor",
    "evaluate",
    "explore",
    "export",
    "models",
    "pretrained",
    "visualize",
    "viz",
]


if not TYPE_CHECKING:  # hidden from type checkers, so that they report unknown names

    def __getattr__(name: str) -> Any:
        from tokenmerge._moved import MOVED

        if name not in __all__ and f"tools.{name}" not in MOVED:
            raise AttributeError(
                f"module 'tokenmerge.tools' has no attribute {name!r}; there are: {', '.join(__all__)}."
            )
        return importlib.import_module(f"tokenmerge.tools.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
