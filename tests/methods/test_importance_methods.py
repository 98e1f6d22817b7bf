"""What each method that ranks or clusters tokens promises by itself, against numpy loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from similarity_loops import array, cosines, groups_of
from torch import Tensor

from helpers import assert_close, view_of
from tokenmerge import plan as plans
from tokenmerge.errors import UnknownNameError, UnsupportedError
from tokenmerge.methods import (
    ATS,
    AttentionPrune,
    EViT,
    RandomPrune,
    Reduction,
    TokenPooling,
    ToMe,
    VidTLDR,
    ZeroTPrune,
    ats,
    token_pooling,
    vid_tldr,
)
from tokenmerge.methods.base import SCORES, TokenView

R = [1, 7, 19, 24]
every_r = pytest.mark.parametrize("r", R)
PRUNERS = [EViT(fuse=False), RandomPrune(), AttentionPrune(), ATS(), ZeroTPrune()]


def _attention(view: TokenView, image: int) -> np.ndarray:
    """Of one image, `[H, N, N]`."""
    assert view.q is not None and view.k is not None
    scores = array(view.q[image] @ view.k[image].mT) / view.q.shape[-1] ** 0.5
    exponents = np.exp(scores)
    found: np.ndarray = exponents / exponents.sum(axis=2, keepdims=True)
    return found


def _lowest(score: np.ndarray, count: int, prefix: int) -> set[int]:
    return set((np.argsort(score[prefix:], kind="stable")[:count] + prefix).tolist())


def _dropped(plan: plans.AnyPlan, image: int) -> set[int]:
    return set((plans.assignment(plan)[image] < 0).nonzero().flatten().tolist())


@pytest.mark.parametrize("method", PRUNERS, ids=repr)
@every_r
def test_what_is_pruned_leaves_no_trace(method: Reduction, r: int) -> None:
    view = view_of()
    plan = method.plan(view, r)
    x, size = method.merge(plan, view.stream, view.size)
    assert view.size is not None and size is not None
    for image in range(3):
        kept = sorted(set(range(26)) - _dropped(plan, image))
        assert len(kept) == 26 - r and plan.keep[image].tolist() == kept, "not in order of place"
        assert torch.equal(x[image], view.stream[image, kept]) and torch.equal(size[image], view.size[image, kept])


@pytest.mark.parametrize("method", [*PRUNERS, EViT(), TokenPooling()], ids=repr)
def test_all_but_one_may_go(method: Reduction) -> None:
    assert method.largest_r(26, 1) == 24 and method.largest_r(26, 26) == method.largest_r(1, 1) == 0
    assert method.largest_r(1, 0) == 0


@every_r
@pytest.mark.parametrize("score", ["class", "received", "norm"])
def test_evit_fuses_the_rest_by_their_attention(r: int, score: str) -> None:
    view = view_of()
    branch = torch.randn_like(view.stream)
    plan = EViT(score=score).plan(view, r)
    merged, size = EViT(score=score).merge(plan, view.stream, view.size, branch)
    x = array(view.stream) + array(branch)
    for image in range(3):
        rows = _attention(view, image).mean(axis=0)
        weight = {"class": rows[0], "received": rows.mean(axis=0), "norm": np.linalg.norm(array(view.x[image]), axis=1)}
        rest = sorted(_lowest(weight[score], r + 1, 1))
        share = weight[score][rest] / weight[score][rest].sum()
        assert_close(merged[image, -1], torch.from_numpy(share @ x[image, rest]).float())
        assert view.size is not None and size is not None and size[image, -1] == view.size[image, rest].sum()
        kept = sorted(set(range(26)) - set(rest))
        assert plan.keep[image, :-1].tolist() == kept and plan.keep[image, -1] == rest[np.argmax(weight[score][rest])]
        assert torch.equal(merged[image, :-1], (view.stream + branch)[image, kept])


def test_evit_fuses_where_hardly_anything_is_attended_to() -> None:
    view = view_of()
    assert view.q is not None and view.k is not None
    # all attention goes to three tokens, and of the others nothing is left that float32 could add to 1
    k = view.k.clone()
    k[:, :, 3:, 0], k[:, :, :3, 0] = -30.0, 30.0
    q = torch.zeros_like(view.q)
    q[..., 0] = 4.0
    view = replace(view, q=q, k=k)
    plan = EViT().plan(view, 20)
    merged = EViT().merge(plan, view.stream, view.size)[0]
    rest = [*plan.src[0].tolist(), int(plan.keep[0, -1])]
    weight = _attention(view, 0).mean(axis=0)[0][rest]
    assert 0 < weight.max() < 1e-12
    expected = weight @ array(view.stream[0, rest]) / weight.sum()
    assert_close(merged[0, -1], torch.from_numpy(expected).float())


def test_random_pruning_depends_on_seed_and_block_alone() -> None:
    keep = RandomPrune().plan(view_of(), 9).keep
    assert torch.equal(keep, RandomPrune().plan(view_of(), 9).keep) and (keep == keep[:1]).all()
    assert not torch.equal(keep, RandomPrune(seed=1).plan(view_of(), 9).keep)
    assert not torch.equal(keep, RandomPrune().plan(replace(view_of(), layer=2), 9).keep)


@pytest.mark.parametrize("n", [17, 50, 197])
def test_random_pruning_is_uniform_over_blocks_and_seeds(n: int) -> None:
    r, trials = n // 4, 600
    view = view_of(B=1, N=n)
    drawn = torch.zeros(n)
    for trial in range(trials):
        plan = RandomPrune(seed=1000 * (trial // 24)).plan(replace(view, layer=trial % 24), r)
        drawn += plans.assignment(plan)[0] < 0
    assert drawn[0] == 0
    share = r / (n - 1)
    expected, deviation = trials * share, (trials * share * (1 - share)) ** 0.5
    normal = (drawn[1:] - expected) / deviation
    # of a chi-square distribution with n - 2 degrees of freedom, in units of its deviation
    assert abs(normal.square().sum() * (1 - 1 / (n - 1)) - (n - 2)) / (2 * (n - 2)) ** 0.5 < 4


@every_r
@pytest.mark.parametrize("score", SCORES)
def test_attention_pruning_drops_the_lowest(r: int, score: str) -> None:
    view = view_of()
    plan = AttentionPrune(score=score).plan(view, r)
    for image in range(3):
        rows = _attention(view, image)
        mean = rows.mean(axis=0)
        values = {
            "class": mean[0],
            "class_value": (rows[:, 0] * np.linalg.norm(array(view.v[image]), axis=2)).mean(axis=0),  # type: ignore[index]
            "received": mean.mean(axis=0),
            "entropy": (mean * np.log(mean)).sum(axis=1),
            "shift": np.linalg.norm(array(view.x[image] - view.x_pre[image]), axis=1),
            "norm": np.linalg.norm(array(view.x[image]), axis=1),
        }[score]
        assert _dropped(plan, image) == _lowest(values, r, 1)


@pytest.mark.parametrize("count", [1, 3, 10, 25, 60])
def test_ats_draws_by_inverse_transform(count: int) -> None:
    share = torch.rand(4, 25).pow(4)
    share = share / share.sum(dim=1, keepdim=True)
    found = ats._is_drawn(share, count)
    for image in range(4):
        sums = np.cumsum(array(share[image]))
        quantiles = (np.arange(1, count + 1) - 0.5) / count
        drawn = {int(np.argmax(sums >= quantile)) for quantile in quantiles}
        assert set(found[image].nonzero().flatten().tolist()) == drawn
        assert len(drawn) <= count


def _ats_by_hand(view: TokenView, image: int, samples: int) -> tuple[set[int], np.ndarray]:
    assert view.v is not None
    share = (_attention(view, image)[:, 0] * np.linalg.norm(array(view.v[image]), axis=2)).mean(axis=0)
    share[0] = 0
    share /= share.sum()
    sums = np.cumsum(share)
    return {int(np.argmax(sums >= (k - 0.5) / samples)) for k in range(1, samples + 1)}, share


@every_r
def test_ats_keeps_what_is_drawn_and_fills_up_with_the_most_important(r: int) -> None:
    view = view_of()
    plan = ATS().plan(view, r)
    for image in range(3):
        drawn, share = _ats_by_hand(view, image, 25 - r)
        order = [int(i) for i in np.argsort(-share, kind="stable") if i not in drawn and i > 0]
        assert set(plan.keep[image].tolist()) == {0} | drawn | set(order[: 25 - r - len(drawn)])


@pytest.mark.parametrize("samples", [0.4, 1.0])
def test_ats_adapts_its_count(samples: float) -> None:
    view = view_of()
    counts = [len(_ats_by_hand(view, image, int(25 * samples + 0.5))[0]) for image in range(3)]
    assert len(set(counts)) > 1, "images that do not differ show nothing"
    plan = ATS(samples=samples).plan(view, 24)
    assert plan.keep.shape[1] == 1 + max(counts)
    for image in range(3):
        drawn, _ = _ats_by_hand(view, image, int(25 * samples + 0.5))
        assert drawn <= set(plan.keep[image].tolist())
        alone = replace(view, q=view.q[image : image + 1], k=view.k[image : image + 1])  # type: ignore[index]
        alone = replace(alone, v=view.v[image : image + 1], stream=view.stream[image : image + 1])  # type: ignore[index]
        assert set(ATS(samples=samples).plan(alone, 24).keep[0].tolist()) == {0} | drawn
    assert ATS(samples=samples).plan(view, 2).keep.shape[1] == 24


@pytest.mark.parametrize("samples", [0.0, -1.0, 1.5])
def test_ats_refuses_shares_that_are_none(samples: float) -> None:
    with pytest.raises(UnsupportedError, match=r"ATS samples is .*: give a share of the tokens above 0, at most 1"):
        ATS(samples=samples)


def _lloyd(
    x: np.ndarray, mass: np.ndarray, first: list[int], iterations: int, is_medoid: bool
) -> tuple[list[int], list[np.ndarray]]:
    """Clusters and centres of one image by plain loops; clusters that run empty keep their centres."""
    centres = [x[i] for i in first]

    def assign() -> list[int]:
        return [int(np.argmin([np.sum((row - centre) ** 2) for centre in centres])) for row in x]

    label = assign()
    for _ in range(iterations):
        for cluster in range(len(centres)):
            members = [i for i in range(len(x)) if label[i] == cluster]
            if not members:
                continue
            if is_medoid:
                costs = [sum(mass[j] * np.sum((x[i] - x[j]) ** 2) for j in members) for i in members]
                centres[cluster] = x[members[int(np.argmin(costs))]]
            else:
                centres[cluster] = sum(mass[i] * x[i] for i in members) / sum(mass[i] for i in members)
        label = assign()
    return label, centres


def _blobs(B: int, n: int, blobs: int) -> Tensor:
    return 4 * torch.randn(B, blobs, 12).repeat_interleave(-(-n // blobs), dim=1)[:, :n] + torch.randn(B, n, 12)


@pytest.mark.parametrize("is_medoid", [False, True], ids=["kmeans", "kmedoids"])
@pytest.mark.parametrize("iterations", [0, 1, 5])
@pytest.mark.parametrize("count", [3, 8, 20])
def test_clusters_are_those_of_lloyd(is_medoid: bool, iterations: int, count: int) -> None:
    x, mass, first = _blobs(3, 30, 6), torch.rand(3, 30) + 0.1, torch.rand(3, 30).argsort(dim=1)[:, :count]
    label, distance = token_pooling._clusters(x, mass, first, iterations, is_medoid)
    for image in range(3):
        rows, weights = array(x[image]), array(mass[image])
        assert label[image].tolist() == _lloyd(rows, weights, first[image].tolist(), iterations, is_medoid)[0]
        if is_medoid:
            # every centre is a token: one member of each cluster is at no distance
            for cluster in set(label[image].tolist()):
                assert distance[image, label[image] == cluster].min() == 0


@pytest.mark.parametrize("is_medoid", [False, True], ids=["kmeans", "kmedoids"])
def test_a_cluster_that_runs_empty_keeps_its_centre(is_medoid: bool) -> None:
    x = torch.randn(1, 20, 2) + 3
    x[:, 1], x[:, 5:8] = x[:, 0], 0.1 * torch.randn(3, 2)  # the second centre is the first; some lie at the origin
    label, _ = token_pooling._clusters(x, torch.ones(1, 20), torch.arange(3)[None], 1, is_medoid)
    expected, centres = _lloyd(array(x[0]), np.ones(20), [0, 1, 2], 1, is_medoid)
    assert label[0].tolist() == expected and np.array_equal(centres[1], array(x[0, 1]))


@pytest.mark.parametrize("algorithm", ["kmeans", "kmedoids"])
@pytest.mark.parametrize("weight", ["significance", "none"])
def test_pooled_tokens_are_weighted_means_or_medoids(algorithm: str, weight: str) -> None:
    view = replace(view_of(), stream=torch.cat((torch.randn(3, 1, 12), _blobs(3, 25, 5)), dim=1))
    branch = torch.randn_like(view.stream)
    # sizes that make no two tokens of a pair equally good medoids
    view = replace(view, branch=branch, size=torch.rand(3, 26) + 0.5)
    method = TokenPooling(algorithm=algorithm, weight=weight)
    plan = method.plan(view, 17)
    merged, _ = method.merge(plan, view.stream, view.size, view.branch)
    assert view.size is not None
    for image in range(3):
        x, size = array(view.x[image]), array(view.size[image])
        significance = _attention(view, image).mean(axis=(0, 1))
        mass = size * (significance if weight == "significance" else 1.0)
        first = [int(i) for i in np.argsort(-significance[1:], kind="stable")[:8]]
        label, centres = _lloyd(x[1:], mass[1:], first, 5, algorithm == "kmedoids")
        assert len(set(label)) == 8, "an empty cluster would be another case"
        expected = sorted([[0]] + [[i + 1 for i in range(25) if label[i] == cluster] for cluster in range(8)])
        assert groups_of(plan, image) == expected
        groups = plans.assignment(plan)[image]
        for slot in range(1, 9):
            members = (groups == slot).nonzero().flatten().numpy()
            mean = (mass[members, None] * x[members]).sum(axis=0) / mass[members].sum()
            centre = centres[label[members[0] - 1]]
            lead = members[np.argmin(((x[members] - centre) ** 2).sum(axis=1))]
            assert plan.keep[image, slot] == lead, "led by another than the nearest to the centre"
            row = mean if algorithm == "kmeans" else x[lead]
            assert_close(merged[image, slot], torch.from_numpy(row).float())


@pytest.mark.parametrize("is_medoid", [False, True], ids=["kmeans", "kmedoids"])
def test_as_many_clusters_as_tokens_are_the_tokens(is_medoid: bool) -> None:
    x = torch.randn(3, 20, 12)
    label, distance = token_pooling._clusters(x, torch.rand(3, 20), torch.rand(3, 20).argsort(dim=1), 5, is_medoid)
    plan = token_pooling._group(label, distance, 20, 2, None)
    assert torch.equal(plan.keep, torch.arange(22).expand(3, -1)) and plan.src.shape == (3, 0)
    assert all(len(set(labels)) == 20 for labels in label.tolist())


@pytest.mark.parametrize("algorithm", ["kmeans", "kmedoids"])
@every_r
def test_no_cluster_is_empty_even_of_equal_tokens(algorithm: str, r: int) -> None:
    few = torch.randn(3, 3, 24)[:, torch.arange(26) % 3]
    view = replace(view_of(), stream=few)
    plan = TokenPooling(algorithm=algorithm).plan(view, r)
    for image in range(3):
        groups = groups_of(plan, image)
        assert len(groups) == 26 - r and sum(map(len, groups)) == 26
        if r <= 22:  # as many clusters as there are different tokens
            assert all(len({i % 3 for i in group}) == 1 for group in groups)


def test_what_fills_empty_clusters_is_farthest_from_its_centre() -> None:
    label, cost = torch.tensor([[0, 0, 0, 2, 2, 2]]), torch.tensor([[1.0, 5.0, 2.0, 0.5, 0.5, 7.0]])
    plan = token_pooling._group(label, cost, 4, 0, None)
    assert groups_of(plan, 0) == [[0, 2], [1], [3, 4], [5]] and plan.keep.tolist() == [[0, 1, 3, 5]]


def _rank_by_hand(rows: np.ndarray, start: np.ndarray, steps: int, prefix: int) -> np.ndarray:
    """Zero-TPrune's importance of one image from its attention `[H, N, N]`."""
    masses = []
    for graph in rows:
        mass = start.copy()
        for _ in range(steps):
            mass = graph.T @ mass
        masses.append(mass)
    heard = [mass for mass in masses if 0.01 <= mass[prefix:].var() <= 0.7] or masses
    found: np.ndarray = np.sqrt(np.mean([mass**2 for mass in heard], axis=0))
    return found


