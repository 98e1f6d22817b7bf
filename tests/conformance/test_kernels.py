"""Every implementation of every operation against the reference, at odd shapes, forward and backward.

Triton's have tests of their own beside these, in `tests/kernels`: they need its interpreter or a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention.flex_attention import flex_attention

import third_opinion
from helpers import TOLERANCE, assert_close, tiny_vit
from tokenmerge import kernels, matching, patch
from tokenmerge.errors import UnknownNameError, UnsupportedError
from tokenmerge.kernels import TABLE, attention, cpu, reference
from tokenmerge.measure.timing import peak_memory

ROWS = [(op, kernel) for op, row in TABLE.items() for kernel in row if kernel.name not in ("reference", "triton")]
IDS = [f"{op}-{kernel.name}" for op, kernel in ROWS]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
needs_native = pytest.mark.skipif(cpu._LIBRARY is None, reason="the part in C++ was not built: no compiler")
# B, H, N, D, prefix, r: widths that no vector divides, one head, one block of rows and more, every token absorbed
SHAPES = [
    (1, 1, 2, 5, 0, 1),
    (2, 3, 17, 8, 1, 8),
    (3, 2, 197, 64, 1, 16),
    (1, 2, 257, 33, 5, 126),
    (2, 1, 578, 80, 2, 40),
    (5, 4, 18, 16, 0, 9),
]


def _keys(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Keys as attention has them: a view of a projection, `[B, H, N, D]`."""
    B, H, N, D = shape[:4]
    return torch.randn(B, N, 3, H, D).to(dtype)[:, :, 1].transpose(1, 2)


