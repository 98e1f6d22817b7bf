"""Each method against a slow statement of its steps in numpy."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenmerge.errors import ConfigError, UnknownNameError, UnsupportedError
from tokenmerge.vlm import Chooser, list_methods, methods
from tokenmerge.vlm.methods import Merged, Visual

Array = NDArray[np.float64]


def units(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def slow_divprune(x: Array, k: int) -> list[int]:
    distance = 1 - units(x) @ units(x).T
    n = len(x)
    chosen = [max(range(n), key=lambda i: min(distance[i, j] for j in range(n) if j != i))]
    while len(chosen) < k:
        left = [i for i in range(n) if i not in chosen]
        chosen.append(max(left, key=lambda i: min(distance[i, j] for j in chosen)))
    return sorted(chosen)


def slow_cdpruner(x: Array, k: int, text: Array) -> list[int]:
    """Greedily make the determinant of the chosen tokens' kernel largest."""
    relevance = (units(x) @ units(text).T).mean(axis=1)
    relevance = (relevance - relevance.min()) / (relevance.max() - relevance.min()) + 1e-6
    kernel = relevance[:, None] * (units(x) @ units(x).T) * relevance
    chosen: list[int] = []
    while len(chosen) < k:
        left = [i for i in range(len(x)) if i not in chosen]
        chosen.append(max(left, key=lambda i: np.linalg.det(kernel[np.ix_([*chosen, i], [*chosen, i])])))
    return sorted(chosen)


def slow_dart(x: Array, k: int, text: Array) -> list[int]:
    own = sorted(range(len(x)), key=lambda i: -np.abs(x[i]).sum())[: min(4, k)]
    words = sorted(range(len(text)), key=lambda i: -np.abs(text[i]).sum())[:4]
    points = [x[i] for i in own] + [text[i] for i in words]
    chosen, left = list(own), k - len(own)
    for number, point in enumerate(points):
        share = left // len(points) + (number < left % len(points))
        free = [i for i in range(len(x)) if i not in chosen]
        chosen += sorted(free, key=lambda i: units(x[i]) @ units(point))[:share]
    return sorted(chosen)


def slow_evs(x: Array, k: int, frames: int) -> list[int]:
    n = len(x) // frames
    change = {i: np.inf if i < n else 1 - units(x[i]) @ units(x[i - n]) for i in range(len(x))}
    return sorted(sorted(change, key=lambda i: (-change[i], i))[: max(k, n)])


