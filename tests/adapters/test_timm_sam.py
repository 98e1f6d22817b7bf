"""timm's Segment Anything encoders: tokens merged inside windows for the attention only, everything else untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from helpers import assert_close, bound_attributes, randomised
from tokenmerge._runtime.frames import Frame
from tokenmerge.errors import AdapterMismatchError, NotTrackedError, UnsupportedError, UnsupportedModelError
from windows_by_hand import by_hand, check_windows, merged, run

pytest.importorskip("timm.models.vision_transformer_sam")
import timm
from timm.models.vision_transformer_sam import Attention, VisionTransformerSAM

VARIANTS: dict[str, dict[str, Any]] = {
    "padded-windows": {},
    "whole-windows": {"window_size": 4},
    "windows-only": {"global_attn_indexes": ()},
    "no-windows": {"window_size": 0},
    "oblong": {"img_size": (32, 24), "window_size": 4},
    "no-abs-pos": {"use_abs_pos": False},
    "no-rel-pos": {"use_rel_pos": False},
    "rope": {"use_rel_pos": False, "use_rope": True},
    "qk-norm-layerscale": {"qk_norm": True, "init_values": 0.5},
    "no-neck": {"neck_chans": None},
    "hidden-head": {"head_hidden_size": 24},
}


def _model(**options: Any) -> nn.Module:
    settings = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 10}
    settings |= {"use_rel_pos": True, "window_size": 3, "global_attn_indexes": (1,), "neck_chans": 16}
    return randomised(VisionTransformerSAM(**{**settings, **options})).eval().double()


def _image(options: dict[str, Any]) -> Tensor:
    size = options.get("img_size", (32, 32))
    return torch.randn(2, 3, *size).double()


every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


@every_variant
@pytest.mark.parametrize("r", [1, 3, 0.3, 1000], ids=str)
def test_merging_equals_group_means_inside_the_attention(options: dict[str, Any], r: Any) -> None:
    model, x = _model(**options), _image(options)
    unmerged = run(model, x)
    answer, plans = merged(model, x, r)
    assert_close(answer, by_hand(model, x, plans), 1e-6)
    assert (answer - unmerged).abs().max() > 1e-6, "merging changed nothing"


@pytest.mark.parametrize("options", [VARIANTS["padded-windows"], VARIANTS["rope"]], ids=["rel-pos", "rope"])
def test_without_proportional_attention_a_group_counts_once(options: dict[str, Any]) -> None:
    model, x = _model(**options), _image(options)
    answer, plans = merged(model, x, 4, prop_attn=False)
    assert_close(answer, by_hand(model, x, plans, counts_all=False), 1e-6)


def test_images_of_another_size_stretch_the_relative_positions() -> None:
    model, x = _model(), torch.randn(2, 3, 40, 28).double()
    answer, plans = merged(model, x, 4)
    assert [plan.n for plan in plans] == [9, 70, 9]
    assert_close(answer, by_hand(model, x, plans), 1e-6)


@every_variant
def test_r0_is_the_original_and_removal_is_bit_exact(options: dict[str, Any]) -> None:
    model, x = _model(**options), _image(options)
    unmerged, keys = run(model, x), list(model.state_dict())
    before = {path: sorted(module.__dict__) for path, module in model.named_modules()}
    handle = tokenmerge.patch(model, r=0)
    assert torch.equal(run(model, x), unmerged) and list(model.state_dict()) == keys
    # and composed, with nothing merged
    for runner in handle.runners:
        runner.block.forward = _Composed(runner)
    assert_close(run(model, x), unmerged, 1e-12)
    for runner in handle.runners:
        runner.block.forward = runner
    handle.r = 4
    assert not torch.equal(run(model, x), unmerged)
    with handle.disabled():
        assert torch.equal(run(model, x), unmerged)
    handle.remove()
    assert torch.equal(run(model, x), unmerged) and bound_attributes(model) == []
    assert {path: sorted(module.__dict__) for path, module in model.named_modules()} == before


class _Composed:
    def __init__(self, runner: Any) -> None:
        self.runner = runner

    def __call__(self, x: Tensor) -> Tensor:
        return self.runner.run(x, 0, False, Frame(0))


def test_the_handle_tells_what_attention_saw_and_that_blocks_end_complete() -> None:
    model, x = _model(), torch.randn(2, 3, 32, 32).double()
    handle = tokenmerge.patch(model, r=3, track=True)
    with pytest.raises(NotTrackedError, match="run the model first"):
        _ = handle.tokens
    assert handle.report().tokens == []
    run(model, x)
    # windows of 3 x 3, then the whole grid of 8 x 8
    assert handle.tokens == [6, 61, 6] and handle.has_merged
    assert torch.equal(handle.sizes, torch.ones(2, 64))
    for groups, positions in zip(handle.groups, handle.positions, strict=True):
        assert torch.equal(groups, torch.arange(64).expand(2, -1)) and torch.equal(positions, groups)
    report = handle.report()
    assert report.prop_attn and report.limits == [
        "merged inside windows for the attention only: r counts per window, each block ends with all its tokens"
    ]
    handle.r = [0, 0.25, 100]
    run(model, x)
    assert handle.tokens == [9, 48, 5]
    handle.r = 0
    run(model, x)
    assert handle.tokens == [9, 64, 9] and not handle.has_merged


def test_the_handle_counts_what_an_adaptive_method_really_removed() -> None:
    from tokenmerge.methods import ATM

    model, x = _model(), torch.randn(2, 3, 32, 32).double()
    unmerged = run(model, x)
    with tokenmerge.patched(model, ATM(alpha=2.0, floor=2.0), r=3) as handle:  # no cosine is above 2
        assert_close(run(model, x), unmerged)
        assert handle.tokens == [9, 64, 9] and not handle.has_merged
    with tokenmerge.patched(model, ATM(alpha=-2.0, floor=-2.0), r=3) as handle:
        run(model, x)
        assert handle.tokens == [6, 61, 6] and handle.has_merged


@pytest.mark.parametrize("restore", [None, "dense", "merged"])
def test_neck_and_intermediates_are_complete_without_any_option(restore: str | None) -> None:
    model, x = _model(), torch.randn(2, 3, 32, 32).double()
    _, plans = merged(model, x, 3)
    with tokenmerge.patched(model, r=3, prop_attn=True, restore=restore) as handle, torch.no_grad():
        features = model.forward_features(x)
        last, maps = model.forward_intermediates(x)
        assert any("inside windows" in limit for limit in handle.report().limits)
    assert features.shape == (2, 16, 8, 8) and [m.shape for m in maps] == [(2, 32, 8, 8)] * 3
    assert torch.equal(features, last)
    model.head = nn.Identity()
    assert_close(features, by_hand(model, x, plans), 1e-6)


def test_what_fills_up_windows_is_merged_with_itself_first() -> None:
    # 8 x 8 patches in windows of 3 x 3: a third row and column of windows with one line of zeros each
    model, x = _model(global_attn_indexes=()), torch.randn(2, 3, 32, 32).double()
    real = torch.nn.functional.pad(torch.ones(1, 8, 8), (0, 1, 0, 1)).bool()
    real = real.view(3, 3, 3, 3).transpose(1, 2).reshape(9, 9).repeat(2, 1)  # [W, N]
    _, plans = merged(model, x, 2)
    for plan in plans:
        leads = plan.keep.gather(1, plan.dst)
        assert torch.equal(real.gather(1, plan.src), real.gather(1, leads))
        # zeros are all that goes where there are zeros
        filled = (~real.gather(1, plan.src)).sum(dim=1)
        assert filled.tolist() == [0, 0, 2, 0, 0, 2, 2, 2, 2] * 2


@every_variant
def test_equal_tokens_may_be_merged_without_a_trace(options: dict[str, Any]) -> None:
    # but for what fills up windows, which is not equal to the rest
    model = _model(**{**options, "use_abs_pos": False, "window_size": 4, "img_size": 32})
    x = torch.randn(2, 3, 1, 1).double().expand(2, 3, 32, 32)
    expected = run(model, x)
    answer, _ = merged(model, x, 5)
    assert_close(answer, expected, 1e-6)


@pytest.mark.parametrize(
    "choices",
    [
        {"metric": "q"},
        {"metric": "v"},
        {"metric": "x"},
        {"metric": "x_pre", "heads": "concat"},
        {"partition": "random"},
    ],
    ids=str,
)
def test_every_metric_is_seen(choices: dict[str, str]) -> None:
    model, x = _model(), torch.randn(2, 3, 32, 32).double()
    answer, plans = merged(model, x, 3, **choices)
    assert_close(answer, by_hand(model, x, plans), 1e-6)


def test_the_free_bound_runs() -> None:
    model, x = _model(), torch.randn(2, 3, 32, 32).double()
    with tokenmerge.patched(model, "drop", r=3) as handle:
        assert run(model, x).isfinite().all() and handle.tokens == [6, 61, 6]


def test_there_is_no_simulation_of_what_never_leaves_the_attention() -> None:
    model, x = _model(), torch.randn(2, 3, 32, 32).double()
    with tokenmerge.patched(model, r=3, track=True) as handle:
        run(model, x)
        groups = handle.groups
    with pytest.raises(UnsupportedError, match="merges inside windows, for the attention only"):
        tokenmerge.simulate(model, groups, x)


def test_doctor_says_that_equivalence_was_not_compared() -> None:
    from tokenmerge.tools.doctor import examine

    report = str(examine(_model().float(), r=3, rounds=1, batch=1))
    assert "merges inside windows" in report


class _OtherAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_other_attentions_are_refused() -> None:
    model: Any = _model()
    model.blocks[1].attn = _OtherAttention()
    with pytest.raises(UnsupportedModelError, match=r"_OtherAttention are not described, only .*it is not known how"):
        tokenmerge.patch(model, r=2)


class _Scaled(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_an_attention_that_does_something_else_fails_the_probe() -> None:
    model: Any = _model()
    model.blocks[0].attn.__class__ = _Scaled
    with pytest.raises(AdapterMismatchError, match="does not behave as its adapter describes"):
        tokenmerge.patch(model, r=2)
    assert bound_attributes(model) == []


@pytest.mark.parametrize("name", timm.list_models(module="vision_transformer_sam"))
def test_registered_names(name: str) -> None:
    options = {"depth": 2, "embed_dim": 32, "num_heads": 4, "global_attn_indexes": (1,), "img_size": 96}
    model = randomised(timm.create_model(name, **options)).eval().double()
    x = torch.randn(2, 3, 96, 96).double()
    plans = check_windows(model, x, 10)
    assert [(plan.n, plan.src.shape[1]) for plan in plans] == [(196, 10), (36, 10)]
