"""Method `tome`: what the vision tower merged is what the language model gets."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_videos import prompt as video_prompt
from test_vlm_families import by_hand, generate
from tiny_vlms import FAMILIES, IS_OLD, doubled, encoded

import tokenmerge
from tokenmerge.errors import ConfigError, UnsupportedError
from tokenmerge.vlm import compact, patch
from tokenmerge.vlm.merging import _within

transformers = pytest.importorskip("transformers", minversion="4.57")

WHOLE = ("llava", "llava_next", "llava_onevision", "paligemma", "ovis2")  # a visual token is one of the tower's
LAYERS = {"llava": 2, "llava_next": 2}  # before the features, of three


@pytest.mark.parametrize("family", WHOLE)
@torch.no_grad()
def test_keeping_everything_is_the_plain_model(family: str) -> None:
    model, inputs = FAMILIES[family].make(), FAMILIES[family].prompts([1, 2])
    plain, tokens = model(**inputs).logits, generate(model, inputs)
    with patch(model, 1.0, method="tome") as handle:
        assert model(**inputs).logits.equal(plain) and generate(model, inputs).equal(tokens)
        handle.keep = 0.5
        assert model(**inputs).logits.shape[1] < plain.shape[1]
        handle.keep = 1.0
        assert model(**inputs).logits.equal(plain)
    assert model(**inputs).logits.equal(plain) and generate(model, inputs).equal(tokens)
    assert tokenmerge.handle_of(model, None) is None and "forward" not in vars(model)


@pytest.mark.parametrize("keep", [0.5, 0.75, 0.3])
@pytest.mark.parametrize("family", WHOLE)
@torch.no_grad()
def test_each_group_of_the_tower_is_one_visual_token(family: str, keep: float) -> None:
    """The language model on the features of a merging tower that gives each place its group's, one place per group."""
    tiny = FAMILIES[family]
    model, inputs = tiny.make(torch.float64), doubled(tiny.prompts([1, 2]))
    twin = copy.deepcopy(model)
    k, layers = round(keep * 16), LAYERS.get(family, 3)
    with patch(model, keep, method="tome") as handle:
        assert handle.tower is not None
        r, logits, places = handle.tower.r, model(**inputs).logits, handle.places
        tokens, pairs = generate(model, inputs, new=3), handle.visual_tokens
    assert isinstance(r, list) and sum(r[:layers]) == 16 - k and sum(r[layers:]) == 0
    tower = tokenmerge.patch(twin, r=r, restore="dense", track=True)
    features = encoded(twin, **{name: x for name, x in inputs.items() if name in ("pixel_values", "image_sizes")})
    images = [rows.reshape(-1, rows.shape[-1]) for rows in features]
    newline = getattr(twin.model, "image_newline", None)
    kept_rows = _kept(inputs, places)
    for rows, kept, (before, after) in zip(images, kept_rows, pairs, strict=True):
        # newlines all stay; of the others each different one is there once
        is_fixed = torch.zeros(len(rows), dtype=torch.bool) if newline is None else (rows == newline).all(dim=1)
        free = kept[~is_fixed[kept]]
        assert (before, after) == (len(rows), len(kept)) and len(kept) - len(free) == is_fixed.sum()
        crops = int((~is_fixed).sum()) // 16
        assert len(_different(rows[~is_fixed])) == len(_different(rows[free])) == len(free) == k * crops
    if tiny.tokens == 16:  # the places are those that the tower's tokens keep
        prefix, position = tower.prefix, tower.positions[layers - 1]
        for own, kept in zip(position, kept_rows, strict=True):
            assert kept.tolist() == sorted(int(place) - prefix for place in own if place >= prefix)
    length = inputs["input_ids"].shape[1]
    for row, (expected, new) in enumerate(by_hand(twin, inputs, places, new=3)):
        torch.testing.assert_close(logits[row][places[row] >= 0], expected, rtol=0, atol=1e-5)
        assert tokens[row, length:].tolist() == new


def _different(rows: torch.Tensor) -> torch.Tensor:
    return (rows * 1e9).round().unique(dim=0)


def _kept(inputs: dict[str, Any], places: torch.Tensor) -> list[torch.Tensor]:
    """Return the indices of the visual tokens that are left, of each image."""
    ids, found = inputs["input_ids"], []
    for row, count in enumerate((1, 2)):
        columns = (ids[row] == 70).nonzero().squeeze(1)
        stays = torch.isin(columns, places[row])
        found += [part.nonzero().squeeze(1) for part in stays.chunk(count)]
    return found


