"""Models with an image tower and a text tower, patched in one call: images are merged, texts are not touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from helpers import assert_close, randomised

transformers = pytest.importorskip("transformers")
hf_models = pytest.importorskip("hf_models")

NAMES = ("clip", "metaclip2", "altclip", "chinese-clip", "siglip", "siglip2", "owlvit", "clipseg-model", "aimv2")


def _made(name: str) -> tuple[Any, dict[str, Any]]:
    """Return a model with two towers and its inputs."""
    if transformers.__version__ < "5" and name in ("clip", "metaclip2", "owlvit", "clipseg-model"):
        pytest.skip("the causal mask of transformers 4 overflows in double")
    case = hf_models.CASES[name]
    return case.make(), case.inputs()


def _features(model: Any, inputs: dict[str, Any]) -> Tensor:
    given = {
        name: inputs[name] for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes") if name in inputs
    }
    out = model.get_image_features(**given)
    return out if isinstance(out, Tensor) else out.pooler_output  # transformers 4 returns the tensor


def _answers(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    with torch.no_grad():
        out = model(**inputs)
        features = _features(model, inputs)
    return {
        "logits": out.logits_per_image,
        "image": out.image_embeds,
        "text": out.text_embeds,
        "get_image_features": features,
    }


@pytest.mark.parametrize("name", NAMES)
def test_one_call_patches_the_image_tower_alone(name: str) -> None:
    model, inputs = _made(name)
    own = _answers(model, inputs)
    with tokenmerge.patched(model, r=0) as handle:
        for what, got in _answers(model, inputs).items():
            assert torch.equal(got, own[what]), what
        handle.r = 3
        merged = _answers(model, inputs)
        report = handle.report()
        assert report.untouched == ["text_model"]
        assert "\nleft alone              text_model\n" in str(report)
        assert len(handle.tokens) == 4 and handle.tokens == sorted(handle.tokens, reverse=True)
    assert torch.equal(merged["text"], own["text"])
    for what in ("logits", "image", "get_image_features"):
        assert (merged[what] - own[what]).abs().max() > 1e-4, what
    with tokenmerge.patched(model.vision_model, r=3, restore="dense") as handle:
        assert handle.report().untouched == []
        alone = _answers(model, inputs)
    for what, got in alone.items():
        assert_close(got, merged[what], 1e-9)
    for what, got in _answers(model, inputs).items():
        assert torch.equal(got, own[what]), what


def test_features_of_images_equal_the_group_mean() -> None:
    model, inputs = _made("clip")
    with tokenmerge.patched(model, r=3, track=True, prop_attn=True) as handle, torch.no_grad():
        merged, groups, positions = _features(model, inputs), handle.groups, handle.positions
    simulated = tokenmerge.simulate(model, groups, positions=positions, **inputs)
    assert_close(merged / merged.norm(dim=-1, keepdim=True), simulated.image_embeds, 1e-6)


def test_open_clip_in_one_call() -> None:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 4, "head_width": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2}
    model = randomised(open_clip.CLIP(16, vision, text)).eval()
    images, words = torch.randn(2, 3, 32, 32), torch.randint(1, 60, (2, 8))
    run: Callable[[nn.Module], tuple[Tensor, ...]] = lambda model: model(images, words)  # noqa: E731
    with torch.no_grad():
        own = run(model)
        with tokenmerge.patched(model, r=3) as handle:
            merged = run(model)
            assert handle.report().untouched == ["transformer"] and handle.tokens == [14, 11, 8, 5]
        with tokenmerge.patched(model.visual, r=3):
            assert torch.equal(run(model)[0], merged[0])
        assert torch.equal(merged[1], own[1]) and (merged[0] - own[0]).abs().max() > 1e-4
        assert all(map(torch.equal, run(model), own))
