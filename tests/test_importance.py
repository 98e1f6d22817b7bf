"""Every score of importance against the whole attention in double precision."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import assert_close
from tokenmerge import importance
from tokenmerge.methods import TokenView
from tokenmerge.methods.base import POSITIVE, SCORES

B, H, N, D = 2, 4, 19, 8


def _qkv(heads_of_keys: int = H) -> tuple[Tensor, Tensor, Tensor]:
    return 2 * torch.randn(B, H, N, D), torch.randn(B, heads_of_keys, N, D), torch.randn(B, heads_of_keys, N, D)


def _attention(q: Tensor, k: Tensor, scale: float | None, bias: Tensor | None) -> Tensor:
    """All of it, `[B, H, N, N]`, one query and one head at a time."""
    rows = torch.zeros(B, H, N, N, dtype=torch.float64)
    for image, head, query in np.ndindex(B, H, N):
        keys = k[image, head * k.shape[1] // H].double()
        scores = keys @ q[image, head, query].double() * (D**-0.5 if scale is None else scale)
        exponents = (scores if bias is None else scores + bias[image].double()).exp()
        rows[image, head, query] = exponents / exponents.sum()
    return rows


GIVEN = {"plain": (None, False), "scale": (0.7, False), "bias": (None, True), "both": (1.3, True)}


@pytest.fixture(params=GIVEN, ids=str)
def given(request: pytest.FixtureRequest) -> tuple[float | None, Tensor | None]:
    scale, has_bias = GIVEN[request.param]
    return scale, torch.randn(B, N) if has_bias else None


@pytest.fixture(params=[2**18, H * N * 5, 1], ids=["one-tile", "tiles-of-5", "tiles-of-1"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(importance, "_TILE", request.param)
    found: int = request.param
    return found


Given = tuple[float | None, Tensor | None]
every_grouping = pytest.mark.parametrize("heads_of_keys", [H, 2, 1])


@every_grouping
def test_rows_are_the_attention(tile: int, given: Given, heads_of_keys: int) -> None:
    q, k, _ = _qkv(heads_of_keys)
    rows = list(importance.attention_rows(q, k, *given))
    widths = {2**18: [19], H * N * 5: [5, 5, 5, 4], 1: [1] * 19}[tile]
    assert [part.shape[2] for part in rows] == widths, "more is held at a time than a tile"
    assert_close(torch.cat(rows, dim=2), _attention(q, k, *given).float(), 1e-6)


@every_grouping
def test_class_attention_is_the_first_row(given: Given, heads_of_keys: int) -> None:
    q, k, v = _qkv(heads_of_keys)
    expected = _attention(q, k, *given)[:, :, 0]
    assert_close(importance.class_attention(q, k, *given), expected.float(), 1e-6)
    values = torch.stack([v[:, head * heads_of_keys // H].double().norm(dim=-1) for head in range(H)], dim=1)
    assert_close(importance.class_value(q, k, v, *given), (expected * values).mean(dim=1).float(), 1e-6)


@every_grouping
def test_received_attention_is_the_mean_of_columns(tile: int, given: Given, heads_of_keys: int) -> None:
    q, k, _ = _qkv(heads_of_keys)
    found = importance.received_attention(q, k, *given)
    assert_close(found, _attention(q, k, *given).mean(dim=(1, 2)).float(), 1e-6)
    assert_close(found.sum(dim=1), torch.ones(B), 1e-5)


@every_grouping
def test_entropy_is_that_of_the_mean_row(tile: int, given: Given, heads_of_keys: int) -> None:
    q, k, _ = _qkv(heads_of_keys)
    mean = _attention(q, k, *given).mean(dim=1)
    assert_close(importance.entropy(q, k, *given), (mean * mean.log()).sum(dim=2).float(), 1e-6)


def test_entropy_of_what_is_looked_at_by_nobody_is_no_nan() -> None:
    q, k, _ = _qkv()
    bias = torch.zeros(B, N).index_fill(1, torch.tensor([4]), float("-inf"))
    assert importance.entropy(q, k, None, bias).isfinite().all()


@every_grouping
def test_own_times_received_attention(tile: int, given: Given, heads_of_keys: int) -> None:
    q, k, _ = _qkv(heads_of_keys)
    rows = _attention(q, k, *given)
    expected = torch.diagonal(rows, dim1=2, dim2=3) * rows.sum(dim=2)
    assert_close(importance.self_received(q, k, *given), expected.float(), 1e-6)


@every_grouping
@pytest.mark.parametrize("iterations", [0, 1, 7])
def test_page_rank_is_power_iteration(tile: int, given: Given, heads_of_keys: int, iterations: int) -> None:
    q, k, _ = _qkv(heads_of_keys)
    start = torch.rand(B, N)
    found = importance.page_rank(q, k, start, iterations, *given)
    for image, head in np.ndindex(B, H):
        graph, mass = _attention(q, k, *given)[image, head].numpy(), start[image].double().numpy()
        for _ in range(iterations):
            mass = np.array([sum(graph[i, j] * mass[i] for i in range(N)) for j in range(N)])
        assert_close(found[image, head], torch.from_numpy(mass).float())


def test_page_rank_ends_at_the_stationary_distribution() -> None:
    q, k, _ = _qkv()
    found = importance.page_rank(q, k, torch.ones(B, N), 200)
    values, vectors = np.linalg.eig(_attention(q, k, None, None)[0, 0].numpy().T)
    leading = np.real(vectors[:, np.argmax(np.real(values))])
    assert_close(found[0, 0], torch.from_numpy(leading / leading.sum() * N).float(), 1e-5)


def test_shift_is_how_far_a_token_moved() -> None:
    x, x_pre = torch.randn(B, N, 6), torch.randn(B, N, 6)
    expected = (x.double() - x_pre.double()).square().sum(dim=2).sqrt()
    assert_close(importance.shift(x, x_pre), expected.float(), 1e-6)


def _view() -> TokenView:
    q, k, v = _qkv()
    stream, branch = torch.randn(B, N, 6), torch.randn(B, N, 6)
    return TokenView(stream, torch.randn(B, N, 6), q, k, v, None, 1, None, 0, None, branch, scale=0.7)


@pytest.mark.parametrize("name", SCORES)
def test_a_view_scores_with_its_scale_and_bias_and_padding_last(name: str) -> None:
    view = replace(_view(), bias=torch.randn(B, N))
    q, k, v, x = view.q, view.k, view.v, view.stream + view.branch  # type: ignore[operator]
    given = (view.scale, view.bias)
    assert q is not None and k is not None and v is not None
    expected = {
        "class": lambda: importance.class_attention(q, k, *given).mean(dim=1),
        "class_value": lambda: importance.class_value(q, k, v, *given),
        "received": lambda: importance.received_attention(q, k, *given),
        "entropy": lambda: importance.entropy(q, k, *given),
        "shift": lambda: importance.shift(x, view.x_pre),
        "norm": lambda: x.norm(dim=2),
    }[name]()
    assert torch.equal(view.score(name), expected) and expected.dtype == torch.float32
    valid = torch.rand(B, N) < 0.7
    padded = replace(view, valid=valid).score(name)
    assert torch.equal(padded[valid], expected[valid]) and (padded[~valid] == float("-inf")).all()
    assert (expected >= 0).all() == (name in POSITIVE)


@pytest.mark.parametrize("name", SCORES)
def test_a_score_asks_for_no_more_than_it_says(name: str) -> None:
    view = _view()
    hidden = {field: None for field in ("q", "k", "v") if field not in SCORES[name]}
    assert torch.equal(replace(view, **hidden).score(name), view.score(name))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["class", "class_value", "received", "entropy"])
def test_autocast_and_half_precision_do_not_tie_scores(name: str) -> None:
    view = _view()
    with torch.autocast("cpu", torch.bfloat16):
        inside = view.score(name)
    assert inside.dtype == torch.float32 and torch.equal(inside, view.score(name))
    half = replace(view, **{field: getattr(view, field).bfloat16() for field in ("q", "k", "v")})
    same = replace(half, **{field: getattr(half, field).float() for field in ("q", "k", "v")})
    assert torch.equal(half.score(name), same.score(name))
