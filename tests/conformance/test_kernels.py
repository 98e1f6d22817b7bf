"""Every implementation of every operation keeps the promises of `tokenmerge.testing`, and what is true of one alone.

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
from helpers import assert_close, tiny_vit
from tokenmerge import kernels, matching, patch
from tokenmerge.errors import UnknownNameError, UnsupportedError
from tokenmerge.kernels import TABLE, attention, cpu, reference
from tokenmerge.measure.timing import peak_memory
from tokenmerge.testing import check_kernel
from tokenmerge.testing.kernels import DTYPES, SHAPES, inputs_of

ROWS = [(op, kernel) for op, row in TABLE.items() for kernel in row if kernel.name not in ("reference", "triton")]
IDS = [f"{op}-{kernel.name}" for op, kernel in ROWS]
needs_native = pytest.mark.skipif(cpu._LIBRARY is None, reason="the part in C++ was not built: no compiler")


def _merge_inputs() -> tuple[Any, ...]:
    return inputs_of("merge", (2, 1, 30, 16, 1, 7), torch.float32)


@pytest.mark.parametrize(("op", "kernel"), ROWS, ids=IDS)
def test_a_version_keeps_its_promises(op: str, kernel: kernels.Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = [dtype for dtype in DTYPES if not kernel.supports(inputs_of(op, SHAPES[1], dtype)[0])]
    if kernel.name == "flex":
        assert refused == list(DTYPES)
        # the fused one runs on GPUs only; what it is given is checked on the unfused one
        monkeypatch.setattr(attention, "_flex", lambda is_compiling: flex_attention)
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        eager = kernel._replace(supports=lambda x: x.dim() == 4 and x.shape[-1] & (x.shape[-1] - 1) == 0)
        lacks = {"gradients": "FlexAttention has no backward on CPU", "layouts": "nor lazily negated views"}
        check_kernel(op, eager, skip=lacks)
        return
    if kernel.name == "cpu" and cpu._LIBRARY is None:
        pytest.skip("the part in C++ was not built: no compiler")
    assert refused == ([torch.float64, torch.float16] if kernel.name == "cpu" else [])
    check_kernel(op, kernel)


@pytest.mark.parametrize("op", TABLE)
def test_the_reference_keeps_the_promises_that_it_can_break(op: str) -> None:
    check_kernel(op, TABLE[op][-1])


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
    metric = inputs_of("bipartite", (B, 2, 300, 64, 1, 60), torch.float32)[0]
    tokens = inputs_of("merge", (B, 1, 300, 96, 1, 60), torch.float32)
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
    x, size, keep, src, dst, branch = _merge_inputs()
    inputs = (x.contiguous().requires_grad_(), size, keep, src, dst, branch.contiguous().requires_grad_())
    torch.library.opcheck(torch.ops.tokenmerge.cpu_merge.default, inputs)
    matched = inputs_of("bipartite", (2, 3, 30, 16, 1, 7), torch.float32)
    torch.library.opcheck(torch.ops.tokenmerge.cpu_bipartite.default, matched)


@needs_native
def test_native_refuses_a_plan_that_points_outside() -> None:
    x, size, keep, src, dst, _ = _merge_inputs()
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
    assert line == "merge without its cpu version, which needs plain tensors of float32 or bfloat16"
    (line,) = kernels.fallbacks({("bipartite", "reference"): "cpu"})
    assert line.endswith("needs plain tensors of float32 or bfloat16 with rows of at most 1024 numbers")
    (line,) = kernels.fallbacks({("merge", "reference"): "cuda"})
    assert line.startswith("merge without its triton version, which needs ") and "TOKENMERGE_KERNELS=triton" in line
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
    needed = "needs the part in C++, which is built when tokenmerge is installed where a C++ compiler (c++) is found"
    assert len(report.fallbacks) == 2 and all(line.endswith(needed) for line in report.fallbacks)
    assert "C++ compiler" in str(report) and "bfloat16" not in str(report)


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
