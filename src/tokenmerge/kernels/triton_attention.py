"""Exact attention with a bias per key on CUDA, in tiles: no `[B, H, N, N]` scores in memory, forward or backward.

For heads up to 256 wide, any strides; sums in float32. Speed on a GPU: not measured. Needs Triton and compute
capability 8.0.
"""
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["attend"]

LOG2E = tl.constexpr(1.4426950408889634)  # the hardware has exp2; scores and lse are in base 2


def attend(
    q: Tensor,  # [B, H, N, D]
    k: Tensor,  # [B, H, N, D]
    v: Tensor,  # [B, H, N, D]
    bias: Tensor,  # [B, N]
    scale: float | None = None,
) -> Tensor:
    """Return `softmax(scale * q k^T + bias[:, None, None, :]) v`, `[B, H, N, D]` in the memory order of `[B, N, H, D]`.

    Differentiable in `q`, `k` and `v`. Dao, 2023, arXiv:2307.08691; the bias is ToMe's proportional attention.
    """
    device = q.device.type
    # under autocast like torch's own attention; else the dtype of q
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = _attend(q.to(dtype), k.to(dtype), v.to(dtype), bias.float(), scale)[0]
    return out


@torch.library.custom_op(
    "tokenmerge::triton_attend",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor bias, float scale) -> (Tensor, Tensor)",
)
def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    B, H, N, _ = q.shape
    out, lse = _attend_fake(q, k, v, bias, scale)
    q, k, v, bias = _rows(q), _rows(k), _rows(v), bias.contiguous()
    blocks, options = _blocks(q)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    grid = (B * H * triton.cdiv(N, blocks[-1]),)
    with torch.cuda.device_of(q):
        attend_kernel[grid](q, k, v, bias, out, lse, H, N, scale, *strides, *blocks, **options)
    return out, lse


@_attend.register_fake
def _attend_fake(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    B, H, N, _ = q.shape
    return _heads_within(q), q.new_empty((B, H, N), dtype=torch.float32)


@torch.library.custom_op(
    "tokenmerge::triton_attend_grad",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor bias, Tensor out, Tensor lse, float scale)"
    " -> (Tensor, Tensor, Tensor)",
)
def _attend_grad(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, N, _ = q.shape
    grads: tuple[Tensor, Tensor, Tensor] = _attend_grad_fake(grad, q, k, v, bias, out, lse, scale)
    grad, q, k, v, bias = _rows(grad), _rows(q), _rows(k), _rows(v), bias.contiguous()
    # in the memory order of the forward, which a compiler may have changed
    out, lse = out.transpose(1, 2).contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    blocks, options = _blocks(q)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    sizes = (H, N, scale, *strides, *blocks)
    grid = (B * H * triton.cdiv(N, blocks[-1]),)
    with torch.cuda.device_of(q):
        # order matters: the first kernel writes delta, the second reads it
        attend_grad_q_kernel[grid](q, k, v, bias, grad, out, lse, delta, grads[0], *sizes, **options)
        attend_grad_kv_kernel[grid](q, k, v, bias, grad, lse, delta, *grads[1:], *sizes, **options)
    return grads


@_attend_grad.register_fake
def _attend_grad_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _heads_within(q), _heads_within(k), _heads_within(v)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_attend_grad(grad, *ctx.saved_tensors, ctx.scale), None, None)


_attend.register_autograd(_backward, setup_context=_keep_for_backward)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads_within(x: Tensor) -> Tensor:
    """Allocate `[B, H, N, D]` in the memory order of `[B, N, H, D]`, so that the model's reshape copies nothing."""
    B, H, N, D = x.shape
    return x.new_empty((B, N, H, D)).transpose(1, 2)


def _blocks(x: Tensor) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Return (row width, its block width, rows per tile) and the launch options."""
    D = x.shape[-1]
    width = max(16, triton.next_power_of_2(D))
    # fits the 99 KiB of shared memory of sm_86; spills at most 312 bytes (compiled for sm_80, not timed)
    if x.dtype == torch.float32:
        return (D, width, min(32, 4096 // width)), {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}
    warps = 4 if width <= 64 else 8
    return (D, width, min(64, 8192 // width)), {"num_warps": warps, "num_stages": 2, "enable_fp_fusion": True}


@triton.jit
def place(N, H, TILE: tl.constexpr):
    """Return this program's image, head, tokens, and its offset in a `[B, H, N]` tensor."""
    tiles = tl.cdiv(N, TILE)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    return pair // H, pair % H, tl.program_id(0) % tiles * TILE + tl.arange(0, TILE), pair * N


