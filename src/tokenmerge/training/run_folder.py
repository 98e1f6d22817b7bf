"""The folder of a run: checks before a run, the files a finished run leaves, and loading a model from them."""

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
from tokenmerge.config.fingerprint import Fingerprint
from tokenmerge.data.preprocessing import Preprocessing, Processor
from tokenmerge.errors import ConfigError, DataError
from tokenmerge.files import is_part, write_file
from tokenmerge.methods import learned
from tokenmerge.tools.hugging_face import build_folder, host_of, is_folder, write_config
from tokenmerge.tools.models import place_of
from tokenmerge.training.build import Network
from tokenmerge.training.log import read_rows, writing
from tokenmerge.training.models import build_model, load_weights
from tokenmerge.training.recipe import Recipe, differences, read_recipe

__all__ = ["alone_in", "check_folder", "check_recipe", "last_rows", "load", "write_model", "write_recipe"]

_RECIPE = "recipe.json"
_WEIGHTS = "model.safetensors"  # written last: if it exists, the run is finished
_LOCK = ".lock"


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Raise `DataError` if the folder holds something else, `ConfigError` (with the differences) for another recipe.

    Writes nothing.
    """
    # a run that was interrupted immediately leaves at most these files
    is_started = all(path.name == _LOCK or is_part(path) for path in folder.iterdir()) if folder.is_dir() else False
    if not folder.exists() or is_started:
        return
    path = folder / _RECIPE
    if not path.is_file():
        raise DataError(f"{folder} is not the folder of a run: it has no {_RECIPE}. Give another, or an empty one.")
    check_recipe(folder, read_recipe(path), recipe)


def check_recipe(folder: Path, before: Recipe, now: Recipe) -> None:
    """Raise `ConfigError` with the differences if two recipes compute different things."""
    changed = differences(before, now)
    if changed:
        raise ConfigError(
            f"the run in {folder} has another recipe; nothing was changed there. What differs:\n  "
            + "\n  ".join(changed)
            + "\nGo on with the old settings, or give another folder (--out) to start anew."
        )


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write the recipe into the folder of a run; raise `DataError` if it cannot be written."""
    with writing(folder):
        write_file(folder / _RECIPE, json.dumps(recipe.as_dict(), indent=2) + "\n")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Create a folder and lock it for this run; raise `DataError` if another run holds the lock."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("a")
    with file:
        try:
            import fcntl

            # child processes do not inherit a POSIX lock: one that outlives this run must not block the next
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise DataError(
                f"another run is writing to {folder}: wait for it, stop it, or give another folder (--out)."
            ) from error
        except (OSError, ImportError):  # a file system or an operating system without such locks
            pass
        yield


def last_rows(folder: Path) -> list[dict[str, Any]] | None:
    """Return the rows of the last evaluation of a finished run; None for an unfinished one."""
    if not (folder / _WEIGHTS).is_file():
        return None
    rows = read_rows(folder)
    return [row for row in rows if row["split"] != "train" and row["step"] == rows[-1]["step"]]


def write_model(
    folder: Path,
    network: Network,
    name: str,
    state: dict[str, Tensor],
    size: tuple[int, ...],
    classes: tuple[str, ...],
    prepared: Preprocessing | None = None,
) -> None:
    """Write the trained model: `model.safetensors`, `model.json` (size, classes) and, if it merges, `merge.json`.

    `model.json` also records the preprocessing; for a Hugging Face processor its own file is written too. A model built
    from a Hugging Face folder or repository (`name`) also writes `config.json`, so that the run no longer needs it.
    `state` holds the weights by their names in `network.core`, and the weights of a learned method.
    """
    from safetensors.torch import save

    weights = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    prefix = f"{learned.MODULES}."
    modules = {key.removeprefix(prefix): weights.pop(key) for key in list(weights) if key.startswith(prefix)}
    with writing(folder):
        if network.handle is not None:
            own = Fingerprint.of(network.core, network.handle._adapter, weights=weights)
            dataclasses.replace(network.handle.config, fingerprint=own).save(folder / "merge.json", modules)
        about: dict[str, Any] = {"size": size, "classes": classes}
        if prepared is not None:
            about["preprocessing"] = {**prepared.as_dict(), "is_known": True}  # used in training, so known
            if isinstance(prepared.own, Processor):
                prepared.own.processor.save_pretrained(folder)
        write_file(folder / "model.json", json.dumps(about, indent=2) + "\n")
        place = place_of(name)  # none: of the hub
        if (place is None or is_folder(place)) and host_of(network.core) == "transformers":
            write_config(network.core, folder, classes)
        write_file(folder / _WEIGHTS, save(weights, {"format": "pt"}))


def load(folder: str | Path, *, merged: bool = True, trust_pickle: bool = False) -> nn.Module:
    """Return the model of a finished run, in eval mode and (`merged`) patched as it was trained.

    Raises `DataError` if the folder holds no finished run, or if its recipe builds the model from a pickle and
    `trust_pickle` is not set.
    """
    folder = Path(folder)
    if not (folder / _WEIGHTS).is_file() or not (folder / _RECIPE).is_file():
        raise DataError(f"{folder} holds no finished run: it needs {_RECIPE} and {_WEIGHTS}.")
    recipe = read_recipe(folder / _RECIPE)
    about: dict[str, Any] = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    if is_folder(folder):
        model = build_folder(folder)
    else:
        # skip the initial weights and their download
        about_model = dataclasses.replace(recipe.model, pretrained=False)
        model = build_model(about_model, tuple(about["size"]), len(about["classes"]), trust_pickle)
    load_weights(model, folder)
    config = getattr(model, "config", None)
    if getattr(config, "label2id", None):
        # labels in the order of the training classes
        config.label2id = {name: number for number, name in enumerate(about["classes"])}  # type: ignore[union-attr]
        config.id2label = dict(enumerate(about["classes"]))  # type: ignore[union-attr]
    if merged and (folder / "merge.json").is_file():
        tokenmerge.patch(model, MergeConfig.load(folder / "merge.json"))
    return model.eval()
