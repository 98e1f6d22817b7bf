"""Whoever needs every token in its place gets it with `restore="dense"`, and is told so without."""

from __future__ import annotations

import copy
import io
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from helpers import assert_close, bound_attributes, run_in_threads, tiny_vit
from tokenmerge import errors as e

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CALLS: dict[str, Any] = {
    "forward_features": lambda model, x: [model.forward_features(x)],
    "forward_intermediates": lambda model, x: model.forward_intermediates(x, intermediates_only=True, norm=True),
    "intermediates-tokens": lambda model, x: model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True),
    "get_intermediate_layers": lambda model, x: model.get_intermediate_layers(x, n=3, reshape=True, norm=True),
}


def _vit(**options: Any) -> nn.Module:
    return tiny_vit(init_values=0.5, reg_tokens=2, **options).double()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("r", [5, (6, -1.0), [0, 9]], ids=["constant", "falling", "one-block"])
def test_restored_features_have_the_unmerged_shapes_and_hold_each_groups_mean(call: Any, r: Any) -> None:
    model = _vit()
    with torch.no_grad():
        unmerged = call(model, X)
        with tokenmerge.patched(model, r=r, restore="dense", track=True) as handle:
            restored, groups = call(model, X), handle.groups
            assert handle.tokens[-1] < 67
        simulated = call(_Simulated(model, groups), X)
    for got, expected, before in zip(restored, simulated, unmerged, strict=True):
        assert got.shape == before.shape
        assert_close(got, expected, 1e-6)


class _Simulated:
    """The methods of a model, run as the group-mean simulation."""

    def __init__(self, model: nn.Module, groups: list[Tensor]) -> None:
        self.model, self.groups = model, groups

    def __getattr__(self, name: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.model.__dict__["forward"] = getattr(self.model, name)
            try:
                return tokenmerge.simulate(self.model, self.groups, *args, **kwargs)
            finally:
                del self.model.__dict__["forward"]

        return run


@pytest.mark.parametrize("pool", ["token", "avg", "avgmax", "max", "map"])
def test_any_pooling_is_right_on_restored_tokens(pool: str) -> None:
    model = _vit(global_pool=pool)
    outs = []
    for restore in (None, "dense"):
        with tokenmerge.patched(model, r=6, restore=restore), torch.no_grad():
            outs.append(model(X))
    assert_close(outs[1], outs[0], 1e-9)


def test_every_token_of_a_group_holds_the_same_features_in_its_own_place() -> None:
    model = _vit(num_classes=0, global_pool="")
    handle = tokenmerge.patch(model, r=9, restore="dense", track=True)
    with torch.no_grad():
        out = model(X)
    last = handle.groups[-1]
    for image in range(2):
        for slot in range(handle.tokens[-1]):
            members = out[image, last[image] == slot]
            assert torch.equal(members, members[:1].expand_as(members))
        assert torch.equal(last[image, :3], torch.arange(3)), "prefix tokens left the front"


@pytest.mark.parametrize("name", ["forward_features", "forward_intermediates", "get_intermediate_layers"])
def test_without_the_option_such_a_call_is_refused_and_names_it(name: str) -> None:
    model = _vit()
    before = getattr(model, name)(X)
    handle = tokenmerge.patch(model, r=4)
    with pytest.raises(e.UnsupportedError, match=rf"{name}\(\) .*r is not 0.*restore='dense'.*restore='merged'"):
        getattr(model, name)(X)
    with torch.no_grad():
        assert model(X).shape == (2, 10) and model.forward(X).shape == (2, 10)
    handle.r = 0
    _same(getattr(model, name)(X), before)
    handle.r = 4
    with handle.disabled():
        _same(getattr(model, name)(X), before)
    with pytest.raises(e.UnsupportedError, match=name):
        getattr(model, name)(X)
    handle.remove()
    assert bound_attributes(model) == [] and name not in model.__dict__
    _same(getattr(model, name)(X), before)


def _same(got: Any, expected: Any) -> None:
    if isinstance(got, Tensor):
        assert torch.equal(got, expected)
    else:
        for one, other in zip(got, expected, strict=True):
            _same(one, other)


def test_merged_tokens_are_handed_out_where_the_user_asks_for_them() -> None:
    model = _vit()
    handle = tokenmerge.patch(model, r=4, restore="merged", track=True)
    with torch.no_grad():
        features = model.forward_features(X)
        assert features.shape == (2, 51, 32) and handle.sizes.shape == (2, 51)
        dense = handle.dense(features)
        handle.remove()
        tokenmerge.patch(model, r=4, restore="dense")
        assert_close(model.forward_features(X), dense, 1e-9)


def test_a_call_in_one_thread_does_not_open_the_guard_of_another() -> None:
    model = _vit()
    tokenmerge.patch(model, r=4)
    refused: list[int] = []
    inside, done = threading.Event(), threading.Event()
    hook = model.blocks[0].register_forward_pre_hook(lambda module, args: (inside.set(), done.wait(10), None)[2])

    def work(i: int) -> None:
        if i == 0:
            with torch.no_grad():
                model(X)
        else:
            inside.wait(10)
            with pytest.raises(e.UnsupportedError):
                model.forward_features(X)
            refused.append(i)
            done.set()

    run_in_threads(work, 2)
    hook.remove()
    assert refused == [1]


def test_a_restored_model_is_compiled_exported_copied_and_saved() -> None:
    model, x = _vit().float(), X.float()
    tokenmerge.patch(model, r=4, restore="dense")
    with torch.no_grad():
        expected = model.forward_features(x)
        logits = model(x)
        assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), logits)
        program = torch.export.export(model, (x,), strict=False)
        assert_close(program.module()(x), logits)
        file = io.BytesIO()
        torch.save(copy.deepcopy(model), file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False).forward_features(x), expected)
    model.train().forward_features(x).sum().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())


def test_restore_is_saved_in_the_configuration(tmp_path: Any) -> None:
    config = tokenmerge.MergeConfig("tome", r=4, restore="dense")
    config.save(tmp_path / "x.json")
    assert tokenmerge.MergeConfig.load(tmp_path / "x.json") == config
    with pytest.raises(e.ConfigError, match=r"restore is 'grid'; it takes 'dense', 'merged', None"):
        tokenmerge.patch(_vit(), r=4, restore="grid")


def test_dropped_tokens_come_back_as_zeros() -> None:
    model = _vit(num_classes=0, global_pool="")
    tokenmerge.patch(model, "drop", r=8, restore="dense")
    with torch.no_grad():
        features = model.forward_intermediates(X, output_fmt="NLC", intermediates_only=True)[-1]
    assert features.shape == (2, 64, 32) and (features[:, -32:] == 0).all() and (features[:, :32] != 0).any()
