"""Multiply-accumulates of video and audio models: the published figures, counted without weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tokenmerge
from tokenmerge import flops
from tokenmerge.testing.models.video import VideoMAEStandIn

TOLERANCE = 0.002


@pytest.fixture(scope="module")
def video() -> nn.Module:
    """ViT-L on clips of 16 frames, 2 x 16 x 16 pixels to a token: 1569 with the class token."""
    with torch.device("meta"):
        return VideoMAEStandIn(
            frames=16, image_size=224, patch=(2, 16, 16), width=1024, depth=24, heads=16, num_classes=400
        )


# GMACs of the ToMe paper, one clip of Kinetics-400
@pytest.mark.parametrize(("r", "published"), [(0, 597.3), (55, 324.4), (65, 280.8), ((65, -1.0), 183.8)], ids=str)
def test_published_figures_of_video(video: nn.Module, r: Any, published: float) -> None:
    with tokenmerge.patched(video, r=r) as handle:
        assert handle.input_size == (3, 16, 224, 224)
        assert flops(video, (1, 3, 16, 224, 224)) / 1e9 == pytest.approx(published, rel=TOLERANCE)


def test_video_unpatched(video: nn.Module) -> None:
    assert flops(video, (1, 3, 16, 224, 224)) / 1e9 == pytest.approx(597.3, rel=TOLERANCE)


@pytest.fixture(scope="module")
def audio() -> nn.Module:
    """ViT-B on a spectrogram of 1024 x 128: 513 tokens with the class token."""
    vit = pytest.importorskip("timm.models.vision_transformer", reason="timm is not installed")
    # older versions of timm cannot be built on the meta device
    model = vit.VisionTransformer(img_size=(1024, 128), in_chans=1, num_classes=527, weight_init="skip")
    return model.to("meta")  # type: ignore[no-any-return]


# GMACs of the ToMe paper, one spectrogram of AudioSet
@pytest.mark.parametrize(("r", "published"), [(0, 48.5), (20, 36.28), (40, 24.67)], ids=str)
def test_published_figures_of_audio(audio: nn.Module, r: int, published: float) -> None:
    with tokenmerge.patched(audio, r=r) as handle:
        assert handle.tokens[0] == 64 * 8 + 1 - r
        assert flops(audio, (1, 1024, 128)) / 1e9 == pytest.approx(published, rel=TOLERANCE)
