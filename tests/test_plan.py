"""A plan merged, unmerged, assigned and composed."""

from __future__ import annotations

import pytest
import torch

from helpers import assert_close
from tokenmerge import plan as plans
from tokenmerge.matching import bipartite, kth
from tokenmerge.plan import Plan


@pytest.mark.parametrize("mode", ["mean", "sum", "amax", "amin", "prod"])
def test_merge_modes_are_what_loops_say(mode: str) -> None:
    plan, x = bipartite(torch.randn(2, 15, 4), 5, prefix=1), torch.randn(2, 15, 3).double()
    combine = {"mean": torch.mean, "sum": torch.sum, "amax": torch.amax, "amin": torch.amin, "prod": torch.prod}[mode]
    merged = plans.merge(plan, x, mode)
    groups = plans.assignment(plan)
    for image in range(2):
        for slot in range(10):
            assert_close(merged[image, slot], combine(x[image, groups[image] == slot], 0), 1e-9)


def test_merge_of_an_unmerged_is_the_merged() -> None:
    plan, y = bipartite(torch.randn(2, 40, 4), 15, prefix=1), torch.randn(2, 25, 6)
    spread = plans.unmerge(plan, y)
    assert spread.shape == (2, 40, 6)
    assert torch.equal(plans.merge_weighted(plan, spread)[0], y)


def test_dropped_tokens_are_zero_and_minus_one() -> None:
    plan, x = kth(torch.randn(1, 10, 4), 4), torch.randn(1, 10, 2)
    spread = plans.unmerge(plan, plans.merge(plan, x))
    assert plans.assignment(plan)[0, 8:].tolist() == [-1, -1]
    assert spread[0, 8:].eq(0).all() and spread[0, :8].ne(0).all()


def test_compose_follows_tokens_through_layers_and_keeps_dropped_ones_dropped() -> None:
    first = kth(torch.randn(2, 30, 4), 4)  # drops two
    second = bipartite(torch.randn(2, 7, 4), 3)
    third = bipartite(torch.randn(2, 4, 4), 1)
    groups = plans.compose(plans.compose(plans.compose(None, first), second), third)
    step = [plans.assignment(plan) for plan in (first, second, third)]
    for image in range(2):
        for token in range(30):
            slot = token
            for groups_of in step:
                slot = int(groups_of[image, slot]) if slot >= 0 else -1
            assert int(groups[image, token]) == slot
    assert (groups == -1).sum() == 4


def test_equal_members_stay_bit_equal_whatever_their_sizes() -> None:
    x = torch.randn(1, 1, 8).expand(1, 33, 8).contiguous()
    plan, size = bipartite(torch.randn(1, 33, 4), 14, prefix=1), torch.randint(1, 50, (1, 33)).float()
    assert torch.equal(plans.merge_weighted(plan, x, size)[0], x[:, :19])


def test_gradients_reach_the_tokens_with_the_weights_of_the_mean() -> None:
    plan = Plan(keep=torch.tensor([[0, 1]]), src=torch.tensor([[2, 3]]), dst=torch.tensor([[1, 1]]), n=4)
    size = torch.tensor([[1.0, 2.0, 1.0, 5.0]])
    x = torch.randn(1, 4, 3, requires_grad=True)
    merged, new_size = plans.merge_weighted(plan, x, size)
    merged[0, 1].sum().backward()
    assert x.grad is not None and new_size.tolist() == [[1.0, 8.0]] and not new_size.requires_grad
    assert_close(x.grad[0, :, 0], torch.tensor([0.0, 2 / 8, 1 / 8, 5 / 8]), 1e-6)
    double, sizes = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True), size
    assert torch.autograd.gradcheck(lambda t: plans.merge_weighted(plan, t, sizes)[0], double)


def _dropping() -> plans.DroppingPlan:
    """The first image merges token 1 into 0 and 2 into 3, the second drops 1 and 3."""
    keep, src, dst = torch.tensor([[0, 3], [0, 2]]), torch.tensor([[1, 2], [1, 3]]), torch.tensor([[0, 1], [0, 0]])
    return plans.DroppingPlan(keep, src, dst, 4, torch.tensor([[False, False], [True, True]]))


