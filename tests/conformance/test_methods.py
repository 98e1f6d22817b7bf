"""What every method promises, of every example that it names, on views of any layout and on a real model."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, asdict, fields, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from helpers import assert_close, randomised, tiny_vit, view_of
from tokenmerge import methods
from tokenmerge import plan as plans
from tokenmerge.errors import UnknownNameError
from tokenmerge.methods import (
    LTMP,
    AdaViT,
    AViT,
    DiffRate,
    Drop,
    Learned,
    MaMe,
    Reduction,
    TokenLearner,
    TokenView,
    ToMe,
    find,
    list_methods,
    register,
)
from tokenmerge.methods.base import ModelShape

EXAMPLES = [example for name in list_methods() for example in find(name).examples()]
# B, N, prefix, r
LAYOUTS = [
    *[(2, 17, 0, 4), (2, 17, 1, 4), (1, 18, 2, 3), (3, 21, 5, 8), (2, 17, 1, 100), (1, 4, 1, 1)],
    *[(2, 16, 0, 4), (3, 21, 5, 7)],
]
every_example = pytest.mark.parametrize("method", EXAMPLES, ids=repr)


def without(reason: str, *exempt: type[Reduction] | Callable[[Any], bool]) -> pytest.MarkDecorator:
    """Every example but those of some methods, for which a promise means nothing."""
    assert reason
    left = [
        method
        for method in EXAMPLES
        if not any(isinstance(method, part) if isinstance(part, type) else part(method) for part in exempt)
    ]
    return pytest.mark.parametrize("method", left, ids=repr)


def ready(method: Reduction, view: TokenView, r: int) -> TokenView:
    """The view with what a learned method has learned for its layer, in the view's dtype."""
    _, n, width = view.stream.shape
    shape = ModelShape(width, 3, view.prefix, view.prefix > 0, (0, r, 0), (n, n, n - r), (1,))
    modules = method.build(shape)
    if modules is None:
        return view
    if not isinstance(method, (AViT, LTMP)):  # whose few scalars are options
        randomised(modules)
    if isinstance(method, AdaViT):
        # an attention that is off adds nothing, also to tokens that stay
        for decision in modules.values():
            decision.sublayers.bias.data.fill_(50.0)  # type: ignore[union-attr]
    return replace(view, module=modules.eval().to(view.stream)["1"])


def planned(method: Reduction, view: TokenView, r: int) -> tuple[plans.AnyPlan, Tensor, Tensor | None]:
    plan = method.plan(replace(view, memory={}), r)
    return plan, *method.merge(plan, view.stream, view.size, view.branch)


def moved(view: TokenView, move: Callable[[Tensor], Tensor]) -> TokenView:
    """The view with every tensor of it moved."""
    parts = {field.name: getattr(view, field.name) for field in fields(view)}
    return TokenView(**{name: move(part) if isinstance(part, Tensor) else part for name, part in parts.items()})


@every_example
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_are_accounted_for(method: Reduction, layout: tuple[int, ...], dtype: torch.dtype) -> None:
    B, N, prefix, r = layout
    r = min(r, method.largest_r(N, prefix))
    view = view_of(B, N, prefix, dtype)
    # keys alike, so that thresholds find something
    assert view.k is not None and view.size is not None
    view = replace(view, k=view.k + 1, stream=view.stream + 1, branch=torch.randn_like(view.stream))
    plan, x, size = planned(method, ready(method, view, r), r)
    M = x.shape[1]
    assert (N - r <= M <= N if method.is_adaptive else N - r == M) and x.shape == (B, M, 24)
    assert x.dtype == dtype and x.isfinite().all()
    assert size is not None and size.dtype == torch.float32 and size.shape == (B, M)
    assert torch.equal(x[:, :prefix], view.x[:, :prefix]), "prefix tokens moved or changed"
    assert torch.equal(plan.keep[:, :prefix], torch.arange(prefix).expand(B, -1))
    groups = plans.assignment(plan)
    # two of its maps may look at one token most
    if not isinstance(method, TokenLearner):
        assert (groups.gather(1, plan.keep) == torch.arange(M)).all(), "a token is not in the group it leads"
    assert_close(size.sum(dim=1), (view.size * (groups >= 0)).sum(dim=1))
    if isinstance(plan, plans.Plan):
        assert torch.equal(size, _sums(view.size, groups, M))


