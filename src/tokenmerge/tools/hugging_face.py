"""Folders of Hugging Face models, transformers' and timm's: load as saved, with other classes or no weights; write."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tokenmerge.errors import DataError, UnsupportedError
from tokenmerge.files import is_file, write_file
from tokenmerge.tools.network import failing_at_once

__all__ = [
    "CONFIG",
    "READ",
    "READ_CONFIG",
    "WEIGHTS",
    "build_folder",
    "fetch",
    "fetched",
    "host_of",
    "import_hub",
    "is_folder",
    "load_folder",
    "load_timm_folder",
    "write_config",
    "write_folder",
]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
READ = ("*.json", "*.safetensors")  # of a repository: nothing in these is executed
READ_CONFIG = ("*.json",)
_log = logging.getLogger(__name__)
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def fetch(repository: str, revision: str | None, patterns: Sequence[str] = READ) -> Path:
    """Return the folder of a repository of the hub, downloaded or from the cache; raises `DataError`."""
    hub = import_hub()
    try:
        with failing_at_once():
            return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # of the hub, of its transport, of names it does not take
        kind = type(error).__name__
        said = f"the Hugging Face hub gave none of this name: {kind}: {' '.join(str(error).split())[:300]}"
        if kind == "LocalEntryNotFoundError":
            said = "the Hugging Face hub cannot be reached (no network, or HF_HUB_OFFLINE is set)."
        raise DataError(f"there is no folder {repository}, and {said} {_remedy(repository, kind)}") from error


def fetched(repository: str) -> Path | None:
    """Return the folder of a repository as it was downloaded before; None where it was not. It asks no network."""
    with suppress(DataError, UnsupportedError), failing_at_once(is_offline=True):
        return fetch(repository, None)
    return None


def _remedy(repository: str, error: str) -> str:
    if error == "GatedRepoError":
        return f"Accept its terms on https://huggingface.co/{repository}, and log in: hf auth login."
    if error == "RepositoryNotFoundError":
        return "Check the name; for a private model log in: hf auth login."
    return (
        f"Where a network is at hand, `hf download {repository} --local-dir FOLDER` fetches it; the folder is a model "
        "here too."
    )


def import_hub() -> Any:
    """Return the module huggingface_hub; raise `UnsupportedError` with the install command if it is missing."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise UnsupportedError("the hub needs huggingface_hub: pip install huggingface_hub") from error
    return huggingface_hub


def is_folder(name: str | Path) -> bool:
    """Return whether a name is a folder with a Hugging Face configuration."""
    return is_file(Path(name) / CONFIG)


def load_timm_folder(folder: Path, num_classes: int | None = None, *, pretrained: bool = True) -> nn.Module | None:
    """Load a folder of a timm model, as timm's own `local-dir:` does, in eval mode; None if the folder is not one.

    Without `pretrained` it gets new weights. Raises `DataError` if the weights do not fit the configuration.
    """
    try:
        about = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    # transformers' wrapper of timm models writes the architecture too
    if not isinstance(about, dict) or "architecture" not in about or "model_type" in about:
        return None
    try:
        import timm
    except ImportError as error:
        raise UnsupportedError(f'{folder} is a timm model: pip install "tokenmerge[timm]"') from error
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    try:
        model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=pretrained, **options)
    except Exception as error:  # of whatever the configuration asks for
        raise DataError(
            f"{folder} cannot be read as a timm model: {_sentence(error)}. It needs a config.json and a "
            f"{WEIGHTS} that fits it, as tokenmerge.save_pretrained or timm's push_to_hf_hub writes them."
        ) from error
    return model.eval()


