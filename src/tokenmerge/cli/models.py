"""Open a model from the command line: anything `load_model` takes, or the folder of a finished training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["open_model"]


def open_model(name: str, *, pretrained: bool = False, trust_pickle: bool = False) -> Any:
    """Return the unmerged model of this name, in eval mode; raise the errors of `tools.models.load_model`."""
    from tokenmerge.files import is_file

    if is_file(Path(name) / "recipe.json"):
        from tokenmerge.training.run_folder import load

        return load(name, merged=False, trust_pickle=trust_pickle)
    from tokenmerge.tools.models import load_model

    return load_model(name, pretrained=pretrained, trust_pickle=trust_pickle)
