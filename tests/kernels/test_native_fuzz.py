"""The part in C++ under shapes, strides, defaults and indices nobody has thought of: it answers, or refuses, in bounds.

`make asan` runs these with a build that stops at the first byte read or written outside of a tensor.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import assert_close
from tokenmerge.errors import UnsupportedError
from tokenmerge.kernels import cpu, reference

pytestmark = pytest.mark.skipif(cpu._LIBRARY is None, reason="the part in C++ was not built: no compiler")
SEEDS = range(8)
CASES = 100  # of each seed
WRONG_SIZES = 2


@contextmanager
def _defaults(draw: random.Random) -> Iterator[None]:
    """Torch's defaults as others may have set them, and any number of threads."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(draw.choice([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    torch.set_num_threads(draw.choice([1, 2, 3, 5]))
    try:
        with torch.device(draw.choice(["cpu", "meta"])):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)


def _laid_out(shape: tuple[int, ...], dtype: torch.dtype, draw: random.Random) -> Tensor:
    """A tensor of this shape: in one piece, a part of a larger one, with its axes in another order, or expanded."""
    way = draw.choice(["plain", "part", "order", "expanded", "step"])
    if way == "part":  # it ends where its memory ends
        return torch.randn([length + 1 for length in shape]).to(dtype)[tuple(slice(1, None) for _ in shape)]
    if way == "order":
        axes = draw.sample(range(len(shape)), len(shape))
        return torch.randn([shape[axis] for axis in axes]).to(dtype).permute([axes.index(i) for i in range(len(shape))])
    if way == "expanded" and len(shape) > 2:
        return torch.randn(shape[1:]).to(dtype).expand(shape)
    if way == "step":
        return torch.randn([*shape[:-2], 2 * shape[-2], shape[-1]]).to(dtype)[..., ::2, :]
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("seed", SEEDS)
def test_matching_makes_a_plan_of_any_shape(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(CASES):
        B, H, N = draw.randint(0, 5), draw.randint(1, 4), draw.choice([0, 1, 2, 3, draw.randint(4, 160)])
        D = draw.choice([0, 1, 15, 16, 17, 64, draw.randint(1, 100), draw.choice([1024, 1025])])
        prefix = draw.randint(0, N)
        r = draw.randint(0, (N - prefix) // 2)
        metric = _laid_out((B, H, N, D)[draw.randint(0, 1) * (H == 1) :], torch.float32, draw)
        metric = metric if metric.dim() == 4 else metric.expand(B, *metric.shape[-2:])
        metric = metric.to(draw.choice([torch.float32, torch.bfloat16]), memory_format=torch.preserve_format)
        if draw.random() < 0.2 and metric.numel():
            metric = metric.clone()
            metric[..., :: draw.randint(1, 50), :: draw.randint(1, 50)] = draw.choice(
                [float("nan"), float("inf"), 0.0, 1e38, 1e-38]
            )
        if not cpu.supports_bipartite(metric):
            continue
        with _defaults(draw):
            keep, src, dst = cpu.bipartite(metric, r, prefix)
        both = torch.cat((keep, src), dim=1).sort(dim=1).values
        assert torch.equal(both, torch.arange(N).expand(B, N)), "a token is there once"
        assert torch.equal(keep[:, :prefix], torch.arange(prefix).expand(B, prefix))
        assert ((dst >= N - r - (N - prefix) // 2 - 1) & (dst < N - r)).all(), "in side B"


@pytest.mark.parametrize("seed", SEEDS)
def test_merging_equals_the_reference_or_refuses_the_plan(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(CASES):
        B, N, C = draw.randint(0, 4), draw.randint(1, 80), draw.choice([0, 1, 17, 64, draw.randint(1, 300), 1100])
        M, R = draw.randint(1, N), draw.choice([0, 1, draw.randint(0, 2 * N)])
        dtype = draw.choice([torch.float32, torch.bfloat16])
        x = _laid_out((B, N, C), dtype, draw)
        branch = _laid_out((B, N, C), dtype, draw) if draw.random() < 0.5 else None
        size = draw.choice([None, torch.rand(B, N) * 9, torch.zeros(B, N), torch.randint(1, 9, (B, 2 * N))[:, ::2]])
        keep, src, dst = torch.randint(N, (B, M)), torch.randint(N, (B, R)), torch.randint(M, (R, B)).T
        wrong = draw.choice([None, None, keep, src, dst])
        if wrong is not None and wrong.numel():
            wrong[draw.randrange(B), draw.randrange(wrong.shape[1])] = draw.choice([-1, 10**6, -(2**62), 2**62])
        with _defaults(draw):
            if wrong is not None and wrong.numel():
                with pytest.raises(IndexError, match="the plan names tokens beyond"):
                    cpu.merge(x, size, keep, src, dst, branch)
                continue
            got = cpu.merge(x, size, keep, src, dst, branch)
        # the truth of halves, too, is in full precision
        wide = None if branch is None else branch.float()
        summed = x.float() if wide is None else (x.float() + wide).to(dtype).float()
        out, new_size = reference.merge(summed, None if size is None else size.float(), keep, src, dst)
        assert_close(got[0], out.to(dtype))
        torch.testing.assert_close(got[1], new_size, rtol=1e-5, atol=1e-5)


def _guarded(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory between two strips that nobody may write to, and the whole of it."""
    whole = torch.full((count + 64,), 77, dtype=dtype)
    return whole[32 : 32 + count], whole


@pytest.mark.parametrize("seed", SEEDS)
def test_matching_touches_nothing_where_the_numbers_do_not_fit(seed: int) -> None:
    draw, odd = random.Random(seed), [-1, 0, 1, 2**31, 2**62, -(2**63)]
    for _ in range(CASES):
        B, H, N, D, prefix = draw.randint(2, 3), draw.randint(2, 3), draw.randint(4, 40), draw.randint(1, 40), 1
        r, threads = draw.randint(1, (N - 1) // 2), draw.randint(1, 3)
        floats = cpu._LIBRARY.tokenmerge_scratch(N, D, prefix)  # type: ignore[union-attr]
        metric = torch.randn(B, H, N, D)
        long, floating = torch.long, torch.float32
        kinds = [(B * (N - r), long), (B * r, long), (B * r, long), (min(B, threads) * floats, floating)]
        buffers = [_guarded(*kind) for kind in kinds]
        memory = [metric.data_ptr(), metric.numel()], *([part.data_ptr(), part.numel()] for part, _ in buffers)
        numbers: dict[str, int] = {"B": B, "H": H, "N": N, "D": D, "sB": H * N * D, "sH": N * D, "sN": D}
        numbers |= {"r": r, "prefix": prefix}

        def call(threads: int = threads, numbers: Any = numbers, memory: Any = memory) -> int:
            (at, count), *rest = memory
            rest = [value for pair in rest for value in pair]
            run = cpu._LIBRARY.tokenmerge_bipartite  # type: ignore[union-attr]
            return int(run(at, count, 0, *numbers.values(), *rest, threads))

        assert call() == 0
        for _, whole in buffers:
            assert (whole[:32] == 77).all() and (whole[-32:] == 77).all()
            whole.fill_(77)
        name, place = draw.choice(list(numbers)), draw.randrange(5)
        # a stride of 0 or 1, and N or D one less, lie within; B one less does not fit what is written
        beyond = 0 if name in ("sB", "sH", "sN") else numbers[name]
        values = [value for value in odd if value > max(beyond, 1)] + [-1]
        assert call(numbers={**numbers, name: draw.choice(values) if name != "prefix" else -1}) == WRONG_SIZES
        assert call(numbers={**numbers, "r": numbers["r"] + 1}) == WRONG_SIZES
        assert call(numbers={**numbers, "prefix": draw.choice([-1, -2, N + 1, 10**6])}) == WRONG_SIZES
        assert call(threads=draw.choice([0, -1])) == WRONG_SIZES
        short = [list(pair) for pair in memory]
        short[place] = draw.choice([[short[place][0], short[place][1] - 1], [None, short[place][1]]])
        assert call(memory=short) == WRONG_SIZES
        assert all((whole == 77).all() for _, whole in buffers)


@pytest.mark.parametrize(
    ("N", "D", "prefix"), [(-1, 8, 0), (9, -1, 0), (9, 1025, 0), (9, 8, -1), (9, 8, 10), (2**31, 8, 0)]
)
def test_no_memory_is_asked_for_where_the_sizes_are_impossible(N: int, D: int, prefix: int) -> None:
    assert cpu._LIBRARY.tokenmerge_scratch(N, D, prefix) == -1  # type: ignore[union-attr]


@pytest.mark.parametrize(("r", "prefix"), [(-1, 1), (8, 1), (3, -1), (3, -8), (1, 16), (1, 17), (10**9, 0)])
def test_matching_refuses_amounts_beyond_the_tokens(r: int, prefix: int) -> None:
    with pytest.raises(UnsupportedError, match=rf"matching of \(2, 16, 8\) tokens .* r = {r} and prefix = {prefix}"):
        cpu.bipartite(torch.randn(2, 16, 8), r, prefix)


@pytest.mark.parametrize("wrong", ["keep", "src", "dst", "size", "branch", "count"])
def test_merging_refuses_tensors_of_another_kind(wrong: str) -> None:
    inputs: dict[str, Any] = {"x": torch.randn(2, 9, 4), "size": torch.ones(2, 9)}
    plan = reference.bipartite(torch.randn(2, 9, 4), 3, 1)
    inputs |= dict(zip(("keep", "src", "dst"), plan, strict=True)) | {"branch": torch.randn(2, 9, 4)}
    if wrong == "count":
        inputs["size"] = torch.ones(2, 8)
    else:
        inputs[wrong] = inputs[wrong].to("meta") if wrong == "size" else inputs[wrong].to(torch.int32)
    with pytest.raises(UnsupportedError, match=r"the C\+\+ part (takes|does not merge)"):
        cpu.merge(**inputs)