def test_what_a_plan_drops_counts_nowhere() -> None:
    plan, x = _dropping(), torch.tensor([[[1.0], [3.0], [5.0], [9.0]]] * 2)
    assert plans.assignment(plan).tolist() == [[0, 0, 1, 1], [0, -1, 1, -1]]
    assert plans.unmerge(plan, torch.tensor([[[1.0], [2.0]]] * 2))[..., 0].tolist() == [[1, 1, 2, 2], [1, 0, 2, 0]]
    size = torch.tensor([[1.0, 3.0, 1.0, 1.0]] * 2)
    for given, means, sizes in (
        (None, [[2, 7], [1, 5]], [[2, 2], [1, 1]]),
        (size, [[2.5, 7], [1, 5]], [[4, 2], [1, 1]]),
    ):
        merged, left = plans.merge_weighted(plan, x, given)
        assert merged[..., 0].tolist() == means and left.tolist() == sizes
        merged, left = plans.merge_average(plan, x, given)
        assert merged[..., 0].tolist() == [[2, 7], [1, 5]] and left.tolist() == sizes
    for mode, expected in (("mean", [[2, 7], [1, 5]]), ("sum", [[4, 14], [1, 5]]), ("amax", [[3, 9], [1, 5]])):
        assert plans.merge(plan, x, mode)[..., 0].tolist() == expected
    assert plans.merge(plan, x, "prod")[..., 0].tolist() == [[3, 45], [1, 5]]


def test_padding_is_no_leader_of_what_is_dropped() -> None:
    plan = plans.DroppingPlan(
        keep=torch.tensor([[0, 3]]),
        src=torch.tensor([[1, 2]]),
        dst=torch.tensor([[0, 1]]),
        n=4,
        dropped=torch.tensor([[True, False]]),
    )
    led = plans.lead_by_real(plan, torch.tensor([[False, True, True, True]]))
    assert torch.equal(led.keep, plan.keep) and torch.equal(led.src, plan.src)  # type: ignore[union-attr]


def _matrix(tokens: int, left: int) -> plans.MatrixPlan:
    keep = torch.arange(left).expand(2, -1)
    return plans.MatrixPlan(torch.rand(2, left, tokens), keep, tokens)


def _weighted(plan: Plan) -> plans.WeightedPlan:
    return plans.WeightedPlan(plan.keep, plan.src, plan.dst, plan.n, torch.rand(2, plan.n) + 0.1)


def _half_dropped(plan: Plan) -> plans.DroppingPlan:
    dropped = torch.arange(plan.src.shape[1]).expand_as(plan.src) % 2 == 0
    return plans.DroppingPlan(plan.keep, plan.src, plan.dst, plan.n, dropped)


@pytest.mark.parametrize("kind", ["plain", "weighted", "dropping", "matrix"])
@pytest.mark.parametrize("has_sizes", [False, True])
def test_tokens_behind_stay_as_they_are_and_the_others_do_not_see_them(kind: str, has_sizes: bool) -> None:
    plan = bipartite(torch.randn(2, 15, 4), 5, prefix=1)
    made = {"plain": plan, "weighted": _weighted(plan), "dropping": _half_dropped(plan), "matrix": _matrix(15, 10)}[
        kind
    ]
    x = torch.randn(2, 19, 3)
    size = torch.randint(1, 5, (2, 19)).float() if has_sizes else None
    merged, sizes = plans.merge_weighted(plans.keep_behind(made, 19), x, size)
    first, first_sizes = plans.merge_weighted(made, x[:, :15], None if size is None else size[:, :15])
    assert_close(merged[:, :10], first, 1e-6)
    assert_close(sizes[:, :10], first_sizes, 1e-6)
    assert torch.equal(merged[:, 10:], x[:, 15:])
    assert torch.equal(sizes[:, 10:], torch.ones(2, 4) if size is None else size[:, 15:])
    groups = plans.assignment(plans.keep_behind(made, 19))
    assert torch.equal(groups[:, :15], plans.assignment(made))
    assert torch.equal(groups[:, 15:], torch.arange(10, 14).expand(2, -1))