@torch.no_grad()
def test_a_number_of_tokens_and_other_layers() -> None:
    model, inputs = FAMILIES["llava"].make(), FAMILIES["llava"].prompts([1, 2])
    with patch(model, 5, method="tome") as handle:
        assert handle.tower is not None
        model(**inputs)
        assert handle.visual_tokens == [(16, 5)] * 3 and handle.tower.r == [6, 5]
        with pytest.raises(UnsupportedError, match=r"after layer 1 of the tower .* down to keep until layer 2"):
            model(**inputs, vision_feature_layer=-3)
        for keep in range(4, 16):
            handle.keep = keep
            model(**inputs)
            assert handle.visual_tokens == [(16, keep)] * 3
        handle.keep = 1.0
        model(**inputs)
        assert handle.tower.r == [0, 0]
        for wrong in (3, 17, 0.1):
            with pytest.raises(ConfigError, match=r"merges them in 2 layers .* Give a number from 4 to 16, or a share"):
                handle.keep = wrong
        assert handle.keep == 1.0
        with pytest.raises(UnsupportedError, match="features come from several layers of the tower"):
            handle.keep = 0.5
            model(**inputs, vision_feature_layer=[-3, -2])
    tiny = FAMILIES["llava"]
    several = tiny._replace(settings={**tiny.settings, "vision_feature_layer": [-2, -1]}).make()
    before = {name: set(vars(module)) for name, module in several.named_modules()}
    with pytest.raises(UnsupportedError, match="features come from several layers of the tower"):
        patch(several, 0.5, method="tome")
    assert {name: set(vars(module)) for name, module in several.named_modules()} == before
    deep = tiny._replace(settings={**tiny.settings, "vision_feature_layer": -1}).make()
    with patch(deep, 2, method="tome") as handle:
        deep(**inputs)
        assert handle.visual_tokens == [(16, 2)] * 3 and "in the tower" in str(handle.report())


def test_a_padded_crop_has_a_group_without_its_target() -> None:
    """Numbers of the tokens, and of their targets: 9 is not among them, 0 are newlines."""
    own, target = torch.tensor([4, 5, 6, 0, 7, 8, 2, 0]), torch.tensor([6, 9, 6, 0, 9, 8, 6, 0])
    assert _within(own, target).tolist() == [2, 1, 2, 3, 1, 5, 2, 7]


@torch.no_grad()
def test_copies_merge_too_and_another_image_size_is_no_trouble() -> None:
    model, inputs = FAMILIES["llava_next"].make(), FAMILIES["llava_next"].prompts([1])
    # 64 x 16 pixels: the first and the last column of patches are padding, which is cut off
    inputs["image_sizes"] = torch.tensor([[64, 16]])
    with patch(model, 0.5, method="tome") as handle:
        tokens = encoded(model, pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"])
        ids = torch.tensor([[5, 6] + [70] * len(tokens[0]) + [7, 8]])
        given = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        out = generate(model, given, new=3)
        (before, after), other = handle.visual_tokens[0], copy.deepcopy(model)
        assert before == len(tokens[0]) < 56 and after < before
        assert generate(other, given, new=3).equal(out)


def test_what_tome_cannot_do_is_refused() -> None:
    model, inputs = FAMILIES["llava"].make(), FAMILIES["llava"].prompts([1])
    before = dict(vars(model))
    with pytest.raises(ConfigError, match=r"tome merges in the vision tower until keep .* r follows from keep"):
        patch(model, 0.5, method="tome", r=3)
    with pytest.raises(ConfigError, match="keep is 2, 2 of the 16 tokens"):
        patch(model, 2, method="tome")
    with pytest.raises(
        UnsupportedError, match=r"needs transformers 5.24" if IS_OLD else "it merged nothing. Use token"
    ):
        compact(model, inputs, keep=0.5, method="tome")
    assert vars(model) == before and tokenmerge.handle_of(model, None) is None
    for one, other in (("tome", "divprune"), ("divprune", "tome")):
        with patch(model, 0.5, method=one) as handle:
            with pytest.raises(
                ConfigError, match=r"cannot become (DivPrune|ToMe)\(\): where in the model a method works"
            ):
                handle.method = other
            handle.method = one
            assert handle.method.name == one
    with pytest.raises(ConfigError, match=r"merges in each crop of an image, whose number differs. Give a share"):
        patch(FAMILIES["llava_next"].make(), 20, method="tome")
    video = FAMILIES["llava_onevision"].make()
    with patch(video, 0.5, method="tome"), pytest.raises(UnsupportedError, match="visual tokens of a video are means"):
        video(**video_prompt("llava_onevision", torch.float32))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in WHOLE])
def test_families_with_units_of_several_tokens_are_refused(family: str) -> None:
    model = FAMILIES[family].make()
    before = dict(vars(model))
    with pytest.raises(UnsupportedError, match=f"A visual token of a {family} model is made of several of the tower's"):
        patch(model, 0.5, method="tome")
    assert vars(model) == before