def _tokens(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Tokens, sizes with one group of padding, a plan and what attention adds, in rows that are not side by side."""
    B, _, N, D, prefix, r = shape
    x, branch = torch.randn(2, B, N, 2 * D).to(dtype)[..., :D]
    size = torch.randint(1, 9, (B, N)).float()
    keep, src, dst = reference.bipartite(torch.randn(B, N, 8), r, prefix)
    size[:, src[0, 0]] = size[:, keep[0, dst[0, 0]]] = 0
    return x, size, keep, src, dst, branch


def _inputs(op: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    if op == "bipartite":
        return _keys(shape, dtype), shape[5], shape[4]
    if op == "merge":
        return _tokens(shape, dtype)
    assert op == "attend", "a new operation needs inputs here"
    q, k, v = (_keys(shape, dtype) for _ in range(3))
    return q, k, v, torch.randint(1, 197, (shape[0], shape[2])).float().log()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "kernel"), ROWS, ids=IDS)
def test_equals_the_reference(
    op: str, kernel: kernels.Kernel, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = _inputs(op, shape, dtype)
    if kernel.name == "flex" and shape[3] & (shape[3] - 1):
        assert not kernel.supports(inputs[0])
        return
    if kernel.name == "flex":
        # the fused one runs on GPUs only; what it is given is checked on the unfused one
        monkeypatch.setattr(attention, "_flex", lambda is_compiling: flex_attention)
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    elif not kernel.supports(inputs[0]):
        assert kernel.name == "cpu" and (dtype in (torch.float64, torch.float16) or cpu._LIBRARY is None)
        return
    before = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
    with torch.no_grad():
        _compare(op, kernel.run(*inputs), inputs)
    for value, copy in zip(inputs, before, strict=True):
        assert not isinstance(value, Tensor) or torch.equal(value, copy)


def _compare(op: str, got: Any, inputs: tuple[Any, ...]) -> None:
    expected = getattr(reference, op)(*inputs)
    got, expected = (out if isinstance(out, tuple) else (out,) for out in (got, expected))
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        if op == "bipartite":
            assert torch.equal(one, other)
        else:
            assert one.isfinite().all()
            assert_close(one, other)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("op", "kernel"), [row for row in ROWS if row[0] != "bipartite"], ids=IDS[1:])
def test_gradients_equal_the_reference(op: str, kernel: kernels.Kernel, shape: tuple[int, ...]) -> None:
    if kernel.name == "flex":
        pytest.skip("FlexAttention has no backward on CPU")
    inputs = _inputs(op, shape, torch.float32)
    if not kernel.supports(inputs[0]):
        assert cpu._LIBRARY is None
        return
    places = [0, 1, 2] if op == "attend" else [0, 5]
    found = []
    for run in (kernel.run, getattr(reference, op)):
        leaves = [value.detach().clone().requires_grad_() if i in places else value for i, value in enumerate(inputs)]
        out = run(*leaves)
        out = out[0] if isinstance(out, tuple) else out
        found.append(
            torch.autograd.grad((out * torch.linspace(-1, 1, out.shape[-1])).sum(), [leaves[i] for i in places])
        )
    for got, expected in zip(*found, strict=True):
        assert_close(got, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["cpu", "matmul", "reference"])
def test_merging_without_sizes_and_branch(name: str) -> None:
    x, _, keep, src, dst, branch = _tokens((2, 1, 50, 24, 1, 12), torch.float32)
    kernel = next(kernel for kernel in TABLE["merge"] if kernel.name == name)
    if not kernel.supports(x):
        pytest.skip("the part in C++ was not built: no compiler")
    ones = torch.ones(2, 50)
    plain, summed = kernel.run(x, None, keep, src, dst, None), kernel.run(x, ones, keep, src, dst, branch)
    assert_close(plain[0], reference.merge(x, ones, keep, src, dst)[0])
    assert_close(summed[0], reference.merge(x + branch, ones, keep, src, dst)[0])
    assert torch.equal(plain[1], summed[1]) and plain[1].sum(dim=1).eq(50).all()


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("run", [reference.bipartite, cpu.bipartite], ids=["reference", "cpu"])
def test_of_equal_scores_the_first_place_wins(run: Callable[..., Any], prefix: int) -> None:
    if run is cpu.bipartite and cpu._LIBRARY is None:
        pytest.skip("the part in C++ was not built: no compiler")
    # unit vectors of a few directions: scores are 0 and 1 without rounding, most of them tied
    metric = F.one_hot(torch.randint(0, 4, (3, 41)), 4).float()
    keep, src, dst = run(metric, 15, prefix)
    for image in range(3):
        pairs = list(zip(src[image].tolist(), dst[image].tolist(), strict=True))
        groups = [[token] + [i for i, slot in pairs if slot == m] for m, token in enumerate(keep[image].tolist())]
        assert groups == third_opinion.bipartite(metric[image].numpy(), 15, prefix)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("members", [2, 10, 100, 401])
def test_large_groups_keep_their_mean(members: int, dtype: torch.dtype) -> None:
    x = (torch.randn(1, 401, 64) + 2).to(dtype)[:, :members]
    keep, src = torch.tensor([[0]]), torch.arange(1, members)[None]
    plan = keep, src, torch.zeros_like(src)
    mean = x.double().mean(dim=1)
    error = (cpu.merge(x, None, *plan, None)[0][:, 0].double() - mean).abs().max()
    # halves: one rounding, of the mean itself
    assert error <= (1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps * mean.abs().max())


@needs_native
def test_a_view_that_is_negated_later_is_what_it_stands_for() -> None:
    negated = torch._neg_view(torch.randn(2, 17, 8))
    plan = kernels.bipartite(negated, 5, 1)
    assert all(torch.equal(*pair) for pair in zip(plan, reference.bipartite(negated, 5, 1), strict=True))
    assert_close(kernels.merge(negated, None, *plan)[0], reference.merge(negated, None, *plan)[0])


@needs_native
def test_tokens_that_are_no_numbers_match_as_in_the_reference() -> None:
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -float("nan")])
    for case in range(40):
        metric = torch.randn(2, 2, 20 + 7 * case, 5 + case)
        places = [torch.randint(length, (case % 4,)) for length in metric.shape]
        metric[tuple(places)] = odd[torch.randint(4, (case % 4,))]
        got, expected = cpu.bipartite(metric, 5 + case, 1), reference.bipartite(metric, 5 + case, 1)
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    metric = torch.full((2, 1, 40, 8), float("nan"))
    got, expected = cpu.bipartite(metric, 9, 2), reference.bipartite(metric, 9, 2)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("tangent_of", ["input", "weight"])
def test_derivatives_in_forward_mode_are_those_of_the_reference(tangent_of: str, trains: bool) -> None:
    model, x = tiny_vit().requires_grad_(trains), torch.randn(2, 3, 32, 32)
    for block in model.blocks:
        block.attn.fused_attn = False  # torch's fused attention knows no forward mode
    patch(model, r=8)
    weight = model.patch_embed.proj.weight
    direction = torch.randn_like(x if tangent_of == "input" else weight)

    def tangent() -> Tensor:
        with forward_ad.dual_level():
            if tangent_of == "input":
                out = model(forward_ad.make_dual(x, direction))
            else:
                dual = forward_ad.make_dual(weight.detach(), direction)
                out = torch.nn.utils.stateless._functional_call(model, {"patch_embed.proj.weight": dual}, (x,))
            found: Tensor = forward_ad.unpack_dual(out).tangent
            return found.detach()

    got = tangent()
    with kernels.force("reference"):
        expected = tangent()
    assert expected.abs().max() > 1e-3
    assert_close(got, expected)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_matching_refuses_more_than_half_of_the_others(name: str) -> None:
    if name == "cpu" and cpu._LIBRARY is None:
        pytest.skip("the part in C++ was not built: no compiler")
    for r, prefix in ((9, 0), (8, 2), (-1, 0), (1, -1), (0, 18)):
        with kernels.force(name), pytest.raises(UnsupportedError, match="removes at most half of the others"):
            kernels.bipartite(torch.randn(1, 17, 4), r, prefix)


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("B", [1, 2, 7])
def test_native_answers_do_not_depend_on_threads(B: int, threads: int) -> None:
    metric, tokens = _keys((B, 2, 300, 64), torch.float32), _tokens((B, 1, 300, 96, 1, 60), torch.float32)
    expected = reference.bipartite(metric, 60, 1), cpu.merge(*tokens)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        plan, merged = cpu.bipartite(metric, 60, 1), cpu.merge(*tokens)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(plan + merged, expected[0] + expected[1], strict=True))


@needs_native
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
def test_native_operators_keep_torchs_contracts() -> None:
    x, size, keep, src, dst, branch = _tokens((2, 1, 30, 16, 1, 7), torch.float32)
    inputs = (x.contiguous().requires_grad_(), size, keep, src, dst, branch.contiguous().requires_grad_())
    torch.library.opcheck(torch.ops.tokenmerge.cpu_merge.default, inputs)
    torch.library.opcheck(torch.ops.tokenmerge.cpu_bipartite.default, (_keys((2, 3, 30, 16), torch.float32), 7, 1))


@needs_native
def test_native_refuses_a_plan_that_points_outside() -> None:
    x, size, keep, src, dst, _ = _tokens((2, 1, 30, 16, 1, 7), torch.float32)
    for wrong in ((keep + 30, src, dst), (keep, src - 30, dst), (keep, src, dst + 30)):
        with pytest.raises(IndexError, match="tokens beyond the 30 there are, or output slots beyond 23"):
            cpu.merge(x, size, *wrong, None)


@needs_native
@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.zeros(1, 2, 3, 4), True),
        (torch.zeros(1, 3, 4, dtype=torch.bfloat16), True),
        (torch.zeros(1, 2, 3, 4, dtype=torch.float16), False),
        (torch.zeros(1, 2, 3, 4, dtype=torch.float64), False),
        (torch.zeros(1, 2, 3, 1025), False),
        (torch.zeros(1, 2, 4, 3).mT, False),
        (torch.zeros(1, 2, 3, 4, device="meta"), False),
        (torch.nn.Parameter(torch.zeros(1, 2, 3, 4)), False),
    ],
    ids=["plain", "bfloat16", "half", "double", "wide", "transposed", "meta", "subclass"],
)
def test_native_matching_knows_its_borders(x: Tensor, expected: bool) -> None:
    assert cpu.supports_bipartite(x) is expected


@needs_native
def test_selection_is_automatic_forced_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, half = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4, dtype=torch.float16)
    monkeypatch.delenv("TOKENMERGE_KERNELS", raising=False)
    assert (kernels.select("merge", plain).name, kernels.select("merge", half).name) == ("cpu", "reference")
    assert kernels.fallbacks({("merge", "cpu"): "cpu"}) == [] and not kernels.is_replaced("attend")
    (line,) = kernels.fallbacks({("merge", "reference"): "cpu"})
    assert "merge without its cpu version, which needs a CPU, float32 or" in line
    with kernels.force("matmul"):
        assert (kernels.select("merge", plain).name, kernels.select("unmerge", plain).name) == ("matmul", "reference")
    with kernels.force("columns"):
        assert kernels.is_replaced("attend")
    monkeypatch.setenv("TOKENMERGE_KERNELS", "reference")
    assert kernels.select("merge", plain).name == "reference"
    monkeypatch.setenv("TOKENMERGE_KERNELS", "cpu")
    assert (kernels.select("merge", plain).name, kernels.select("unmerge", plain).name) == ("cpu", "reference")
    with pytest.raises(UnsupportedError, match=r"'cpu' version of 'merge' .* needs a CPU, .*C\+\+.*float16 on cpu"):
        kernels.select("merge", half)
    monkeypatch.setenv("TOKENMERGE_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match=r"'triton' version of 'merge' .* needs triton, a CUDA device"):
            kernels.select("merge", plain)
    monkeypatch.setenv("TOKENMERGE_KERNELS", "cpus")
    with pytest.raises(UnknownNameError, match=r"no kernel family .*'cpus'. Did you mean 'cpu'"):
        kernels.select("merge", plain)
    with pytest.raises(UnknownNameError, match=r"no kernel family .*'flexx'"), kernels.force("flexx"):
        pass


def test_without_the_native_part_all_runs_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny_vit(), torch.randn(2, 3, 32, 32)
    handle = patch(model, r=8)
    with torch.no_grad():
        expected = model(x)
        monkeypatch.setattr(cpu, "_LIBRARY", None)
        assert_close(model(x), expected)
    report = handle.report()
    assert report.kernels == {"bipartite": "reference", "merge": "reference", "attend": "reference"}
    assert len(report.fallbacks) == 2 and "C++ compiler" in str(report)


@pytest.mark.parametrize("name", ["columns", "values"])
@pytest.mark.parametrize("global_pool", ["token", "avg", "map"])
def test_a_model_attends_through_every_implementation(name: str, global_pool: str) -> None:
    model, x = tiny_vit(global_pool=global_pool, class_token=global_pool == "token"), torch.randn(2, 3, 32, 32)
    patch(model, r=8)
    with torch.no_grad():
        expected = model(x)
        with kernels.force(name):
            got = model(x)
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert type(got) is Tensor and not torch.equal(got, expected)  # another order of rounding: it really ran
    assert_close(got, expected)
    assert_close(compiled, expected)


def test_every_row_ends_with_the_reference() -> None:
    assert {row[-1].name for row in TABLE.values()} == {"reference"}
    assert all(hasattr(kernels, op) for op in TABLE)


def test_matching_holds_no_matrix() -> None:
    metric = torch.randn(2, 4096, 64)
    for run in (reference.bipartite, cpu.bipartite)[: 1 if cpu._LIBRARY is None else 2]:
        # the scores of both sides would take 32 MB
        assert peak_memory(partial(run, r=100, prefix=1), metric) < 20 * 2**20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_matching_of_halves_runs_in_full_precision(dtype: torch.dtype) -> None:
    metric = torch.randn(2, 65, 64).to(dtype)
    half, full = matching.bipartite(metric, 16, prefix=1), matching.bipartite(metric.float(), 16, prefix=1)
    assert torch.equal(half.keep, full.keep) and torch.equal(half.dst, full.dst)
    with torch.autocast("cpu", torch.bfloat16):
        within = matching.bipartite(metric, 16, prefix=1)
    assert torch.equal(within.keep, full.keep)


def test_zero_vectors_do_not_poison_the_match() -> None:
    metric = torch.randn(1, 20, 4)
    metric[0, 4] = 0
    best, _ = kernels.match(metric, slice(0, 20, 2), slice(1, 20, 2))
    assert best.isfinite().all() and best[0, 2] == 0


@pytest.mark.parametrize("name", ["columns", "values", "reference"])
def test_a_learned_bias_gets_its_gradient_whatever_is_forced(name: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 9, 8).unbind()
    bias = torch.randn(2, 9, requires_grad=True)
    with kernels.force(name):
        out = kernels.attend(q, k, v, bias)
    (gradient,) = torch.autograd.grad(out.square().sum(), bias)
    plain = bias.detach().clone().requires_grad_()
    scores = q @ k.mT / 8**0.5 + plain[:, None, None]
    (expected,) = torch.autograd.grad((scores.softmax(dim=-1) @ v).square().sum(), plain)
    torch.testing.assert_close(gradient, expected)
