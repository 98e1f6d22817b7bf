"""Fused matching and merging on CPU: `native.cpp`, compiled at installation if there is a compiler.

Matching fuses head mean, normalisation, scores, row maximum and selection, and never stores the scores. Merging fuses
the residual add. Requires float32 or bfloat16, rows contiguous in memory, and a width of at most 1024 for matching.
Measured against the reference: matching 2.3 to 2.9 times, merging 1.9 to 2.1 times as fast (benchmarks/results/ops.md).

Shapes: B batch, H heads, N tokens in, M tokens out, R absorbed tokens, C channels, D head width.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenmerge._torch.tracing import is_compiling
from tokenmerge.errors import UnsupportedError
from tokenmerge.kernels import reference

__all__ = ["bipartite", "merge", "supports_bipartite", "supports_merge", "unmet"]

_INTERFACE = 2  # interface version of native.cpp
_WRONG_INDEX = 1
_WIDEST = 1024
_DTYPES = (torch.float32, torch.bfloat16)


def _load() -> ctypes.CDLL | None:
    """Load the build for this CPU's vector extension; None if it was not built or has another interface version.

    `TOKENMERGE_NATIVE_LIBRARY` names another build, e.g. one with sanitizers. Raises `UnsupportedError` if that build
    cannot be loaded.
    """
    named = os.environ.get("TOKENMERGE_NATIVE_LIBRARY", "")
    # the build links OpenMP by name only, so it uses torch's OpenMP runtime, which is already loaded
    vectors = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "base")
    path = Path(named) if named else Path(__file__).with_name(f"native.{vectors}.so")
    library, reason = None, "no such file"
    if path.exists():
        try:
            library, reason = ctypes.CDLL(str(path.resolve())), "it is of another version of tokenmerge"
        except OSError as error:  # built for another platform, or torch has no OpenMP
            reason = str(error)
    if library is None or library.tokenmerge_interface() != _INTERFACE:
        if named:
            raise UnsupportedError(f"TOKENMERGE_NATIVE_LIBRARY is {named}, which cannot be loaded: {reason}.")
        return None
    count, flag = ctypes.c_int64, ctypes.c_int
    memory: list[Any] = [ctypes.c_void_p, count]
    library.tokenmerge_scratch.argtypes, library.tokenmerge_scratch.restype = [count] * 3, count
    library.tokenmerge_bipartite.argtypes = [*memory, flag, *[count] * 9, *memory * 4, flag]
    numbers = [*[*memory, count, count] * 2, flag, *memory * 4, *[count] * 5, *memory * 2, flag]
    library.tokenmerge_merge.argtypes = numbers
    return library


_LIBRARY = _load()


def supports_bipartite(metric: Tensor) -> bool:
    """Return whether the fused matching supports these keys, `[B, H, N, D]` or `[B, N, D]`."""
    return _supports(metric) and metric.stride(-1) == 1 and metric.shape[-1] <= _WIDEST


def supports_merge(x: Tensor) -> bool:
    """Return whether the fused merging supports these tokens, `[B, N, C]`."""
    return _supports(x)


def unmet(op: str) -> str:
    """Return what an operation on CPU that ran without these kernels needs, in words."""
    if _LIBRARY is None:
        return "the part in C++, which is built when tokenmerge is installed where a C++ compiler (c++) is found"
    width = f" with rows of at most {_WIDEST} numbers" if op == "bipartite" else ""
    return f"plain tensors of float32 or bfloat16{width}"


def bipartite(metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.bipartite`."""
    if _is_bare(metric):
        return _bipartite(metric, r, prefix)
    plan: tuple[Tensor, Tensor, Tensor] = torch.ops.tokenmerge.cpu_bipartite(metric, r, prefix)
    return plan