@every_r
@pytest.mark.parametrize(("layer", "steps"), [(0, 30), (1, 30), (2, 5), (5, 1)])
@pytest.mark.parametrize("prefix", [0, 1])
def test_zero_tprune_is_both_stages_by_hand(r: int, layer: int, steps: int, prefix: int) -> None:
    view = replace(view_of(prefix=prefix), layer=layer, depth=6)
    assert view.q is not None and view.k is not None
    # heads of which one is heard too little, one too much
    view = replace(view, q=view.q * torch.tensor([0.05, 0.7, 4.0])[:, None, None])
    plan = ZeroTPrune().plan(view, r)
    for image in range(3):
        rows, start = _attention(view, image), np.ones(26)
        start[:prefix] = 26**0.5
        score = _rank_by_hand(rows, start, steps, prefix)
        order = [int(i) + prefix for i in np.argsort(score[prefix:], kind="stable")]
        low, high = order[: len(order) // 2], order[len(order) // 2 :]
        alike = cosines(view.k[image])
        best = sorted(low, key=lambda i: -max(alike[i, j] for j in high))
        similar = best[: min(int(r / 2 + 0.5), len(low))]
        if len(similar) < r:
            left = [i for i in range(26) if i not in similar]
            rows = rows[:, :, left] / rows[:, :, left].sum(axis=2, keepdims=True)
            graph = np.zeros_like(_attention(view, image))
            graph[:, :, left] = rows
            start = np.where(np.isin(np.arange(26), similar), 0.0, score)
            score = _rank_by_hand(graph, start, steps, prefix)
        rest = [i for i in range(prefix, 26) if i not in similar]
        lowest = sorted(rest, key=lambda i: score[i])[: r - len(similar)]
        assert _dropped(plan, image) == set(similar) | set(lowest)


def test_zero_tprune_leaves_out_heads_that_say_nothing_or_shout() -> None:
    view = view_of()
    assert view.q is not None
    method = ZeroTPrune(similar=0.0, iterations=(3, 3, 3))
    flat = replace(view, q=view.q * torch.tensor([0.0, 1.0, 1.0])[:, None, None])
    other = replace(flat, k=torch.cat((torch.randn_like(view.k[:, :1]), view.k[:, 1:]), dim=1))  # type: ignore[index]
    assert torch.equal(method.plan(flat, 9).keep, method.plan(other, 9).keep)
    none = replace(method, variance=(50.0, 60.0))
    all_heads = replace(method, variance=(0.0, 1e9))
    assert torch.equal(none.plan(view, 9).keep, all_heads.plan(view, 9).keep)


def test_saliency_is_the_shifted_negative_entropy() -> None:
    view = view_of()
    found = vid_tldr._saliency(view.score("entropy"), 1)
    for image in range(3):
        mean = _attention(view, image).mean(axis=0)
        score = (mean * np.log(mean)).sum(axis=1)[1:]
        score = (score - score.min()) / (score.max() - score.min())
        expected = np.where(score < score.mean(), 0.0, score - score.mean()) / (1 - score.mean())
        assert_close(found[image, 1:], torch.from_numpy(expected).float(), 1e-4)
        assert (found[image, 1:] == 0).sum() == (score < score.mean()).sum()


def test_background_has_no_influence_where_it_is_absorbed() -> None:
    view = view_of()
    branch = torch.randn_like(view.stream)
    plan = VidTLDR().plan(view, 11)
    merged, size = VidTLDR().merge(plan, view.stream, view.size, branch)
    is_background = torch.zeros(3, 26, dtype=torch.bool)
    for image in range(3):
        for src in plan.src[image].tolist():
            is_background[image, src] = plan.weight[image, src] == 0
    assert is_background.sum() > 5 and (is_background.sum(dim=1) < 11).all()
    noise = 100 * torch.randn_like(view.stream) * is_background[..., None]
    assert torch.equal(VidTLDR().merge(plan, view.stream + noise, view.size, branch)[0], merged)
    assert view.size is not None and size is not None
    for image in range(3):
        groups, saliency = plans.assignment(plan)[image], vid_tldr._saliency(view.score("entropy"), 1)[image]
        for slot, lead in enumerate(plan.keep[image].tolist()):
            members = (groups == slot).nonzero().flatten().tolist()
            weight = view.size[image, members] * torch.tensor(
                [1.0 if i == lead else float(saliency[i]) for i in members]
            )
            mean = (weight[:, None] * (view.stream + branch)[image, members]).sum(dim=0) / weight.sum()
            assert_close(merged[image, slot], mean)
            assert size[image, slot] == view.size[image, members].sum()


def test_vid_tldr_pairs_are_those_of_tome() -> None:
    view = view_of()
    plan, tome = VidTLDR().plan(view, 9), ToMe(metric="x").plan(view, 9)
    assert all(torch.equal(getattr(plan, name), getattr(tome, name)) for name in ("keep", "src", "dst"))


def test_saliency_of_equal_scores_and_of_padding() -> None:
    assert vid_tldr._saliency(torch.ones(2, 9), 1).isfinite().all()
    score = torch.rand(1, 9)
    padded = torch.cat((score, torch.full((1, 4), float("-inf"))), dim=1)
    found = vid_tldr._saliency(padded, 1)
    assert torch.equal(found[:, :9], vid_tldr._saliency(score, 1)) and (found[:, 9:] == 0).all()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (EViT, {"score": "entropy"}, r"no EViT score 'entropy'. Known: class, class_value, received, shift, norm"),
        (AttentionPrune, {"score": "classes"}, r"no AttentionPrune score 'classes'. Did you mean 'class'"),
        (ATS, {"score": "entropy"}, r"no ATS score 'entropy'"),
        (TokenPooling, {"algorithm": "kmean"}, r"no TokenPooling algorithm 'kmean'. Did you mean 'kmeans'"),
        (TokenPooling, {"weight": "significant"}, r"no TokenPooling weight 'significant'. Did you mean 'significance'"),
        (TokenPooling, {"score": "entropy"}, r"no TokenPooling score 'entropy'"),
        (ZeroTPrune, {"metric": "key"}, r"no ZeroTPrune metric 'key'"),
        (VidTLDR, {"metric": "key"}, r"no VidTLDR metric 'key'"),
        (VidTLDR, {"score": "entropie"}, r"no VidTLDR score 'entropie'. Did you mean 'entropy'"),
    ],
)
def test_a_wrong_choice_says_which_there_are(kind: type[Reduction], options: dict[str, str], message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        kind(**options)


@pytest.mark.parametrize("method", [EViT(), AttentionPrune(), ATS(), TokenPooling(), VidTLDR()], ids=repr)
def test_a_score_is_what_the_model_must_show(method: Reduction) -> None:
    for score in ("received", "norm", "class"):
        assert SCORES[score] == replace(method, score=score).needs - {"x"}  # type: ignore[call-arg]
