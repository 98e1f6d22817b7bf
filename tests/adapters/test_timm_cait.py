"""timm's CaiT: heads that talk to each other count merged tokens exactly, and the class token sees every patch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.cait import Cait, ClassAttn
from torch import Tensor, nn

import tokenmerge
from helpers import assert_close, randomised
from promises import check_intermediates, check_promises
from tokenmerge import ToMe
from tokenmerge.errors import UnsupportedModelError

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
VARIANTS: dict[str, dict[str, Any]] = {
    "token": {},
    "average": {"global_pool": "avg"},
    "every-token": {"global_pool": "", "num_classes": 0},
    "no-qkv-bias": {"qkv_bias": False},
    "one-class-block": {"depth_token_only": 1},
}


def _make(name: str = "token", **more: Any) -> Any:
    settings = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 10}
    return randomised(Cait(**{**settings, **VARIANTS[name], **more})).eval().double()


def _run(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_keeps_the_promises(name: str) -> None:
    assert check_promises(_make(name), X, tolerance=1e-6) == [61, 58, 55]


@pytest.mark.parametrize("metric", ["q", "v", "x"])
def test_every_metric_is_seen(metric: str) -> None:
    check_promises(_make(), X, tolerance=1e-6, patch={"method": ToMe(metric=metric)})


def test_a_model_without_its_class_stage_keeps_the_promises() -> None:
    model = _make()
    model.prune_intermediate_layers([0, 1, 2])
    check_promises(model.eval(), X, tolerance=1e-6)  # older timm puts a new list of blocks there


def test_feature_maps_are_dense_or_refused() -> None:
    check_intermediates(_make(), X)


@pytest.mark.parametrize("is_biased", [True, False], ids=["with-bias", "without-bias"])
def test_a_token_of_size_three_counts_as_three(is_biased: bool) -> None:
    model = _make()
    attn, x = model.blocks[0].attn, torch.randn(1, 4, 32, dtype=torch.float64)
    if not is_biased:
        attn.proj_w.bias = None
    size = torch.tensor([[1.0, 3.0, 1.0, 2.0]])
    spread = torch.tensor([0, 1, 1, 1, 2, 3, 3])
    with torch.no_grad():
        expected = attn(x[:, spread])
        handle = tokenmerge.patch(model, r=2)
        got = handle.runners[0].tap(x, size.log())
        assert_close(got[:, spread], expected, 1e-6)
        # without sizes nothing is added
        assert (handle.runners[0].tap(x, None)[:, spread] - expected).abs().max() > 1e-3
        assert torch.equal(attn(x[:, spread]), expected), "outside of a block nothing is added"


def test_without_proportional_attention_a_group_counts_once() -> None:
    model = _make()
    with tokenmerge.patched(model, r=6, prop_attn=True):
        counted = _run(model)
    with tokenmerge.patched(model, r=6, prop_attn=False):
        assert (_run(model) - counted).abs().max() > 1e-3


def test_equal_patches_give_the_unmerged_answer() -> None:
    model = _make()
    nn.init.zeros_(model.pos_embed)
    x = torch.randn(2, 3, 1, 1, dtype=torch.float64).expand(2, 3, 32, 32)
    expected = _run(model, x)
    with tokenmerge.patched(model, r=6, prop_attn=True):
        assert_close(_run(model, x), expected, 1e-6)


def test_the_report_says_that_the_class_token_gets_every_patch() -> None:
    handle = tokenmerge.patch(_make(), r=2)
    assert handle.prefix == 0 and handle.grid == (8, 8)
    assert handle.report().limits == [
        "tokens are put back in their places after the last block: the class token attends to every patch"
    ]


def test_an_attention_of_another_kind_is_refused() -> None:
    model = _make()
    model.blocks[1].attn = ClassAttn(32, num_heads=4)
    with pytest.raises(
        UnsupportedModelError,
        match=r"LayerScaleBlock with timm.models.cait.ClassAttn is not described: Cait has .*Talk",
    ):
        tokenmerge.patch(model, r=2)
