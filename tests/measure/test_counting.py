"""Multiply-accumulates: the published figures, counted without touching the model or its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tokenmerge
from helpers import tiny_vit
from tokenmerge import flops
from tokenmerge.adapters import ADAPTERS
from tokenmerge.measure.counting import CostModel, count


@pytest.mark.parametrize("name", ["cpu", "triton", "columns"])
def test_counts_the_same_whatever_kernels_are_forced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vit()
    tokenmerge.patch(model, r=8)
    expected = count(model, (3, 32, 32))
    monkeypatch.setenv("TOKENMERGE_KERNELS", name)
    assert count(model, (3, 32, 32)) == expected


# GMACs of the ToMe paper and of timm's results for the same models
@pytest.mark.parametrize(
    ("name", "r", "published"),
    [
        ("vit_small_patch16_224", 13, 2.70),
        ("vit_base_patch16_224", 0, 17.56),
        ("vit_base_patch16_224", 16, 8.77),
        ("vit_large_patch16_224", 8, 30.96),
        ("vit_large_patch16_224", (8, -1.0), 22.32),
        ("vit_huge_patch14_224", 7, 92.83),
        ("vit_large_patch16_384", 23, 96.2),
    ],
)
def test_published_figures(name: str, r: Any, published: float) -> None:
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    tokenmerge.patch(model, r=r)
    side = int(name.rsplit("_", 1)[1])
    assert flops(model, (3, side, side)) / 1e9 == pytest.approx(published, rel=0.002)


def test_by_hand() -> None:
    # 64 patches of 4 x 4 x 3, 65 tokens of width 32, 4 blocks, MLP four times as wide, 10 classes
    patches, tokens, width = 64, 65, 32
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    expected = patches * 48 * width + 4 * block + width * 10
    assert count(tiny_vit(), (3, 32, 32)) == (expected, 0)


def test_matching_is_counted_apart() -> None:
    model = tiny_vit()
    handle = tokenmerge.patch(model, r=0)
    unmerged = count(model, (3, 32, 32))
    assert unmerged.matching == 0
    handle.r = [8]
    merged = count(model, (3, 32, 32))
    # one matching, keys averaged over 4 heads to a width of 8: of the 64 patches, 32 against 32
    assert merged.matching == 32 * 32 * 8
    assert merged.model < unmerged.model
    assert flops(model, (3, 32, 32)) == merged.model


@pytest.mark.parametrize("r", [None, 0, 6], ids=["unpatched", "r0", "r6"])
def test_a_batch_of_four_counts_four_times(r: int | None) -> None:
    model = tiny_vit()
    if r is not None:
        tokenmerge.patch(model, r=r)
    one, four = count(model, (3, 32, 32)), count(model, (4, 3, 32, 32))
    assert four == (4 * one.model, 4 * one.matching)
    assert one == count(model, (1, 3, 32, 32))


def test_the_last_forward_of_the_model_is_untouched() -> None:
    model = tiny_vit(dynamic_img_size=True)
    handle = tokenmerge.patch(model, r=4, track=True)
    flops(model, (3, 48, 48))
    assert handle.report().planned and handle.tokens == [61, 57, 53, 49]
    model(torch.randn(2, 3, 40, 40))
    tokens, sizes, groups = handle.tokens, handle.sizes, handle.groups[-1]
    assert tokens == [97, 93, 89, 85]
    flops(model, (3, 48, 48))
    assert handle.tokens == tokens and torch.equal(handle.sizes, sizes) and torch.equal(handle.groups[-1], groups)


def test_model_method_and_mode_are_left_alone() -> None:
    model = tiny_vit().train()
    handle = tokenmerge.patch(model, r=4)
    methods = [runner.method for runner in handle.runners]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flops(model, (3, 32, 32))
    assert model.training
    assert all(runner.method is method for runner, method in zip(handle.runners, methods, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("is_patched", [False, True], ids=["unpatched", "patched"])
def test_no_second_set_of_weights(is_patched: bool) -> None:
    model = tiny_vit(embed_dim=256)
    if is_patched:
        tokenmerge.patch(model, r=4)
        model(torch.randn(1, 3, 32, 32))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    # the second line shows that the first would see a copy
    assert _allocated(lambda: flops(model, (3, 32, 32))) < 0.02 * weights
    assert _allocated(lambda: copy.deepcopy(model)) >= weights


def _allocated(call: Callable[[], Any]) -> int:
    """Return the bytes that the CPU allocator gave out during a call, freed or not."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return sum(max(0, event.nbytes()) for event in events)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_dtype_does_not_matter(dtype: torch.dtype) -> None:
    assert flops(tiny_vit().to(dtype), (3, 32, 32)) == flops(tiny_vit(), (3, 32, 32))


def test_unfused_attention_counts_the_same() -> None:
    model = tiny_vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    assert flops(model, (3, 32, 32)) == flops(tiny_vit(), (3, 32, 32))


def test_a_model_that_is_no_transformer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 16, 5))
    assert flops(model, (3, 4, 4)) == 16 * 27 * 8 + 8 * 16 * 5


@pytest.mark.parametrize("family", ["timm_vit", "timm_cait", "timm_sam", "hf_clip", "hf_vjepa2", "dino", "vit_pytorch"])
@pytest.mark.parametrize("options", [{}, {"multiple_of": 4}, {"restore": "dense"}], ids=str)
def test_a_cost_model_says_what_is_counted(family: str, options: dict[str, Any]) -> None:
    """By a polynomial for each block, or by counting where that does not hold (windows)."""
    model, x = next(adapter for adapter in ADAPTERS if adapter.name == family).tiny()
    handle = tokenmerge.patch(model, r=0, **options)
    size = tuple(x.shape[1:])
    macs = CostModel(model, size)
    assert handle.r == 0 and macs.is_exact == (family != "timm_sam")
    schedules = (5, 0.3, [3, 0, 1, 2], (2, -1.0), 0, 1)
    for r in schedules[: 3 if options else 6]:
        handle.r = r if not isinstance(r, list) else (r * len(handle.runners))[: len(handle.runners)]
        assert macs(handle.r) == flops(model, size)


@pytest.mark.parametrize("method", ["atm", "mame", "tofu", "drop"])
def test_a_cost_model_follows_what_a_method_removes(method: str) -> None:
    """An adaptive method may remove fewer tokens than planned; then every schedule is counted."""
    model, x = next(adapter for adapter in ADAPTERS if adapter.name == "timm_vit").tiny()
    handle = tokenmerge.patch(model, method, r=0)
    macs = CostModel(model, tuple(x.shape[1:]))
    for r in (0, 3, (2, -1.0), 30):
        handle.r = r
        assert macs(r) == flops(model, tuple(x.shape[1:]))
