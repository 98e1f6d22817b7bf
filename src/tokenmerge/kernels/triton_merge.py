"""Size-weighted merge on CUDA in one launch: residual add, group means, new sizes; one more launch for the gradient.

For any `[B, N, C]`; no atomics, so that sums are the same in every run. Speed on a GPU: not measured. Needs Triton and
compute capability 8.0.
"""
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["merge"]

ROWS = 16  # output rows per program; each program reads all of dst once
SOURCES = 64
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def merge(
    x: Tensor,  # [B, N, C]
    size: Tensor | None,  # [B, N], None = all ones
    keep: Tensor,  # [B, M]
    src: Tensor,  # [B, R]
    dst: Tensor,  # [B, R]
    branch: Tensor | None = None,  # [B, N, C]
) -> tuple[Tensor, Tensor]:
    """Merge rows of `x + branch` as size-weighted means; returns `[B, M, C]` and the new sizes `[B, M]`.

    With s the sizes and S the new size, a group's row is `x_kept + sum_i (s_i / S) (x_i - x_kept)`, sources added in
    the order of `src`. Differentiable in `x` and `branch`.
    """
    merged: tuple[Tensor, Tensor] = _merge(x, size, keep, src, dst, branch)
    return merged


@torch.library.custom_op(
    "tokenmerge::triton_merge",
    mutates_args=(),
    schema="(Tensor x, Tensor? size, Tensor keep, Tensor src, Tensor dst, Tensor? branch) -> (Tensor, Tensor)",
)
def _merge(
    x: Tensor, size: Tensor | None, keep: Tensor, src: Tensor, dst: Tensor, branch: Tensor | None
) -> tuple[Tensor, Tensor]:
    (B, N, C), M, R = x.shape, keep.shape[1], src.shape[1]
    out, new_size = _merge_fake(x, size, keep, src, dst, branch)
    inputs = (None if t is None else t.contiguous() for t in (x, branch, size, keep, src, dst))
    columns = min(256, triton.next_power_of_2(C))
    grid = (B * triton.cdiv(M, ROWS), triton.cdiv(C, columns))
    with torch.cuda.device_of(x):
        merge_kernel[grid](*inputs, out, new_size, N, M, R, C, ROWS, SOURCES, columns, **OPTIONS)
    return out, new_size


@_merge.register_fake
def _merge_fake(
    x: Tensor, size: Tensor | None, keep: Tensor, src: Tensor, dst: Tensor, branch: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], keep.shape[1])
    return x.new_empty((*shape, x.shape[2])), x.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op(
    "tokenmerge::triton_merge_grad",
    mutates_args=(),
    schema="(Tensor grad, Tensor? size, Tensor new_size, Tensor keep, Tensor src, Tensor dst, int N) -> Tensor",
)
def _merge_grad(
    grad: Tensor, size: Tensor | None, new_size: Tensor, keep: Tensor, src: Tensor, dst: Tensor, N: int
) -> Tensor:
    (B, M, C), R = grad.shape, src.shape[1]
    # tokens that are neither kept nor absorbed get no gradient
    out = grad.new_empty((B, N, C)) if M + R == N else grad.new_zeros((B, N, C))
    inputs = (None if t is None else t.contiguous() for t in (grad, size, new_size, keep, src, dst))
    columns = min(256, triton.next_power_of_2(C))
    grid = (B * triton.cdiv(M + R, ROWS), triton.cdiv(C, columns))
    with torch.cuda.device_of(grad):
        merge_grad_kernel[grid](*inputs, out, N, M, R, C, ROWS, columns, **OPTIONS)
    return out


@_merge_grad.register_fake
def _(grad: Tensor, size: Tensor | None, new_size: Tensor, keep: Tensor, src: Tensor, dst: Tensor, N: int) -> Tensor:
    return grad.new_empty((grad.shape[0], N, grad.shape[2]))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, size, keep, src, dst, branch = inputs
    ctx.N, ctx.has_branch = x.shape[1], branch is not None
    ctx.save_for_backward(size, output[1], keep, src, dst)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_x = _merge_grad(grad, *ctx.saved_tensors, ctx.N)
    return grad_x, None, None, None, None, grad_x if ctx.has_branch else None


_merge.register_autograd(_backward, setup_context=_keep_for_backward)


@triton.jit
def load_sizes(p_size, o_n, m_n):
    b_size = m_n.to(tl.float32)
    if p_size is not None:
        b_size = tl.load(p_size + o_n, mask=m_n, other=0.0).to(tl.float32)
    return b_size


