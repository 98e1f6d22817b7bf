"""Save a merging model as a folder that others load in one line, from a disk or from the Hugging Face hub."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tokenmerge
from tokenmerge import Handle, MergeConfig
from tokenmerge.config import Fingerprint
from tokenmerge.errors import DataError, NotPatchedError, TokenMergeError, UnsupportedError
from tokenmerge.files import filling, is_dir, is_file, write_file
from tokenmerge.measure.outputs import answer, known_size, shared_copy
from tokenmerge.tools.hugging_face import fetch, host_of, import_hub, is_folder, load_timm_folder, write_folder
from tokenmerge.tools.model_card import model_card
from tokenmerge.tools.models import CONFIGURATION, load_model

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]

# what an earlier save may have left in a folder
_OURS = (
    CONFIGURATION,
    "merge.safetensors",
    "config.json",
    "generation_config.json",
    "model*.safetensors*",
    "README.md",
)
_LEARNED = "tokenmerge_modules."


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    base: str | None = None,
    weights: bool | None = None,
    measured: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Write a patched timm or transformers model: its weights, `merge.json` and a model card; return the folder.

    The weights have the names they have without merging, so that the model's own host reads the folder too. What is
    written is read back and compared, and a cut-off leaves no half of it.

    Args:
        model: the patched model; it is not changed.
        folder: where to write.
        base: where its weights come from: a timm name, a hub id, a folder, or `"reference"`. They are then not written
            again, and `from_pretrained` takes them from there.
        weights: write the weights although there is a `base`, as for a model that was trained further.
        measured: what was measured with it, and where, see `MergeConfig`; that of its configuration if not given.
        model_args: what a timm model was built with, for versions of timm that do not record it.
        force: write into a folder that is not empty; files of an earlier save give way, others stay.

    Raises `NotPatchedError` for a model that does not merge, `UnsupportedError` for one that neither timm nor
    transformers can build again, `DataError` for a folder that is not empty or cannot be written.
    """
    handle, folder, weights = _handle(model), Path(folder), base is None if weights is None else weights
    if weights and not host_of(model):
        raise UnsupportedError(
            f"{type(model).__module__}.{type(model).__qualname__} was made neither by timm.create_model nor by a class "
            "of transformers, so nothing in a folder could say how to build it. Say where its weights are "
            "(base=...), or write them yourself, and handle.save('merge.json') beside them."
        )
    config = handle.described()
    config = replace(
        config,
        fingerprint=replace(config.fingerprint or Fingerprint.of(model), base=base),
        measured=config.measured if measured is None else dict(measured),
    )
    if not force and folder.exists() and (not is_dir(folder) or any(folder.iterdir())):
        raise DataError(
            f"{folder} exists and is not empty; nothing was changed there. Give another folder, or force=True to "
            "replace what an earlier save wrote."
        )
    learned = {name.removeprefix(_LEARNED): value for name, value in _state(model).items() if name.startswith(_LEARNED)}
    with _writing(folder) as part:
        config.save(part / CONFIGURATION, learned)
        write_file(part / "README.md", model_card(config, host_of(model), folder.absolute().name))
        if weights:
            plain = {name: value for name, value in _state(model).items() if not name.startswith(_LEARNED)}
            _write_host(model, part, plain, model_args)
            _check_written(model, part, folder)
    return folder


def from_pretrained(name: str | Path, *, revision: str | None = None) -> nn.Module:
    """Return the merging model that `save_pretrained` wrote, in eval mode: from a folder, or a repository of the hub.

    Warns where the weights are not those that were saved. No code of the folder is executed. Raises `DataError` for a
    name that is neither, a folder without `merge.json`, and weights that do not fit; `ConfigError` for a model that
    the configuration does not fit.
    """
    handle = _opened(Path(name) if is_dir(name) else fetch(str(name), revision), str(name))
    for remark in handle.remarks:
        warnings.warn(f"{name}: {remark}.", stacklevel=2)
    return handle.model