def merge(
    x: Tensor, size: Tensor | None, keep: Tensor, src: Tensor, dst: Tensor, branch: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `kernels.merge`."""
    if _is_bare(x) and (branch is None or _is_bare(branch)):
        return _merge(x, size, keep, src, dst, branch)
    merged: tuple[Tensor, Tensor] = torch.ops.tokenmerge.cpu_merge(x, size, keep, src, dst, branch)
    return merged


def _supports(x: Tensor) -> bool:
    is_plain = type(x) is Tensor and x.layout is torch.strided
    return _LIBRARY is not None and x.is_cpu and x.dtype in _DTYPES and is_plain


def _is_bare(x: Tensor) -> bool:
    """Return whether C++ can be called directly: no tracing, autograd or dispatch mode, and no negative view.

    The registered operators handle all of these but cost 3 us more per call.
    """
    is_watched = is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return not (is_watched or (x.requires_grad and torch.is_grad_enabled()) or x.is_neg())


def _bipartite(metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    heads = metric if metric.dim() == 4 else metric[:, None]
    B, H, N, D = heads.shape
    assert _LIBRARY is not None
    threads, floats = torch.get_num_threads(), max(0, _LIBRARY.tokenmerge_scratch(N, D, prefix))
    if 0 <= r <= N:  # C++ checks the rest
        keep, src, dst = _empty_plan(heads, r, prefix)
        scratch = torch.empty(min(B, threads) * floats, dtype=torch.float32, device="cpu")
        code = _LIBRARY.tokenmerge_bipartite(
            *_memory(heads, heads.dtype), heads.dtype == torch.bfloat16, B, H, N, D, *heads.stride()[:3], r, prefix,
            *_memory(keep), *_memory(src), *_memory(dst), *_memory(scratch, torch.float32), threads,
        )  # fmt: skip
        if not code:
            return keep, src, dst
    raise UnsupportedError(
        f"matching of {tuple(metric.shape)} tokens was asked for r = {r} and prefix = {prefix}; r lies between 0 and "
        f"half of the unprotected tokens, and prefix between 0 and the {N} there are."
    )


def _merge(
    x: Tensor, size: Tensor | None, keep: Tensor, src: Tensor, dst: Tensor, branch: Tensor | None
) -> tuple[Tensor, Tensor]:
    (B, N, C), M, R = x.shape, keep.shape[-1], src.shape[-1]
    x, branch = _rows(x), None if branch is None else _rows(branch if branch.shape == x.shape else branch.expand_as(x))
    keep, src, dst = keep.contiguous(), src.contiguous(), dst.contiguous()
    size = None if size is None else size.float().contiguous()
    out, new_size = _empty_merge(x, size, keep)
    assert _LIBRARY is not None
    code = _LIBRARY.tokenmerge_merge(
        *_memory(x, x.dtype), *x.stride()[:2],
        *((None, 0, 0, 0) if branch is None else (*_memory(branch, x.dtype), *branch.stride()[:2])),
        x.dtype == torch.bfloat16, *((None, 0) if size is None else _memory(size, torch.float32)),
        *_memory(keep), *_memory(src), *_memory(dst), B, N, M, R, C,
        *_memory(out, x.dtype), *_memory(new_size, torch.float32), torch.get_num_threads(),
    )  # fmt: skip
    if code == _WRONG_INDEX:
        raise IndexError(f"the plan names tokens beyond the {N} there are, or output slots beyond {M}.")
    if code:
        raise UnsupportedError(f"the C++ part does not merge {tuple(x.shape)} tokens to {M} by a plan of {R}.")
    return out, new_size


def _memory(x: Tensor, dtype: torch.dtype = torch.long) -> tuple[int, int]:
    """Return a tensor's data pointer and the number of elements from there on, for the bounds checks in C++.

    Raises `UnsupportedError` for another dtype or device. Runs for every tensor of every block, so keep it cheap.
    """
    if x.dtype != dtype or not x.is_cpu:
        raise UnsupportedError(f"the C++ part takes {dtype} in the CPU's memory here, not {x.dtype} on {x.device}.")
    if x.is_contiguous():
        return x.data_ptr(), x.numel()
    return x.data_ptr(), int(x.untyped_storage().nbytes() // x.element_size() - x.storage_offset())


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_plan(metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    B, n = metric.shape[0], metric.shape[-2]
    keep, src, dst = (metric.new_empty((B, count), dtype=torch.long) for count in (n - r, r, r))
    return keep, src, dst


def _empty_merge(x: Tensor, size: Tensor | None, keep: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], keep.shape[1], x.shape[2]), x.new_empty(keep.shape, dtype=torch.float32)


# registered operators, for autograd, tracing and dispatch modes; schemas are explicit, unlike with custom_op
_OPERATORS = torch.library.Library("tokenmerge", "FRAGMENT")
_OPERATORS.define("cpu_bipartite(Tensor metric, int r, int prefix) -> (Tensor, Tensor, Tensor)")
_OPERATORS.define(
    "cpu_merge(Tensor x, Tensor? size, Tensor keep, Tensor src, Tensor dst, Tensor? branch) -> (Tensor, Tensor)"
)
_OPERATORS.impl("cpu_bipartite", _bipartite, "CPU")
_OPERATORS.impl("cpu_merge", _merge, "CPU")
torch.library.register_fake("tokenmerge::cpu_bipartite", _empty_plan, lib=_OPERATORS)
torch.library.register_fake("tokenmerge::cpu_merge", _empty_merge, lib=_OPERATORS)
torch.library.register_autograd(
    "tokenmerge::cpu_merge", reference.merge_backward, setup_context=reference.merge_context, lib=_OPERATORS
)