@triton.jit
def load_rows(p_x, p_branch, o_n, m_n, o_c, m_c, C):
    """Return the rows `o_n` of x + branch in float32, rounded to the dtype of x like a separate add."""
    m_x = m_n[:, None] & m_c[None, :]
    b_x = tl.load(p_x + o_n[:, None] * C + o_c[None, :], mask=m_x, other=0.0)
    if p_branch is not None:
        b_branch = tl.load(p_branch + o_n[:, None] * C + o_c[None, :], mask=m_x, other=0.0)
        b_x = (b_x.to(tl.float32) + b_branch.to(tl.float32)).to(b_x.dtype)
    return b_x.to(tl.float32)


@triton.jit(do_not_specialize=["N", "M", "R"])
def merge_kernel(
    p_x,
    p_branch,
    p_size,
    p_keep,
    p_src,
    p_dst,
    p_out,
    p_new_size,
    N,
    M,
    R,
    C,
    ROWS: tl.constexpr,
    SOURCES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tiles = tl.cdiv(M, ROWS)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    o_m = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_m, m_c = o_m < M, o_c < C
    p_x += image * N * C
    if p_branch is not None:
        p_branch += image * N * C
    if p_size is not None:
        p_size += image * N
    b_keep = tl.load(p_keep + image * M + o_m, mask=m_m, other=0)
    b_kept = load_rows(p_x, p_branch, b_keep, m_m, o_c, m_c, C)
    b_total = load_sizes(p_size, b_keep, m_m)
    b_step = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, R, SOURCES):
        o_r = start + tl.arange(0, SOURCES)
        b_dst = tl.load(p_dst + image * R + o_r, mask=o_r < R, other=-1)
        b_mine = tl.where(b_dst[None, :] == o_m[:, None], o_r[None, :], R)
        # each row adds its sources in order, and no two programs add to the same row
        b_next = tl.min(b_mine, 1)
        while tl.min(b_next, 0) < R:
            m_row = b_next < R
            b_src = tl.load(p_src + image * R + b_next, mask=m_row, other=0)
            b_size = load_sizes(p_size, b_src, m_row)
            b_row = load_rows(p_x, p_branch, b_src, m_row, o_c, m_c, C)
            b_step += tl.where(m_row[:, None], b_size[:, None] * (b_row - b_kept), 0.0)
            b_total += b_size
            b_next = tl.min(tl.where(b_mine > b_next[:, None], b_mine, R), 1)
    b_out = b_kept + b_step / tl.maximum(b_total, 1e-12)[:, None]
    o_out = image * M + o_m
    tl.store(p_out + o_out[:, None] * C + o_c[None, :], b_out, mask=m_m[:, None] & m_c[None, :])
    if tl.program_id(1) == 0:
        tl.store(p_new_size + o_out, b_total, mask=m_m)


@triton.jit(do_not_specialize=["N", "M", "R"])
def merge_grad_kernel(
    p_grad,
    p_size,
    p_new_size,
    p_keep,
    p_src,
    p_dst,
    p_out,
    N,
    M,
    R,
    C,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute, for the rows of keep and then of src, each token's share of its group's gradient."""
    tiles = tl.cdiv(M + R, ROWS)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    o = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < C
    m_kept, m_absorbed = o < M, (o >= M) & (o < M + R)
    m_any = m_kept | m_absorbed
    o_r = image * R + o - M
    b_token = tl.load(p_keep + image * M + o, mask=m_kept, other=0) + tl.load(p_src + o_r, mask=m_absorbed, other=0)
    b_slot = tl.where(m_kept, o, tl.load(p_dst + o_r, mask=m_absorbed, other=0))
    b_total = tl.load(p_new_size + image * M + b_slot, mask=m_any, other=1.0)
    b_size = load_sizes(p_size, image * N + b_token, m_any)
    # the kept token gets what the absorbed ones leave, also in a group of size 0
    b_share = tl.where(m_kept, b_total - b_size, b_size) / tl.maximum(b_total, 1e-12)
    b_share = tl.where(m_kept, 1.0 - b_share, b_share)
    m_x = m_any[:, None] & m_c[None, :]
    p_grad += (image * M + b_slot)[:, None] * C + o_c[None, :]
    b_grad = tl.load(p_grad, mask=m_x, other=0.0).to(tl.float32) * b_share[:, None]
    tl.store(p_out + (image * N + b_token)[:, None] * C + o_c[None, :], b_grad, mask=m_x)
