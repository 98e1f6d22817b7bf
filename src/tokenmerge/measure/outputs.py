"""Find the device to run on, and copy models with shared weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from tokenmerge.data.answers import answer, declared_classes, known_size, run_images
from tokenmerge.errors import UnsupportedError

__all__ = [
    "answer",
    "declared_classes",
    "find_device",
    "find_dtype",
    "known_size",
    "run_images",
    "shared_copy",
]


def find_device(name: str | int | torch.device) -> torch.device:
    """Return an available torch device; raise `UnsupportedError` with a list of the available ones."""
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


def find_dtype(name: str | torch.dtype) -> torch.dtype:
    """Return a dtype by its name; raise `UnsupportedError` with a list of those that models run in."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    dtype = known.get(name) if isinstance(name, str) else name
    if dtype is None or dtype not in known.values():
        raise UnsupportedError(f"no dtype {name!r}; there are: {', '.join(known)}.")
    return dtype


def shared_copy(model: nn.Module) -> nn.Module:
    """Copy the modules of a model; the copy shares all parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
