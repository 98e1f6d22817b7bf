"""What every training-free method promises, of the methods that rank tokens, cluster them or look at their places."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import asdict, fields
from typing import Any

import pytest
import test_similarity_promises as promises
import torch
from similarity_loops import view_of

from tokenmerge.methods import (
    ALGM,
    ATS,
    GTP,
    MPM,
    AttentionPrune,
    EViT,
    RandomPrune,
    Reduction,
    TokenPooling,
    TokenView,
    ToMe2D,
    VidTLDR,
    ZeroTPrune,
    find,
)

CHOICES: list[Reduction] = [
    EViT(),
    EViT(fuse=False),
    EViT(score="received"),
    RandomPrune(),
    RandomPrune(seed=3),
    AttentionPrune(),
    *[AttentionPrune(score=score) for score in ("class_value", "received", "entropy", "shift", "norm")],
    ATS(),
    ATS(samples=1.0),
    ATS(samples=0.5, score="received"),
    TokenPooling(),
    TokenPooling(algorithm="kmedoids"),
    TokenPooling(weight="none", iterations=2, score="norm"),
    ZeroTPrune(),
    ZeroTPrune(iterations=(2, 2, 2), similar=0.0),
    ZeroTPrune(similar=1.0, metric="x"),
    GTP(),
    GTP(graph="spatial"),
    GTP(graph="semantic", neighbours=3, heads="mean"),
    ALGM(),
    ALGM(threshold=-1.0, metric="x"),
    MPM(),
    MPM(metric="k"),
    VidTLDR(),
    VidTLDR(metric="k", score="class"),
    ToMe2D(),
    ToMe2D(stride=3, seed=1, metric="k"),
]
every_method = pytest.mark.parametrize("method", CHOICES, ids=repr)
CHECKS = [
    promises.test_sizes_are_ones_where_none_are_given,
    promises.test_equal_inputs_and_permuted_batches,
    promises.test_a_method_sees_only_what_it_needs,
    promises.test_real_tokens_go_to_real_tokens,
    promises.test_gradients_reach_the_tokens,
]


@every_method
@promises.every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_are_accounted_for(method: Reduction, layout: tuple[int, ...], dtype: torch.dtype) -> None:
    promises.test_tokens_are_accounted_for(method, layout, dtype)


@every_method
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[5:])
def test_promise(method: Reduction, check: Any) -> None:
    check(method)


@every_method
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("where", ["behind", "before", "scattered"])
def test_padding_goes_first(method: Reduction, prefix: int, where: str) -> None:
    promises.test_padding_goes_first(method, prefix, where)


@every_method
def test_plans_are_made_where_the_tokens_are(method: Reduction) -> None:
    view = view_of()
    moved = {f.name: getattr(view, f.name) for f in fields(view)}
    moved = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in moved.items()}
    plan = method.plan(TokenView(**moved), 6)
    x, size = method.merge(plan, moved["stream"], moved["size"])
    assert size is not None and x.device.type == size.device.type == "meta"
    assert x.shape == (3, 20, 24) and size.shape == (3, 20)


@pytest.mark.hosts
@every_method
def test_on_a_real_model(method: Reduction) -> None:
    promises.test_on_a_real_model(method)


@every_method
def test_a_method_is_its_own_configuration(method: Reduction) -> None:
    assert method == copy.deepcopy(method) == pickle.loads(pickle.dumps(method)) == eval(repr(method))
    options = json.loads(json.dumps(asdict(method)))  # type: ignore[call-overload]
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    assert hash(method) == hash(type(method)(**options)) and method == type(method)(**options)
    assert find(method.name) is type(method)
