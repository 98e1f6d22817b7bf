"""Which tensors the Triton kernels support, decided without importing Triton."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["MAX_WIDTH", "supports_attend", "supports_bipartite", "supports_merge", "unmet"]

MAX_WIDTH = 256  # of a head: one block holds the whole row
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HAS_TRITON = find_spec("triton") is not None


def supports_bipartite(metric: Tensor) -> bool:  # [B, H, N, D] or [B, N, D]
    """Return whether `metric` has one of the two shapes and fits a block, on a device that runs Triton."""
    return metric.dim() in (3, 4) and 0 < metric.shape[-1] <= MAX_WIDTH and _runs(metric)


def supports_merge(x: Tensor) -> bool:  # [B, N, C]
    """Return whether `x` is `[B, N, C]`, on a device that runs Triton."""
    return x.dim() == 3 and x.shape[-1] > 0 and _runs(x)


def supports_attend(q: Tensor) -> bool:  # [B, H, N, D]
    """Return whether the heads of `q` fit a block, on a device that runs Triton."""
    return q.dim() == 4 and 0 < q.shape[-1] <= MAX_WIDTH and _runs(q)


def unmet() -> str:
    """Return what an operation on a GPU that ran without these kernels needs, in words."""
    if not HAS_TRITON:
        return "triton"
    if not _is_able("cuda", None):
        return "a GPU of compute capability 8.0 or newer"
    return f"float32, float16 or bfloat16, and heads of at most {MAX_WIDTH} numbers"


def _runs(x: Tensor) -> bool:
    return x.dtype in DTYPES and x.numel() > 0 and HAS_TRITON and _is_able(x.device.type, x.device.index)


def _is_able(device: str, index: int | None) -> bool:
    if device == "cuda":
        # bfloat16 and the shared memory for these blocks need compute capability 8.0
        return torch.cuda.is_available() and torch.cuda.get_device_capability(index) >= (8, 0)
    # Triton's interpreter runs the kernels on CPU, slowly: for tests
    return device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


# dynamo must not trace device queries and the environment; torch.compiler.assume_constant_result sets the same flag,
# but imports dynamo and triton first
_is_able._dynamo_marked_constant = True  # type: ignore[attr-defined]
