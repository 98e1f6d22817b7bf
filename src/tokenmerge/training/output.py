"""A run's folder: what may be in it before, what a finished run leaves, and the way back to a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import tokenmerge
from tokenmerge import MergeConfig
from tokenmerge.errors import ConfigError, DataError
from tokenmerge.tools.results import replace_text
from tokenmerge.training.nets import build, load_weights
from tokenmerge.training.parts import MODULES, Parts
from tokenmerge.training.recipe import Recipe, differences, from_dict, read_recipe

__all__ = ["check_folder", "check_recipe", "export", "load", "write_recipe"]

_RECIPE = "recipe.json"


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Raise `DataError` for a folder of something else, `ConfigError` for a run of another recipe, with what differs.

    Nothing is written.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    path = folder / _RECIPE
    if not path.is_file():
        raise DataError(f"{folder} is not the folder of a run: it has no {_RECIPE}. Give another, or an empty one.")
    check_recipe(folder, read_recipe(path), recipe)


def check_recipe(folder: Path, before: Recipe, now: Recipe) -> None:
    """Raise `ConfigError` where two recipes compute different things, with what differs."""
    changed = differences(before, now)
    if changed:
        raise ConfigError(
            f"the run in {folder} has another recipe; nothing was changed there. What differs:\n  "
            + "\n  ".join(changed)
            + "\nGo on with the old settings, or give another folder (--out) to start anew."
        )


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write down what the folder is a run of; raises `DataError` where that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / _RECIPE, json.dumps(recipe.as_dict(), indent=2) + "\n")
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error.strerror}.") from error


def export(
    folder: Path, parts: Parts, state: dict[str, Tensor], size: tuple[int, ...], classes: tuple[str, ...]
) -> None:
    """Write the trained model: `model.safetensors`, `model.json` (size, classes) and, where it merges, `merge.json`.

    `state` holds the weights by the names they have in `parts.core`, and what the method learned.
    """
    from safetensors.torch import save_file

    weights = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    learned = {key.removeprefix(MODULES): weights.pop(key) for key in list(weights) if key.startswith(MODULES)}
    if parts.handle is not None:
        parts.handle.r = parts.r
        parts.handle.config.save(folder / "merge.json", learned)
    replace_text(folder / "model.json", json.dumps({"size": size, "classes": classes}, indent=2) + "\n")
    # last: where it is, the run is finished
    part = folder / "model.safetensors.part"
    save_file(weights, part)
    part.replace(folder / "model.safetensors")


def load(folder: str | Path, *, merged: bool = True) -> nn.Module:
    """Return the model that a finished run left, in eval mode, patched as it was trained (`merged`).

    Raises `DataError` where the folder holds no finished run.
    """
    folder = Path(folder)
    if not (folder / "model.safetensors").is_file() or not (folder / _RECIPE).is_file():
        raise DataError(f"{folder} holds no finished run: it needs {_RECIPE} and model.safetensors.")
    recipe = from_dict(json.loads((folder / _RECIPE).read_text(encoding="utf-8")))
    about: dict[str, Any] = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    model = build(recipe.model, tuple(about["size"]), len(about["classes"]))
    load_weights(model, folder)
    if merged and (folder / "merge.json").is_file():
        tokenmerge.patch(model, MergeConfig.load(folder / "merge.json"))
    return model.eval()
