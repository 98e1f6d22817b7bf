"""Hosts of models by prefix: `timm:NAME`, `hf:ID_OR_FOLDER`, `open_clip:ARCH/TAG`, `torchvision:NAME`.

A host is a class below and a line in `HOSTS`.
"""

from __future__ import annotations

import argparse
import importlib.util
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from tokenmerge.errors import ConfigError, DataError, UnsupportedError, unknown_name
from tokenmerge.files import describe_differences, is_file
from tokenmerge.tools import hugging_face
from tokenmerge.tools.network import failing_at_once

__all__ = ["HOSTS", "Host", "hosts_of", "import_timm", "known_names"]

_FAILURES = (OSError, RuntimeError, ValueError, LookupError, TypeError, AssertionError, AttributeError, ImportError)


class Host(Protocol):
    """Where models come from. `names` are those that it can build, found without a network; it may know more."""

    form: str  # how its models are named

    def names(self) -> list[str]:
        """Return the names of the models that it can build; none where it is not installed."""

    def build(self, name: str, pretrained: bool, num_classes: int | None) -> nn.Module:
        """Return the model; with `num_classes` as a classifier of so many. Raises `TokenMergeError`."""


class Timm:
    """timm's models, `NAME/FILE` with the weights of a file, and what its own prefixes name (`hf-hub:`, ...)."""

    form = "timm:NAME"

    def names(self) -> list[str]:
        try:
            import timm
        except ImportError:
            return []
        return [*timm.list_models()]

    def build(self, name: str, pretrained: bool, num_classes: int | None) -> nn.Module:
        timm = import_timm()
        architecture, _, file = (name, "", "") if ":" in name else name.partition("/")
        if ":" not in name and architecture.split(".")[0] not in (known := timm.list_models()):
            raise unknown_name("timm model", architecture, [one for one in known if "vit" in one or "deit" in one])
        if file:
            return _with_weights(timm, architecture, Path(file), num_classes)
        options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
        try:
            with failing_at_once() if pretrained else nullcontext():
                return timm.create_model(name, pretrained=pretrained, **options)  # type: ignore[no-any-return]
        except _FAILURES as error:
            raise _failed(name, pretrained, error) from error


class HuggingFace:
    """Models of transformers: a folder of `save_pretrained`, or the id of a repository on the hub."""

    form = "hf:ID_OR_FOLDER"

    def names(self) -> list[str]:
        return []

    def build(self, name: str, pretrained: bool, num_classes: int | None) -> nn.Module:
        if hugging_face.is_folder(name):
            return hugging_face.load_folder(Path(name), num_classes)
        if Path(name).exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
            raise DataError(f"{name} is no folder with a config.json, as model.save_pretrained(folder) writes it.")
        patterns = hugging_face.READ if pretrained else hugging_face.READ_CONFIG
        folder = hugging_face.fetch(name, None, patterns)
        of_timm = hugging_face.load_timm_folder(folder, num_classes, pretrained=pretrained)
        if of_timm is not None:
            return of_timm
        return hugging_face.load_folder(folder, num_classes) if pretrained else hugging_face.build_folder(folder)


class OpenCLIP:
    """Two-tower models of open_clip: an architecture, and the tag of its weights or a file."""

    form = "open_clip:ARCH/TAG"

    def names(self) -> list[str]:
        # by its files: importing it takes a second, and every name without a prefix is looked up here
        found = importlib.util.find_spec("open_clip")
        if found is None or found.origin is None:
            return []
        return sorted(path.stem for path in Path(found.origin).parent.glob("model_configs/*.json"))

    def build(self, name: str, pretrained: bool, num_classes: int | None) -> nn.Module:
        try:
            import open_clip
        except ImportError as error:
            raise UnsupportedError("this needs open_clip: pip install open_clip_torch") from error
        _no_classes("open_clip", name, num_classes)
        architecture, _, tag = name.partition("/")
        if architecture not in (names := open_clip.list_models()):
            raise unknown_name("open_clip model", architecture, names)
        tags, is_file = open_clip.list_pretrained_tags_by_model(architecture), Path(tag).is_file()
        if tag and tag not in tags and not is_file:
            raise unknown_name(f"file and no weights of {architecture} in open_clip", tag, tags)
        if pretrained and not tag:
            known, which = ("several", f"one of {', '.join(tags)}, or ") if tags else ("no", "")
            file = f"a file as open_clip:{architecture}/FILE"
            raise ConfigError(f"open_clip has {known} weights of {architecture}: give {which}{file}.")
        try:
            weights = tag if pretrained or is_file else None  # a file is no download
            with failing_at_once() if weights and not is_file else nullcontext():
                return open_clip.create_model(architecture, pretrained=weights)  # type: ignore[no-any-return]
        except _FAILURES as error:
            file = f"name a file of its weights that you have (open_clip:{architecture}/FILE), "
            raise _failed(name, pretrained, error, file) from error


