"""Merging in towers that take all images as one sequence, inside the whole vision-language model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_vlms import FAMILIES, NEWER

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


@torch.no_grad()
def test_images_of_two_sizes_are_refused_with_the_way_out() -> None:
    model = FAMILIES["qwen2_vl"].make()
    pixels, grid = torch.randn(48 + 24, 3 * 2 * 4 * 4), torch.tensor([[1, 8, 6], [1, 4, 6]])
    own = model.model.get_image_features(pixels, grid).pooler_output
    with tokenmerge.patched(model, r=4, restore="dense") as handle:
        with pytest.raises(UnsupportedError, match=r"of 48, 24 tokens .* one size in one call and others in another"):
            model.model.get_image_features(pixels, grid)
        handle.r = 0
        assert all(map(torch.equal, model.model.get_image_features(pixels, grid).pooler_output, own))


def test_windows_are_refused_and_keep_still_works() -> None:
    tiny = FAMILIES["qwen2_5_vl"]
    model, inputs = tiny.make(), tiny.prompts([1])
    with pytest.raises(UnsupportedModelError, match=r"inside windows .* keep=0\.25\), without r"):
        patch(model, 0.5, r=2)
    with patch(model, 0.5) as handle, torch.no_grad():
        model(**inputs)
        assert handle.visual_tokens == [(12, 6)]