def push_to_hub(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Upload a folder of `save_pretrained` to a repository of the hub, made if need be; return its address.

    Who you are is what `huggingface_hub.login` keeps. Raises `DataError` for a folder without `merge.json`, and where
    the hub refuses.
    """
    if not is_file(Path(folder) / CONFIGURATION):
        raise DataError(f"{folder} holds no {CONFIGURATION}: write it with tokenmerge.save_pretrained first.")
    hub = import_hub()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        return str(hub.upload_folder(repo_id=repository, folder_path=folder))
    except Exception as error:  # of the hub, of its transport, of names it does not take
        raise DataError(f"the hub did not take {folder} as {repository}: {type(error).__name__}: {error}") from error


def _opened(folder: Path, name: str) -> Handle:
    if not is_file(folder / CONFIGURATION):
        raise DataError(
            f"{name} holds no {CONFIGURATION}: it is no folder of tokenmerge.save_pretrained. Load the model with its "
            "own library, and patch it."
        )
    if is_file(folder / "recipe.json"):
        raise DataError(
            f"{name} is a run of `tokenmerge train`: load({name!r}) of tokenmerge.training.run_folder loads it."
        )
    config = MergeConfig.load(folder / CONFIGURATION)
    if is_folder(folder):
        return tokenmerge.patch(load_model(str(folder)), config)
    if config.fingerprint is None or not config.fingerprint.base:
        raise DataError(f"{name} holds neither weights (config.json, model.safetensors) nor the name of a base model.")
    return tokenmerge.patch(_load_base(config.fingerprint, config.fingerprint.base), config)


def _handle(model: nn.Module) -> Handle:
    handle = tokenmerge.handle_of(model, None)
    if handle is None:
        raise NotPatchedError(
            f"save_pretrained writes a model that merges, and this {type(model).__qualname__} is not patched: call "
            "tokenmerge.patch(model, ...) first. Without merging, its own library saves it."
        )
    return handle


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.state_dict().items()}


@contextmanager
def _writing(folder: Path) -> Iterator[Path]:
    try:
        with filling(folder, last=CONFIGURATION, replaces=_OURS) as part:
            yield part
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error.strerror or error}.") from error


def _write_host(model: nn.Module, part: Path, state: dict[str, Tensor], model_args: Mapping[str, Any] | None) -> None:
    try:
        write_folder(model, part, state, model_args)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnsupportedError(
            f"{host_of(model)} cannot say how this {type(model).__qualname__} was built: {error}. Give what can be "
            "written as JSON (timm: model_args={...}), or say where its weights are (base=...)."
        ) from error


def _check_written(model: nn.Module, part: Path, folder: Path) -> None:
    """Read the folder back, and compare the weights and one unmerged answer: not all that a model is stands in them."""
    try:
        twin = _opened(part, str(folder)).model
        state, own = _state(twin), _state(model)
        same = [name for name in own if name in state and torch.equal(state[name].to(own[name]), own[name])]
        wrong = sorted({*own, *state} - {*same})
        what = f"other weights: {', '.join(wrong[:3])}" if wrong else _answers_differ(shared_copy(model), twin)
    except TokenMergeError as error:
        what = str(error).replace(str(part), str(folder)).rstrip(".")
    if what:
        raise UnsupportedError(
            f"what {host_of(model)} wrote of this {type(model).__qualname__} comes back as another model: {what}. "
            f"Nothing was written to {folder}. Give what it was built with (timm: model_args={{...}}), or say where "
            "its weights are (base=...)."
        )


def _answers_differ(model: nn.Module, twin: nn.Module) -> str:
    one, other = tokenmerge.handle_of(model), tokenmerge.handle_of(twin)
    try:
        size = known_size(one)
    except DataError:
        return ""
    x = torch.randn(1, *size, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()))
    with torch.inference_mode(), one.disabled(), other.disabled():
        mine, its = answer(model.eval()(x)), answer(twin.to(x)(x))
    if mine.shape != its.shape:
        return f"its answers are {tuple(its.shape)}, not {tuple(mine.shape)}"
    tolerance = 1e-3 if mine.dtype in (torch.float32, torch.float64) else 1e-1
    difference = float((mine - its).abs().max()) / max(1.0, float(mine.abs().max()))
    return "" if difference <= tolerance else f"its answers differ by {difference:.2g}"


def _load_base(model: Fingerprint, base: str) -> nn.Module:
    """Load the model that weights are taken from: a folder, a hub id, or a name that `load_model` takes."""
    is_hub_id = base.count("/") == 1 and ":" not in base and not Path(base).is_absolute() and not Path(base).exists()
    try:
        folder = str(fetch(base, None)) if is_hub_id else base
        # transformers reads folders of timm's too, as models of its own
        is_wrapped = not is_folder(folder) or model.architecture.startswith("transformers.")
        found = None if is_wrapped else load_timm_folder(Path(folder))
        return load_model(folder, pretrained=True) if found is None else found
    except TokenMergeError as error:
        raise DataError(f"the base model {base!r} cannot be loaded: {error}") from error
