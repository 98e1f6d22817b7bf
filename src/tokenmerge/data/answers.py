"""The inputs and outputs of a model: its input size, its number of classes, and the answer tensor in its output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge import adapters
from tokenmerge.errors import DataError, TokenMergeError
from tokenmerge.handle import Handle, handle_of

__all__ = ["answer", "declared_classes", "known_size", "run_images"]


def run_images(model: nn.Module, x: Tensor) -> Tensor:
    """Run a batch `[B, channels, height, width]` without gradients; raise `DataError` if the model does not take it."""
    try:
        with torch.inference_mode():
            out = answer(model(x))
    except TokenMergeError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"the model does not take images of {tuple(x.shape[1:])}: {str(error).rstrip('.')}.") from error
    return out


# names of the answer in the outputs of hosts; the first one found is used, else the first tensor
_ANSWERS = ("logits", "predicted_depth", "image_embeds", "last_hidden_state")


def answer(output: Any) -> Tensor:
    """Return the answer tensor of a model's output: the output itself, or one in a tuple, dict or host output class.

    Raises `DataError` if there is no tensor.
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
    """Return how many classes a model declares; None if it declares none."""
    count = getattr(model, "num_classes", None)
    if isinstance(count, int):
        return count or None  # 0 in timm: no classifier
    config = getattr(model, "config", None)
    # models without a classifier have `num_labels` too
    is_classifier = "ForImageClassification" in type(model).__name__
    return int(config.num_labels) if config is not None and is_classifier else None


def known_size(model: nn.Module | Handle) -> tuple[int, ...]:
    """Return the input size of a model, patched or not; raise `DataError` if the model does not declare it."""
    model = model.model if isinstance(model, Handle) else model
    handle = handle_of(model, None)
    size = handle.input_size if handle else adapters.find(model).layout(model).input_size
    if size is None:
        raise DataError(
            f"{type(model).__qualname__} does not say which input size it takes; give input_size (--input-size)."
        )
    return size
