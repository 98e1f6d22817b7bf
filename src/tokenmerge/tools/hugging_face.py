"""Load Hugging Face models from folders of `save_pretrained`: as saved, with other classes, or without weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from tokenmerge.errors import DataError, UnsupportedError
from tokenmerge.files import is_file, write_file

__all__ = ["CONFIG", "build_folder", "is_folder", "load_folder", "write_config"]

CONFIG = "config.json"
_log = logging.getLogger(__name__)
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def is_folder(name: str | Path) -> bool:
    """Return whether a name is a folder with a Hugging Face configuration."""
    return is_file(Path(name) / CONFIG)


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
            f"{folder} cannot be read as a Hugging Face model: {' '.join(str(error).split()).rstrip('.')}. It needs "
            "config.json and model.safetensors, as model.save_pretrained(folder) writes them."
        ) from error
    finally:
        if shows:
            bars.enable_progress_bar()