def _sums(size: Tensor, groups: Tensor, M: int) -> Tensor:
    """What the sizes of each group's members sum to."""
    sums = torch.zeros(size.shape[0], M)
    for image, slots in enumerate(groups):
        sums[image].index_add_(0, slots[slots >= 0], size[image, slots >= 0])
    return sums


@every_example
def test_sizes_are_ones_where_none_are_given(method: Reduction) -> None:
    view = ready(method, replace(view_of(), size=None), 5)
    plan, x, size = planned(method, view, 5)
    _, same, ones = planned(method, replace(view, size=torch.ones(3, 26)), 5)
    assert_close(x, same)
    if isinstance(method, Drop):
        assert size is None, "nothing was merged"
        return
    assert size is not None and ones is not None
    assert_close(size, ones)
    if isinstance(plan, plans.Plan):
        assert torch.equal(size, _sums(torch.ones(3, 26), plans.assignment(plan), x.shape[1]))


@every_example
def test_equal_inputs_and_permuted_batches(method: Reduction) -> None:
    view, order = ready(method, view_of(4), 5), torch.tensor([3, 1, 0, 2])
    first, again, permuted = (planned(method, v, 5) for v in (view, view, moved(view, lambda part: part[order])))
    for one, other, third in zip(first[1:], again[1:], permuted[1:], strict=True):
        assert one is not None and other is not None and third is not None
        assert torch.equal(one, other)
        assert_close(one[order], third)
    for name in ("keep", "src", "dst", "weight"):
        one, other, third = (getattr(plan, name, None) for plan in (first[0], again[0], permuted[0]))
        if one is not None and other is not None and third is not None:
            assert torch.equal(one, other)
            assert_close(one[order].double(), third.double(), 1e-5 if name == "weight" else 0.0)


@every_example
def test_gradients_reach_the_tokens(method: Reduction) -> None:
    view = ready(method, view_of(), 5)
    plan = method.plan(view, 5)
    x, branch = view.stream.clone().requires_grad_(), torch.randn_like(view.stream).requires_grad_()
    method.merge(plan, x, view.size, branch)[0].square().sum().backward()
    for grad in (x.grad, branch.grad):
        assert grad is not None and grad.isfinite().all()
        assert (grad.gather(1, plan.keep[..., None].expand(-1, -1, 24)).abs().sum(dim=2) > 0).all()


@every_example
def test_a_method_sees_only_what_it_needs(method: Reduction) -> None:
    view = ready(method, view_of(), 5)
    assert method.needs == method.captures | method.requires
    hidden: dict[str, Any] = {name: None for name in ("q", "k", "v") if name not in method.captures}
    if "places" not in method.requires:
        hidden["grid"] = None
    assert torch.equal(planned(method, view, 5)[1], planned(method, replace(view, **hidden), 5)[1])


@every_example
def test_a_method_is_its_own_configuration(method: Reduction) -> None:
    twins = (copy.deepcopy(method), pickle.loads(pickle.dumps(method)), eval(repr(method), vars(methods)))
    options = json.loads(json.dumps(asdict(method)))  # type: ignore[call-overload]
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    for twin in (*twins, type(method)(**options), methods.parse(f"{method.name}({_written(options)})")):
        assert twin == method and hash(twin) == hash(method)
    assert find(method.name) is type(method)
    with pytest.raises((FrozenInstanceError, AttributeError)):
        method.metric = "v"  # type: ignore[attr-defined]


