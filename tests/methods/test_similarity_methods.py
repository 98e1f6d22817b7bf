"""What each training-free method promises by itself, against numpy loops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import similarity_loops as loops
import torch
from similarity_loops import groups_from, groups_of

import third_opinion
from helpers import assert_close, view_of
from tokenmerge import matching
from tokenmerge import plan as plans
from tokenmerge.errors import UnknownNameError, UnsupportedError
from tokenmerge.methods import (
    ATM,
    DSM,
    MCTF,
    PPT,
    DiffRate,
    Greedy,
    LeastLoss,
    MaMe,
    PiToMe,
    ToFu,
    ToMe,
    ToMeCIS,
    mame,
    ppt,
)
from tokenmerge.methods.base import METRICS

R = [1, 4, 7]
every_r = pytest.mark.parametrize("r", R)
LAYOUTS = [(26, 1), (25, 0), (27, 2)]  # N, prefix
every_layout = pytest.mark.parametrize(("N", "prefix"), LAYOUTS)


@every_r
def test_tofu_pairs_are_those_of_tome(r: int) -> None:
    view = view_of()
    assert view.k is not None
    tofu, tome = ToFu().plan(view, r), ToMe().plan(view, r)
    for name in ("keep", "src", "dst"):
        assert torch.equal(getattr(tofu, name), getattr(tome, name))
    expected = third_opinion.bipartite(loops.array(view.k[0]).mean(0), r, 1)
    assert groups_of(tofu, 0) == sorted(sorted(group) for group in expected)


@pytest.mark.parametrize(("layer", "is_early"), [(0, True), (5, True), (6, False), (11, False)])
def test_tofu_prunes_in_early_blocks_and_keeps_the_largest_norm_in_late_ones(layer: int, is_early: bool) -> None:
    view = replace(view_of(), layer=layer, depth=12)
    branch = torch.randn_like(view.stream)
    plan = ToFu().plan(view, 8)
    merged, size = ToFu().merge(plan, view.stream, view.size, branch)
    average, _ = ToFu(combine="average").merge(plan, view.stream, view.size, branch)
    assert view.size is not None and size is not None
    slots, x = plans.assignment(plan), view.stream + branch
    for slot in range(18):
        members = x[0, slots[0] == slot]
        assert size[0, slot] == view.size[0, slots[0] == slot].sum()
        if is_early or len(members) == 1:
            assert torch.equal(merged[0, slot], x[0, plan.keep[0, slot]])
            assert torch.equal(average[0, slot], merged[0, slot])
            continue
        mean = members.mean(dim=0)
        assert_close(average[0, slot], mean)
        assert_close(merged[0, slot], mean / mean.norm() * members.norm(dim=1).max())
    assert max(len(group) for group in groups_of(plan, 0)) > 1


def test_the_share_of_early_blocks_can_be_none_or_all() -> None:
    first, last = replace(view_of(), layer=0), replace(view_of(), layer=3)
    assert not ToFu(early=0.0).plan(first, 2).is_early and ToFu(early=1.0).plan(last, 2).is_early


@every_r
@every_layout
@pytest.mark.parametrize("layer", [0, 3])
def test_pitome_merges_as_the_loops_do(r: int, N: int, prefix: int, layer: int) -> None:
    view = view_of(N=N, prefix=prefix, layer=layer)
    for image in range(3):
        assert groups_of(PiToMe().plan(view, r), image) == groups_from(N, loops.pitome(view, image, r))
        other = PiToMe(margin=0.2, alpha=0.3).plan(view, r)
        assert groups_of(other, image) == groups_from(N, loops.pitome(view, image, r, 0.2, 0.3))


def test_pitome_protects_the_tokens_of_lowest_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    # a cluster of 12 alike tokens at places 5 to 16, all others far from everything
    keys = 0.01 * torch.randn(2, 1, 26, 40)
    keys[:, :, torch.arange(26), torch.arange(26)] += 1
    keys[:, :, 5:17, 39] += 20
    view = replace(view_of(B=2), k=keys)
    for tile in (2**20, 26):
        monkeypatch.setattr("tokenmerge.methods.pitome._TILE", tile)
        plan = PiToMe().plan(view, 6)
        for image in range(2):
            alone = {group[0] for group in groups_of(plan, image) if len(group) == 1}
            assert alone >= {*range(5), *range(17, 26)} and alone & set(range(5, 17)) < set(range(5, 17))


@every_r
@every_layout
def test_mctf_merges_as_the_loops_do(r: int, N: int, prefix: int) -> None:
    view = view_of(N=N, prefix=prefix)
    for taus in ((1.0, 20.0, 40.0), (1.0, 2.0, math.inf), (0.5, math.inf, 3.0)):
        plan = MCTF(tau_sim=taus[0], tau_info=taus[1], tau_size=taus[2]).plan(view, r)
        for image in range(3):
            assert groups_of(plan, image) == groups_from(N, loops.mctf(view, image, r, taus))


def test_mctf_with_infinite_temperatures_sees_similarity_alone() -> None:
    view = view_of()
    assert view.q is not None
    blind = MCTF(tau_info=math.inf, tau_size=math.inf)
    other = replace(view, q=torch.randn_like(view.q), size=None)
    plan, same = blind.plan(view, 8), blind.plan(other, 8)
    assert torch.equal(plan.keep, same.keep) and torch.equal(plan.dst, same.dst)
    # the first half are the best pairs of ToMe on the same metric
    assert torch.equal(plan.src[:, :4], ToMe(metric="x").plan(view, 4).src)
    assert not torch.equal(MCTF(tau_info=0.5).plan(view, 8).keep, MCTF(tau_info=0.5).plan(other, 8).keep)


def test_mctf_averages_by_importance_and_size() -> None:
    view = view_of()
    plan, branch = MCTF().plan(view, 8), torch.randn_like(view.stream)
    merged, size = MCTF().merge(plan, view.stream, view.size, branch)
    x, received, slots = view.stream + branch, loops.attention(view, 0).mean(axis=(0, 1)), plans.assignment(plan)[0]
    assert view.size is not None and size is not None
    for slot in range(18):
        members = [i for i in range(26) if slots[i] == slot]
        weight = [received[i] * view.size[0, i].item() for i in members]
        expected = sum(w * x[0, i] for w, i in zip(weight, members, strict=True)) / sum(weight)
        assert_close(merged[0, slot], expected)
        assert size[0, slot] == view.size[0, members].sum()


@pytest.mark.parametrize(("prune", "pruned"), [(0.0, 0), (0.5, 4), (0.25, 2), (1.0, 7), ((0, 3, 9, 0), 3)])
@every_layout
def test_diffrate_prunes_and_merges_as_the_loops_do(
    prune: float | tuple[int, ...], pruned: int, N: int, prefix: int
) -> None:
    view = view_of(N=N, prefix=prefix)
    method = DiffRate(prune=prune)
    plan = method.plan(view, 7)
    merged, _ = method.merge(plan, view.x, view.size)
    slots = plans.assignment(plan)
    for image in range(3):
        pairs, dropped = loops.diffrate(view, image, 7, pruned)
        assert groups_of(plan, image) == groups_from(N, pairs, dropped)
        assert sorted(dropped) == (slots[image] == -1).nonzero().flatten().tolist() and len(dropped) == pruned
        for slot in range(N - 7):
            assert_close(merged[image, slot], view.x[image, slots[image] == slot].mean(dim=0))


def test_diffrate_that_only_prunes_drops_the_lowest_class_attention() -> None:
    view = view_of()
    dropped = plans.assignment(DiffRate(prune=1.0).plan(view, 20)) == -1
    score = view.score("class")
    assert (dropped.sum(dim=1) == 20).all() and not dropped[:, 0].any()
    lowest_kept = score[:, 1:].masked_fill(dropped[:, 1:], math.inf).amin(dim=1)
    assert (score.masked_fill(~dropped, -math.inf).amax(dim=1) < lowest_kept).all()
    assert DiffRate().largest_r(26, 1) == 24 and DiffRate(prune=0.0).plan(view, 24).keep.shape == (3, 2)


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ((1, 2), r"names 2 counts and the model has 4 blocks: give one for each block"),
        ((0, 9, 0, 0), r"drop 9 tokens in block 1, where r removes 7 in all.*Give a larger r"),
        ((0, -1, 0, 0), r"prune is \(0, -1, 0, 0\): give a share from 0 to 1, or a tuple of counts"),
        (1.5, r"prune is 1.5: give a share from 0 to 1"),
    ],
)
def test_counts_of_diffrate_that_do_not_fit(prune: float | tuple[int, ...], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        DiffRate(prune=prune).plan(view_of(), 7)


def test_ppt_gives_each_image_of_a_batch_its_own_policy() -> None:
    view = view_of(B=4)
    variances = [loops.ppt_variance(view, image)[0] for image in range(4)]
    method = PPT(threshold=(sorted(variances)[1] + sorted(variances)[2]) / 2)
    plan = method.plan(view, 6)
    merged, size = method.merge(plan, view.x, view.size)
    pooled, slots = ToMe().plan(view, 6), plans.assignment(plan)
    assert view.size is not None and size is not None
    policies = set()
    for image in range(4):
        alone = replace(view, **{name: getattr(view, name)[image : image + 1] for name in ("stream", "q", "k", "v")})
        alone = replace(alone, x_pre=view.x_pre[image : image + 1], size=view.size[image : image + 1])
        single = method.plan(alone, 6)
        x_alone, size_alone = method.merge(single, alone.x, alone.size)
        assert_close(merged[image], x_alone[0])
        assert torch.equal(size[image], size_alone[0])  # type: ignore[index]
        assert groups_of(plan, image) == groups_of(single, 0)
        pools = variances[image] < method.threshold
        policies.add(pools)
        if pools:
            assert groups_of(plan, image) == groups_of(pooled, image) and (slots[image] >= 0).all()
            assert_close(merged[image], ToMe().merge(pooled, view.x, view.size)[0][image])
            continue
        lowest = np.argsort(loops.ppt_variance(view, image)[1])[:6] + 1
        assert (slots[image] == -1).nonzero().flatten().tolist() == sorted(lowest)
        kept = [i for i in range(26) if i not in lowest]
        assert torch.equal(merged[image], view.x[image, kept]) and torch.equal(size[image], view.size[image, kept])
    assert policies == {True, False}


def test_ppt_takes_no_account_of_padding() -> None:
    view, real = view_of(), torch.tensor([i for i in range(26) if i not in (3, 8, 20)])
    variance = ppt._variance(view.score("class_value")[:, 1:])
    for image in range(3):
        assert variance[image].item() == pytest.approx(loops.ppt_variance(view, image)[0], rel=1e-4)
    score = view.score("class_value")[:, 1:]
    hidden = score.clone()
    hidden[:, [2, 7, 19]] = -math.inf
    assert_close(ppt._variance(hidden), ppt._variance(score[:, real[1:] - 1]), 1e-8)
    assert not torch.allclose(ppt._variance(hidden), variance, rtol=1e-2)


def test_gradients_of_ppt_reach_what_stays_and_not_what_is_dropped() -> None:
    view = view_of(B=2)
    method = PPT(threshold=0.0)
    plan = method.plan(view, 6)
    x = view.x.clone().requires_grad_()
    method.merge(plan, x, view.size)[0].sum().backward()
    dropped = plans.assignment(plan) == -1
    assert x.grad is not None and dropped.sum() == 12
    assert (x.grad[dropped] == 0).all() and (x.grad[~dropped] == 1).all()


@pytest.mark.parametrize(("layer", "is_distinctive"), [(1, False), (2, True), (3, True)])
@every_layout
def test_atm_merges_all_pairs_above_its_threshold(layer: int, is_distinctive: bool, N: int, prefix: int) -> None:
    view = view_of(N=N, prefix=prefix, layer=layer)
    method = ATM(alpha=0.5, beta=0.05, floor=0.2)
    threshold = max(0.5 - (math.exp(0.05 * layer) - 1), 0.2)
    assert method.threshold(layer) == pytest.approx(threshold)
    pairs = [loops.atm(view, image, threshold, is_distinctive) for image in range(3)]
    fewest = min(len(found) for found in pairs)
    assert fewest > 1
    for r in (fewest - 1, 12):
        count = min(fewest, r)
        plan = method.plan(view, r)
        assert plan.src.shape == (3, count)
        for image in range(3):
            assert groups_of(plan, image) == groups_from(N, pairs[image][:count])


def test_atm_merges_nothing_below_its_threshold_and_no_two_large_tokens() -> None:
    for layer in range(4):
        view = view_of(B=1, layer=layer)
        assert view.k is not None and view.size is not None
        assert ATM(alpha=1.1, floor=1.1).plan(view, 12).src.shape == (1, 0)
        plan = ATM(alpha=0.3, floor=0.3).plan(view, 12)
        cosine = loops.cosines(view.k[0])
        into = plan.keep.gather(1, plan.dst)
        assert plan.src.shape[1] > 0
        assert all(cosine[i, j] > 0.3 for i, j in zip(plan.src[0].tolist(), into[0].tolist(), strict=True))
        sizes = view.size[0, 1:].sort().values
        if layer >= 2:
            # whoever is absorbed is of the smaller half and meets one of the larger
            assert (view.size[0, plan.src[0]] <= sizes[12]).all() and (view.size[0, into[0]] >= sizes[12]).all()
    view = replace(view_of(layer=3), size=None)
    equal = replace(view, size=torch.ones(3, 26))
    assert torch.equal(ATM(alpha=0.1, floor=0.1).plan(view, 9).src, ATM(alpha=0.1, floor=0.1).plan(equal, 9).src)


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("is_exact", [False, True])
@every_layout
def test_mame_rows_are_means(tau: float, is_exact: bool, N: int, prefix: int, monkeypatch: pytest.MonkeyPatch) -> None:
    view = view_of(N=N, prefix=prefix)
    if is_exact:
        monkeypatch.setattr(mame, "batch_count", lambda wanted, r, seen: r)
    method = MaMe(tau=tau)
    wanted = min(len({i for i, _ in loops.mame_weights(view, image, tau)}) for image in range(3))
    assert (wanted == 0) == (tau == 0.9)
    for r in (3, 11):
        count = r if is_exact else min(r, wanted)
        plan = method.plan(view, r)
        merged, size = method.merge(plan, view.x, view.size)
        assert merged.shape == (3, N - count, 24) and (plans.assignment(plan) >= 0).all()
        assert view.size is not None and size is not None
        assert_close(size.sum(dim=1), view.size.sum(dim=1))
        for image in range(3):
            keep, rows = loops.mame(view, image, count, tau)
            assert plan.keep[image].tolist() == keep
            assert_close(merged[image], torch.tensor(rows, dtype=torch.float32))


def test_mame_keeps_sources_without_weights() -> None:
    view = view_of(B=1)
    sources = {i for i, _ in loops.mame_weights(view, 0, 0.3)}
    kept = set(MaMe(tau=0.3).plan(view, 12).keep[0].tolist())
    assert 0 < len(sources) < 12 and set(range(26)) - kept == sources


@pytest.mark.parametrize("r", [*R, 12])
@every_layout
def test_greedy_takes_the_most_similar_pair_again_and_again(r: int, N: int, prefix: int) -> None:
    view = view_of(N=N, prefix=prefix)
    plan = Greedy().plan(view, r)
    for image in range(3):
        pairs = loops.greedy(view, image, r)
        assert groups_of(plan, image) == groups_from(N, pairs)
        assert plan.src[image].tolist() == [src for src, _ in pairs]


@every_r
@every_layout
def test_tomecis_damps_important_pairs(r: int, N: int, prefix: int) -> None:
    view = view_of(N=N, prefix=prefix)
    plain, tome = ToMeCIS(damping=0.0).plan(view, r), ToMe().plan(view, r)
    for name in ("keep", "src", "dst"):
        assert torch.equal(getattr(plain, name), getattr(tome, name))
    for damping in (0.5, 1.0, 3.0):
        plan = ToMeCIS(damping=damping).plan(view, r)
        for image in range(3):
            assert groups_of(plan, image) == groups_from(N, loops.tomecis(view, image, r, damping))


def test_a_very_important_token_is_merged_last() -> None:
    view = view_of(B=1)
    assert view.q is not None and view.k is not None
    keys = view.k.clone()
    keys[:, :, 6] = 4 * view.q[:, :, 0]  # what the class token looks for
    keys[:, :, 7] = keys[:, :, 6]  # and its double: the first pair of ToMe
    view = replace(view, k=keys)
    assert [6, 7] in groups_of(ToMe().plan(view, 1), 0)
    plan = ToMeCIS().plan(view, 1)
    assert [6] in groups_of(plan, 0) and [7] in groups_of(plan, 0)


@pytest.mark.parametrize(("size", "importance"), [(0.0, 0.0), (0.5, 0.0), (0.0, 1.0), (0.5, 0.5), (1.0, 2.0)])
@pytest.mark.parametrize(("r", "N", "prefix"), [(1, 26, 1), (5, 26, 1), (8, 21, 5)])
def test_least_loss_ranks_by_what_is_lost(size: float, importance: float, r: int, N: int, prefix: int) -> None:
    view = view_of(N=N, prefix=prefix)
    plan = LeastLoss(size=size, importance=importance).plan(view, r)
    for image in range(3):
        assert groups_of(plan, image) == groups_from(N, loops.least_loss(view, image, r, size, importance))


@pytest.mark.parametrize(("size", "importance"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize(("r", "N", "prefix"), [(1, 26, 1), (5, 26, 1), (12, 26, 1), (8, 21, 5), (1, 3, 1)])
def test_least_loss_pairs_what_is_each_others_best(size: float, importance: float, r: int, N: int, prefix: int) -> None:
    view = view_of(N=N, prefix=prefix)
    plan = LeastLoss(pairs="mutual", size=size, importance=importance).plan(view, r)
    for image in range(3):
        expected = loops.mutual_loss(view, image, r, size, importance, matching._ROUNDS)
        assert groups_of(plan, image) == groups_from(N, expected)
        stays, gone = (part[image].tolist() for part in (plan.keep, plan.src))
        assert [stays[at] for at in plan.dst[image].tolist()] == [dict(expected)[token] for token in gone]


@pytest.mark.parametrize("r", [1, 5, 12])
def test_mutual_pairs_in_many_rounds_are_the_greedy_ones(r: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_ROUNDS", 13)
    view = view_of(N=27)  # an even number of patches: none is left over
    mine, greedy = LeastLoss(pairs="mutual", size=0.0, importance=0.0).plan(view, r), Greedy().plan(view, r)
    assert all(groups_of(mine, image) == groups_of(greedy, image) for image in range(3))


def test_mutual_pairs_of_equal_tokens_and_of_nan_are_a_plan() -> None:
    view = view_of(N=14)
    assert view.k is not None
    broken = view.k.clone()
    broken[0, :, 3] = broken[0, :, 9] = float("nan")
    for k in (torch.ones_like(view.k), torch.zeros_like(view.k), broken):
        plan = LeastLoss(pairs="mutual", importance=0.0).plan(replace(view, k=k), 6)
        for keep, src in zip(plan.keep.tolist(), plan.src.tolist(), strict=True):
            assert sorted(keep + src) == list(range(14)) and keep == sorted(keep)


def test_mutual_pairs_remove_padding_first() -> None:
    view = view_of(N=14)
    valid = torch.ones(3, 14, dtype=torch.bool)
    valid[0, 10:] = valid[1, 13:] = False
    plan = LeastLoss(pairs="mutual", importance=0.0).plan(replace(view, valid=valid), 2)
    into = plan.keep.gather(1, plan.dst)
    assert set(plan.src[0].tolist()) | set(into[0].tolist()) == {10, 11, 12, 13}
    assert not {13} & {*plan.src[1].tolist(), *into[1].tolist()}  # one alone has no other padding to merge with


def test_least_loss_has_tome_and_tofu_inside() -> None:
    view = view_of(N=26)
    branch = torch.randn_like(view.stream)
    plain = {"size": 0.0, "importance": 0.0}
    for layer in (0, 3):
        view = replace(view, layer=layer)
        for mine, other in (
            (LeastLoss(early=0.0, combine="weighted", **plain), ToMe()),  # type: ignore[arg-type]
            (LeastLoss(**plain), ToFu()),  # type: ignore[arg-type]
            (LeastLoss(heads="concat", early=0.0, combine="weighted", **plain), ToMe(heads="concat")),  # type: ignore[arg-type]
        ):
            plans = mine.plan(view, 7), other.plan(view, 7)
            assert all(torch.equal(getattr(plans[0], name), getattr(plans[1], name)) for name in ("keep", "src", "dst"))
            merged = [
                method.merge(plan, view.stream, view.size, branch)
                for method, plan in zip((mine, other), plans, strict=True)
            ]
            assert all(torch.equal(a, b) for a, b in zip(*merged, strict=True))  # type: ignore[arg-type]
    assert LeastLoss(importance=0.0).needs == {"k"} and "class" not in LeastLoss(score="shift").needs


@pytest.mark.parametrize("r", [1, 3, 4, 6, 8])
def test_dsm_takes_a_quarter_of_each_window(r: int) -> None:
    view = view_of(N=65)
    plan = DSM().plan(view, r)
    for image in range(3):
        assert groups_of(plan, image) == groups_from(65, loops.dsm(view, image, r))
    quarter = [2 * (cell // 8 >= 4) + (cell % 8 >= 4) for cell in range(64)]
    into = plan.keep.gather(1, plan.dst)
    for sources, targets in zip(plan.src.tolist(), into.tolist(), strict=True):
        assert all(quarter[i - 1] == quarter[j - 1] for i, j in zip(sources, targets, strict=True))
        counts = [sum(quarter[i - 1] == window for i in sources) for window in range(4)]
        assert sum(counts) == r and max(counts) - min(counts) <= 1


@pytest.mark.parametrize("r", [3, 9, 12])
def test_dsm_goes_by_the_places_tokens_keep(r: int) -> None:
    cells = torch.stack([torch.randperm(49)[:25] for _ in range(3)])
    places = torch.cat((torch.zeros(3, 1, dtype=torch.long), cells + 1), dim=1)
    view = view_of(grid=(7, 7), places=places)
    plan = DSM().plan(view, r)
    assert plan.keep.shape == (3, 26 - r)
    for image in range(3):
        pairs = loops.dsm(view, image, r)
        merged = [group for group in groups_of(plan, image) if len(group) > 1]
        # where no pairs are left inside the windows, others fill up
        if len(pairs) == r:
            assert groups_of(plan, image) == groups_from(26, pairs)
        assert sum(len(group) - 1 for group in merged) == r


def test_dsm_takes_last_who_is_alone_in_its_window() -> None:
    # of a grid of 4 x 7 the last quarter holds one token, at an even place
    cells = torch.tensor([27, *range(14), *range(14, 18), *range(21, 25)])
    places = torch.cat((torch.zeros(1, dtype=torch.long), cells + 1)).expand(3, -1)
    order = [0, *range(2, 9), 1, *range(9, 24)]  # token 8 lies in cell 27
    view = view_of(N=24, grid=(4, 7), places=places[:, order])
    for r in (1, 4, 11):
        plan = DSM().plan(view, r)
        assert (plan.src == 8).any() == (r == 11)
        if r < 11:
            assert [groups_of(plan, i) for i in range(3)] == [groups_from(24, loops.dsm(view, i, r)) for i in range(3)]


def test_dsm_counts_a_quarter_without_its_padding() -> None:
    view, valid = view_of(N=65), torch.ones(3, 65, dtype=torch.bool)
    valid[:, 1:5] = False  # in the first window, two at even places
    plan = DSM().plan(replace(view, valid=valid), 10)
    quarter = [2 * (cell // 8 >= 4) + (cell % 8 >= 4) for cell in range(64)]
    for sources in plan.src.tolist():
        assert sources[:2] == [2, 4]
        assert [sum(quarter[i - 1] == window for i in sources[2:]) for window in range(4)] == [2, 2, 2, 2]


def test_dsm_matches_everywhere_after_its_first_blocks() -> None:
    view, tome = view_of(N=65), ToMe()
    first, third = replace(view, layer=0), replace(view, layer=2)
    method = DSM(windowed=1)
    windowed, after = method.plan(first, 9), method.plan(third, 9)
    assert torch.equal(after.src, tome.plan(third, 9).src) and not torch.equal(windowed.src, after.src)
    # a layer that runs again, as in gradient checkpointing, finds the same
    assert torch.equal(method.plan(first, 9).src, windowed.src)
    assert torch.equal(DSM(windowed=0).plan(replace(view, memory=None), 9).src, tome.plan(view, 9).src)
    with pytest.raises(UnsupportedError, match="no grid of patches"):
        method.plan(replace(view, grid=None, memory={}), 9)


@pytest.mark.parametrize("kind", [ToFu, PiToMe, MCTF, DiffRate, PPT, ATM, MaMe, Greedy, ToMeCIS, LeastLoss, DSM])
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
