"""The front door: handles, configurations, and every mistake a user can make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import tokenmerge
from helpers import assert_close, bound_attributes, run_in_threads, tiny_vit
from tokenmerge import MergeConfig, ToMe
from tokenmerge import errors as e
from tokenmerge.kernels import cpu

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def _run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(X)
    return out


def test_the_handle_says_what_was_done() -> None:
    model = tiny_vit(init_values=0.5)
    handle = tokenmerge.patch(model, r=8, track=True)
    assert handle.tokens == [57, 49, 41, 33], "planned"
    assert handle.report().planned and "(planned)" in str(handle.report())
    _run(model)
    assert handle.tokens == [57, 49, 41, 33]
    assert handle.sizes.shape == (2, 33) and handle.sizes.dtype == torch.float32
    assert [tuple(groups.shape) for groups in handle.groups] == [(2, 65)] * 4
    assert [int(groups.max()) + 1 for groups in handle.groups] == handle.tokens
    counts = torch.stack([torch.bincount(groups) for groups in handle.groups[-1]])
    assert torch.equal(counts.float(), handle.sizes)
    report = handle.report()
    assert (report.adapter, report.blocks, report.tokens, report.planned) == ("timm_vit", 4, handle.tokens, False)
    assert report.prop_attn and report.limits == [] and report.parity == 0.0
    fused = "reference" if cpu._LIBRARY is None else "cpu"
    assert report.kernels == {"bipartite": fused, "merge": fused, "attend": "reference"}
    for word in ("timm_vit", "57 49 41 33", "ToMe(metric='k'", "seam"):
        assert word in str(report)
    assert "ToMe" in repr(handle) and "r=8" in repr(handle)


def test_tokens_left_are_rounded_where_that_is_asked_for(tmp_path: Path) -> None:
    model = tiny_vit()
    handle = tokenmerge.patch(model, r=7, multiple_of=8)
    _run(model)
    assert handle.tokens == [56, 48, 40, 32]
    handle.r = 15
    _run(model)
    assert handle.tokens == [48, 32, 24, 16]
    handle.config.save(tmp_path / "merge.json")
    loaded = tokenmerge.MergeConfig.load(tmp_path / "merge.json")
    assert loaded == handle.config and loaded.multiple_of == 8
    handle.remove()
    with pytest.raises(ValueError, match="multiple_of is 0"):
        tokenmerge.patch(model, r=8, multiple_of=0)
    assert tokenmerge.patch(model, loaded).tokens == [48, 32, 24, 16]


def test_dense_gives_every_token_its_groups_features() -> None:
    model = tiny_vit(global_pool="", class_token=False, fc_norm=False, num_classes=0)
    handle = tokenmerge.patch(model, r=8, track=True, restore="merged")
    y = _run(model)
    assert y.shape == (2, 32, 32)
    dense = handle.dense(y)
    assert dense.shape == (2, 64, 32)
    for image in range(2):
        assert torch.equal(dense[image], y[image, handle.groups[-1][image]])
    for wrong in (y[:1], y[:, 1:], y[0]):
        with pytest.raises(ValueError, match=r"dense\(\) takes the last forward's tokens, \[2, 32, C\]; got"):
            handle.dense(wrong)


def test_r_is_set_at_any_time_and_zero_switches_off() -> None:
    model = tiny_vit()
    unmerged = _run(model)
    handle = tokenmerge.patch(model, r=8)
    first = _run(model)
    handle.r = (4, -1.0)
    assert handle.r == (4, -1.0) and handle.config.r == (4, -1.0) and not torch.equal(_run(model), first)
    with pytest.raises(ValueError, match="Allowed"):
        handle.r = -1
    assert handle.r == (4, -1.0), "a wrong r changed something"
    handle.r = 0
    assert torch.equal(_run(model), unmerged) and handle.sizes.tolist() == torch.ones(2, 65).tolist()
    handle.r = 8
    with handle.disabled():
        assert torch.equal(_run(model), unmerged)
    assert torch.equal(_run(model), first)


def test_every_form_of_r_reaches_the_model() -> None:
    model = tiny_vit()
    for r in (3, 0.3, [3, 2], (3, 1.0), lambda block, tokens: tokens // 10):
        with tokenmerge.patched(model, r=r) as handle:
            planned = handle.tokens
            _run(model)
            assert handle.tokens == planned and planned[-1] < 65


def test_patched_gives_the_model_back_even_after_an_error_or_a_remove_inside() -> None:
    model = tiny_vit()
    with pytest.raises(KeyError), tokenmerge.patched(model, r=8):
        raise KeyError
    with tokenmerge.patched(model, r=8) as handle:
        handle.remove()
    assert bound_attributes(model) == []


def test_a_config_survives_its_file(tmp_path: Path) -> None:
    for i, r in enumerate([8, 0.25, [8, 0, 3], (16, -1.0)]):
        config = MergeConfig(ToMe(metric="v", heads="concat"), r=r, prop_attn=False, track=True)
        config.save(tmp_path / f"{i}.json")
        loaded = MergeConfig.load(tmp_path / f"{i}.json")
        assert loaded == config and type(loaded.r) is type(r)
    model = tiny_vit()
    handle = tokenmerge.patch(model, MergeConfig("tome", r=4))
    assert handle.config == MergeConfig(ToMe(), r=4)
    handle.remove()
    assert tokenmerge.patch(model, MergeConfig("tome", r=4), r=2, track=True).config == MergeConfig(
        "tome", 2, track=True
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"x.json is no JSON"),
        ("[]", r"no tokenmerge configuration: it must hold version, method and r"),
        ({"method": {"name": "tome"}, "r": 1}, r"must hold version"),
        (
            {"version": 3, "tokenmerge": "9.1", "method": {"name": "tome"}, "r": 1},
            r"has version 3; this tokenmerge \(.*\) reads versions 1 to 2\. 9\.1 wrote it: upgrade tokenmerge",
        ),
        ({"version": 1, "method": "tome", "r": 1}, r"method must be an object with a name"),
        ({"version": 1, "method": {"name": "tomee"}, "r": 1}, r"no method 'tomee'. Did you mean 'tome'"),
        ({"version": 1, "method": {"name": "tome", "metrik": "k"}, "r": 1}, r"option of tome .*'metrik'. .*'metric'"),
        ({"version": 1, "method": {"name": "tome"}, "r": -1}, r"Allowed: an int >= 0"),
        ({"version": 1, "method": {"name": "tome"}, "r": {"r": 1}}, r"a pair is written as"),
        ({"version": 1, "method": {"name": "tome"}, "r": 1, "trak": True}, r"configuration key .*'trak'. .*'track'"),
        (
            {"version": 1, "method": {"name": "tome"}, "r": 1, "prop_attn": "on"},
            r"prop_attn is 'on'; it takes True, False, 'auto'",
        ),
    ],
)
def test_a_wrong_config_file_says_what_is_wrong(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(e.TokenMergeError, match=message):
        MergeConfig.load(path)


def test_a_config_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(e.ConfigError, match=r"cannot read .*nothing.json: No such file"):
        MergeConfig.load(tmp_path / "nothing.json")
    with pytest.raises(e.ConfigError, match=r"cannot write .*: No such file"):
        MergeConfig("tome", r=1).save(tmp_path / "no" / "x.json")
    with pytest.raises(e.ConfigError, match=r"callable .*JSON cannot hold"):
        MergeConfig("tome", r=lambda block, tokens: 1).save(tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []


MISTAKES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("unknown-method", {"method": "tomee", "r": 8}, e.UnknownNameError, r"no method 'tomee'. Did you mean 'tome'\?"),
    (
        "method-type",
        {"method": 8, "r": 8},
        e.ConfigError,
        r"the method is 8; give a name \(tome, tofu, .*, drop\) or an object",
    ),
    (
        "unknown-keyword",
        {"trak": True, "r": 8},
        e.UnknownNameError,
        r"no keyword of patch 'trak'. Did you mean 'track'\?",
    ),
    (
        "option",
        {"metric": "v", "r": 8},
        e.UnknownNameError,
        r"option of the method: patch\(model, ToMe\(metric=...\)\)",
    ),
    ("no-r", {}, e.InvalidScheduleError, r"r is missing"),
    ("negative", {"r": -1}, ValueError, r"r holds -1. Allowed"),
    ("above-one", {"r": 1.5}, ValueError, r"r holds 1.5. Allowed"),
    ("nan", {"r": float("nan")}, ValueError, r"r holds nan. Allowed"),
    ("bool", {"r": True}, ValueError, r"r holds True. Allowed"),
    ("too-long", {"r": [1] * 5}, ValueError, r"r has 5 entries, the model has 4 blocks"),
    ("inflection", {"r": (8, 2.0)}, ValueError, r"inflection 2.0"),
    ("prop-attn", {"r": 8, "prop_attn": "yes"}, e.ConfigError, r"prop_attn is 'yes'; it takes True, False, 'auto'"),
]


@pytest.mark.parametrize(
    ("options", "error", "message"), [row[1:] for row in MISTAKES], ids=[row[0] for row in MISTAKES]
)
def test_a_mistake_says_so_and_changes_nothing(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = tiny_vit()
    before, attributes = _run(model), bound_attributes(model)
    with pytest.raises(error, match=message):
        tokenmerge.patch(model, **options)
    assert torch.equal(_run(model), before) and bound_attributes(model) == attributes


def test_an_unsupported_model_says_what_was_tried_and_what_is_nearest() -> None:
    near = nn.Module()
    near.blocks = tiny_vit().blocks
    with pytest.raises(
        e.UnsupportedModelError,
        match=r"no adapter for .*Module: none of the \d+ families describes it .* Nearest is .* missing are .*blocks=",
    ):
        tokenmerge.patch(near, r=8)
    with pytest.raises(e.UnsupportedModelError, match=r"Linear: none of .*It has no attention"):
        tokenmerge.patch(nn.Linear(2, 2), r=8)
    with pytest.raises(e.UnsupportedModelError, match=r"patch takes a torch.nn.Module, got builtins.int"):
        tokenmerge.patch(8, r=8)  # type: ignore[arg-type]
    assert not tokenmerge.supports(near) and not tokenmerge.supports(nn.Linear(2, 2))
    assert bound_attributes(near) == []


@pytest.mark.parametrize(
    "wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel], ids=["compiled", "parallel"]
)
def test_a_wrapped_model_is_to_be_patched_before(wrap: Any) -> None:
    with pytest.raises(e.UnsupportedModelError, match=r"wraps a VisionTransformer: patch that one, before"):
        tokenmerge.patch(wrap(tiny_vit()), r=2)


def test_blocks_of_an_unknown_class_are_refused() -> None:
    class Alien(nn.Module):
        def __init__(self, dim: int, **options: Any) -> None:
            super().__init__()
            self.norm1 = nn.LayerNorm(dim)

    model = tiny_vit(block_fn=Alien)
    with pytest.raises(e.UnsupportedModelError, match=r"blocks of class .*Alien are not described"):
        tokenmerge.patch(model, r=8)
    assert bound_attributes(model) == []


def test_no_blocks_is_an_error() -> None:
    with pytest.raises(e.UnsupportedModelError, match=r"matches 'timm_vit' but has no blocks: nothing to patch"):
        tokenmerge.patch(tiny_vit(depth=0), r=8)


def test_a_block_that_does_more_than_described_is_refused_and_left_alone() -> None:
    from timm.models.vision_transformer import Block

    class Louder(Block):
        def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
            return 1.5 * super().forward(x, **options)

    class Dropping(Block):
        def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
            return nn.functional.dropout(super().forward(x, **options), 0.5, self.training)

    class Pair(Block):
        def forward(self, x: torch.Tensor, **options: Any) -> Any:
            return super().forward(x, **options), torch.ones(1)

    for block, message in (
        (Louder, r"max \|difference\|"),
        (Dropping, r"max \|difference\|"),
        (Pair, r"returns more than its tokens"),
    ):
        block.forward.__module__ = Block.__module__  # as if it were the host's that had changed
        model = tiny_vit(block_fn=block)
        attributes, modes = bound_attributes(model), [module.training for module in model.modules()]
        with pytest.raises(e.AdapterMismatchError, match=rf"blocks?.0 \(.*{block.__name__}\).*{message}"):
            tokenmerge.patch(model, r=8)
        assert bound_attributes(model) == attributes and [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("child", ["ls1", "attn", "mlp"])
def test_a_missing_child_is_named(child: str) -> None:
    model = tiny_vit()
    delattr(model.blocks[2], child)
    with pytest.raises(e.AdapterMismatchError, match=rf"block 2 \(.*Block\) has no child {child}, .*It has: norm1"):
        tokenmerge.patch(model, r=8)
    assert bound_attributes(model) == []


def test_an_attention_that_hides_its_keys_is_refused() -> None:
    class Hiding(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.k_norm = inner, nn.Identity()

        def forward(
            self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
        ) -> torch.Tensor:
            out: torch.Tensor = self.inner(x, attn_mask=attn_mask)
            return out

    model = tiny_vit()
    for block in model.blocks:
        block.attn = Hiding(block.attn)
    with pytest.raises(e.AdapterMismatchError, match=r"hands over nothing for 'k'.*ToMe\(metric='x'\)"):
        tokenmerge.patch(model, r=8)
    assert bound_attributes(model) == []
    with tokenmerge.patched(model, ToMe(metric="x"), r=8) as handle:
        _run(model)
        assert handle.tokens[-1] == 33


def test_an_attention_without_a_mask_gets_no_bias_and_the_report_says_so() -> None:
    class Plain(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.num_heads, self.qkv, self.proj = inner.num_heads, inner.qkv, inner.proj

        def forward(self, x: torch.Tensor, is_causal: bool = False, **mask: Any) -> torch.Tensor:
            B, N, _ = x.shape
            q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            out: torch.Tensor = self.proj(
                (q @ k.mT / k.shape[-1] ** 0.5).softmax(-1).matmul(v).transpose(1, 2).flatten(2)
            )
            return out

    model, reference = tiny_vit(), tiny_vit()
    reference.load_state_dict(model.state_dict())
    for block in model.blocks:
        block.attn = Plain(block.attn)
    with pytest.raises(e.UnsupportedError, match=r"prop_attn=True, but this attention takes no mask"):
        tokenmerge.patch(model, r=8, prop_attn=True)
    assert bound_attributes(model) == []
    handle = tokenmerge.patch(model, r=8)
    assert handle.report().limits == ["no proportional attention: this attention takes no mask"]
    assert not handle.report().prop_attn
    with tokenmerge.patched(reference, r=8, prop_attn=False):
        assert_close(_run(model), _run(reference))


def test_proportional_attention_follows_the_paper_for_mae() -> None:
    from tokenmerge.testing.models.plain import MAEStandIn

    handle = tokenmerge.patch(MAEStandIn(), r=2)
    assert handle.report().prop_attn and "off-the-shelf MAE" in handle.report().limits[0]
    tagged = tiny_vit()
    tagged.pretrained_cfg = {"tag": "mae"}
    handle = tokenmerge.patch(tagged, r=2)
    assert not handle.report().prop_attn and "MAE model trained without merging" in handle.report().limits[0]
    handle.remove()
    assert tokenmerge.patch(tagged, r=2, prop_attn=True).report().prop_attn


def test_for_a_pool_that_takes_no_mask_tokens_are_restored_and_it_is_reported() -> None:
    if not hasattr(timm.layers, "AttentionPoolPrr"):
        pytest.skip(f"timm {timm.__version__} has no AttentionPoolPrr")
    (limit,) = tokenmerge.patch(tiny_vit(global_pool="prr"), r=2).report().limits
    assert limit.startswith("tokens are put back in their places after the last block: AttentionPoolPrr takes no mask")


def test_unpatching_what_was_never_patched() -> None:
    model = tiny_vit()
    with pytest.raises(e.NotPatchedError, match=r"VisionTransformer is not patched by tokenmerge"):
        tokenmerge.unpatch(model)
    handle = tokenmerge.patch(model, r=2)
    handle.remove()
    with pytest.raises(e.NotPatchedError):
        handle.remove()


def test_questions_about_forwards_that_were_not_recorded() -> None:
    model = tiny_vit()
    handle = tokenmerge.patch(model, r=2)
    with pytest.raises(e.NotTrackedError, match=r"no forward has run since"):
        _ = handle.sizes
    with pytest.raises(e.NotTrackedError, match=r"only while tracking; patch\(..., track=True\)"):
        _ = handle.groups
    _run(model)
    handle.track = True
    with pytest.raises(e.NotTrackedError, match=r"before tracking was switched on"):
        _ = handle.groups
    _run(model)
    assert len(handle.groups) == 4


def test_a_mask_for_unmerged_tokens_is_refused_once_tokens_are_merged() -> None:
    model = tiny_vit()
    mask = torch.zeros(65, 65)
    handle = tokenmerge.patch(model, r=0, restore="merged")
    expected = model.forward_features(X, attn_mask=mask)
    assert expected.shape == (2, 65, 32)
    handle.r = 2
    with pytest.raises(e.UnsupportedError, match=r"block 0 was called with 'attn_mask' while tokens are merged"):
        model.forward_features(X, attn_mask=mask)


def test_weights_and_tokens_on_different_devices_name_data_parallel() -> None:
    model = tiny_vit()
    tokenmerge.patch(model, r=2)
    model.blocks[0].to("meta")
    with pytest.raises(e.UnsupportedError, match=r"tokens are on cpu, .* on meta. nn.DataParallel"):
        model(X)


def test_two_threads_train_one_model() -> None:
    model = tiny_vit().train()
    tokenmerge.patch(model, r=4)
    inputs = [torch.randn(2, 3, 32, 32) for _ in range(2)]
    expected = [torch.autograd.grad(model(x).square().sum(), model.head.weight)[0] for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            gradient = torch.autograd.grad(model(inputs[i]).square().sum(), model.head.weight)[0]
            if not torch.allclose(gradient, expected[i], rtol=1e-5):
                wrong.append(i)

    run_in_threads(work, 2)
    assert wrong == []


def test_another_tools_instance_forward_is_kept() -> None:
    model = tiny_vit()
    calls: list[int] = []
    block = model.blocks[1]

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        out: torch.Tensor = type(block).forward(block, x, *args, **kwargs)
        return out

    block.forward = forward
    handle = tokenmerge.patch(model, r=0)
    calls.clear()
    _run(model)
    assert calls == [1]
    handle.remove()
    assert block.__dict__["forward"] is forward


def test_simulation_refuses_what_it_cannot_mean() -> None:
    model = tiny_vit()
    handle = tokenmerge.patch(model, "drop", r=4, track=True)
    _run(model)
    groups = handle.groups
    assert handle.tokens[-1] == 49 and (groups[-1] == -1).sum() == 2 * 16
    with pytest.raises(e.AlreadyPatchedError, match=r"simulate\(\) runs the unmerged model"):
        tokenmerge.simulate(model, groups, X)
    handle.remove()
    with pytest.raises(e.UnsupportedError, match=r"drops tokens has no group-mean simulation"):
        tokenmerge.simulate(model, groups, X)
