"""Mean over heads on CPU: heads added one by one, where torch's own reduction reads each token's heads in turn.

Measured on two cores, float32, [16, 6, 184, 64] as a view of a qkv projection: 0.15 ms against 0.26 ms.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["mean_heads", "supports_mean_heads"]


def mean_heads(x: Tensor) -> Tensor:  # [B, H, N, D]
    """Return the mean over heads, `[B, N, D]`."""
    total = x[:, 0] + x[:, 1]
    for head in range(2, x.shape[1]):
        total += x[:, head]
    return total.div_(x.shape[1])


def supports_mean_heads(x: Tensor) -> bool:
    """Say whether `x` is on CPU, in single or double precision, with heads to add and no gradient to carry."""
    is_plain = x.dtype in (torch.float32, torch.float64) and not (x.requires_grad and torch.is_grad_enabled())
    return x.device.type == "cpu" and is_plain and x.dim() == 4 and x.shape[1] >= 2
