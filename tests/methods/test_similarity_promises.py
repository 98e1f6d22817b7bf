"""What every training-free method promises: tokens accounted for, padding first, graphs, and a real model."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
import torch
from similarity_loops import view_of
from torch import Tensor

import tokenmerge
from helpers import assert_close, tiny_vit
from tokenmerge import matching
from tokenmerge import plan as plans
from tokenmerge.errors import UnknownNameError
from tokenmerge.methods import ATM, DSM, MCTF, PPT, DiffRate, Greedy, MaMe, PiToMe, Reduction, ToFu, TokenView, ToMeCIS
from tokenmerge.methods.base import METRICS

EVERYTHING = ATM(alpha=-2.0, floor=-2.0)  # merges all there is
CHOICES: list[Reduction] = [
    ToFu(),
    ToFu(early=0.0),
    ToFu(early=0.0, combine="average"),
    PiToMe(),
    PiToMe(margin=0.0, alpha=0.1),
    MCTF(),
    MCTF(score="norm", metric="k"),
    DiffRate(),
    DiffRate(prune=0.0, score="received"),
    DiffRate(prune=1.0),
    PPT(),
    PPT(threshold=1.0),
    PPT(score="received"),
    ATM(alpha=0.4, floor=0.2),
    EVERYTHING,
    MaMe(),
    MaMe(tau=0.1, metric="k"),
    Greedy(),
    ToMeCIS(),
    ToMeCIS(score="received", damping=0.3),
    DSM(),
    DSM(windowed=0),
]
LAYOUTS = [(2, 17, 0, 4), (2, 17, 1, 4), (1, 18, 2, 3), (3, 21, 5, 8), (2, 17, 1, 100), (1, 4, 1, 1)]  # B, N, prefix, r
every_method = pytest.mark.parametrize("method", CHOICES, ids=repr)
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


def _planned(method: Reduction, view: TokenView, r: int) -> tuple[plans.AnyPlan, Tensor, Tensor]:
    plan = method.plan(replace(view, memory={}), r)
    x, size = method.merge(plan, view.stream, view.size, view.branch)
    assert size is not None
    return plan, x, size


@every_method
@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_are_accounted_for(method: Reduction, layout: tuple[int, ...], dtype: torch.dtype) -> None:
    B, N, prefix, r = layout
    view = view_of(B, N, prefix, dtype)
    # keys alike, so that thresholds find something
    assert view.k is not None and view.size is not None
    view = replace(view, k=view.k + 1, stream=view.stream + 1, branch=torch.randn_like(view.stream))
    r = min(r, method.largest_r(N, prefix))
    plan, x, size = _planned(method, view, r)
    M = x.shape[1]
    assert (N - r <= M <= N if method.is_adaptive else N - r == M) and x.shape == (B, M, 24)
    assert x.dtype == dtype and x.isfinite().all() and size.dtype == torch.float32 and size.shape == (B, M)
    assert torch.equal(x[:, :prefix], view.x[:, :prefix]), "prefix tokens moved or changed"
    assert torch.equal(plan.keep[:, :prefix], torch.arange(prefix).expand(B, -1))
    groups = plans.assignment(plan)
    assert (groups.gather(1, plan.keep) == torch.arange(M)).all(), "a token is not in the group it leads"
    assert_close(size.sum(dim=1), (view.size * (groups >= 0)).sum(dim=1))
    if isinstance(plan, plans.Plan):
        for image in range(B):
            for slot in range(M):
                assert size[image, slot] == view.size[image, groups[image] == slot].sum()


@every_method
def test_sizes_are_ones_where_none_are_given(method: Reduction) -> None:
    view = replace(view_of(), size=None)
    ones = replace(view, size=torch.ones(3, 26))
    for got, expected in zip(_planned(method, view, 5)[1:], _planned(method, ones, 5)[1:], strict=True):
        assert_close(got, expected)


@every_method
def test_equal_inputs_and_permuted_batches(method: Reduction) -> None:
    view, order = view_of(4), torch.tensor([3, 1, 0, 2])
    moved = {f.name: getattr(view, f.name) for f in fields(view)}
    moved = {name: value[order] if isinstance(value, Tensor) else value for name, value in moved.items()}
    (_, *first), (_, *again), (_, *permuted) = (_planned(method, v, 5) for v in (view, view, TokenView(**moved)))
    for one, other, third in zip(first, again, permuted, strict=True):
        assert torch.equal(one, other)
        assert_close(one[order], third)


@every_method
def test_gradients_reach_the_tokens(method: Reduction) -> None:
    view = view_of()
    plan = method.plan(view, 5)
    x, branch = view.stream.clone().requires_grad_(), torch.randn_like(view.stream).requires_grad_()
    method.merge(plan, x, view.size, branch)[0].square().sum().backward()
    for grad in (x.grad, branch.grad):
        assert grad is not None and grad.isfinite().all()
        assert (grad.gather(1, plan.keep[..., None].expand(-1, -1, 24)).abs().sum(dim=2) > 0).all()


@every_method
def test_a_method_sees_only_what_it_needs(method: Reduction) -> None:
    view = view_of()
    hidden: dict[str, Any] = {name: None for name in ("q", "k", "v") if name not in method.needs}
    if "places" not in method.needs:
        hidden["grid"] = None
    assert torch.equal(_planned(method, view, 5)[1], _planned(method, replace(view, **hidden), 5)[1])


@every_method
def test_a_method_is_its_own_configuration(method: Reduction) -> None:
    assert method == copy.deepcopy(method) == pickle.loads(pickle.dumps(method)) == eval(repr(method))
    options = json.loads(json.dumps(asdict(method)))  # type: ignore[call-overload]
    assert hash(method) == hash(type(method)(**options)) and method == type(method)(**options)


@every_method
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("where", ["behind", "before", "scattered"])
def test_padding_goes_first(method: Reduction, prefix: int, where: str) -> None:
    view, N, r = view_of(N=25 + prefix, prefix=prefix), 25 + prefix, 4
    places = {"behind": range(N - 9, N), "before": range(prefix, prefix + 9), "scattered": range(3, 21, 2)}[where]
    valid = torch.ones(3, N, dtype=torch.bool)
    valid[:, list(places)] = False
    if where == "scattered":
        valid[:, [5, 9, 13, 17]], valid[:, [6, 10, 14, 18]] = True, False  # as many as r at even places
    assert view.size is not None
    view = replace(view, valid=valid, size=view.size * valid)
    plan = plans.lead_by_real(method.plan(view, r), valid)
    x, size = method.merge(plan, view.stream, view.size, view.branch)
    assert size is not None
    M, real = x.shape[1], valid.gather(1, plan.keep)
    assert N - r <= M and (real.sum(dim=1) == 25 + prefix - 9).all(), "a real token went before padding"
    assert_close(size[real], view.size.gather(1, plan.keep)[real])
    expected = view.stream.gather(1, plan.keep[..., None].expand(-1, -1, 24))
    if isinstance(method, MaMe) and N - r < M:
        return  # thresholds may have merged some real tokens too
    assert_close(x[real], expected[real])


@every_method
def test_real_tokens_go_to_real_tokens(method: Reduction) -> None:
    view, valid = view_of(), torch.ones(3, 26, dtype=torch.bool)
    valid[0, [4, 9, 15]] = valid[1, [2, 4, 11]] = valid[2, [13, 23]] = False
    assert view.size is not None
    plan = method.plan(replace(view, valid=valid, size=view.size * valid), 9)
    if isinstance(plan, plans.MatrixPlan):
        mixes = (plan.weight > 0) & valid[:, None] & ~valid.gather(1, plan.keep)[..., None]
        assert not mixes.any()
        return
    into = plan.keep.gather(1, plan.dst.clamp_min(0))
    is_mixed = valid.gather(1, plan.src) & ~valid.gather(1, into) & (plan.dst >= 0)
    assert not is_mixed.any(), "padding absorbed a real token"
    led = plans.lead_by_real(plan, valid)
    assert torch.equal(led.keep, plan.keep) and torch.equal(led.dst, plan.dst)  # type: ignore[union-attr]


def test_padding_is_no_leader_of_what_is_dropped() -> None:
    plan = plans.Plan(torch.tensor([[0, 3]]), torch.tensor([[1, 2]]), torch.tensor([[-1, 1]]), n=4)
    led = plans.lead_by_real(plan, torch.tensor([[False, True, True, True]]))
    assert torch.equal(led.keep, plan.keep) and torch.equal(led.src, plan.src)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", [ToFu, PiToMe, MCTF, DiffRate, PPT, ATM, MaMe, Greedy, ToMeCIS, DSM])
def test_options_say_which_values_there_are(kind: type[Any]) -> None:
    with pytest.raises(UnknownNameError, match=rf"no {kind.__name__} metric 'key'. Known: k, q, v, x, x_pre"):
        kind(metric="key")
    for metric in METRICS:
        needs = kind(metric=metric).needs
        assert metric not in ("k", "q", "v") or metric in needs
        assert torch.equal(kind(metric=metric).plan(view_of(), 2).keep[:, :1], torch.zeros(3, 1, dtype=torch.long))
    if hasattr(kind, "score"):
        assert "class" not in kind(score="received").needs
        with pytest.raises(UnknownNameError, match=rf"no {kind.__name__} score 'recieved'. Did you mean 'received'"):
            kind(score="recieved")
    if kind is ToFu:
        with pytest.raises(UnknownNameError, match=r"no ToFu combine 'mlep'. Did you mean 'mlerp'"):
            kind(combine="mlep")


def test_products_are_exact_under_autocast() -> None:
    rows = matching.unit(torch.randn(2, 3, 9, 8, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        inside = matching.cosines(rows, rows)
    assert inside.dtype == torch.float32 and torch.equal(inside, matching.cosines(rows, rows))


def test_absorbing_and_dropping_at_once() -> None:
    src, into, gone = torch.tensor([[5, 0], [1, 2]]), torch.tensor([[3, 3], [6, 0]]), torch.tensor([[4], [3]])
    plan = matching.absorb(src, into, 7, gone=gone)
    assert plan.keep.tolist() == [[1, 2, 3, 6], [0, 4, 5, 6]]
    assert plans.assignment(plan).tolist() == [[2, 0, 1, 2, -1, 2, 3], [0, 3, 0, -1, 1, 2, 3]]


@pytest.mark.hosts
@pytest.mark.parametrize("method", [*CHOICES, DiffRate(prune=(0, 2, 0))], ids=repr)
def test_on_a_real_model(method: Reduction) -> None:
    """Eager, compiled, in half precision, and exported for any batch; three blocks, as graphs take their time."""
    model, images = tiny_vit(depth=3), torch.randn(3, 3, 32, 32)
    handle = tokenmerge.patch(model, method, r=[0, 5, 7], track=True)
    with torch.no_grad():
        eager = model(images)
        groups, sizes = handle.groups[-1], handle.sizes
        assert groups is not None and sizes is not None
        assert_close(sizes.sum(dim=1), (groups >= 0).sum(dim=1).float())
        assert sizes.shape[1] >= 53 if method.is_adaptive else sizes.shape[1] == 53
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)(images)
        assert handle.sizes is not None and handle.sizes.shape[1] == 53
        if not method.is_adaptive or method == EVERYTHING:
            assert_close(compiled, eager)
        assert compiled.isfinite().all()
        batch = ({0: torch.export.Dim("batch", min=1, max=512)},)
        exported = torch.export.export(model, (images[:2],), dynamic_shapes=batch).module()
        assert_close(exported(images), compiled)
        assert_close(exported(images[:1]), compiled[:1])
        half = model.bfloat16()(images.bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all() and half.shape == eager.shape


@pytest.mark.hosts
@pytest.mark.parametrize("method", [MCTF(), PPT(), EVERYTHING, MaMe(), Greedy(), DSM(windowed=1)], ids=repr)
def test_graphs_exported_for_one_batch_answer_the_same(method: Reduction) -> None:
    model, images = tiny_vit(depth=3), torch.randn(2, 3, 32, 32)
    tokenmerge.patch(model, method, r=[0, 5, 7])
    torch._dynamo.reset()
    with torch.no_grad():
        exported = torch.export.export(model, (images,)).module()(images)
        compiled = torch.compile(model, backend="eager", fullgraph=True)(images)
    assert_close(exported, compiled)
