"""What stands for a model on the command line: what the tools take, and the folder of a finished training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["open_model"]


def open_model(name: str, *, pretrained: bool = False, trust_pickle: bool = False) -> Any:
    """Return the model of a name, nothing merged, in eval mode; raises what `tools.models.load_model` raises."""
    from tokenmerge.files import is_file

    if is_file(Path(name) / "recipe.json"):
        from tokenmerge.training.output import load

        return load(name, merged=False, trust_pickle=trust_pickle)
    from tokenmerge.tools.models import load_model

    return load_model(name, pretrained=pretrained, trust_pickle=trust_pickle)
