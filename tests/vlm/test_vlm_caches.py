"""Caches whose rows or tokens somebody moved between two turns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_vlm_families import generate
from tiny_vlms import CACHE, FAMILIES, IMAGE, NEWER, doubled
from torch import Tensor

from tokenmerge.errors import UnsupportedError
from tokenmerge.vlm import patch

transformers = pytest.importorskip("transformers", minversion="4.57")

CASES = [
    ("llava", "divprune"),
    ("mistral3", "divprune"),
    pytest.param("llava", "fastv(layer=1)", marks=NEWER),
    ("qwen2_5_vl", "divprune"),
    ("gemma3", "divprune"),
]
every_case = pytest.mark.parametrize(("name", "method"), CASES)


def first_turn(name: str) -> tuple[Any, dict[str, Any]]:
    """A model, and prompts of which one is padded by far."""
    return FAMILIES[name].make(torch.float64), doubled(FAMILIES[name].prompts([1, 2, 1]))


def next_turn(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Two tokens behind each of these rows."""
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
    return {"input_ids": torch.tensor([[7, 8], [9, 5], [11, 6]])[rows], "attention_mask": mask[rows]}


def select(cache: Any, rows: Tensor, how: str) -> None:
    if how == "by hand":
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
    else:
        getattr(cache, how)(rows)


@every_case
@pytest.mark.parametrize("how", ["reorder_cache", "batch_select_indices", "by hand"])
@torch.no_grad()
def test_rows_in_another_order(name: str, method: str, how: str) -> None:
    """Each row goes on after its own prompt, and every later call after the rows as they are then."""
    model, inputs = first_turn(name)
    everything = torch.arange(3)
    with patch(model, 0.5, method=method):
        cache = model(**inputs, use_cache=True)[CACHE]
        copies = [copy.deepcopy(cache) for _ in range(4)]
        expected = model(**next_turn(inputs, everything), **{CACHE: cache}).logits
        orders = ([2, 0, 1], [1, 1, 0, 2, 2], [2], [0, 1, 2])
        for own, order in zip(copies, orders, strict=True):
            rows = torch.tensor(order)
            select(own, rows, how)
            logits = model(**next_turn(inputs, rows), **{CACHE: own}).logits
            torch.testing.assert_close(logits, expected[rows], rtol=0, atol=1e-9)
        # the first copy once more: back, with the tokens of the turn
        select(copies[0], torch.tensor([1, 2, 0]), how)
        word = {"input_ids": torch.tensor([[12], [13], [14]])}
        again, straight = model(**word, **{CACHE: copies[0]}).logits, model(**word, **{CACHE: cache}).logits
        torch.testing.assert_close(again, straight, rtol=0, atol=1e-9)


@torch.no_grad()
def test_rows_in_another_order_behind_a_window() -> None:
    """They are known by what is left of the prompt in the window; when that is gone too, they must be alike."""
    tiny = FAMILIES["mistral3"]
    text = {**tiny.settings["text_config"], "sliding_window": 40}
    model = tiny._replace(settings={**tiny.settings, "text_config": text}).make(torch.float64)
    inputs, rows = doubled(tiny.prompts([1, 2, 1])), torch.tensor([2, 0, 1])
    with patch(model, 0.5):
        cache = model(**inputs, use_cache=True)[CACHE]
        assert all(layer.is_sliding for layer in cache.layers) and cache.layers[0].keys.shape[2] < 39
        words = {"input_ids": torch.arange(5, 62).view(3, 19)}
        model(**words, **{CACHE: cache})
        assert cache.layers[0].keys.shape[2] == 39
        other = copy.deepcopy(cache)
        other.reorder_cache(rows)
        turn = {"input_ids": torch.tensor([[7, 8], [9, 5], [11, 6]])}
        expected = model(**turn, **{CACHE: cache}).logits
        logits = model(input_ids=turn["input_ids"][rows], **{CACHE: other}).logits
        torch.testing.assert_close(logits, expected[rows], rtol=0, atol=1e-9)
        with pytest.raises(UnsupportedError, match="prompts of different lengths, and holds no keys of them"):
            for _ in range(3):
                model(**words, **{CACHE: cache})
        alike = doubled(tiny.prompts([1], words=6))
        twice = {key: torch.cat((x, x)) for key, x in alike.items()}
        cache = model(**twice, use_cache=True)[CACHE]
        for _ in range(4):
            assert model(input_ids=words["input_ids"][:2], **{CACHE: cache}).logits.isfinite().all()