class Torchvision:
    """torchvision's models, with the weights that it calls its default; their transforms stay with the model."""

    form = "torchvision:NAME"

    def names(self) -> list[str]:
        try:
            from torchvision import models
        except ImportError:
            return []
        return [*models.list_models()]

    def build(self, name: str, pretrained: bool, num_classes: int | None) -> nn.Module:
        try:
            from torchvision import models
        except ImportError as error:
            raise UnsupportedError("this needs torchvision: pip install torchvision") from error
        _no_classes("torchvision", name, num_classes)
        if name not in (known := self.names()):
            raise unknown_name("torchvision model", name, known)
        try:
            weights = models.get_model_weights(name).DEFAULT
            model: nn.Module = models.get_model(name, weights=weights if pretrained else None)
        except _FAILURES as error:
            raise _failed(name, pretrained, error) from error
        model.torchvision_weights = weights  # an enum: the transforms are a module, which would become a child
        return model


HOSTS: dict[str, Host] = {
    "timm": Timm(),
    "hf": HuggingFace(),
    "open_clip": OpenCLIP(),
    "torchvision": Torchvision(),
}


def hosts_of(name: str) -> list[str]:
    """Return the prefixes of the hosts that have a model of this name, tags aside."""
    bare = {"timm": name.split(".")[0], "open_clip": name.partition("/")[0]}
    return [prefix for prefix, host in HOSTS.items() if bare.get(prefix, name) in host.names()]


def known_names() -> list[str]:
    """Return the names of all hosts' models."""
    return [name for host in HOSTS.values() for name in host.names()]


def import_timm() -> Any:
    """Return the timm module; raise `UnsupportedError` with the install command if it is missing."""
    try:
        import timm
    except ImportError as error:
        raise UnsupportedError('this needs timm: pip install "tokenmerge[timm]"') from error
    return timm


def _with_weights(timm: Any, name: str, file: Path, num_classes: int | None) -> nn.Module:
    """Return a model of timm with the weights of a file, as timm's training script saves them, and with its classes."""
    if not is_file(file):
        raise DataError(f"no file {file} of weights for timm's {name}.")
    try:
        # checkpoints hold the arguments of their training too
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = timm.models.load_state_dict(str(file))
        shapes = {key: value.shape for key, value in state.items()}
    except Exception as error:  # a pickle can raise any exception
        raise DataError(f"{file} holds no weights that timm reads: {type(error).__name__}: {error}.") from error
    with torch.device("meta"):
        head = f"{timm.create_model(name).pretrained_cfg.get('classifier')}.weight"
    model: nn.Module = timm.create_model(name, num_classes=shapes[head][0] if head in shapes else 0)
    different = describe_differences(state, model.state_dict())
    if different:
        raise DataError(f"{file} holds other weights than timm's {name} has: {different}.")
    model.load_state_dict(state)
    if num_classes is not None and num_classes != model.num_classes:
        model.reset_classifier(num_classes)  # type: ignore[operator]
    return model


def _no_classes(host: str, name: str, num_classes: int | None) -> None:
    if num_classes is not None:
        raise UnsupportedError(
            f"a new classifier for {num_classes} classes was asked of {name}, and models of {host} are loaded as they "
            "are. Take timm or Hugging Face, or change the model in Python and save it."
        )


def _failed(name: str, pretrained: bool, error: Exception, file: str = "") -> UnsupportedError:
    what = "pretrained weights of" if pretrained else "model"
    instead = f"{file}take random weights (--no-pretrained), " if pretrained else ""
    return UnsupportedError(
        f"the {what} {name!r} could not be loaded: {str(error).rstrip('.')}. Check the name and the network, "
        f"{instead}give a path to a saved module, or use the bundled model ('reference')."
    )
