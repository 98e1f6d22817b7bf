"""Turn user input into a model (bundled, of a host, saved) or a reduction method."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import sys
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import tokenmerge
from tokenmerge import Handle, MergeConfig, Reduction
from tokenmerge._moved import moved_names
from tokenmerge.errors import ConfigError, DataError, UnsupportedError, unknown_name
from tokenmerge.files import describe_differences, is_dir, is_file, read_tensors
from tokenmerge.schedule import R
from tokenmerge.tools.hosts import HOSTS, hosts_of, import_timm, known_names
from tokenmerge.tools.hugging_face import fetched, is_folder, load_folder, load_timm_folder

__all__ = [
    "AUTO",
    "BUNDLED",
    "CONFIGURATION",
    "OF_TIMM",
    "Method",
    "Trained",
    "apply_method",
    "call_function",
    "check_takes_images",
    "choices_of",
    "configuration_beside",
    "file_name",
    "has_weights",
    "import_timm",
    "load",
    "load_model",
    "load_unmerged",
    "own_r",
    "place_of",
    "read_method",
    "repository_of",
    "short_name",
]

BUNDLED = "reference"
CONFIGURATION = "merge.json"  # in the folder of a merging model
AUTO = "auto"
# folders by a file in them, and what loads them; imported where one is met, as it stands on a higher floor
_FOLDERS = {"recipe.json": ("tokenmerge.training.run_folder", "load")}
OF_TIMM = ("hf-hub", "hf_hub", "local-dir")  # prefixes of its own
_FILES = (".pt", ".pth", ".bin", ".pkl", ".ckpt", ".safetensors", ".onnx")  # names that mean files, there or not


@dataclass(frozen=True)
class Trained:
    """A saved configuration, and the weights (.safetensors) of the model that was trained with it."""

    config: MergeConfig
    weights: Path

    def load_into(self, model: nn.Module) -> None:
        """Load weights into a model as new tensors; raise `DataError` if they belong to another model."""
        state, own = read_tensors(self.weights), model.state_dict()
        different = describe_differences(state, own)
        if different:
            raise DataError(
                f"the weights in {self.weights} are of another model: {different}. Give the model that the recipe "
                "trained."
            )
        # assign new tensors instead of copying: copies of the model share the old ones
        model.load_state_dict({key: value.to(own[key]) for key, value in state.items()}, assign=True)


# a name, a name with options, or a result of `read_method`
Method = str | Reduction | MergeConfig | Trained


def read_method(text: str) -> Method:
    """Return the method that a text names.

    A name that `patch` takes is returned as it is; `tome(metric='x')` is a method with options; a `.json` file is a
    saved configuration; a folder is one of `tokenmerge train`, with `merge.json` and, if the model was trained too,
    `model.safetensors`. Raises `UnknownNameError` (with the nearest name) for a name or option that does not exist,
    `ConfigError` for anything else that cannot be read.

    >>> read_method("tome(metric='x')")
    ToMe(metric='x', heads='mean', distance='cosine', combine='weighted', partition='alternating', seed=0)
    """
    if text in (AUTO, *tokenmerge.list_methods()):
        return text
    path = Path(text)
    if (text and path.suffix != ".json" and is_dir(path)) or (
        "/" in text and not text.endswith(".json") and "(" not in text
    ):
        config, weights = MergeConfig.load(path / CONFIGURATION), path / "model.safetensors"
        return Trained(config, weights) if weights.is_file() else config
    return tokenmerge.config.read_method(text)


def short_name(method: Method) -> str:
    """Return a short unique text for a method: its name and the options that differ from the default.

    >>> short_name(read_method("tome(metric='x')"))
    "tome(metric='x')"
    """
    if isinstance(method, str):
        return method
    if isinstance(method, Trained):
        return method.weights.parent.name
    reduction = method.method if isinstance(method, MergeConfig) else method
    plain = type(reduction)()
    options = [field.name for field in dataclasses.fields(reduction)]  # type: ignore[arg-type]
    changed = [name for name in options if getattr(reduction, name) != getattr(plain, name)]
    shown = ", ".join(f"{name}={getattr(reduction, name)!r}" for name in changed)
    return f"{reduction.name}({shown})" if shown else reduction.name


def own_r(method: Method) -> R | None:
    """Return the `r` that a method was saved with; None for others."""
    config = method.config if isinstance(method, Trained) else method
    return config.r if isinstance(config, MergeConfig) else None


def apply_method(
    model: nn.Module, method: Method, *, r: R | None = None, calibrate: Tensor | None = None, **options: Any
) -> Handle:
    """Patch a model in place, as `tokenmerge.patch` does, with anything that `read_method` takes or returns.

    `calibrate` are the images for `"auto"`; other methods ignore it. A method that was trained together with the model
    brings weights: they replace the tensors of this model, but not those of copies that share them.
    """
    if isinstance(method, str):
        method = read_method(method)
    if isinstance(method, Trained):
        method.load_into(model)
        method = method.config
    return tokenmerge.patch(model, method, r=r, calibrate=calibrate if method == AUTO else None, **options)


def choices_of(reduced: Iterable[tuple[R, nn.Module]]) -> list[str]:
    """Return a sentence per `r` with the choice of `"auto"` in the patched model."""
    found = [(r, tokenmerge.handle_of(model).report().choice) for r, model in reduced]
    return [f"r = {r}: {choice}" for r, choice in found if choice]


def load(name: str, *, pretrained: bool = True, trust_pickle: bool = False) -> nn.Module:
    """Return a model by its name, unmerged and in eval mode, ready for `patch`.

    Args:
        name: `timm:NAME` (`timm:NAME/FILE` with weights of your own), `hf:ID_OR_FOLDER`, `open_clip:ARCH/TAG` or
            `torchvision:NAME`; a name alone that one of them has, timm first; a folder of `save_pretrained` or of a run
            of `tokenmerge train`; `FILE.py:FUNCTION`, which returns the model; a file of `torch.save(model)`, with
            `trust_pickle`; `"reference"`, the bundled one.
        pretrained: take the weights of the host, which may download them; else new ones.
        trust_pickle: load a pickle, which runs the code that it holds.

    The model knows how its images are prepared: `tokenmerge.data.prepare.find_preprocessing(model)`. Warns where a
    folder or a repository of the hub holds a `merge.json`: it is not applied, `from_pretrained` does that. Raises
    `UnknownNameError` (with the nearest name), `ConfigError` for a name that is a host's and a file's, `DataError` for
    a file, a folder or a repository without a model, `UnsupportedError` for a host that is missing or cannot build it.
    """
    model = load_unmerged(name, pretrained=pretrained, trust_pickle=trust_pickle)
    if (path := configuration_beside(name)) is not None:
        is_run = any(is_file(path.parent / mark) for mark in _FOLDERS)
        home = repository_of(name) or str(path.parent)
        whole = "" if is_run else f"tokenmerge.from_pretrained({home!r}), or "
        said = f"{home} holds {CONFIGURATION}, which load does not apply. By it merges"
        warnings.warn(f"{said} {whole}patch(model, {str(path)!r}).", stacklevel=2)
    return model


def configuration_beside(name: str) -> Path | None:
    """Return the `merge.json` in the folder, or the downloaded repository, that a name means; None for others."""
    repository = repository_of(name)
    place = fetched(repository) if repository else place_of(name) if name.strip() else None
    return place / CONFIGURATION if place is not None and is_file(place / CONFIGURATION) else None


def repository_of(name: str) -> str:
    """Return the repository of the hub that `load` takes a name for; "" for other names.

    >>> repository_of("hf:me/vit"), repository_of("me/vit"), repository_of("timm:vit_tiny_patch16_224")
    ('me/vit', 'me/vit', '')
    """
    bare = name.removeprefix("hf:")
    is_id = bool(bare.strip()) and ":" not in bare and bare.count("/") <= 1 and not bare.startswith((".", "/", "~"))
    if not is_id or place_of(name) is not None:
        return ""
    return bare if bare != name or ("/" in name and Path(name).suffix not in _FILES and not hosts_of(name)) else ""


def load_unmerged(name: str, *, pretrained: bool = True, trust_pickle: bool = False) -> nn.Module:
    """Return what `load` does, without its warning: for callers that merge it, or say so themselves."""
    for mark, (module, function) in _FOLDERS.items():
        if name and is_file(Path(name) / mark):
            loads = getattr(importlib.import_module(module), function)
            return loads(name, merged=False, trust_pickle=trust_pickle)  # type: ignore[no-any-return]
    return load_model(name, pretrained=pretrained, trust_pickle=trust_pickle)


def load_model(
    name: str, *, pretrained: bool = False, num_classes: int | None = None, trust_pickle: bool = False
) -> nn.Module:
    """Return a model as `load` does, without folders of runs.

    `num_classes` applies to timm's and Hugging Face's classifiers: one with another number of classes gets a new last
    layer.
    """
    if not name.strip():
        raise DataError(f"the name of the model is empty: give {_forms()}.")
    if name == BUNDLED:
        from tokenmerge.assets import reference_model

        import_timm()
        model: nn.Module = reference_model()
        return model.eval()
    prefix, _, rest = name.partition(":")
    if prefix in HOSTS:
        if not rest.strip():
            raise ConfigError(f"{name!r} names no model behind its host: give {HOSTS[prefix].form}.")
        return HOSTS[prefix].build(rest, pretrained, num_classes).eval()
    file, _, function = name.rpartition(":")
    if file.endswith(".py") and function:
        return call_function(Path(file), function).eval()
    if name.rstrip(":").endswith(".py"):
        file = name.rstrip(":")
        raise ConfigError(f"{name} is a file alone: say which of its functions returns the model, {file}:FUNCTION.")
    found = [] if ":" in name else hosts_of(name)
    is_here = Path(name).exists() or Path(name).suffix in _FILES
    if found and is_here:
        raise ConfigError(f"{name} is here and a model of {found[0]}: say ./{name} or {found[0]}:{name}.")
    if found:
        return HOSTS[found[0]].build(name, pretrained, num_classes).eval()
    if is_folder(name):
        # what save_pretrained wrote of a timm model is that; transformers would put its wrapper around it
        timm_model = load_timm_folder(Path(name), num_classes) if is_file(Path(name) / CONFIGURATION) else None
        return timm_model or load_folder(Path(name), num_classes)
    if is_here or name.startswith((".", "/", "~")) or name.count("/") > 1:
        return _load_file(Path(name), trust_pickle)
    if ":" in name:
        if prefix not in OF_TIMM:
            raise unknown_name("host of models", prefix, HOSTS)
        return HOSTS["timm"].build(name, pretrained, num_classes).eval()
    if "/" in name:
        return HOSTS["hf"].build(name, pretrained, num_classes).eval()
    import_timm()  # it may be one of timm's
    raise unknown_name("model", name, [BUNDLED, *known_names()])


def has_weights(name: str) -> bool:
    """Return whether a name means a model with weights of its own, which `pretrained` does not change."""
    return name == BUNDLED or place_of(name) is not None


def place_of(name: str) -> Path | None:
    """Return the file or folder that a name means; None for a model of a host, and where nothing is there."""
    file, _, rest = name.rpartition(":")
    if file in ("open_clip", "timm"):
        rest = rest.partition("/")[2]
    path = Path(file if file.endswith(".py") else rest if file in ("hf", "open_clip", "timm") else name)
    return path if path.parts and path.exists() else None


def file_name(name: str) -> str:
    """Return what a file that is written of a model is called, without a suffix.

    >>> file_name("timm:vit_tiny_patch16_224"), file_name("open_clip:ViT-B-32/openai"), file_name("hf:me/vit")
    ('vit_tiny_patch16_224', 'ViT-B-32', 'vit')
    """
    path = place_of(name)
    if path is not None:
        return path.stem if path.is_file() else path.resolve().name
    host, _, rest = name.rpartition(":")
    return rest.partition("/")[0] if host == "open_clip" else Path(rest).name


def check_takes_images(model: nn.Module, name: str) -> None:
    """Raise `UnsupportedError` for a model whose first input is text: what is given images alone cannot run it."""
    first = next(iter(inspect.signature(model.forward).parameters), "")
    if first == "input_ids":
        raise UnsupportedError(
            f"{name} is a {type(model).__qualname__}: it takes text (input_ids), and the commands give images alone. "
            "Of a model of text and images take the image tower, as CLIPVisionModelWithProjection.from_pretrained(...)."
            "save_pretrained(FOLDER); `tokenmerge vlm` asks vision-language models."
        )


def call_function(path: Path, name: str) -> nn.Module:
    """Return the model that a function without arguments returns, of a Python file; raises `DataError`."""
    if not is_file(path):
        raise DataError(f"no file {path}: give FILE.py:FUNCTION, a function without arguments that returns the model.")
    if (folder := str(path.parent.resolve())) not in sys.path:
        sys.path.insert(0, folder)  # its neighbours, as for `python FILE.py`
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # so that classes of the file can be copied and saved
    try:
        spec.loader.exec_module(module)
        model = getattr(module, name)()
    except (Exception, SystemExit) as error:  # of the user's own code
        if sys.modules.get(path.stem) is module:
            del sys.modules[path.stem]  # what is mended is read again
        raise DataError(f"{path}:{name} gave no model: {type(error).__name__}: {error}.") from error
    if not isinstance(model, nn.Module):
        raise DataError(f"{path}:{name} returned a {type(model).__name__}, not a torch module: return the model alone.")
    return model


def _forms() -> str:
    hosts = ", ".join(host.form for host in HOSTS.values())
    return (
        f"{BUNDLED!r}, a name with its host ({hosts}), FILE.py:FUNCTION, a file written by torch.save(model), or a "
        "folder that `tokenmerge train` or a Hugging Face model's save_pretrained wrote"
    )


def _load_file(path: Path, trust_pickle: bool) -> nn.Module:
    if not is_file(path):
        hint = " A device or a pipe is none." if path.exists() and not path.is_dir() else ""
        what = f"{path} is a folder without config.json" if path.is_dir() else f"no file or folder {path}"
        raise DataError(f"{what}: give {_forms()}.{hint}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except Exception as error:  # a pickle can raise any exception
        if not trust_pickle and _is_pickle(path):
            raise DataError(
                f"{path} is a pickle, and loading it would run whatever code it holds. Where you trust who made it, "
                "say so: --trust-pickle on the command line, trust_pickle=True in Python. Folders of `tokenmerge "
                "train` and of save_pretrained need no trust."
            ) from error
        raise DataError(f"{path} cannot be read as a saved module: {type(error).__name__}: {error}.") from error
    if not isinstance(content, nn.Module):
        raise DataError(
            f"{path} holds a {type(content).__name__}, not a module. Save the whole model with torch.save(model, "
            "path); a state dict alone does not say what to build."
        )
    return content.eval()


def _is_pickle(path: Path) -> bool:
    """Return whether a file was written by torch.save, or is another pickle."""
    with path.open("rb") as file:
        return zipfile.is_zipfile(path) or file.read(1) == b"\x80"


if not TYPE_CHECKING:
    __getattr__ = moved_names(__name__)
