"""What each method that looks at places, pairs or graphs of neighbours promises by itself, against numpy loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from similarity_loops import array, cosines, groups_from, groups_of, sides
from torch import Tensor

import tokenmerge
from helpers import assert_close, tiny_vit, view_of
from tokenmerge import plan as plans
from tokenmerge.errors import UnknownNameError, UnsupportedError
from tokenmerge.methods import ALGM, GTP, MPM, Reduction, TokenView, ToMe2D, algm, mpm
from tokenmerge.methods.gtp import GTPPlan

GRIDS = [(4, 6), (5, 5), (3, 7)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def _grid_view(grid: tuple[int, int], prefix: int = 1, left: int | None = None) -> TokenView:
    """A view of a whole grid, or of `left` of its patches, others in every image."""
    n = grid[0] * grid[1]
    view = replace(view_of(N=(left or n) + prefix, prefix=prefix), grid=grid)
    if left is None:
        return view
    patches = torch.rand(3, n).argsort(dim=1)[:, :left].sort(dim=1).values + prefix
    return replace(view, places=torch.cat((torch.arange(prefix).expand(3, -1), patches), dim=1))


def _cells(view: TokenView, image: int) -> list[tuple[int, int] | None]:
    """Row and column of each token of one image."""
    cells, (_, columns) = view.cells()
    return [None] * view.prefix + [divmod(cell, columns) for cell in cells[image].tolist()]


def _blurred(view: TokenView, noise: float) -> TokenView:
    """Windows whose tokens are alike, with noise that differs from window to window."""
    assert view.grid is not None and view.k is not None
    rows, columns = view.grid
    token = torch.arange(rows * columns)
    window = token // columns // 2 * columns + token % columns // 2
    base = torch.randn(3, 3, rows * columns, 8)[:, :, window]
    loud = noise * torch.rand(3, 1, rows * columns, 1)
    loud[:, :, 0] = noise / 10  # one at least is above any threshold
    loud = loud[:, :, window]
    k = torch.cat((view.k[:, :, : view.prefix], base + loud * torch.randn_like(base)), dim=2)
    return replace(view, k=k)


@every_grid
@pytest.mark.parametrize("left", [None, 15])
@pytest.mark.parametrize("graph", ["mixed", "spatial", "semantic"])
@pytest.mark.parametrize("heads", ["max", "mean"])
@pytest.mark.parametrize("r", [1, 6, 13])
def test_gtp_keeps_and_propagates_as_by_hand(
    grid: tuple[int, int], left: int | None, graph: str, heads: str, r: int
) -> None:
    view = _grid_view(grid, left=left)
    method = GTP(graph=graph, heads=heads, neighbours=3, alpha=0.3)
    branch = torch.randn_like(view.stream)
    plan = method.plan(view, r)
    merged, size = method.merge(plan, view.stream, view.size, branch)
    assert view.q is not None and view.k is not None and view.size is not None and size is not None
    N = view.stream.shape[1]
    for image in range(3):
        rows = np.exp(array(view.q[image] @ view.k[image].mT) / 8**0.5)
        rows = rows / rows.sum(axis=2, keepdims=True)
        score = np.stack([np.diag(head) * head.sum(axis=0) for head in rows])
        score = score.max(axis=0) if heads == "max" else score.mean(axis=0)
        gone = sorted((np.argsort(score[1:], kind="stable")[:r] + 1).tolist())
        kept = [i for i in range(N) if i not in gone]
        assert plan.keep[image].tolist() == kept
        cells, alike = _cells(view, image), cosines(view.x[image])
        edges = np.zeros((N, N))
        for j in gone:
            if graph != "spatial":
                for i in sorted((i for i in kept if i), key=lambda i: -alike[i, j])[:3]:
                    edges[i, j] = 1
            for i in kept[1:] if graph != "semantic" else []:
                here, there = cells[i], cells[j]
                assert here is not None and there is not None
                if abs(here[0] - there[0]) <= 1 and abs(here[1] - there[1]) <= 1:
                    edges[i, j] = 1
        x, sizes = array(view.stream[image]) + array(branch[image]), array(view.size[image])
        for slot, i in enumerate(kept):
            found, total = x[i].copy(), sizes[i]
            for j in gone:
                if edges[i, j]:
                    found += 0.3 * x[j] / np.sqrt(edges[i].sum() * edges[:, j].sum())
                    total += sizes[j] * _share(edges, i, j)
            assert_close(merged[image, slot], torch.from_numpy(found).float())
            assert_close(size[image, slot], torch.tensor(total).float())


def _share(edges: np.ndarray, i: int, j: int) -> float:
    """What token i takes of the size of j: in proportion to the weights of its edges."""
    weights = [edges[k, j] / np.sqrt(max(1, edges[k].sum() * edges[:, j].sum())) for k in range(len(edges))]
    found: float = weights[i] / sum(weights)
    return found


def test_gtp_needs_places_where_its_graph_has_them() -> None:
    assert "places" in GTP().needs and "places" in GTP(graph="spatial").needs
    assert GTP(graph="semantic").needs == {"q", "k"}
    lonely = replace(view_of(), grid=None)
    assert isinstance(GTP(graph="semantic").plan(lonely, 3), GTPPlan)
    with pytest.raises(UnsupportedError, match="merges by place"):
        GTP().plan(lonely, 3)


def test_gtp_without_strength_only_prunes() -> None:
    view = _grid_view((5, 5))
    plan = GTP(alpha=0.0).plan(view, 7)
    x, _ = GTP(alpha=0.0).merge(plan, view.stream, view.size)
    assert torch.equal(x, view.stream.gather(1, plan.keep[..., None].expand(-1, -1, 24)))


def _windows_by_hand(view: TokenView, image: int) -> dict[tuple[int, ...], float]:
    assert view.grid is not None and view.k is not None
    rows, columns = view.grid
    alike, found = cosines(view.k[image]), {}
    for row in range(0, rows - 1, 2):
        for column in range(0, columns - 1, 2):
            cells = [(row, column), (row, column + 1), (row + 1, column), (row + 1, column + 1)]
            tokens = tuple(view.prefix + r * columns + c for r, c in cells)
            pairs = [alike[i, j] for i in tokens for j in tokens if i < j]
            found[tokens] = float(np.mean(pairs))
    return found


@every_grid
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("r", [2, 3, 7, 12])
def test_algm_merges_windows_above_the_threshold(grid: tuple[int, int], prefix: int, r: int) -> None:
    view = _blurred(_grid_view(grid, prefix), 0.6)
    by_hand = [_windows_by_hand(view, image) for image in range(3)]
    wanted = [3 * sum(mean >= 0.88 for mean in windows.values()) for windows in by_hand]
    r = min(r, ALGM().largest_r(view.stream.shape[1], prefix))
    plan = ALGM().plan(view, r)
    count = min(r, *wanted)
    assert plan.keep.shape[1] == view.stream.shape[1] - count and count > 0
    for image, windows in enumerate(by_hand):
        best = sorted(windows, key=lambda tokens: -windows[tokens])
        pairs = [(src, tokens[0]) for tokens in best for src in tokens[1:]][:count]
        assert groups_of(plan, image) == groups_from(view.stream.shape[1], pairs)


@every_grid
def test_algm_merges_nothing_below_the_threshold(grid: tuple[int, int]) -> None:
    view = _grid_view(grid)
    assert max(max(_windows_by_hand(view, image).values()) for image in range(3)) < 0.88
    plan = ALGM().plan(view, 9)
    assert torch.equal(plan.keep, torch.arange(view.stream.shape[1]).expand(3, -1)) and plan.src.shape == (3, 0)
    x, size = ALGM().merge(plan, view.stream, view.size)
    assert torch.equal(x, view.stream) and view.size is not None and size is not None and torch.equal(size, view.size)
    alike = _blurred(view, 0.0)
    assert ALGM(threshold=1.0 + 1e-3).plan(alike, 9).src.shape == (3, 0)
    assert ALGM(threshold=1.0 - 1e-3).plan(alike, 9).src.shape[1] == min(9, 3 * (grid[0] // 2) * (grid[1] // 2))


@pytest.mark.parametrize("grid", [(1, 8), (2, 2)])
def test_algm_on_grids_with_hardly_a_window(grid: tuple[int, int]) -> None:
    plan = ALGM(threshold=-1.0).plan(_grid_view(grid), 2)
    assert plan.src.shape[1] == (0 if grid[0] == 1 else 2)


def test_algm_loses_as_much_as_the_image_with_least_to_lose() -> None:
    view, other = _blurred(_grid_view((4, 6)), 0.01), _grid_view((4, 6))
    assert view.k is not None and other.k is not None
    assert ALGM().plan(view, 12).src.shape[1] == 12
    assert ALGM().plan(replace(view, k=torch.cat((view.k[:2], other.k[2:]))), 12).src.shape[1] == 0


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("r", [1, 4, 7])
def test_algm_merges_globally_above_mean_plus_deviation(is_padded: bool, r: int) -> None:
    view = _grid_view((5, 6), left=19)
    assert view.k is not None
    view = replace(view, k=view.k + 0.7)
    if is_padded:
        valid = torch.ones(3, 20, dtype=torch.bool)
        valid[0, 3:7] = valid[1, 10:14] = valid[2, 15:19] = False
        view = replace(view, valid=valid)
    side_a, side_b = sides(20, 1)
    counts, edges = [], []
    for image in range(3):
        real = view.valid[image].tolist() if view.valid is not None else [True] * 20
        alike = cosines(view.k[image])
        pairs = [alike[i, j] for i in side_a for j in side_b if real[i] and real[j]]
        threshold = np.mean(pairs) + np.std(pairs)
        assert_close(algm._threshold(*_unit(view), view.valid)[image], torch.tensor(threshold).float())
        found = []
        for i in side_a:
            partners = [j for j in side_b if real[i] == real[j]]
            j = max(partners, key=lambda j: alike[i, j]) if real[i] else partners[0]
            found.append((alike[i, j] if real[i] else np.inf, i, j))
        edges.append(sorted(found, key=lambda edge: -edge[0]))
        counts.append(sum(score >= threshold for score, _, _ in found))
    count = min(r, *counts)
    plan = ALGM().plan(view, r)
    assert plan.src.shape[1] == count > 0
    for image in range(3):
        assert groups_of(plan, image) == groups_from(20, [(i, j) for _, i, j in edges[image][:count]])


def _unit(view: TokenView) -> tuple[Tensor, int]:
    assert view.k is not None
    mean = view.k.mean(dim=1)
    return mean / mean.norm(dim=-1, keepdim=True), view.prefix


@pytest.mark.hosts
def test_algm_is_local_in_the_first_block_that_merges_and_global_after(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    local = ALGM._local
    monkeypatch.setattr(
        ALGM, "_local", lambda self, view, *rest: (calls.append(view.layer), local(self, view, *rest))[1]
    )
    model = tiny_vit()
    handle = tokenmerge.patch(model, ALGM(threshold=-1.0), r=[0, 9, 4, 5], track=True)
    model(torch.randn(2, 3, 32, 32))
    assert calls == [1]
    groups = handle.groups[1]
    assert groups is not None
    for image in range(2):
        for slot in range(56):
            members = ((groups[image] == slot).nonzero().flatten() - 1).tolist()
            assert len({(i // 8 // 2, i % 8 // 2) for i in members}) == 1 or members == [-1]
            assert len(members) in (1, 4)


def _mutual_pairs(metric: Tensor, prefix: int) -> list[tuple[float, int, int]]:
    """Similarity, later and earlier token of each mutual pair of one image, best first."""
    alike = cosines(metric)
    np.fill_diagonal(alike, -2)
    n, found = len(alike), []
    for i in range(prefix, n):
        for j in range(i + 1, n):
            if prefix + int(np.argmax(alike[i, prefix:])) == j and prefix + int(np.argmax(alike[j, prefix:])) == i:
                found.append((float(alike[i, j]), j, i))
    return sorted(found, key=lambda pair: -pair[0])


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("metric", ["x", "k"])
@pytest.mark.parametrize("r", [1, 4, 15])
def test_mpm_averages_mutual_nearest_neighbours(prefix: int, metric: str, r: int) -> None:
    view = view_of(N=36, prefix=prefix)
    branch = torch.randn_like(view.stream)
    plan = MPM(metric=metric).plan(view, r)
    by_hand = [_mutual_pairs(getattr(view, metric)[image], prefix) for image in range(3)]
    count = min(r, *map(len, by_hand))
    assert plan.src.shape[1] == count > 0
    merged, size = MPM().merge(plan, view.stream, view.size, branch)
    x = view.stream + branch
    for image in range(3):
        pairs = [(j, i) for _, j, i in by_hand[image][:count]]
        assert groups_of(plan, image) == groups_from(36, pairs)
        for j, i in pairs:
            slot = plan.keep[image].tolist().index(i)
            assert_close(merged[image, slot], (x[image, i] + x[image, j]) / 2)
            assert view.size is not None and size is not None
            assert size[image, slot] == view.size[image, i] + view.size[image, j]


def test_mpm_lets_a_padding_token_without_another_go_first() -> None:
    view, valid = view_of(N=36), torch.ones(3, 36, dtype=torch.bool)
    valid[:, 9] = False
    assert view.size is not None
    plan = MPM().plan(replace(view, valid=valid, size=view.size * valid), 16)
    real = torch.arange(36)[valid[0]]
    by_hand = [_mutual_pairs(view.x[image, real], 1) for image in range(3)]
    assert plan.src.shape[1] == 1 + min(map(len, by_hand)) > 1
    for image in range(3):
        pairs = [(int(real[j]), int(real[i])) for _, j, i in by_hand[image]][: plan.src.shape[1] - 1]
        into = plan.keep[image][plan.dst[image]].tolist()
        assert plan.src[image, 0] == 9 and list(zip(plan.src[image, 1:].tolist(), into[1:], strict=True)) == pairs


def test_mpm_searches_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    view = view_of(N=36)
    whole = MPM().plan(view, 9)
    monkeypatch.setattr(mpm, "_TILE", 35 * 4)
    tiled = MPM().plan(view, 9)
    assert torch.equal(whole.keep, tiled.keep) and torch.equal(whole.src, tiled.src)


@pytest.mark.parametrize("r", [4, 12, 17])
def test_mpm_removes_exactly_r_in_a_graph(r: int, monkeypatch: pytest.MonkeyPatch) -> None:
    view = view_of(N=36)
    monkeypatch.setattr(mpm, "batch_count", lambda wanted, r, seen: r)  # as in a captured graph
    plan = MPM().plan(view, r)
    assert plan.src.shape[1] == r
    for image in range(3):
        alike, pairs = cosines(view.x[image]), _mutual_pairs(view.x[image], 1)
        into = plan.keep[image][plan.dst[image]].tolist()
        found = list(zip(plan.src[image].tolist(), into, strict=True))
        mutual = [(j, i) for _, j, i in pairs][:r]
        assert found[: len(mutual)] == mutual, "others before the mutual pairs"
        for j, i in found[len(mutual) :]:
            assert i == max(plan.keep[image].tolist()[1:], key=lambda other: alike[j, other])
            assert j not in {i for _, _, i in pairs}


def test_mpm_of_equal_tokens() -> None:
    view = replace(view_of(), stream=torch.ones(3, 26, 24))
    plan = MPM().plan(view, 12)
    assert plan.src.tolist() == [[2]] * 3 and plan.keep[:, 1].tolist() == [1] * 3


@every_grid
@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("seed", [0, 5])
def test_tome2d_has_one_destination_in_each_tile(grid: tuple[int, int], stride: int, prefix: int, seed: int) -> None:
    view, (rows, columns) = _grid_view(grid, prefix), grid
    tiles = -(-rows // stride) * -(-columns // stride)
    # all sources go, so that what is left are the destinations
    plan = ToMe2D(stride=stride, seed=seed).plan(view, rows * columns - tiles)
    assert (plan.keep == plan.keep[:1]).all(), "destinations differ from image to image"
    cells = [divmod(int(i) - prefix, columns) for i in plan.keep[0, prefix:]]
    assert len({(row // stride, column // stride) for row, column in cells}) == len(cells) == tiles
    other = ToMe2D(stride=stride, seed=seed + 1).plan(view, rows * columns - tiles)
    later = ToMe2D(stride=stride, seed=seed).plan(replace(view, layer=2), rows * columns - tiles)
    assert not torch.equal(other.keep, plan.keep) and torch.equal(other.keep, later.keep)


def test_tome2d_draws_every_place_of_a_tile_equally_often() -> None:
    view = _grid_view((8, 8), 0)
    drawn = torch.zeros(64)
    for seed in range(300):
        drawn[ToMe2D(seed=seed).plan(view, 48).keep[0]] += 1
    corners = drawn.view(4, 2, 4, 2).sum(dim=(0, 2)).flatten() / (300 * 16)
    assert (corners - 0.25).abs().max() < 4 * (0.25 * 0.75 / 4800) ** 0.5
    assert drawn.min() > 40 and drawn.max() < 110


@every_grid
@pytest.mark.parametrize("r", [1, 5, 11])
@pytest.mark.parametrize("left", [None, 17, 12])
def test_tome2d_merges_the_best_into_the_destinations(grid: tuple[int, int], r: int, left: int | None) -> None:
    view, method = _grid_view(grid, left=left), ToMe2D(metric="k")
    N = view.stream.shape[1]
    rank = _drawn(grid, seed=1)  # of the view's layer
    tiles = -(-grid[0] // 2) * -(-grid[1] // 2)
    plan = method.plan(view, r)
    assert view.k is not None
    for image in range(3):
        cells, seen, turns = _cells(view, image), {}, []
        for i in sorted(range(1, N), key=lambda i: rank[cells[i]]):  # type: ignore[index]
            row, column = cells[i]  # type: ignore[misc]
            turn = seen[row // 2, column // 2] = seen.get((row // 2, column // 2), -1) + 1
            turns.append((turn, rank[row, column], i))
        into = [i for _, _, i in sorted(turns)[: min(tiles, N - 1 - r)]]
        alike = cosines(view.k[image])
        edges = [(max(alike[i, j] for j in into), i) for i in range(1, N) if i not in into]
        best = [i for _, i in sorted(edges, key=lambda edge: -edge[0])[:r]]
        pairs = [(i, max(into, key=lambda j: alike[i, j])) for i in best]
        assert groups_of(plan, image) == groups_from(N, pairs)


def _drawn(grid: tuple[int, int], seed: int) -> dict[tuple[int, int], int]:
    """The rank that was drawn for each cell, read from where the destinations of growing sets lie."""
    from tokenmerge import matching

    ranks = matching.shuffle(grid[0] * grid[1], seed, torch.device("cpu")).tolist()
    assert sorted(ranks) == list(range(grid[0] * grid[1]))
    return {divmod(cell, grid[1]): rank for cell, rank in enumerate(ranks)}


@pytest.mark.parametrize("method", [GTP(), GTP(graph="spatial"), ALGM(threshold=-1.0), ToMe2D()], ids=repr)
def test_methods_by_place_say_what_they_lack(method: Reduction) -> None:
    with pytest.raises(UnsupportedError, match="this model says no grid of patches"):
        method.plan(replace(view_of(), grid=None), 3)
    with pytest.raises(UnsupportedError, match="Build the model for the size of its images"):
        method.plan(replace(view_of(), grid=(3, 4)), 3)


@pytest.mark.hosts
@pytest.mark.parametrize("method", [GTP(), ToMe2D(metric="k"), ALGM(threshold=0.0)], ids=repr)
def test_places_follow_through_the_blocks(method: Reduction, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny_vit(), []
    plan = type(method).plan

    def spy(self: Reduction, view: TokenView, r: int) -> plans.AnyPlan:
        seen.append((view.places, view.stream.shape[1]))
        return plan(self, view, r)

    monkeypatch.setattr(type(method), "plan", spy)

    handle = tokenmerge.patch(model, method, r=[0, 9, 8, 5], track=True)
    model(torch.randn(2, 3, 32, 32))
    assert seen[0][0] is None and len(seen) == 3
    for (places, n), kept in zip(seen[1:], handle.positions[1:3], strict=True):
        assert places is not None and kept is not None and torch.equal(places, kept) and places.shape[1] == n


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (GTP, {"graph": "semantics"}, r"no GTP graph 'semantics'. Did you mean 'semantic'"),
        (GTP, {"heads": "sum"}, r"no GTP heads 'sum'. Known: max, mean"),
        (ALGM, {"metric": "key"}, r"no ALGM metric 'key'"),
        (MPM, {"metric": "key"}, r"no MPM metric 'key'"),
        (ToMe2D, {"metric": "key"}, r"no ToMe2D metric 'key'"),
    ],
)
def test_a_wrong_choice_says_which_there_are(kind: type[Reduction], options: dict[str, str], message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        kind(**options)


def test_a_tile_of_one_place_is_none() -> None:
    with pytest.raises(UnsupportedError, match="ToMe2D stride is 1: a tile has at least 2 x 2 places"):
        ToMe2D(stride=1)