@every_case
@torch.no_grad()
def test_another_order_for_generate(name: str, method: str) -> None:
    """The ids say which prompts go on: they must be those of the rows."""
    model, inputs = first_turn(name)
    rows = torch.tensor([2, 0, 1])
    with patch(model, 0.5, method=method):
        cache = model(**inputs, use_cache=True)[CACHE]
        other = copy.deepcopy(cache)
        turn = next_turn(inputs, torch.arange(3))
        turn["input_ids"] = torch.cat((inputs["input_ids"], turn["input_ids"]), dim=1)
        if "mm_token_type_ids" in inputs:
            turn["mm_token_type_ids"] = (turn["input_ids"] == IMAGE).long()
        if "token_type_ids" in inputs:
            turn["token_type_ids"] = (turn["input_ids"] == IMAGE).long()
        moved = {key: x[rows] for key, x in turn.items()}
        expected = generate(model, turn, new=3, **{CACHE: cache})
        other.reorder_cache(rows)
        assert generate(model, moved, new=3, **{CACHE: other}).equal(expected[rows])


@torch.no_grad()
def test_several_answers_to_a_prompt_go_on() -> None:
    model, inputs = first_turn("llava")
    with patch(model, 0.5):
        torch.manual_seed(0)
        out = generate(model, inputs, new=3, do_sample=True, num_return_sequences=2, return_dict_in_generate=True)
        mask = torch.nn.functional.pad(inputs["attention_mask"].repeat_interleave(2, dim=0), (0, 3), value=1)
        word = torch.arange(20, 26)[:, None]
        given = {"input_ids": torch.cat((out.sequences, word), dim=1)}
        given["attention_mask"] = torch.nn.functional.pad(mask, (0, 1), value=1)
        pixels = {"pixel_values": _of_rows(inputs, [1, 2, 1])}
        expected = generate(model, {**given, **pixels}, new=3)
        assert generate(model, given, new=3, **{CACHE: out[CACHE]}).equal(expected)


def _of_rows(inputs: dict[str, Any], images: list[int]) -> Tensor:
    parts = inputs["pixel_values"].split(images)
    return torch.cat([part for part in parts for _ in range(2)])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("cut", [1, 3])
@torch.no_grad()
def test_the_end_of_a_prompt_is_cut_off_its_cache(name: str, cut: int) -> None:
    """What was cut off is given again: the last tokens of the prompt are text."""
    model, inputs = first_turn(name)
    with patch(model, 0.5, **({"positions": "keep"} if name == "llava" else {})):
        out = model(**inputs, use_cache=True)
        out[CACHE].crop(-cut)
        given = {"input_ids": inputs["input_ids"][:, -cut:], "attention_mask": inputs["attention_mask"]}
        logits = model(**given, **{CACHE: out[CACHE]}).logits
        torch.testing.assert_close(logits, out.logits[:, -cut:], rtol=0, atol=1e-9)


@torch.no_grad()
def test_what_cannot_be_followed_is_refused() -> None:
    model, inputs = first_turn("llava")
    turn = next_turn(inputs, torch.arange(3))
    with patch(model, 0.5):
        cache = model(**inputs, use_cache=True)[CACHE]
        other, short = copy.deepcopy(cache), copy.deepcopy(cache)
        other.layers[0].keys = other.layers[0].keys.flip(2)
        with pytest.raises(UnsupportedError, match="its keys are others than after that call"):
            model(**turn, **{CACHE: other})
        short.crop(-12)
        whole = {"input_ids": torch.cat((inputs["input_ids"], turn["input_ids"]), dim=1)}
        with pytest.raises(UnsupportedError, match="the cache was cut inside the images: it holds"):
            generate(model, {**whole, "attention_mask": turn["attention_mask"]}, new=2, **{CACHE: short})
