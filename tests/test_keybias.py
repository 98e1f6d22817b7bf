"""A bias per key that reaches a fused attention through hosts that only know masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import assert_close
from tokenmerge import kernels
from tokenmerge._runtime.key_bias import KeyBias, key_bias

Q, K, V = torch.randn(3, 2, 4, 9, 16)
BIAS = torch.randint(1, 9, (2, 9)).float().log()


def _host(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any) -> Tensor:
    """What hosts do to a mask before they hand it on."""
    mask = mask.to(q.dtype)[:, None, None, :][:, :, :, : k.shape[-2]]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []
    attend = kernels.attend

    def noted(*args: Any) -> Tensor:
        seen.append(args)
        return attend(*args)

    monkeypatch.setattr(kernels, "attend", noted)
    return seen


def test_it_is_a_plain_mask_where_nothing_replaces_it() -> None:
    assert type(key_bias(BIAS)) is Tensor
    with kernels.force("values"):
        assert type(key_bias(BIAS)) is KeyBias


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}], ids=str)
def test_it_reaches_the_kernel_in_full_precision(calls: list[Any], options: dict[str, Any]) -> None:
    q, k, v = (x.bfloat16() for x in (Q, K, V))
    with kernels.force("values"):
        out = _host(q, k, v, key_bias(BIAS), **options)
    assert type(out) is Tensor and len(calls) == 1
    assert torch.equal(calls[0][3], BIAS) and calls[0][3].dtype == torch.float32 and calls[0][4] == options.get("scale")
    assert_close(out, _host(q, k, v, BIAS, **options))


def test_what_the_kernel_cannot_do_runs_with_a_mask(calls: list[Any]) -> None:
    with kernels.force("values"):
        bias = key_bias(BIAS)
        few = _host(Q, K[:, :2], V[:, :2], bias, enable_gqa=True)
        joined = F.scaled_dot_product_attention(Q, K, V, attn_mask=bias[:, None, None, :] + torch.zeros(9, 9))
        expanded = F.scaled_dot_product_attention(Q, K, V, attn_mask=bias[:, None, None, :].expand(2, 4, 9, 9))
    assert calls == []
    assert_close(few, _host(Q, K[:, :2], V[:, :2], BIAS, enable_gqa=True))
    assert_close(joined, _host(Q, K, V, BIAS))
    assert_close(expanded, joined)


def test_elsewhere_it_is_an_ordinary_tensor() -> None:
    with kernels.force("values"):
        bias = key_bias(BIAS)
    assert type(bias + 1) is Tensor and type(bias.exp()) is Tensor and type(torch.cat((bias, bias))) is Tensor
    assert type(bias[:, None]) is KeyBias and torch.equal(bias.exp(), BIAS.exp())
