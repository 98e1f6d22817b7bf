"""The promises every method keeps, at every layout of tokens."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from helpers import assert_close
from tokenmerge import matching
from tokenmerge import plan as plans
from tokenmerge.errors import UnknownNameError
from tokenmerge.methods import Drop, Reduction, TokenView, ToMe, find, list_methods, register

CHOICES = [
    ToMe(),
    *[ToMe(metric=metric) for metric in ("q", "v", "x", "x_pre")],
    ToMe(heads="concat"),
    *[ToMe(distance=distance) for distance in matching.DISTANCES[1:]],
    *[ToMe(combine=combine) for combine in ("average", "max", "keep_one")],
    *[ToMe(partition=partition) for partition in matching.PARTITIONS[1:]],
    Drop(),
]
LAYOUTS = [(2, 17, 0, 4), (2, 17, 1, 4), (1, 18, 2, 3), (3, 21, 5, 8), (2, 17, 1, 100), (1, 4, 1, 1)]  # B, N, prefix, r
every_method = pytest.mark.parametrize("method", CHOICES, ids=repr)
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


def _view(B: int, N: int, prefix: int, dtype: torch.dtype = torch.float32) -> TokenView:
    q, k, v = (torch.randn(B, 3, N, 8, dtype=dtype) for _ in range(3))
    size = torch.randint(1, 5, (B, N)).float()
    x, x_pre = torch.randn(B, N, 24, dtype=dtype), torch.randn(B, N, 24, dtype=dtype)
    return TokenView(x, x_pre, q, k, v, size, prefix, None, layer=1)


def _r(N: int, prefix: int, r: int) -> int:
    return min(r, matching.largest_r(N, prefix))


@every_method
@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_are_accounted_for(method: Reduction, layout: tuple[int, ...], dtype: torch.dtype) -> None:
    B, N, prefix, r = layout
    view = _view(B, N, prefix, dtype)
    r = _r(N, prefix, r)
    plan = method.plan(view, r)
    x, size = method.merge(plan, view.x, view.size)
    groups = plans.assignment(plan)
    assert x.shape == (B, N - r, 24) and x.dtype == dtype and x.isfinite().all()
    assert torch.equal(x[:, :prefix], view.x[:, :prefix]), "prefix tokens moved or changed"
    assert view.size is not None and size is not None
    for image in range(B):
        for slot in range(N - r):
            assert size[image, slot] == view.size[image, groups[image] == slot].sum()
    dropped = view.size[groups == -1].sum()
    assert size.sum() == view.size.sum() - dropped


@every_method
def test_sizes_appear_only_where_something_was_merged(method: Reduction) -> None:
    view = _view(2, 16, 1)
    plan = method.plan(view, 5)
    size = method.merge(plan, view.x, None)[1]
    if isinstance(method, Drop):
        assert size is None
    else:
        counts = torch.stack([torch.bincount(groups, minlength=11) for groups in plans.assignment(plan)])
        assert size is not None and torch.equal(size, counts.float())


@every_method
def test_equal_inputs_and_permuted_batches(method: Reduction) -> None:
    view, order = _view(4, 18, 1), torch.tensor([3, 1, 0, 2])
    moved = {f.name: getattr(view, f.name) for f in fields(view)}
    moved = {name: value[order] if isinstance(value, torch.Tensor) else value for name, value in moved.items()}
    first, again, permuted = method.plan(view, 5), method.plan(view, 5), method.plan(TokenView(**moved), 5)
    for name in ("keep", "src", "dst"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert torch.equal(getattr(first, name)[order], getattr(permuted, name))


@every_method
def test_gradients_reach_the_tokens(method: Reduction) -> None:
    view = _view(2, 16, 1)
    plan = method.plan(view, 5)
    x = view.x.clone().requires_grad_()
    method.merge(plan, x, view.size)[0].square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad[:, 0].abs().sum() > 0


@every_method
def test_a_method_is_its_own_configuration(method: Reduction) -> None:
    assert method == copy.deepcopy(method) == pickle.loads(pickle.dumps(method))
    assert hash(method) == hash(copy.deepcopy(method)) and eval(repr(method)) == method
    with pytest.raises((FrozenInstanceError, AttributeError)):
        method.metric = "v"  # type: ignore[attr-defined]


def test_combinations_mean_what_they_say() -> None:
    view = _view(2, 12, 1)
    plan = ToMe().plan(view, 4)
    groups = plans.assignment(plan)
    for combine in ("weighted", "average", "max", "keep_one"):
        merged = ToMe(combine=combine).merge(plan, view.x, view.size)[0]
        for slot in range(8):
            members, size = view.x[0, groups[0] == slot], view.size[0, groups[0] == slot, None]  # type: ignore[index]
            expected = {
                "weighted": (members * size).sum(0) / size.sum(),
                "average": members.mean(0),
                "max": members.amax(0),
                "keep_one": view.x[0, plan.keep[0, slot]],
            }[combine]
            assert_close(merged[0, slot], expected, 1e-6)


@pytest.mark.parametrize("metric", ["k", "q", "v", "x", "x_pre"])
def test_a_metric_is_read_from_where_it_says(metric: str) -> None:
    view = _view(1, 14, 1)
    expected = getattr(view, metric)
    expected = expected.mean(1) if expected.dim() == 4 else expected
    plan, direct = ToMe(metric=metric).plan(view, 4), matching.bipartite(expected, 4, prefix=1)
    assert torch.equal(plan.keep, direct.keep) and torch.equal(plan.dst, direct.dst)
    assert ToMe(metric=metric).needs == ({metric} if metric in "qkv" else set())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "key"}, r"no ToMe metric 'key'. Known: k, q, v, x, x_pre"),
        ({"heads": "max"}, r"no ToMe heads 'max'"),
        ({"distance": "cosin"}, r"no ToMe distance 'cosin'. Did you mean 'cosine'"),
        ({"combine": "mean"}, r"no ToMe combine 'mean'"),
        ({"partition": "alternate"}, r"no ToMe partition 'alternate'. Did you mean 'alternating'"),
    ],
)
def test_a_wrong_choice_says_which_there_are(options: dict[str, str], message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        ToMe(**options)


def test_the_registry() -> None:
    names = """
        tome tofu pitome mctf diffrate ppt atm mame greedy tomecis dsm evit attention random ats token_pooling
        zero_tprune gtp algm mpm vid_tldr tome2d dynamicvit avit adavit spvit tokenlearner dtem ltmp drop
    """
    assert list_methods() == names.split() and find("tome") is ToMe
    with pytest.raises(UnknownNameError, match=r"no method 'tomee'. Did you mean 'tome'\? Known: tome, tofu, pitome"):
        find("tomee")
    with pytest.raises(UnknownNameError, match=r"method name 'tome' is taken by ToMe"):
        register(type("Mine", (ToMe,), {"name": "tome"}))