def _written(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _has_other_sides(method: Reduction) -> bool:
    return isinstance(method, ToMe) and method.partition != "alternating"


# the first tokens stay; of TokenLearner all are means; padding that lies on the side that absorbs stays
@without("what they keep is said otherwise", Drop, TokenLearner, _has_other_sides)
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("where", ["behind", "before", "scattered"])
def test_padding_goes_first(method: Reduction, prefix: int, where: str) -> None:
    N, r = 25 + prefix, 4
    places = {
        "behind": list(range(N - 9, N)),
        "before": list(range(prefix, prefix + 9)),
        # as many as r at even places
        "scattered": [3, 6, 7, 10, 11, 14, 15, 18, 19],
    }[where]
    valid = torch.ones(3, N, dtype=torch.bool)
    valid[:, places] = False
    view = view_of(N=N, prefix=prefix)
    assert view.size is not None
    view = ready(method, replace(view, valid=valid, size=view.size * valid), r)
    plan = plans.lead_by_real(method.plan(view, r), valid)
    x, size = method.merge(plan, view.stream, view.size, view.branch)
    assert size is not None and view.size is not None
    M, real = x.shape[1], valid.gather(1, plan.keep)
    assert N - r <= M and (method.is_adaptive or N - r == M)
    assert (real.sum(dim=1) == N - 9).all(), "a real token went before padding"
    assert N - r == M or not isinstance(method, Learned), "padding stayed"
    assert_close(size[real], view.size.gather(1, plan.keep)[real])
    if isinstance(method, MaMe) and N - r < M:
        return  # thresholds may have merged some real tokens too
    assert_close(x[real], view.stream.gather(1, plan.keep[..., None].expand(-1, -1, 24))[real])


@without("the first tokens stay, whatever they are", Drop)
def test_real_tokens_go_to_real_tokens(method: Reduction) -> None:
    view, valid = view_of(), torch.ones(3, 26, dtype=torch.bool)
    valid[0, [4, 9, 15]] = valid[1, [2, 4, 11]] = valid[2, [13, 23]] = False
    assert view.size is not None
    view = ready(method, replace(view, valid=valid, size=view.size * valid), 9)
    plan = method.plan(view, 9)
    if isinstance(plan, plans.MatrixPlan):
        mixes = (plan.weight > 0) & valid[:, None] & ~valid.gather(1, plan.keep)[..., None]
        assert not mixes.any()
        return
    is_absorbed = plans.assignment(plan).gather(1, plan.src) >= 0
    is_mixed = valid.gather(1, plan.src) & ~valid.gather(1, plan.keep.gather(1, plan.dst)) & is_absorbed
    assert not is_mixed.any(), "padding absorbed a real token"
    led = plans.lead_by_real(plan, valid)
    assert torch.equal(led.keep, plan.keep) and torch.equal(led.dst, plan.dst)  # type: ignore[union-attr]


@every_example
def test_plans_are_made_where_the_tokens_are(method: Reduction) -> None:
    view = ready(method, view_of(), 6)
    view = replace(moved(view, lambda part: part.to("meta")), module=view.module and view.module.to("meta"))
    _, x, size = planned(method, view, 6)
    assert size is not None and x.device.type == size.device.type == "meta"
    assert x.shape == (3, 20, 24) and size.shape == (3, 20)


@cache
def _model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return tiny_vit(depth=3).to(dtype)


@pytest.mark.hosts
@pytest.mark.parametrize("method", [*EXAMPLES, DiffRate(prune=(0, 2, 0))], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_real_model(method: Reduction, dtype: torch.dtype) -> None:
    model, images = _model(dtype), torch.randn(3, 3, 32, 32, dtype=dtype)
    with torch.no_grad(), tokenmerge.patched(model, method, r=[0, 5, 7], track=True) as handle:
        out = model(images)
        groups, sizes = handle.groups[-1], handle.sizes
    assert out.shape == (3, 10) and out.dtype == dtype and out.isfinite().all()
    assert_close(sizes.sum(dim=1), (groups >= 0).sum(dim=1).float())
    assert sizes.shape[1] >= 53 if method.is_adaptive else sizes.shape[1] == 53


def test_needs_that_nobody_can_meet_are_refused() -> None:
    class Misspelt(ToMe):
        needs = frozenset({"k", "grid"})

    with pytest.raises(UnknownNameError, match=r"no Misspelt needs 'grid'. Known: q, k, v, class, places"):
        tokenmerge.patch(_model(torch.float32), Misspelt(), r=2)


def test_the_registry() -> None:
    names = """
        tome tofu pitome mctf diffrate ppt atm mame greedy tomecis dsm evit attention random ats token_pooling
        zero_tprune gtp algm mpm vid_tldr tome2d dynamicvit avit adavit spvit tokenlearner dtem ltmp drop
    """
    # others may come between them; docs/methods.md has the same order
    assert [name for name in list_methods() if name in names.split()] == names.split() and find("tome") is ToMe
    with pytest.raises(UnknownNameError, match=r"no method 'tomee'. Did you mean 'tome'\? Known: tome, tofu, pitome"):
        find("tomee")
    with pytest.raises(UnknownNameError, match=r"method name 'tome' is taken by ToMe"):
        register(type("Mine", (ToMe,), {"name": "tome"}))
