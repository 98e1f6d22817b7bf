"""A run's folder: what may be in it before, what a finished run leaves, and the way back to a model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import tokenmerge
from tokenmerge import MergeConfig
from tokenmerge.data.preprocessing import Preprocessing, Processor
from tokenmerge.errors import ConfigError, DataError
from tokenmerge.files import is_part, write_file
from tokenmerge.tools.hugging_face import build_folder, is_folder, write_config
from tokenmerge.training.log import read_rows, writing
from tokenmerge.training.nets import build, load_weights
from tokenmerge.training.parts import MODULES, Parts
from tokenmerge.training.recipe import Recipe, differences, read_recipe

__all__ = ["alone_in", "check_folder", "check_recipe", "export", "last_rows", "load", "write_recipe"]

_RECIPE = "recipe.json"
_WEIGHTS = "model.safetensors"  # written last: where it is, the run is finished
_LOCK = ".lock"


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Raise `DataError` for a folder of something else, `ConfigError` for a run of another recipe, with what differs.

    Nothing is written.
    """
    # a run that was cut off at once leaves no more than these
    is_started = all(path.name == _LOCK or is_part(path) for path in folder.iterdir()) if folder.is_dir() else False
    if not folder.exists() or is_started:
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
    with writing(folder):
        write_file(folder / _RECIPE, json.dumps(recipe.as_dict(), indent=2) + "\n")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make a folder, and keep other runs out of it; raises `DataError` where one is in it already."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("a")
    with file:
        try:
            import fcntl

            # of this process alone: what it starts may outlive it, and must not hold up the next run
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise DataError(
                f"another run is writing to {folder}: wait for it, stop it, or give another folder (--out)."
            ) from error
        except (OSError, ImportError):  # a file system, or a system, that knows no such locks
            pass
        yield


def last_rows(folder: Path) -> list[dict[str, Any]] | None:
    """Return the lines of the last evaluation of a run that is over; None of others."""
    if not (folder / _WEIGHTS).is_file():
        return None
    rows = read_rows(folder)
    return [row for row in rows if row["split"] != "train" and row["step"] == rows[-1]["step"]]


def export(
    folder: Path,
    parts: Parts,
    name: str,
    state: dict[str, Tensor],
    size: tuple[int, ...],
    classes: tuple[str, ...],
    prepared: Preprocessing | None = None,
) -> None:
    """Write the trained model: `model.safetensors`, `model.json` (size, classes) and, where it merges, `merge.json`.

    How images are prepared is written to `model.json`, and where that is a Hugging Face processor's work, as its file.
    A model that was called `name` as a folder of Hugging Face's leaves its `config.json`: the folder needs no other.
    `state` holds the weights by the names they have in `parts.core`, and what the method learned.
    """
    from safetensors.torch import save

    weights = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    learned = {key.removeprefix(MODULES): weights.pop(key) for key in list(weights) if key.startswith(MODULES)}
    with writing(folder):
        if parts.handle is not None:
            parts.handle.r = parts.r
            parts.handle.config.save(folder / "merge.json", learned)
        about: dict[str, Any] = {"size": size, "classes": classes}
        if prepared is not None:
            about["preprocessing"] = {**prepared.as_dict(), "is_known": True}  # it was trained with that
            if isinstance(prepared.own, Processor):
                prepared.own.processor.save_pretrained(folder)
        write_file(folder / "model.json", json.dumps(about, indent=2) + "\n")
        if is_folder(name):
            write_config(parts.core, folder, classes)
        write_file(folder / _WEIGHTS, save(weights, {"format": "pt"}))


def load(folder: str | Path, *, merged: bool = True, trust_pickle: bool = False) -> nn.Module:
    """Return the model that a finished run left, in eval mode, patched as it was trained (`merged`).

    Raises `DataError` where the folder holds no finished run, and where its recipe names a pickle to build the model
    by: that is loaded only with `trust_pickle`.
    """
    folder = Path(folder)
    if not (folder / _WEIGHTS).is_file() or not (folder / _RECIPE).is_file():
        raise DataError(f"{folder} holds no finished run: it needs {_RECIPE} and {_WEIGHTS}.")
    recipe = read_recipe(folder / _RECIPE)
    about: dict[str, Any] = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    if is_folder(folder):
        model = build_folder(folder)
    else:
        # the weights it started from are no longer needed, nor the network they come by
        about_model = dataclasses.replace(recipe.model, pretrained=False)
        model = build(about_model, tuple(about["size"]), len(about["classes"]), trust_pickle)
    load_weights(model, folder)
    config = getattr(model, "config", None)
    if getattr(config, "label2id", None):
        # in the order of the samples it was trained on
        config.label2id = {name: number for number, name in enumerate(about["classes"])}  # type: ignore[union-attr]
        config.id2label = dict(enumerate(about["classes"]))  # type: ignore[union-attr]
    if merged and (folder / "merge.json").is_file():
        tokenmerge.patch(model, MergeConfig.load(folder / "merge.json"))
    return model.eval()
