"""The Triton attention and its gradients against the formula in float64, and at its borders."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from helpers import TOLERANCE, assert_close
from tokenmerge.kernels import reference, triton_attention, triton_supports

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, H, N, D
SHAPES = [
    (1, 1, 2, 5),
    (3, 1, 5, 33),
    (2, 3, 17, 64),
    (1, 12, 33, 72),
    (1, 3, 65, 80),
    (1, 2, 197, 16),
    (1, 1, 34, 200),
]


def by_hand(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None) -> Tensor:
    """The formula in float64; differentiable."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q.double() @ k.double().mT * scale + bias.double()[:, None, None, :]
    return scores.softmax(dim=-1) @ v.double()


def qkv(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Three leaves of the shape `[B, H, N, D]` that lie within each other, as views of a qkv projection do."""
    B, H, N, D = shape
    base = torch.randn(B, N, 3, H, D, device=device).to(dtype)
    return [part.detach().requires_grad_() for part in base.permute(2, 0, 3, 1, 4).unbind(0)]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    B, H, N, D = shape
    inputs = qkv(shape, dtype, device)
    bias = torch.randint(1, 9, (B, N), device=device).float().log()
    out = triton_attention.attend(*inputs, bias)
    expected = by_hand(*inputs, bias, None)
    assert out.dtype == dtype and out.transpose(1, 2).reshape(B, N, H * D).data_ptr() == out.data_ptr()
    assert_close(out, expected, TOLERANCE[dtype])
    seed = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, seed)
    for got, wanted in zip(grads, torch.autograd.grad(expected, inputs, seed.double()), strict=True):
        assert got.dtype == dtype
        assert_close(got, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("scale", [1.0, 0.05])
def test_takes_a_scale(device: str, scale: float) -> None:
    q, k, v = qkv((1, 2, 17, 24), torch.float32, device)
    bias = torch.randn(1, 17, device=device)
    assert_close(triton_attention.attend(q, k, v, bias, scale), by_hand(q, k, v, bias, scale))


def test_equals_the_reference(device: str) -> None:
    q, k, v = qkv((2, 3, 40, 64), torch.float32, device)
    bias = torch.randint(1, 9, (2, 40), device=device).float().log()
    assert_close(triton_attention.attend(q, k, v, bias), reference.attend(q, k, v, bias))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("padding", [-1e4, float("-inf")])
def test_padding_has_no_weight_and_no_gradient(device: str, padding: float) -> None:
    inputs = qkv((2, 2, 70, 16), torch.float32, device)
    bias = torch.zeros(2, 70, device=device)
    bias[0, :64] = padding  # the whole first tile
    bias[1, 50:] = padding
    out = triton_attention.attend(*inputs, bias)
    assert_close(out, by_hand(*inputs, bias, None))
    _, grad_k, grad_v = torch.autograd.grad(out.square().sum(), inputs)
    for grad in (grad_k, grad_v):
        assert grad.isfinite().all()
        assert not grad[0, :, :64].any() and not grad[1, :, 50:].any()
        assert grad[0, :, 64:].any() and grad[1, :, :50].any()


@pytest.mark.usefixtures("poison")
def test_large_scores_do_not_overflow(device: str) -> None:
    inputs = qkv((1, 1, 33, 16), torch.float32, device)
    bias = torch.full((1, 33), 200.0, device=device)
    out, expected = (run(*inputs, bias, 100.0) for run in (triton_attention.attend, by_hand))
    # scores of a thousand: what rounding they have is in the exponent
    assert_close(out, expected, 1e-3)
    for got, wanted in zip(
        torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        assert_close(got, wanted, 1e-2)


@pytest.mark.usefixtures("poison")
def test_reads_any_strides(device: str) -> None:
    strided = [
        torch.randn(2, 3, 17, 16, device=device)[..., :8],
        torch.randn(17, 3, 2, 8, device=device).permute(2, 1, 0, 3),
        torch.randn(17, 8, 3, 2, device=device).permute(3, 2, 0, 1),
    ]
    inputs = [part.detach().requires_grad_() for part in strided]
    bias = torch.randn(17, 2, device=device).T
    out, expected = triton_attention.attend(*inputs, bias), by_hand(*inputs, bias, None)
    assert_close(out, expected, 1e-5)
    # the gradient of a sum is one number, expanded
    for got, wanted in zip(
        torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        assert_close(got, wanted)


def test_gradients_do_not_depend_on_how_the_forward_was_kept(device: str) -> None:
    q, k, v = (part.detach() for part in qkv((2, 3, 17, 16), torch.float32, device))
    bias, seed = torch.randn(2, 17, device=device), torch.randn(2, 3, 17, 16, device=device)
    out, lse = torch.ops.tokenmerge.triton_attend(q, k, v, bias, 0.25)
    expected = torch.ops.tokenmerge.triton_attend_grad(seed, q, k, v, bias, out, lse, 0.25)
    kept = out.contiguous(), lse.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for got, wanted in zip(
        torch.ops.tokenmerge.triton_attend_grad(seed, q, k, v, bias, *kept, 0.25), expected, strict=True
    ):
        assert torch.equal(got, wanted)


def test_under_autocast_as_torch_does_it(device: str) -> None:
    q, k, v = qkv((1, 2, 17, 16), torch.float32, device)
    bias = torch.zeros(1, 17, device=device)
    with torch.autocast(device, torch.bfloat16):
        out = triton_attention.attend(q, k, v.bfloat16(), bias)
    assert out.dtype == torch.bfloat16
    assert_close(out, by_hand(q, k, v, bias, None), TOLERANCE[torch.bfloat16])
    # without it the queries decide
    assert triton_attention.attend(q, k, v.bfloat16(), bias).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of opcheck itself
def test_obeys_the_rules_of_custom_operators(device: str) -> None:
    q, k, v = qkv((2, 2, 9, 16), torch.float32, device)
    bias = torch.randn(2, 9, device=device)
    torch.library.opcheck(torch.ops.tokenmerge.triton_attend, (q, k, v, bias, 0.25))
    with torch.no_grad():
        out, lse = torch.ops.tokenmerge.triton_attend(q, k, v, bias, 0.25)
        torch.library.opcheck(
            torch.ops.tokenmerge.triton_attend_grad, (torch.randn_like(out), q, k, v, bias, out, lse, 0.25)
        )


@pytest.mark.parametrize(
    ("q", "expected"),
    [
        (torch.zeros(2, 3, 5, 16), True),
        (torch.zeros(2, 3, 5, 256, dtype=torch.bfloat16), True),
        (torch.zeros(2, 3, 5, 257), False),
        (torch.zeros(2, 3, 16), False),
        (torch.zeros(2, 3, 5, 16, dtype=torch.float64), False),
        (torch.zeros(2, 3, 5, 16, device="meta"), False),
    ],
    ids=["plain", "widest", "wide", "no-heads", "double", "meta"],
)
def test_knows_its_borders(monkeypatch: pytest.MonkeyPatch, q: Tensor, expected: bool) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_supports.supports_attend(q) is expected
    monkeypatch.delenv("TRITON_INTERPRET")
    assert triton_supports.supports_attend(q) is False
