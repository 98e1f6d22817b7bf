"""One public function per operation, and the table that says which implementations each has."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenmerge.errors import UnsupportedError, unknown_name
from tokenmerge.kernels import cpu, reference
from tokenmerge.kernels.reference import Side

__all__ = ["Side", "match", "mean_heads", "merge", "reduce", "select", "unmerge"]


class Kernel(NamedTuple):
    name: str
    run: Callable[..., Any]
    supports: Callable[[Tensor], bool]  # a pure predicate on device, dtype and shape; never raises


def _reference(op: str) -> Kernel:
    return Kernel("reference", getattr(reference, op), lambda x: True)


# fastest first; the reference supports everything and closes every row
TABLE: dict[str, tuple[Kernel, ...]] = {
    "match": (_reference("match"),),
    "mean_heads": (Kernel("cpu", cpu.mean_heads, cpu.supports_mean_heads), _reference("mean_heads")),
    "merge": (_reference("merge"),),
    "reduce": (_reference("reduce"),),
    "unmerge": (_reference("unmerge"),),
}
NAMES = sorted({kernel.name for row in TABLE.values() for kernel in row})


def match(
    metric: Tensor, side_a: Side, side_b: Side, distance: str = "cosine", valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Best partner in side B of every token of side A, of `[B, N, D]`: scores and places in B, both `[B, Na]`."""
    best: tuple[Tensor, Tensor] = select("match", metric).run(metric, side_a, side_b, distance, valid)
    return best


def mean_heads(x: Tensor) -> Tensor:
    """Mean over heads: `[B, H, N, D]` to `[B, N, D]`."""
    mean: Tensor = select("mean_heads", x).run(x)
    return mean


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
    named = [kernel for kernel in row if kernel.name == forced] or [row[-1]]  # an op without that version has one only
    if named[0].supports(x):
        return named[0]
    raise UnsupportedError(
        f"TOKENMERGE_KERNELS={forced} asks for the {forced!r} version of {op!r}; it does not run on "
        f"{tuple(x.shape)} {x.dtype} on {x.device}. Unset the variable to let tokenmerge choose."
    )
