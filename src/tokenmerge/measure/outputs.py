"""Run a model on a batch and take the one tensor out of what it answers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge.errors import DataError, TokenMergeError, UnsupportedError
from tokenmerge.handle import Handle

__all__ = ["answer", "declared_classes", "find_device", "known_size", "run_images", "shared_copy"]


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


# what hosts call their answer; the first of these that an output holds is meant, else its first tensor
_ANSWERS = ("logits", "predicted_depth", "image_embeds", "last_hidden_state")


def answer(output: Any) -> Tensor:
    """Return the tensor that a model's answer is about: itself, or the one in a tuple, a dict or a host's output.

    Raises `DataError` where there is none.
    """
    found = _tensor_in(output)
    if found is None:
        raise DataError(f"the model returns a {type(output).__name__} without a tensor: there is no answer to look at.")
    return found


def _tensor_in(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = [output[name] for name in (*(name for name in _ANSWERS if name in output), *output)]
    if not isinstance(output, (list, tuple)):
        return None
    return next((found for part in output if (found := _tensor_in(part)) is not None), None)


def declared_classes(model: nn.Module) -> int | None:
    """Return how many classes a model says it tells apart; None for one that says nothing of classes."""
    count = getattr(model, "num_classes", None)
    if isinstance(count, int):
        return count or None  # timm's 0: the features themselves
    config = getattr(model, "config", None)
    # others have such a number too, and no classifier
    is_classifier = "ForImageClassification" in type(model).__name__
    return int(config.num_labels) if config is not None and is_classifier else None


def known_size(handle: Handle) -> tuple[int, ...]:
    """Return the input size of a patched model; raises `DataError` where the model does not say it."""
    if handle.input_size is None:
        raise DataError(
            f"{type(handle.model).__qualname__} does not say which input size it takes; give input_size (--input-size)."
        )
    return handle.input_size
