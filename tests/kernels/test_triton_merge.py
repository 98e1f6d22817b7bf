"""The Triton merge and its gradient against a loop in float64, and at its borders."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from helpers import TOLERANCE, assert_close
from tokenmerge.kernels import reference, triton_merge, triton_supports

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, N, C, R, dropped
SHAPES = [(1, 2, 3, 1, 0), (2, 5, 33, 2, 0), (3, 17, 64, 8, 2), (1, 197, 300, 98, 0), (2, 257, 40, 100, 5)]


def plan(B: int, N: int, R: int, dropped: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Any tokens in any order: the sources of a slot stand apart, and some slots have many."""
    order = torch.stack([torch.randperm(N) for _ in range(B)]).to(device)
    M = N - R - dropped
    slots = torch.randint(0, max(1, M // 3), (B, R), device=device)
    return order[:, :M], order[:, M : M + R], slots


def by_hand(
    x: Tensor, size: Tensor | None, keep: Tensor, src: Tensor, dst: Tensor, branch: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weighted means in float64, image by image, slot by slot; differentiable."""
    x = x if branch is None else x + branch
    rows = x.double()
    size = torch.ones(x.shape[:2]) if size is None else size
    out, sizes = [], []
    for image, kept in enumerate(keep.tolist()):
        for slot, leader in enumerate(kept):
            group = [leader, *(s for s, d in zip(src[image].tolist(), dst[image].tolist(), strict=True) if d == slot)]
            weight = size[image, group].double().to(x.device)
            sizes.append(weight.sum())
            share = weight / weight.sum() if float(weight.sum()) else torch.eye(len(group), device=x.device)[0].double()
            out.append(share @ rows[image, group])
    return torch.stack(out).view(*keep.shape, -1), torch.stack(sizes).view(keep.shape)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("has_size", "has_branch"), [(False, False), (True, True)], ids=["plain", "size-branch"])
def test_equals_a_loop(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, has_size: bool, has_branch: bool
) -> None:
    B, N, C, R, dropped = shape
    x = torch.randn(B, N, C, device=device).to(dtype).requires_grad_()
    branch = torch.randn(B, N, C, device=device).to(dtype).requires_grad_() if has_branch else None
    size = torch.randint(1, 9, (B, N), device=device).float() if has_size else None
    places = plan(B, N, R, dropped, device)
    out, new_size = triton_merge.merge(x, size, *places, branch)
    expected, expected_size = by_hand(x, size, *places, branch)
    assert out.dtype == dtype and new_size.dtype == torch.float32 and not new_size.requires_grad
    assert_close(out, expected, TOLERANCE[dtype])
    assert torch.equal(new_size.double(), expected_size)
    inputs = [x] if branch is None else [x, branch]
    seed = torch.randn_like(out)
    for got, wanted in zip(
        torch.autograd.grad(out, inputs, seed), torch.autograd.grad(expected, inputs, seed.double()), strict=True
    ):
        assert got.dtype == dtype
        assert_close(got, wanted, TOLERANCE[dtype])


def test_equals_the_reference(device: str) -> None:
    x, branch = torch.randn(2, 2, 50, 32, device=device)
    size = torch.randint(1, 5, (2, 50), device=device).float()
    places = plan(2, 50, 20, 0, device)
    for got, expected in zip(
        triton_merge.merge(x, size, *places, branch), reference.merge(x, size, *places, branch), strict=True
    ):
        assert_close(got, expected)


@pytest.mark.usefixtures("poison")
def test_reads_any_strides(device: str) -> None:
    x, branch = torch.randn(3, 17, 64, device=device)[:, :, ::2], torch.randn(17, 3, 32, device=device).transpose(0, 1)
    size = torch.randint(1, 5, (17, 3), device=device).float().T
    places = tuple(part.T.contiguous().T for part in plan(3, 17, 8, 0, device))
    before = x.clone(), branch.clone()
    assert_close(triton_merge.merge(x, size, *places, branch)[0], by_hand(x, size, *places, branch)[0], 1e-5)
    assert torch.equal(x, before[0]) and torch.equal(branch, before[1])


def test_takes_a_gradient_of_any_strides(device: str) -> None:
    x = torch.randn(2, 9, 8, device=device, requires_grad=True)
    places = plan(2, 9, 4, 0, device)
    # the gradient of a sum is one number, expanded
    (got,) = torch.autograd.grad(triton_merge.merge(x, None, *places)[0].sum(), x)
    (expected,) = torch.autograd.grad(by_hand(x, None, *places, None)[0].sum(), x)
    assert_close(got, expected)


def test_equal_tokens_stay_what_they_are(device: str) -> None:
    x = torch.randn(1, 1, 40, device=device).expand(2, 65, 40)
    size = torch.randint(1, 9, (2, 65), device=device).float() / 3
    out, _ = triton_merge.merge(x, size, *plan(2, 65, 30, 0, device))
    assert torch.equal(out, x[:, :35])


def test_one_slot_takes_all(device: str) -> None:
    x = torch.randn(1, 151, 8, device=device)
    keep, src = torch.arange(2, device=device)[None], torch.arange(2, 151, device=device)[None]
    places = (keep, src, torch.zeros_like(src))
    out, new_size = triton_merge.merge(x, None, *places)
    assert_close(out, by_hand(x, None, *places, None)[0], 1e-5)
    assert new_size.tolist() == [[150.0, 1.0]]


def test_nothing_absorbed_is_a_copy(device: str) -> None:
    x = torch.randn(2, 7, 8, device=device)
    keep, none = torch.randperm(7, device=device).expand(2, -1), torch.empty(2, 0, dtype=torch.int64, device=device)
    out, new_size = triton_merge.merge(x, None, keep, none, none)
    assert torch.equal(out, x[:, keep[0]]) and torch.equal(new_size, torch.ones(2, 7, device=device))


def test_groups_of_padding_keep_their_leader(device: str) -> None:
    x = torch.randn(1, 6, 4, device=device, requires_grad=True)
    size = torch.tensor([[0.0, 1.0, 0.0, 0.0, 2.0, 0.0]], device=device)
    keep, src, dst = (torch.tensor([row], device=device) for row in ([0, 1, 4], [2, 3, 5], [0, 0, 1]))
    out, new_size = triton_merge.merge(x, size, keep, src, dst)
    assert torch.equal(out, x[:, [0, 1, 4]]) and new_size.tolist() == [[0.0, 1.0, 2.0]]
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad[0, :, 0].tolist() == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, in the interpreter
def test_infinite_rows_stay_in_their_groups(device: str) -> None:
    x = torch.zeros(1, 40, 8, device=device)
    x[0, 0] = float("inf")
    keep, src = torch.arange(20, device=device)[None], torch.arange(20, 40, device=device)[None]
    out, _ = triton_merge.merge(x, None, keep, src, torch.full_like(src, 1))
    assert out[0, 0].tolist() == [float("inf")] * 8
    assert not out[0, 1:].any()


def test_a_branch_of_another_dtype(device: str) -> None:
    x = torch.randn(1, 9, 8, device=device, requires_grad=True)
    branch = torch.randn(1, 9, 8, device=device).bfloat16().requires_grad_()
    places = plan(1, 9, 4, 0, device)
    out, _ = triton_merge.merge(x, None, *places, branch)
    assert_close(out, by_hand(x, None, *places, branch)[0], 1e-5)
    grads = torch.autograd.grad(out.sum(), (x, branch))
    assert [grad.dtype for grad in grads] == [torch.float32, torch.bfloat16]


def test_the_branch_is_added_as_an_add_of_its_own_would(device: str) -> None:
    x = torch.tensor([[[512.0], [-512.0]]], dtype=torch.bfloat16, device=device)
    branch = torch.tensor([[[0.5], [-0.25]]], dtype=torch.bfloat16, device=device)
    keep, src = torch.tensor([[0]], device=device), torch.tensor([[1]], device=device)
    # both sums round to x; the mean of the sums themselves is 0.125
    assert triton_merge.merge(x, None, keep, src, keep, branch)[0].item() == 0.0


def test_the_same_in_every_run(device: str) -> None:
    x, places = torch.randn(2, 65, 16, device=device), plan(2, 65, 32, 0, device)
    first, again = triton_merge.merge(x, None, *places)[0], triton_merge.merge(x, None, *places)[0]
    assert torch.equal(first, again)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of opcheck itself
@pytest.mark.parametrize("has_branch", [False, True], ids=["plain", "branch"])
def test_obeys_the_rules_of_custom_operators(device: str, has_branch: bool) -> None:
    x = torch.randn(2, 9, 8, device=device, requires_grad=True)
    branch = torch.randn(2, 9, 8, device=device, requires_grad=True) if has_branch else None
    size = torch.ones(2, 9, device=device)
    places = plan(2, 9, 4, 0, device)
    torch.library.opcheck(torch.ops.tokenmerge.triton_merge, (x, size, *places, branch))
    grad = torch.randn(2, 5, 8, device=device)
    torch.library.opcheck(torch.ops.tokenmerge.triton_merge_grad, (grad, size, torch.ones(2, 5).to(device), *places, 9))


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.zeros(2, 3, 4), True),
        (torch.zeros(2, 3, 5000, dtype=torch.float16), True),
        (torch.zeros(3, 4), False),
        (torch.zeros(2, 3, 0), False),
        (torch.zeros(2, 3, 4, dtype=torch.float64), False),
        (torch.zeros(2, 3, 4, device="meta"), False),
    ],
    ids=["plain", "wide-half", "two-dimensions", "empty", "double", "meta"],
)
def test_knows_its_borders(monkeypatch: pytest.MonkeyPatch, x: Tensor, expected: bool) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_supports.supports_merge(x) is expected
    monkeypatch.delenv("TRITON_INTERPRET")
    assert triton_supports.supports_merge(x) is False