def load_folder(folder: Path, num_classes: int | None = None) -> nn.Module:
    """Load a folder of `save_pretrained` with the class named in its configuration, in eval mode.

    With `num_classes` the model becomes a classifier with this many classes, if transformers has one of its kind: a
    tower gets a classifier, a classifier with other classes a new one. No code in the folder is executed. Raises
    `DataError` if the folder cannot be read, or if parameters other than the classifier have no weights in it.
    """
    with _reading(folder) as transformers:
        config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
        kind = _class_of(transformers, config)
        if num_classes is not None and not _is_classifier(kind):
            kind = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(config), None) or kind
        is_new = num_classes is not None and _is_classifier(kind) and config.num_labels != num_classes
        if is_new:
            config.num_labels = num_classes
        options = {"use_safetensors": True, "ignore_mismatched_sizes": is_new, "output_loading_info": True, **_LOCAL}
        model, about = kind.from_pretrained(folder, config=config, **options)
    if is_new:
        _check_tower(model, about["mismatched_keys"], folder)
        _log.warning("the classifier of %s is new, for %d classes.", folder, num_classes)
    return model.eval()  # type: ignore[no-any-return]


def _check_tower(model: nn.Module, keys: Any, folder: Path) -> None:
    """Raise `DataError` if parameters other than the classifier have other shapes in the file and would be new."""
    tower = max(model.named_children(), key=lambda child: sum(p.numel() for p in child[1].parameters()))[0]
    names = sorted(key if isinstance(key, str) else key[0] for key in keys)  # transformers 4 and 5
    wrong = [name for name in names if name.startswith(f"{tower}.")]
    if wrong:
        raise DataError(f"the weights in {folder} do not fit its config.json: {', '.join(wrong[:5])}.")


def build_folder(folder: Path) -> nn.Module:
    """Build a model from the configuration in a folder, with new weights."""
    with _reading(folder) as transformers:
        config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
        kind = _class_of(transformers, config)
        model: nn.Module = kind(config)
    return model


def host_of(model: nn.Module) -> str:
    """Return which library can read the model's folder again: "timm", "transformers", or "" for neither.

    timm knows models that its `create_model` made, transformers those of its own classes.
    """
    module = type(model).__module__.partition(".")[0]
    about = getattr(model, "pretrained_cfg", None)
    if module == "timm" and isinstance(about, Mapping) and about.get("architecture"):
        return "timm"
    if module != "transformers":
        return ""
    import transformers

    return module if getattr(transformers, type(model).__name__, None) is type(model) else ""


def write_folder(
    model: Any, folder: Path, state: dict[str, Tensor], model_args: Mapping[str, Any] | None = None
) -> None:
    """Write the configuration and these weights of a model of `host_of` into a folder, for its host to read."""
    if host_of(model) == "transformers":
        with _reading(folder):
            model.save_pretrained(folder, state_dict=state)
        return
    from safetensors.torch import save
    from timm.models._hub import save_config_for_hf  # by no public name

    write_file(folder / WEIGHTS, save({name: value.cpu().contiguous().clone() for name, value in state.items()}))
    save_config_for_hf(model, str(folder / CONFIG), model_args=None if model_args is None else dict(model_args))


def write_config(model: Any, folder: Path, classes: tuple[str, ...]) -> None:
    """Write the configuration of a model from `load_folder`, with these classes."""
    config = model.config
    config.architectures = [type(model).__name__]
    config.label2id, config.id2label = {name: i for i, name in enumerate(classes)}, dict(enumerate(classes))
    write_file(folder / CONFIG, config.to_json_string())


def _class_of(transformers: Any, config: Any) -> Any:
    name = next(iter(config.architectures or ()), "")
    return getattr(transformers, name, transformers.AutoModelForImageClassification)


def _is_classifier(kind: Any) -> bool:
    return "ForImageClassification" in kind.__name__


@contextmanager
def _reading(folder: Path) -> Iterator[Any]:
    """Yield transformers with its logging silenced; raise `DataError` for its read errors."""
    try:
        import transformers
    except ImportError as error:
        raise UnsupportedError(f"{folder} is a Hugging Face model: pip install transformers") from error
    bars = transformers.utils.logging
    shows = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield transformers
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, ImportError) as error:
        raise DataError(
            f"{folder} cannot be read as a Hugging Face model: {_sentence(error)}. It needs "
            "config.json and model.safetensors, as model.save_pretrained(folder) writes them."
        ) from error
    finally:
        if shows:
            bars.enable_progress_bar()


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:500]
