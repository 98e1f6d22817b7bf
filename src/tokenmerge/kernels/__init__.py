"""One public function per operation, and the table that says which implementations each has."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenmerge.errors import UnsupportedError, unknown_name
from tokenmerge.kernels import reference

__all__ = ["match", "merge", "reduce", "select", "unmerge"]


class Kernel(NamedTuple):
    name: str
    run: Callable[..., Any]
    supports: Callable[[Tensor], bool]  # a pure predicate on device, dtype and shape; never raises


# fastest first; the reference supports everything and closes every row
TABLE: dict[str, list[Kernel]] = {
    op: [Kernel("reference", getattr(reference, op), lambda x: True)] for op in reference.__all__
}
NAMES = sorted({kernel.name for row in TABLE.values() for kernel in row})


def match(a: Tensor, b: Tensor, distance: str = "cosine") -> tuple[Tensor, Tensor]:
    """Best partner in `b` `[B, Nb, D]` of every row of `a` `[B, Na, D]`: scores and indices, both `[B, Na]`."""
    best: tuple[Tensor, Tensor] = select("match", a).run(a, b, distance)
    return best


def merge(x: Tensor, size: Tensor | None, keep: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    """Size-weighted means of groups: `[B, N, C]` and `[B, N]` to `[B, M, C]` and `[B, M]`."""
    merged: tuple[Tensor, Tensor] = select("merge", x).run(x, size, keep, src, dst)
    return merged


def reduce(x: Tensor, keep: Tensor, src: Tensor, dst: Tensor, mode: str) -> Tensor:
    """Unweighted reduction of groups by `mode`: `[B, N, C]` to `[B, M, C]`."""
    reduced: Tensor = select("reduce", x).run(x, keep, src, dst, mode)
    return reduced


def unmerge(y: Tensor, assignment: Tensor) -> Tensor:
    """Copy every group's row to its members: `[B, M, C]` and `[B, N]` to `[B, N, C]`."""
    spread: Tensor = select("unmerge", y).run(y, assignment)
    return spread


def select(op: str, x: Tensor) -> Kernel:
    """Return the first implementation of `op` that supports `x`; `TOKENMERGE_KERNELS` forces one by name.

    Raises `UnknownNameError` for a forced name that does not exist and `UnsupportedError` where it cannot run.
    An exported graph always holds the reference, so that it needs nothing but torch's own operators.
    """
    row = TABLE[op]
    if torch.compiler.is_compiling():
        # a tracer cannot guard on the environment, and inductor fuses the plain version itself
        return row[-1]
    forced = os.environ.get("TOKENMERGE_KERNELS")
    if not forced:
        return next(kernel for kernel in row if kernel.supports(x))
    if forced not in NAMES:
        raise unknown_name("kernel family (TOKENMERGE_KERNELS)", forced, NAMES)
    for kernel in row:
        if kernel.name == forced and kernel.supports(x):
            return kernel
    raise UnsupportedError(
        f"TOKENMERGE_KERNELS={forced} asks for the {forced!r} version of {op!r}; it does not run on "
        f"{tuple(x.shape)} {x.dtype} on {x.device}. Unset the variable to let tokenmerge choose."
    )