def slow_vidcom2(x: Array, k: int, frames: int) -> list[int]:
    n = len(x) // frames
    calm = np.argsort(x.var(axis=0), kind="stable")[: x.shape[1] // 2]
    u = units(x[:, calm])

    def like(token: Array, mean: Array) -> float:
        return sum(float(np.exp(-((token - mean) ** 2).sum() / (2 * 2.0**power))) for power in range(-3, 2))

    video = u.mean(axis=0)
    of_video = [like(token, video) for token in u]
    of_frame = [like(u[i], u[i // n * n : (i // n + 1) * n].mean(axis=0)) for i in range(len(u))]
    score = np.array([np.mean(of_video[t * n : (t + 1) * n]) for t in range(frames)])
    weight = np.exp(-(score - score.min()) / 0.01)
    weight /= weight.sum()
    budget = np.clip(k / frames * (1 + weight - weight.mean()), 0, n).round(4)
    counts = np.floor(budget).astype(int)
    order = np.argsort(-(budget - counts), kind="stable")
    while counts.sum() < k:  # a frame has no more than n tokens
        for t in order:
            counts[t] += counts[t] < n and counts.sum() < k
    chosen: list[int] = []
    for t, count in enumerate(counts):
        chosen += sorted(range(t * n, (t + 1) * n), key=lambda i: of_video[i] + of_frame[i])[:count]
    return sorted(chosen)


def slow_visionzip(x: Array, k: int, attention: Array, keys: Array, merge: str = "sum") -> tuple[list[int], Array]:
    """The places, and the tokens there `[k, C]`."""
    count = round(k * 27 / 32)
    top = sorted(range(len(x)), key=lambda i: (-attention[i], i))[:count]
    rest = [i for i in range(len(x)) if i not in top]
    targets = rest[:: len(rest) // (k - count)][: k - count] if k > count else []
    tokens = {i: x[i] for i in top}
    went: dict[int, list[int]] = {i: [] for i in targets}
    for i in rest:
        if i not in targets and targets:
            went[max(targets, key=lambda j: units(keys[i]) @ units(keys[j]))].append(i)
    for target, own in went.items():
        if merge == "mean":
            tokens[target] = np.mean([x[i] for i in [target, *own]], axis=0)
        else:
            tokens[target] = x[target] + (np.mean([x[i] for i in own], axis=0) if own else 0)
    places = sorted(tokens)
    return places, np.stack([tokens[i] for i in places])


def drawn(tokens: int, seed: int, width: int = 16) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("seed", "k"), [*itertools.product(range(4), (1, 3, 9, 23))])
def test_methods_of_images_follow_their_steps(seed: int, k: int) -> None:
    x, text = drawn(24, seed), drawn(7, seed + 50)
    slow, words = x.double().numpy(), text.double().numpy()
    assert methods.divprune(x, k).tolist() == slow_divprune(slow, k)
    assert methods.dart(x, k, text).tolist() == slow_dart(slow, k, words)
    if k < 10:  # later ones have determinants that are too small for the slow way
        assert methods.cdpruner(x, k, text).tolist() == slow_cdpruner(slow, k, words)


@pytest.mark.parametrize(("seed", "k"), [*itertools.product(range(4), (1, 2, 9, 13, 19, 23, 24))])
@pytest.mark.parametrize("merge", ["sum", "mean"])
def test_visionzip_follows_its_steps(seed: int, k: int, merge: str) -> None:
    x, attention, keys = drawn(24, seed), drawn(24, seed + 10, 1).squeeze(1).exp(), drawn(24, seed + 20, 8)
    attention[3] = attention[20]  # the first of equal ones
    places, tokens = slow_visionzip(*(a.double().numpy() for a in (x,)), k, attention.numpy(), keys.numpy(), merge)
    index, weights = methods.visionzip(x, k, attention, keys, merge=merge)
    assert index.tolist() == places and weights.shape == (k, 24)
    np.testing.assert_allclose((weights @ x).numpy(), tokens, atol=1e-5)
    if merge == "mean":
        np.testing.assert_allclose(weights.sum(dim=1).numpy(), 1, atol=1e-6)
    alone = weights[(weights != 0).sum(dim=1) == 1]
    assert len(alone) >= round(k * 27 / 32) and ((alone == 1) | (alone == 0)).all()


def test_visionzip_with_only_one_kind_of_tokens() -> None:
    x, attention, keys = drawn(12, 0), drawn(12, 1)[:, 0], drawn(12, 2)
    most = attention.topk(4).indices.sort().values
    index, weights = methods.visionzip(x, 4, attention, keys, dominant=1.0)
    assert index.equal(most) and (weights @ x).equal(x[most])
    index, weights = methods.visionzip(x, 4, attention, keys, dominant=0.0, merge="mean")
    # every token is in one of the four
    assert ((weights > 0).sum(dim=0) == 1).all() and (weights[range(4), index] > 0).all()
    for text in ("visionzip(dominant=1.5)", "visionzip(dominant=-0.1)", "visionzip(merge='max')"):
        with pytest.raises(ConfigError, match=r"visionzip: (dominant|merge) is"):
            methods.find(text)


def test_fastv_keeps_what_is_attended_to() -> None:
    attention = torch.tensor([0.1, 0.3, 0.2, 0.3, 0.05, 0.2])
    for k in range(1, 7):
        expected = sorted(sorted(range(6), key=lambda i: (-attention[i], i))[:k])
        assert methods.fastv(attention, k).tolist() == expected
    with pytest.raises(ConfigError, match="fastv: layer is 0; it takes at least 1"):
        methods.find("fastv(layer=0)")


def test_tome_keeps_one_of_each_group() -> None:
    """Whose place it is says the tower."""
    targets = torch.tensor([5, 1, 1, 5, 6, 5, 6, 7])
    assert methods.tome(targets).tolist() == sorted(set(targets.tolist())) == [1, 5, 6, 7]


@pytest.mark.parametrize(("seed", "k"), [*itertools.product(range(4), (4, 7, 12, 23))])
def test_methods_of_videos_follow_their_steps(seed: int, k: int) -> None:
    x = drawn(24, seed)
    slow = x.double().numpy()
    assert methods.evs(x, k, 4).tolist() == slow_evs(slow, k, 4)
    assert methods.vidcom2(x, k, 4).tolist() == slow_vidcom2(slow, k, 4)


def test_the_baselines() -> None:
    x = drawn(10, 0)
    assert methods.uniform(x, 5).tolist() == [1, 3, 5, 7, 9] and methods.uniform(x, 1).tolist() == [5]
    assert methods.uniform(x, 10).tolist() == list(range(10))
    one = methods.random(x, 4)
    assert one.equal(methods.random(x, 4)) and not one.equal(methods.random(x, 4, seed=1))
    counts = torch.bincount(torch.cat([methods.random(x, 4, seed=seed) for seed in range(500)]), minlength=10)
    assert counts.sum() == 2000 and (counts - 200).abs().max() < 60


def places_of(chosen: Tensor | Merged) -> Tensor:
    return chosen.kept if isinstance(chosen, Merged) else chosen


@pytest.mark.parametrize("name", list_methods())
@pytest.mark.parametrize("k", [1, 5, 12, 16])
def test_every_method_returns_so_many_tokens_in_order(name: str, k: int) -> None:
    chooser = methods.find(name)
    visual = Visual(drawn(16, 3), 4, drawn(5, 4), drawn(16, 5)[:, 0], drawn(16, 6), torch.arange(16) % k)
    chosen = places_of(chooser.choose(visual, k))
    count = max(k, 4) if name == "evs" else k
    assert chosen.dtype == torch.int64 and chosen.shape == (count,)
    assert (chosen.diff() > 0).all() and chosen[0] >= 0 and chosen[-1] < 16
    assert places_of(chooser.choose(visual, k)).equal(chosen)
    half = replace(visual, features=visual.features.bfloat16())
    assert places_of(chooser.choose(half, k)).shape == (count,)


@pytest.mark.parametrize("name", list_methods())
def test_equal_tokens_are_no_trouble(name: str) -> None:
    """A white image: every token is the same, and every similarity a tie."""
    visual = Visual(torch.ones(16, 8), 4, torch.ones(3, 8), torch.ones(16), torch.ones(16, 8), torch.arange(16) % 6)
    assert len(places_of(methods.find(name).choose(visual, 6)).unique()) == 6


def test_methods_say_what_they_miss() -> None:
    with pytest.raises(UnsupportedError, match="cdpruner chooses by the text of the prompt, and there is none"):
        methods.find("cdpruner").choose(Visual(drawn(4, 0)), 2)
    for name in ("evs", "vidcom2"):
        with pytest.raises(UnsupportedError, match=rf"{name} compares .*, and 4 tokens are not 3 equal frames"):
            methods.find(name).choose(Visual(drawn(4, 0), frames=3), 2)
    with pytest.raises(UnsupportedError, match=r"visionzip chooses by the attention .* Visual\(features, attention="):
        methods.find("visionzip").choose(Visual(drawn(4, 0)), 2)
    with pytest.raises(UnsupportedError, match=r"fastv chooses by the attention inside .* method='fastv'"):
        methods.find("fastv").choose(Visual(drawn(4, 0)), 2)
    with pytest.raises(UnsupportedError, match=r"tome keeps what the vision tower merged, and it merged nothing. Use"):
        methods.find("tome").choose(Visual(drawn(4, 0)), 2)


def test_methods_are_values() -> None:
    assert methods.find("dart") == methods.Dart() and repr(methods.Dart(pivots=2)) == "Dart(pivots=2, text_pivots=4)"
    assert all(issubclass(cls, Chooser) and cls.name for cls in methods.METHODS)
    assert all(cls.source for cls in methods.METHODS if cls.name not in ("random", "uniform"))


def test_options_in_a_text() -> None:
    assert methods.find("dart(pivots=2)") == methods.Dart(pivots=2)
    with pytest.raises(UnknownNameError, match=r"no option of dart 'pivot'. Did you mean 'pivots'"):
        methods.find("dart(pivot=2)")
    with pytest.raises(UnknownNameError, match=r"no option of divprune 'pivots': it has none\."):
        methods.find("divprune(pivots=2)")
    with pytest.raises(ConfigError, match=r"method is the class Dart\. Give an object of it: Dart\(\)"):
        methods.find(methods.Dart)  # type: ignore[arg-type]
    for text in ("dart(2)", "dart(pivots=2, pivots=3)", "dart(", "a b", None, 3):
        with pytest.raises(ConfigError, match="it takes a name"):
            methods.find(text)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="dart: pivots is 'two'; it takes int"):
        methods.find("dart(pivots='two')")
    with pytest.raises(ConfigError, match="dart: pivots is 0 and text_pivots 4; it takes at least 1 and 0"):
        methods.find("dart(pivots=0)")


def test_the_functions_need_no_transformers() -> None:
    code = "import sys; from tokenmerge.vlm.methods import divprune; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_divprune_of_a_long_video_needs_no_square_matrix() -> None:
    """10,000 tokens: all similarities would be 400 MB; the tile is 40."""
    from tokenmerge.measure.timing import _peak

    x = drawn(10_000, 0)
    assert _peak(lambda: methods.divprune(x, 4), x.device) < 100e6
