"""Which tensors the Triton kernels take, said without importing Triton."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["MAX_WIDTH", "supports_attend", "supports_bipartite", "supports_merge"]

MAX_WIDTH = 256  # of a head: one block holds the whole row
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HAS_TRITON = find_spec("triton") is not None


def supports_bipartite(metric: Tensor) -> bool:  # [B, H, N, D] or [B, N, D]
    """Say whether `metric` has one of the two shapes, no wider than a block, on a device that runs Triton."""
    return metric.dim() in (3, 4) and 0 < metric.shape[-1] <= MAX_WIDTH and _runs(metric)


def supports_merge(x: Tensor) -> bool:  # [B, N, C]
    """Say whether `x` is rows of tokens on a device that runs Triton."""
    return x.dim() == 3 and x.shape[-1] > 0 and _runs(x)


def supports_attend(q: Tensor) -> bool:  # [B, H, N, D]
    """Say whether `q` has heads no wider than a block, on a device that runs Triton."""
    return q.dim() == 4 and 0 < q.shape[-1] <= MAX_WIDTH and _runs(q)


def _runs(x: Tensor) -> bool:
    return x.dtype in DTYPES and x.numel() > 0 and HAS_TRITON and _is_able(x.device.type, x.device.index)


def _is_able(device: str, index: int | None) -> bool:
    if device == "cuda":
        # bfloat16, and the shared memory that the blocks are sized for, begin with compute capability 8.0
        return torch.cuda.is_available() and torch.cuda.get_device_capability(index) >= (8, 0)
    # Triton's interpreter runs the kernels on CPU, slowly: for tests
    return device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


# neither chips nor the environment are for a tracer to look into; torch.compiler.assume_constant_result does just this,
# after it has imported dynamo and triton
_is_able._dynamo_marked_constant = True  # type: ignore[attr-defined]
