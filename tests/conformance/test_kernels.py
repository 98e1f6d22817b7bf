"""Every implementation of every operation against the reference, at odd shapes, forward and backward."""

from __future__ import annotations

import pytest
import torch

from helpers import TOLERANCE, assert_close
from tokenmerge import kernels, matching
from tokenmerge.errors import UnknownNameError, UnsupportedError
from tokenmerge.kernels import TABLE, cpu, reference

ROWS = [(op, kernel) for op, row in TABLE.items() for kernel in row if kernel.name != "reference"]
SHAPES = [(1, 1, 2, 5), (2, 3, 17, 8), (3, 12, 197, 64), (1, 2, 577, 33)]  # B, H, N, D
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "kernel"), ROWS, ids=[f"{op}-{kernel.name}" for op, kernel in ROWS])
def test_equals_the_reference(op: str, kernel: kernels.Kernel, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert op == "mean_heads", "a new operation needs inputs here"
    B, H, N, D = shape
    x = torch.randn(B, N, 3, H, D, dtype=dtype)[:, :, 1].transpose(1, 2)
    if not kernel.supports(x):
        assert dtype == torch.bfloat16 or shape[1] == 1
        return
    before = x.clone()
    assert_close(kernel.run(x), reference.mean_heads(x), TOLERANCE[dtype])
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.zeros(1, 2, 3, 4), True),
        (torch.zeros(1, 1, 3, 4), False),
        (torch.zeros(1, 2, 3, 4, dtype=torch.float16), False),
        (torch.zeros(1, 2, 3, 4, requires_grad=True), False),
        (torch.zeros(2, 3, 4), False),
        (torch.zeros(1, 2, 3, 4, device="meta"), False),
    ],
    ids=["plain", "one-head", "half", "gradient", "no-heads", "meta"],
)
def test_cpu_mean_heads_knows_its_borders(x: torch.Tensor, expected: bool) -> None:
    assert cpu.supports_mean_heads(x) is expected


def test_selection_is_automatic_forced_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, half = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4, dtype=torch.float16)
    monkeypatch.delenv("TOKENMERGE_KERNELS", raising=False)
    assert (kernels.select("mean_heads", plain).name, kernels.select("mean_heads", half).name) == ("cpu", "reference")
    monkeypatch.setenv("TOKENMERGE_KERNELS", "reference")
    assert kernels.select("mean_heads", plain).name == "reference"
    monkeypatch.setenv("TOKENMERGE_KERNELS", "cpu")
    assert (kernels.select("mean_heads", plain).name, kernels.select("merge", plain).name) == ("cpu", "reference")
    with pytest.raises(UnsupportedError, match=r"TOKENMERGE_KERNELS=cpu .*'mean_heads'.*float16.*Unset"):
        kernels.select("mean_heads", half)
    monkeypatch.setenv("TOKENMERGE_KERNELS", "cpus")
    with pytest.raises(UnknownNameError, match=r"no kernel family .*'cpus'. Did you mean 'cpu'"):
        kernels.select("merge", plain)


def test_every_row_ends_with_the_reference() -> None:
    assert {row[-1].name for row in TABLE.values()} == {"reference"}
    assert all(hasattr(kernels, op) for op in TABLE)


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
