"""Turn what a user types into a model: the bundled one, a timm name, or a saved module."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge import Handle
from tokenmerge.errors import DataError, TokenMergeError, UnsupportedError, unknown_name

__all__ = ["BUNDLED", "answer", "find_device", "import_timm", "known_size", "load_model", "run_images", "shared_copy"]

BUNDLED = "reference"


def load_model(name: str, *, pretrained: bool = False, num_classes: int | None = None) -> nn.Module:
    """Return a model in eval mode: `"reference"` (bundled), a path that `torch.save(model)` wrote, or a timm name.

    A saved module is a pickle: load only files you trust. Raises `UnknownNameError` for a name timm does not have (with
    the nearest), `DataError` for a file that holds no module, `UnsupportedError` where timm cannot build it.
    """
    if name == BUNDLED:
        from tokenmerge.assets import reference_model

        import_timm()
        model: nn.Module = reference_model()
        return model.eval()
    is_path = Path(name).suffix in (".pt", ".pth", ".bin") or Path(name).is_file() or "/" in name
    if is_path and ":" not in name:
        return _load_file(Path(name))
    timm = import_timm()
    if name not in timm.list_models() and name.split(".")[0] not in timm.list_models() and ":" not in name:
        raise unknown_name("timm model", name, [BUNDLED, *timm.list_models("*vit*"), *timm.list_models("*deit*")])
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    try:
        return timm.create_model(name, pretrained=pretrained, **options).eval()  # type: ignore[no-any-return]
    except (OSError, RuntimeError, ValueError) as error:
        what = "pretrained weights of" if pretrained else "model"
        raise UnsupportedError(
            f"the {what} {name!r} could not be loaded: {str(error).rstrip('.')}. Check the name and the network, give "
            f"a path to a saved module, or use the bundled model ({BUNDLED!r})."
        ) from error


def import_timm() -> Any:
    """Return the timm module; raises `UnsupportedError` with the command that installs it."""
    try:
        import timm
    except ImportError as error:
        raise UnsupportedError('this needs timm: pip install "tokenmerge[timm]"') from error
    return timm


def find_device(name: str | int | torch.device) -> torch.device:
    """Return a torch device that is really there; raises `UnsupportedError` that says which are."""
    there = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        there.append("mps")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UnsupportedError(f"no device {name!r}; there are: {', '.join(there)}.") from error
    wanted = f"cuda:{device.index or 0}" if device.type == "cuda" else device.type
    if wanted not in there:
        raise UnsupportedError(f"no device {name!r} on this machine; there are: {', '.join(there)}.")
    return device


def shared_copy(model: nn.Module) -> nn.Module:
    """Copy a model's modules, not its weights: both see the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def run_images(model: nn.Module, x: Tensor) -> Tensor:
    """Run a batch `[B, channels, height, width]` without gradients; raises `DataError` where it does not fit."""
    try:
        with torch.inference_mode():
            out = answer(model(x))
    except TokenMergeError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"the model does not take images of {tuple(x.shape[1:])}: {str(error).rstrip('.')}.") from error
    return out


def answer(output: Any) -> Tensor:
    """Return the tensor that a model's answer is about: itself, or the first that a host's output object holds."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


def _load_file(path: Path) -> nn.Module:
    if not path.is_file():
        raise DataError(f"no file {path}: give a timm name, {BUNDLED!r}, or a file written by torch.save(model).")
    try:
        content = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # a pickle can raise anything at all
        raise DataError(f"{path} cannot be read as a saved module: {type(error).__name__}: {error}.") from error
    if not isinstance(content, nn.Module):
        raise DataError(
            f"{path} holds a {type(content).__name__}, not a module. Save the whole model with torch.save(model, "
            "path); a state dict alone does not say what to build."
        )
    return content.eval()


def known_size(handle: Handle) -> tuple[int, ...]:
    """Return the input size of a patched model; raises `DataError` where the model does not say it."""
    if handle.input_size is None:
        raise DataError(
            f"{type(handle.model).__qualname__} does not say which input size it takes; give input_size (--input-size)."
        )
    return handle.input_size
