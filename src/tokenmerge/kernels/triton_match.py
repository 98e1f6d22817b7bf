"""Bipartite matching on CUDA: head mean, normalisation, best partner and selection of the r best in two launches.

The `[B, N/2, N/2]` scores are never stored: a program holds one tile of them. For any N; beyond 1,024, two more
launches average the heads once and rank in parallel. Speed on a GPU: not measured. Needs Triton and compute capability
8.0.
"""
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["bipartite"]

ONE_PROGRAM = 512  # tokens of side A that one program can rank
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


def bipartite(metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Match `[B, H, N, D]` or `[B, N, D]` by cosine; return `keep` `[B, M]`, `src` and `dst` `[B, R]`, in int64.

    A NaN score loses to every other score. Bolya et al., ICLR 2023, arXiv:2210.09461, section 3.
    """
    plan: tuple[Tensor, Tensor, Tensor] = _bipartite(metric, r, prefix)
    return plan


@torch.library.custom_op(
    "tokenmerge::triton_bipartite",
    mutates_args=(),
    schema="(Tensor metric, int r, int prefix) -> (Tensor, Tensor, Tensor)",
)
def _bipartite(metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    metric = metric[:, None] if metric.dim() == 3 else metric
    B, H, N, D = metric.shape
    # sides alternate over the whole sequence: A at even places, B at odd ones
    first_a, first_b = prefix + prefix % 2, prefix | 1
    count_a, count_b = (N - first_a + 1) // 2, (N - first_b + 1) // 2
    keep, src, dst = _bipartite_fake(metric, r, prefix)
    best = metric.new_empty((B, count_a), dtype=torch.float32)
    partner = metric.new_empty((B, count_a), dtype=torch.int32)
    rank = None
    width = max(16, triton.next_power_of_2(D))
    tile = min(64, 4096 // width)
    grid = (B * triton.cdiv(count_a, tile),)
    with torch.cuda.device_of(metric):
        if count_a > ONE_PROGRAM and H > 1:
            # average the heads once, since every tile of A reads all of B
            mean = metric.new_empty((B, 1, N, D), dtype=torch.float32)
            mean_kernel[(B * triton.cdiv(N, tile),)](metric, mean, N, H, *metric.stride(), D, width, tile, **OPTIONS)
            metric, H = mean, 1
        sides = (count_a, count_b, first_a, first_b)
        score_kernel[grid](metric, best, partner, N, H, *sides, *metric.stride(), D, width, tile, **OPTIONS)
        if count_a > ONE_PROGRAM:
            rank = torch.empty_like(partner)
            rank_kernel[grid](best, rank, count_a, tile, **OPTIONS)
        block = min(ONE_PROGRAM, max(16, triton.next_power_of_2(count_a)))
        place_kernel[(B,)](best, partner, rank, keep, src, dst, r, prefix, *sides, block, **OPTIONS)
    return keep, src, dst


@_bipartite.register_fake
def _bipartite_fake(metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    B, N = metric.shape[0], metric.shape[-2]
    keep, src, dst = (metric.new_empty((B, count), dtype=torch.int64) for count in (N - r, r, r))
    return keep, src, dst


@triton.jit
def mean_rows(p_x, o_n, N, H, stride_h, stride_n, stride_d, D: tl.constexpr, WIDTH: tl.constexpr):
    """Return the mean over heads of the rows `o_n`, in float32."""
    o_d = tl.arange(0, WIDTH).to(tl.int64)
    m_x = (o_n < N)[:, None] & (o_d < D)[None, :]
    p_x += o_n.to(tl.int64)[:, None] * stride_n + o_d[None, :] * stride_d
    b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
    for _ in range(1, H):
        p_x += stride_h
        b_x += tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
    return b_x / H


@triton.jit
def unit_rows(p_x, o_n, N, H, stride_h, stride_n, stride_d, D: tl.constexpr, WIDTH: tl.constexpr):
    b_x = mean_rows(p_x, o_n, N, H, stride_h, stride_n, stride_d, D, WIDTH)
    # IEEE rounding, so that parallel vectors of different lengths tie exactly
    b_norm = tl.maximum(tl.sqrt_rn(tl.sum(b_x * b_x, 1)), 1e-12)
    return tl.div_rn(b_x, tl.broadcast_to(b_norm[:, None], b_x.shape))


@triton.jit(do_not_specialize=["N", "H"])
def mean_kernel(
    p_x, p_mean, N, H, stride_b, stride_h, stride_n, stride_d, D: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr
):
    tiles = tl.cdiv(N, TILE)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    o_n = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    b_x = mean_rows(p_x + image * stride_b, o_n, N, H, stride_h, stride_n, stride_d, D, WIDTH)
    o_d = tl.arange(0, WIDTH)
    p_mean += (image * N + o_n)[:, None] * D + o_d[None, :]
    tl.store(p_mean, b_x, mask=(o_n < N)[:, None] & (o_d < D)[None, :])


@triton.jit(do_not_specialize=["N", "H", "count_a", "count_b", "first_a", "first_b"])
def score_kernel(
    p_x,
    p_best,
    p_partner,
    N,
    H,
    count_a,
    count_b,
    first_a,
    first_b,
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """Compute the best score of a tile of A in all of B, and the partner's place in B; of equal scores the first."""
    tiles = tl.cdiv(count_a, TILE)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    o_a = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    p_x += image * stride_b
    b_a = unit_rows(p_x, first_a + 2 * o_a, N, H, stride_h, stride_n, stride_d, D, WIDTH)
    b_best = tl.full((TILE,), float("-inf"), tl.float32)
    b_partner = tl.zeros((TILE,), tl.int32)
    for start in range(0, count_b, TILE):
        o_b = start + tl.arange(0, TILE)
        b_b = unit_rows(p_x, first_b + 2 * o_b, N, H, stride_h, stride_n, stride_d, D, WIDTH)
        b_score = tl.dot(b_a, tl.trans(b_b), input_precision="ieee")
        # drop NaN scores: with them the ranks would be no permutation
        b_score = tl.where((o_b < count_b)[None, :] & (b_score == b_score), b_score, float("-inf"))
        b_top, b_index = tl.max(b_score, 1, return_indices=True)
        b_partner = tl.where(b_top > b_best, start + b_index, b_partner)
        b_best = tl.maximum(b_best, b_top)
    m_a = o_a < count_a
    tl.store(p_best + image * count_a + o_a, b_best, mask=m_a)
    tl.store(p_partner + image * count_a + o_a, b_partner, mask=m_a)


@triton.jit
def ranks(p_best, o_a, count_a, CHUNK: tl.constexpr):
    """Return the ranks of the tokens `o_a` by falling score; of equal scores the earlier token comes first."""
    b_mine = tl.load(p_best + o_a, mask=o_a < count_a, other=float("-inf"))[:, None]
    b_rank = tl.zeros(o_a.shape, tl.int32)
    for start in range(0, count_a, CHUNK):
        o_other = start + tl.arange(0, CHUNK)
        b_other = tl.load(p_best + o_other, mask=o_other < count_a, other=float("-inf"))[None, :]
        m_before = (b_other > b_mine) | ((b_other == b_mine) & (o_other[None, :] < o_a[:, None]))
        b_rank += tl.sum(m_before.to(tl.int32), 1)
    return b_rank


@triton.jit(do_not_specialize=["count_a"])
def rank_kernel(p_best, p_rank, count_a, TILE: tl.constexpr):
    tiles = tl.cdiv(count_a, TILE)
    first = (tl.program_id(0) // tiles).to(tl.int64) * count_a
    o_a = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    b_rank = ranks(p_best + first, o_a, count_a, 32)
    tl.store(p_rank + first + o_a, b_rank, mask=o_a < count_a)


@triton.jit(do_not_specialize=["r", "prefix", "count_a", "count_b", "first_a", "first_b"])
def place_kernel(
    p_best,
    p_partner,
    p_rank,
    p_keep,
    p_src,
    p_dst,
    r,
    prefix,
    count_a,
    count_b,
    first_a,
    first_b,
    BLOCK: tl.constexpr,
):
    """Write an image's plan; `keep` is the prefix, the rest of A and all of B, each in order of place."""
    image = tl.program_id(0).to(tl.int64)
    p_keep += image * (prefix + count_a - r + count_b)
    o = tl.arange(0, BLOCK)
    for start in range(0, prefix, BLOCK):
        tl.store(p_keep + start + o, start + o, mask=start + o < prefix)
    slot_b = prefix + count_a - r
    for start in range(0, count_b, BLOCK):
        tl.store(p_keep + slot_b + start + o, first_b + 2 * (start + o), mask=start + o < count_b)
    slot_a = prefix
    for start in range(0, count_a, BLOCK):
        o_a = start + o
        m_a = o_a < count_a
        if p_rank is None:
            b_rank = ranks(p_best + image * count_a, o_a, count_a, 32)
        else:
            b_rank = tl.load(p_rank + image * count_a + o_a, mask=m_a, other=0)
        b_partner = tl.load(p_partner + image * count_a + o_a, mask=m_a, other=0)
        m_left = m_a & (b_rank >= r)
        tl.store(p_src + image * r + b_rank, first_a + 2 * o_a, mask=m_a & (b_rank < r))
        tl.store(p_dst + image * r + b_rank, slot_b + b_partner, mask=m_a & (b_rank < r))
        b_left = m_left.to(tl.int32)
        tl.store(p_keep + slot_a + tl.cumsum(b_left, 0) - 1, first_a + 2 * o_a, mask=m_left)
        slot_a += tl.sum(b_left, 0)