@triton.jit
def load_rows(p_x, o_n, N, stride_n, D: tl.constexpr, WIDTH: tl.constexpr):
    o_d = tl.arange(0, WIDTH)
    p_x += o_n.to(tl.int64)[:, None] * stride_n + o_d[None, :]
    return tl.load(p_x, mask=(o_n < N)[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def store_rows(p_x, b_x, image, head, o_n, H, N, D: tl.constexpr, WIDTH: tl.constexpr):
    o_d = tl.arange(0, WIDTH)
    p_x += ((image * N + o_n)[:, None] * H + head) * D + o_d[None, :]
    tl.store(p_x, b_x, mask=(o_n < N)[:, None] & (o_d < D)[None, :])


@triton.jit
def scores(b_q, b_k, p_bias, o_k, N, scale):
    """Return the scores of a tile in base 2; keys beyond the last get minus infinity."""
    b_bias = tl.load(p_bias + o_k, mask=o_k < N, other=float("-inf"))
    return (tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale + b_bias[None, :]) * LOG2E


@triton.jit(do_not_specialize=["N", "scale"])
def attend_kernel(
    p_q,
    p_k,
    p_v,
    p_bias,
    p_out,
    p_lse,
    H,
    N,
    scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    image, head, o_q, first = place(N, H, TILE)
    p_k += image * stride_kb + head * stride_kh
    p_v += image * stride_vb + head * stride_vh
    b_q = load_rows(p_q + image * stride_qb + head * stride_qh, o_q, N, stride_qn, D, WIDTH)
    # finite: a whole tile of padding, minus infinity, has no top of its own
    b_top = tl.full((TILE,), -1e38, tl.float32)
    b_sum = tl.zeros((TILE,), tl.float32)
    b_out = tl.zeros((TILE, WIDTH), tl.float32)
    for start in range(0, N, TILE):
        o_k = start + tl.arange(0, TILE)
        b_k = load_rows(p_k, o_k, N, stride_kn, D, WIDTH)
        b_score = scores(b_q, b_k, p_bias + image * N, o_k, N, scale)
        b_new = tl.maximum(b_top, tl.max(b_score, 1))
        b_weight = tl.exp2(b_score - b_new[:, None])
        b_fade = tl.exp2(b_top - b_new)
        b_v = load_rows(p_v, o_k, N, stride_vn, D, WIDTH)
        b_out = b_out * b_fade[:, None] + tl.dot(b_weight.to(b_v.dtype), b_v, input_precision="ieee")
        b_sum = b_sum * b_fade + tl.sum(b_weight, 1)
        b_top = b_new
    store_rows(p_out, b_out / b_sum[:, None], image, head, o_q, H, N, D, WIDTH)
    tl.store(p_lse + first + o_q, b_top + tl.log2(b_sum), mask=o_q < N)


@triton.jit(do_not_specialize=["N", "scale"])
def attend_grad_q_kernel(
    p_q,
    p_k,
    p_v,
    p_bias,
    p_grad,
    p_out,
    p_lse,
    p_delta,
    p_grad_q,
    H,
    N,
    scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gn,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """Compute the gradient of a tile of queries, and delta = sum(grad * out) of each query."""
    image, head, o_q, first = place(N, H, TILE)
    p_k += image * stride_kb + head * stride_kh
    p_v += image * stride_vb + head * stride_vh
    b_q = load_rows(p_q + image * stride_qb + head * stride_qh, o_q, N, stride_qn, D, WIDTH)
    b_grad = load_rows(p_grad + image * stride_gb + head * stride_gh, o_q, N, stride_gn, D, WIDTH)
    b_out = load_rows(p_out + (image * N * H + head) * D, o_q, N, H * D, D, WIDTH)
    b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
    tl.store(p_delta + first + o_q, b_delta, mask=o_q < N)
    b_lse = tl.load(p_lse + first + o_q, mask=o_q < N, other=float("inf"))
    b_grad_q = tl.zeros((TILE, WIDTH), tl.float32)
    for start in range(0, N, TILE):
        o_k = start + tl.arange(0, TILE)
        b_k = load_rows(p_k, o_k, N, stride_kn, D, WIDTH)
        b_v = load_rows(p_v, o_k, N, stride_vn, D, WIDTH)
        b_weight = tl.exp2(scores(b_q, b_k, p_bias + image * N, o_k, N, scale) - b_lse[:, None])
        b_step = b_weight * (tl.dot(b_grad, tl.trans(b_v), input_precision="ieee") - b_delta[:, None])
        b_grad_q += tl.dot(b_step.to(b_k.dtype), b_k, input_precision="ieee")
    store_rows(p_grad_q, b_grad_q * scale, image, head, o_q, H, N, D, WIDTH)


@triton.jit(do_not_specialize=["N", "scale"])
def attend_grad_kv_kernel(
    p_q,
    p_k,
    p_v,
    p_bias,
    p_grad,
    p_lse,
    p_delta,
    p_grad_k,
    p_grad_v,
    H,
    N,
    scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gn,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    image, head, o_k, first = place(N, H, TILE)
    p_q += image * stride_qb + head * stride_qh
    p_grad += image * stride_gb + head * stride_gh
    b_k = load_rows(p_k + image * stride_kb + head * stride_kh, o_k, N, stride_kn, D, WIDTH)
    b_v = load_rows(p_v + image * stride_vb + head * stride_vh, o_k, N, stride_vn, D, WIDTH)
    b_grad_k = tl.zeros((TILE, WIDTH), tl.float32)
    b_grad_v = tl.zeros((TILE, WIDTH), tl.float32)
    for start in range(0, N, TILE):
        o_q = start + tl.arange(0, TILE)
        b_q = load_rows(p_q, o_q, N, stride_qn, D, WIDTH)
        b_grad = load_rows(p_grad, o_q, N, stride_gn, D, WIDTH)
        # queries beyond the last get weight 0
        b_lse = tl.load(p_lse + first + o_q, mask=o_q < N, other=float("inf"))
        b_delta = tl.load(p_delta + first + o_q, mask=o_q < N, other=0.0)
        b_weight = tl.exp2(scores(b_q, b_k, p_bias + image * N, o_k, N, scale) - b_lse[:, None])
        b_grad_v += tl.dot(tl.trans(b_weight.to(b_grad.dtype)), b_grad, input_precision="ieee")
        b_step = b_weight * (tl.dot(b_grad, tl.trans(b_v), input_precision="ieee") - b_delta[:, None])
        b_grad_k += tl.dot(tl.trans(b_step.to(b_q.dtype)), b_q, input_precision="ieee")
    store_rows(p_grad_k, b_grad_k * scale, image, head, o_k, H, N, D, WIDTH)
    store_rows(p_grad_v, b_grad_v, image, head, o_k, H, N, D, WIDTH)
