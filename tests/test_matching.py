"""Matching and plans against numpy loops, and the properties every plan has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import assert_close
from third_opinion import bipartite as slow_bipartite
from third_opinion import weighted_mean
from tokenmerge import kernels, matching
from tokenmerge import plan as plans
from tokenmerge.errors import UnknownNameError

SIZES = [(17, 1, 4), (17, 0, 8), (5, 1, 9), (2, 1, 1), (1, 1, 3), (21, 5, 100), (197, 1, 16), (257, 2, 13), (64, 0, 32)]
sizes = pytest.mark.parametrize(("n", "prefix", "r"), SIZES, ids=lambda value: str(value))


def _groups(plan: plans.Plan, image: int) -> list[list[int]]:
    keep, src, dst = (t[image].tolist() for t in (plan.keep, plan.src, plan.dst))
    return [[token] + [s for s, d in zip(src, dst, strict=True) if d == slot] for slot, token in enumerate(keep)]


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-13, 1e19, 1e30, 1e38])
def test_cosines_of_rows_of_any_magnitude(scale: float) -> None:
    rows = torch.rand(2, 14, 8) * 0.9 + 0.1
    scaled = (rows.double() * scale).float()
    # denormal numbers have few digits
    assert_close(matching.unit(scaled), matching.unit(rows), 1e-3 if scale < 1e-37 else 1e-6)
    assert torch.equal(matching.unit(rows), rows / rows.norm(dim=-1, keepdim=True))
    with kernels.force("reference"):
        got, expected = matching.bipartite(scaled, 4, prefix=1), matching.bipartite(rows, 4, prefix=1)
    if scale > 1e-37:
        assert torch.equal(got.keep, expected.keep) and torch.equal(got.dst, expected.dst)


def test_rows_that_have_no_direction() -> None:
    rows = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0], [3.0, 4.0]])[None]
    unit = matching.unit(rows)[0]
    assert unit[0].tolist() == [0.0, 0.0] and unit[3].tolist() == pytest.approx([0.6, 0.8])
    assert unit[1].isnan().all() and unit[2].isnan().any()


@sizes
def test_bipartite_is_what_loops_say(n: int, prefix: int, r: int) -> None:
    metric, x, size = torch.randn(3, n, 8), torch.randn(3, n, 5), torch.randint(1, 9, (3, n)).float()
    plan = matching.bipartite(metric, r, prefix=prefix)
    merged, new_size = plans.merge_weighted(plan, x, size)
    for image in range(3):
        expected = slow_bipartite(metric[image].double().numpy(), r, prefix)
        got = _groups(plan, image)
        assert [sorted(group) for group in got] == [sorted(group) for group in expected]
        means, sums = weighted_mean(x[image].double().numpy(), size[image].double().numpy(), expected)
        assert_close(merged[image], torch.from_numpy(means).float(), 1e-6)
        assert_close(new_size[image], torch.from_numpy(sums).float(), 0.0)


@sizes
@pytest.mark.parametrize("partition", matching.PARTITIONS)
@pytest.mark.parametrize("distance", matching.DISTANCES)
def test_every_token_is_kept_or_absorbed_once(n: int, prefix: int, r: int, partition: str, distance: str) -> None:
    plan = matching.bipartite(torch.randn(2, n, 4), r, prefix=prefix, partition=partition, distance=distance)
    left = n - min(r, matching.largest_r(n, prefix))
    assert plan.keep.shape == (2, left) and plan.src.shape == plan.dst.shape == (2, n - left)
    for image in range(2):
        assert sorted(plan.keep[image].tolist() + plan.src[image].tolist()) == list(range(n))
        assert plan.keep[image, :prefix].tolist() == list(range(prefix))
        assert all(slot >= prefix for slot in plan.dst[image].tolist()), "a prefix token absorbed something"


# real tokens per image, padding behind them, r: with these r there are padding tokens or real pairs enough
PADDED = [
    pytest.param(20, 1, (20, 12, 7), 4, id="more-padding-each"),
    pytest.param(33, 0, (33, 2, 17), 6, id="two-real"),
    pytest.param(24, 2, (20, 21, 24), 3, id="little-padding"),
    pytest.param(16, 1, (16, 16, 16), 7, id="no-padding"),
]


@pytest.mark.parametrize(("n", "prefix", "reals", "r"), PADDED)
@pytest.mark.parametrize("is_scattered", [False, True], ids=["behind", "scattered"])
def test_padding_is_merged_with_padding_first_and_never_with_a_real_token(
    n: int, prefix: int, reals: tuple[int, ...], r: int, is_scattered: bool
) -> None:
    metric, valid = torch.randn(3, n, 8), torch.arange(n) < torch.tensor(reals)[:, None]
    if is_scattered:
        order = torch.cat((torch.arange(prefix), prefix + torch.randperm(n - prefix)))
        valid = valid[:, order]
    plan = plans.lead_by_real(matching.bipartite(metric, r, prefix=prefix, valid=valid), valid)
    assert plan.keep.shape == (3, n - r)
    for image in range(3):
        is_real = valid[image].tolist()
        got = [sorted(group) for group in _groups(plan, image)]
        expected = slow_bipartite(metric[image].double().numpy(), r, prefix, valid[image].double().numpy())
        assert all(len({is_real[token] for token in group}) == 1 for group in got)
        # which of the padding goes is nobody's concern: how much of it does
        assert sorted(g for g in got if is_real[g[0]]) == sorted(sorted(g) for g in expected if is_real[g[0]])
        removed = sum(len(group) - 1 for group in got if not is_real[group[0]])
        assert removed == sum(len(group) - 1 for group in expected if not is_real[group[0]])


@pytest.mark.parametrize("partition", matching.PARTITIONS)
@pytest.mark.parametrize("distance", matching.DISTANCES)
@pytest.mark.parametrize("real", [0, 1, 2, 5, 16])
def test_a_group_with_a_real_token_is_led_by_one_however_little_room_there_is(
    real: int, distance: str, partition: str
) -> None:
    metric = torch.randn(40, 16, 4)
    valid = torch.rand(40, 16).argsort(dim=1) < real
    first = matching.bipartite(metric, 100, distance=distance, partition=partition, valid=valid)
    plan = plans.lead_by_real(first, valid)
    assert torch.equal(plans.assignment(plan), plans.assignment(first))
    size = plans.merge(plan, valid[..., None].float(), "sum")[..., 0]
    assert torch.equal(size > 0, valid.gather(1, plan.keep)) and (size.sum(dim=1) == real).all()
    x = torch.randn(40, 16, 3).masked_fill(~valid[..., None], 1e6)
    merged, _ = plans.merge_weighted(plan, x, valid.float())
    assert merged[size > 0].abs().max() < 100 if real else merged.eq(1e6).all(), "padding has no weight"


@pytest.mark.parametrize("distance", matching.DISTANCES)
def test_padding_behind_an_image_does_not_change_its_matching(distance: str) -> None:
    metric, junk = torch.randn(2, 20, 8), torch.randn(2, 12, 8)
    alone = matching.bipartite(metric, 5, prefix=1, distance=distance)
    valid = torch.arange(32) < 20
    padded = matching.bipartite(
        torch.cat((metric, junk), dim=1), 6 + 5, prefix=1, distance=distance, valid=valid.expand(2, -1)
    )
    groups, padded_groups = plans.assignment(alone), plans.assignment(padded)[:, :20]
    for image in range(2):
        same = groups[image, :, None] == groups[image]
        assert torch.equal(padded_groups[image, :, None] == padded_groups[image], same)


def test_matching_without_padding_is_the_same_with_a_mask_that_says_so() -> None:
    metric = torch.randn(3, 30, 8)
    plain, masked = (matching.bipartite(metric, 7, prefix=1, valid=v) for v in (None, torch.ones(3, 30).bool()))
    assert all(torch.equal(getattr(plain, name), getattr(masked, name)) for name in ("keep", "src", "dst"))


def _best_pairs(a: Tensor, b: Tensor, distance: str) -> tuple[Tensor, Tensor]:
    if distance == "dot":
        scores = torch.einsum("bid,bjd->bij", a, b)
    elif distance == "euclidean":
        scores = -(a[:, :, None] - b[:, None]).norm(dim=-1)
    elif distance == "softmax":
        scores = (torch.einsum("bid,bjd->bij", a, b) / a.shape[-1] ** 0.5).softmax(-1)
    else:
        scores = torch.nn.functional.cosine_similarity(a[:, :, None], b[:, None], dim=-1)
    return scores.max(dim=-1)


@pytest.mark.parametrize("distance", matching.DISTANCES)
@pytest.mark.parametrize("partition", ["alternating", "sequential"])
def test_distances_and_partitions_mean_what_they_say(distance: str, partition: str) -> None:
    metric = torch.randn(2, 12, 6).double()
    a, b = (metric[:, ::2], metric[:, 1::2]) if partition == "alternating" else (metric[:, :6], metric[:, 6:])
    first_a, first_b = (0, 1) if partition == "alternating" else (0, 6)
    step = 2 if partition == "alternating" else 1
    best, partner = _best_pairs(a, b, distance)
    plan = matching.bipartite(metric, 3, distance=distance, partition=partition)
    order = best.argsort(dim=-1, descending=True)[:, :3]
    assert torch.equal(plan.src, first_a + step * order)
    assert torch.equal(plan.keep.gather(1, plan.dst), first_b + step * partner.gather(1, order))


def test_random_partition_is_a_fixed_even_draw() -> None:
    sides = [matching._sides(101, 1, "random", seed, torch.device("cpu")) for seed in range(200)]
    for side_a, side_b in sides:
        assert sorted(side_a.tolist() + side_b.tolist()) == list(range(1, 101)) and len(side_a) == 50
    again = matching._sides(101, 1, "random", 7, torch.device("cpu"))
    assert torch.equal(sides[7][0], again[0])
    share = torch.stack([torch.bincount(side_a, minlength=101) for side_a, _ in sides])[:, 1:].float().mean(0)
    assert share.min() > 0.3 and share.max() < 0.7 and len({tuple(side_a.tolist()) for side_a, _ in sides}) == 200


def test_equal_inputs_give_equal_plans_and_a_permuted_batch_permuted_ones() -> None:
    metric = torch.randn(4, 30, 8)
    order = torch.tensor([2, 0, 3, 1])
    plan, again = matching.bipartite(metric, 7, prefix=1), matching.bipartite(metric, 7, prefix=1)
    permuted = matching.bipartite(metric[order], 7, prefix=1)
    for name in ("keep", "src", "dst"):
        assert torch.equal(getattr(plan, name), getattr(again, name))
        assert torch.equal(getattr(plan, name)[order], getattr(permuted, name))


def test_unknown_names_say_what_is_meant() -> None:
    with pytest.raises(UnknownNameError, match=r"no distance 'cosin'. Did you mean 'cosine'"):
        matching.bipartite(torch.randn(1, 8, 2), 2, distance="cosin")
    with pytest.raises(UnknownNameError, match=r"no partition 'even'. .*Known: alternating"):
        matching.bipartite(torch.randn(1, 8, 2), 2, partition="even")


@pytest.mark.parametrize(("n", "k"), [(12, 3), (50, 4), (7, 2), (9, 9)])
def test_kth_merges_into_every_kth_and_drops_the_tail(n: int, k: int) -> None:
    metric = torch.randn(2, n, 4)
    plan = matching.kth(metric, k)
    assert plan.keep[0].tolist() == list(range(k - 1, n, k))
    assert plans.assignment(plan)[:, n - n % k :].eq(-1).all()
    unit = torch.nn.functional.normalize(metric, dim=-1)
    for image in range(2):
        for token, slot in zip(plan.src[image].tolist(), plan.dst[image].tolist(), strict=True):
            scores = unit[image, plan.keep[image]] @ unit[image, token]
            assert slot == int(scores.argmax())


def test_random_matching_follows_the_global_generator() -> None:
    metric = torch.randn(2, 20, 4)
    torch.manual_seed(3)
    first = matching.random(metric, 6)
    torch.manual_seed(3)
    second = matching.random(metric, 6)
    assert torch.equal(first.src, second.src) and first.keep.shape == (2, 14)
    assert not torch.equal(first.src, matching.random(metric, 6).src)
    unit = torch.nn.functional.normalize(metric, dim=-1)
    scores = torch.einsum("brd,bmd->brm", _take(unit, first.src), _take(unit, first.keep))
    assert torch.equal(scores.argmax(-1), first.dst)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return torch.stack([row[i] for row, i in zip(x, index, strict=True)])


def test_concatenated_heads_compare_all_channels() -> None:
    k = torch.randn(2, 3, 10, 4)
    assert torch.equal(matching.join_heads(k, "concat"), torch.cat([k[:, head] for head in range(3)], dim=-1))


@pytest.mark.parametrize("distance", matching.DISTANCES)
def test_heads_are_averaged_while_matching(distance: str) -> None:
    k = torch.randn(2, 3, 25, 4)
    whole, mean = (
        matching.bipartite(metric, 6, prefix=1, distance=distance)
        for metric in (matching.join_heads(k, "mean"), torch.from_numpy(np.mean(k.numpy(), axis=1)))
    )
    assert torch.equal(whole.keep, mean.keep) and torch.equal(whole.dst, mean.dst)


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
