"""Models that answer with a class for every pixel: `eval` and `tune` count the pixels that keep their class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from helpers import randomised
from tokenmerge.data.labelled import Batches
from tokenmerge.errors import ConfigError
from tokenmerge.measure.quality import Judge, Question, answers_pixels
from tokenmerge.tools.evaluate import evaluate
from tokenmerge.tuning import clock

transformers = pytest.importorskip("transformers")


def _sizes(**more: Any) -> dict[str, Any]:
    towers = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    heads = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
    return {**towers, **heads, "image_size": 32, "patch_size": 8, "is_hybrid": False, "num_labels": 5, **more}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return randomised(transformers.DPTForSemanticSegmentation(transformers.DPTConfig(**_sizes()))).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(80, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def _same(model: nn.Module, images: Tensor, r: Any) -> Tensor:
    """Return the share of pixels of each image that keep their class."""
    with torch.no_grad():
        plain = model(images).logits.argmax(dim=1)
        with tokenmerge.patched(model, r=r):
            return (model(images).logits.argmax(dim=1) == plain).double().mean(dim=(1, 2))


def test_eval_says_how_many_pixels_keep_their_class(model: nn.Module, images: Tensor) -> None:
    batches = [(images[:8], torch.zeros(8, dtype=torch.long)), (images[8:12], torch.zeros(4, dtype=torch.long))]
    result = evaluate(model, Batches(batches, ["a", "b"]), rs=(0, 4))
    unmerged, merged = result.rows
    expected = 100 * _same(model, images[:12], 4).mean().item()
    assert unmerged["agreement %"] == 100.0 and "top-1 %" not in merged
    assert merged["agreement %"] == pytest.approx(expected, abs=0.006) and 20 < expected < 99.9
    (note,) = [note for note in result.notes if "pixels" in note]
    assert note.startswith("DPTForSemanticSegmentation answers with a class for each of 64 x 64 pixels: agreement %")


def test_the_cosine_of_a_large_map_with_itself_is_one() -> None:
    model, answers = nn.Identity(), torch.randn(1, 24, 500, 500)
    judge = Judge(Question(model, Batches([(answers[:, :3], torch.zeros(1).long())], ["a"]), answers.shape))
    judge.add(answers, answers.clone(), torch.zeros(1).long())
    assert (judge.figures()["cosine"], judge.figures()["error %"]) == (1.0, 0.0)


def test_tune_keeps_the_share_of_pixels(model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_ROUNDS", (2,))
    found = tokenmerge.tune(model, images, "agreement=40", methods=("tome",), budget=1, batch_size=16)
    assert found.reached and sum(found.config.r) > 0
    assert "agreement 100.0 %" not in found.report and "agreement" in found.report
    # of the whole set, and of the quarter that is reported
    assert found.figures["agreement %"] == pytest.approx(100 * _same(model, images, found.config.r).mean(), abs=5)
    assert 100 * _same(model, images, found.config.r).mean() > 40


def test_a_map_of_features_has_no_classes(images: Tensor) -> None:
    assert not answers_pixels(nn.Conv2d(3, 4, 1), (1, 4, 32, 32))
    config = transformers.DPTConfig(**_sizes())
    depth = randomised(transformers.DPTForDepthEstimation(config)).eval()
    with pytest.raises(ConfigError, match="compares classes, and this model answers with none"):
        tokenmerge.tune(depth, images, "agreement=90")
