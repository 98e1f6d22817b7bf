"""What a model takes and answers: its input size, its classes, and the one tensor out of what it returns."""

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


def known_size(model: nn.Module | Handle) -> tuple[int, ...]:
    """Return the input size of a model, patched or not; raises `DataError` where the model does not say it."""
    model = model.model if isinstance(model, Handle) else model
    handle = handle_of(model, None)
    size = handle.input_size if handle else adapters.find(model).layout(model).input_size
    if size is None:
        raise DataError(
            f"{type(model).__qualname__} does not say which input size it takes; give input_size (--input-size)."
        )
    return size
