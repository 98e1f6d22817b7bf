"""Merging in towers that take all images as one sequence, inside the whole vision-language model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_vlm_families import by_hand, generate
from tiny_vlms import END, FAMILIES, IMAGE, NEWER, START

import tokenmerge
from helpers import assert_close
from promises import check_promises
from tokenmerge.errors import UnsupportedError, UnsupportedModelError
from tokenmerge.vlm import patch

pytest.importorskip("transformers", minversion="4.57")

NAMES = ("qwen2_vl", "qwen3_vl", "glm4v", "mistral3")
every_family = pytest.mark.parametrize("name", NAMES)


pytestmark = NEWER  # merging in these towers


def _logits(out: Any) -> torch.Tensor:
    return out.logits


@every_family
def test_logits_are_those_of_the_group_mean(name: str) -> None:
    tiny = FAMILIES[name]
    model, inputs = tiny.make(torch.float64), tiny.prompts([1, 2])
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.no_grad():
        own = model(**inputs).logits
        with tokenmerge.patched(model, r=0):
            assert torch.equal(model(**inputs).logits, own)
        assert check_promises(model, r=3, output=_logits, **inputs)[-1] < 45
        assert torch.equal(model(**inputs).logits, own)


@every_family
@torch.no_grad()
def test_merging_and_fewer_tokens(name: str) -> None:
    tiny = FAMILIES[name]
    model, inputs = tiny.make(), tiny.prompts([1, 2])
    plain = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    own = model(**inputs).logits
    with tokenmerge.patched(model, r=3, restore="dense"):
        merged = model(**inputs).logits
    with patch(model, 1.0, r=3) as handle:
        assert torch.equal(model(**inputs).logits, merged) and (merged - own).abs().max() > 1e-4
        assert handle.tower is not None and handle.tower.report().adapter in ("hf_qwen_vision", "hf_pixtral")
        assert handle.tower.report().untouched == ["model.language_model"]
    with patch(model, 0.5, r=3) as handle:
        answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert answer.shape == plain.shape and all(after < before for before, after in handle.visual_tokens)
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), plain)
    assert_close(model(**inputs).logits, own, 0.0)


@torch.no_grad()
def test_frames_of_a_video_are_merged_one_by_one() -> None:
    tiny = FAMILIES["qwen2_vl"]
    model = tiny.make()
    pixels, grid = torch.randn(2 * 48, 3 * 2 * 4 * 4), torch.tensor([[2, 8, 6]])
    with tokenmerge.patched(model, r=4, track=True) as handle:
        video = model.model.get_video_features(pixels, grid).pooler_output[0]
        assert handle.groups[-1].shape == (2, 48)
        frames = [model.model.get_video_features(part, grid // torch.tensor([2, 1, 1])) for part in pixels.chunk(2)]
        assert_close(torch.cat([frame.pooler_output[0] for frame in frames]), video, 1e-5)


def _two_sizes(name: str) -> dict[str, Any]:
    """A prompt with an image of 12 visual tokens, and one with an image of 6 and one of 12."""
    generator = torch.Generator().manual_seed(5)
    sizes = [(8, 6), (4, 6), (6, 8)]
    images = [[START, *[IMAGE] * (rows * columns // 4), END, 7 + rows] for rows, columns in sizes]
    rows = [[5, 6, *images[0]], [8, *images[1], *images[2]]]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if name == "mistral3":
        pixels = torch.randn(3, 3, 64, 64, generator=generator).double()
        return {**inputs, "pixel_values": pixels, "image_sizes": torch.tensor([[8 * r, 8 * c] for r, c in sizes])}
    grids = torch.tensor([[1, *size] for size in sizes])
    pixels = torch.randn(int(grids.prod(dim=1).sum()), 96, generator=generator).double()
    inputs |= {"mm_token_type_ids": (ids == IMAGE).long()}
    return {**inputs, "pixel_values": pixels, "image_grid_thw": grids}


@every_family
@torch.no_grad()
def test_images_of_two_sizes_in_one_call(name: str) -> None:
    """The tower merges each by itself, and of its tokens the language model is given fewer."""
    model, inputs = FAMILIES[name].make(torch.float64), _two_sizes(name)
    own = model(**inputs).logits
    with patch(model, 1.0, r=4) as handle:
        merged = model(**inputs).logits
        assert (merged - own).abs().max() > 1e-4
        handle.keep = 0.5
        logits, places = model(**inputs).logits, handle.places
        assert handle.visual_tokens == [(12, 6), (6, 3), (12, 6)]
        tokens = generate(model, inputs, new=3)
    with tokenmerge.patched(model, r=4, restore="dense"):
        assert_close(model(**inputs).logits, merged, 1e-9)
        for row, (expected, new) in enumerate(by_hand(model, inputs, places, new=3)):
            assert_close(logits[row][places[row] >= 0], expected, 1e-5)
            assert tokens[row, inputs["input_ids"].shape[1] :].tolist() == new
    assert model(**inputs).logits.equal(own)


@torch.no_grad()
def test_images_of_two_sizes_are_refused_where_their_rows_are_not_known() -> None:
    """Tables made before, for all images: they cannot be parted."""
    model = FAMILIES["qwen2_vl"].make()
    pixels, grid = torch.randn(48 + 24, 3 * 2 * 4 * 4), torch.tensor([[1, 8, 6], [1, 4, 6]])
    ends = torch.tensor([0, 48, 72], dtype=torch.int32)
    own = model.model.visual(pixels, grid, cu_seqlens=ends).pooler_output
    with tokenmerge.patched(model, r=4, restore="dense") as handle:
        with pytest.raises(UnsupportedError, match=r"of 48, 24 tokens .* one size in one call and others in another"):
            model.model.visual(pixels, grid, cu_seqlens=ends)
        handle.r = 0
        assert torch.equal(model.model.visual(pixels, grid, cu_seqlens=ends).pooler_output, own)


def test_windows_are_refused_and_keep_still_works() -> None:
    tiny = FAMILIES["qwen2_5_vl"]
    model, inputs = tiny.make(), tiny.prompts([1])
    with pytest.raises(UnsupportedModelError, match=r"inside windows .* keep=0\.25\), without r"):
        patch(model, 0.5, r=2)
    with patch(model, 0.5) as handle, torch.no_grad():
        model(**inputs)
        assert handle.visual_tokens == [(12, 6)]
