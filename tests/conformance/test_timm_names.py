"""Registered timm models of every line that is claimed, built without weights: they patch, merge and add up."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import model_entrypoint

import tokenmerge

# one or two of each line
NAMES = [
    "vit_tiny_patch16_224",
    "vit_base_patch16_384",
    "vit_huge_patch14_224",
    "vit_small_patch32_224",
    "deit_small_patch16_224",
    "deit_base_distilled_patch16_224",
    "deit3_large_patch16_384",
    "vit_small_patch14_dinov2",
    "vit_base_patch14_reg4_dinov2",
    "vit_giant_patch14_dinov2",
    "vit_base_patch16_clip_224",
    "vit_large_patch14_clip_336",
    "vit_base_patch16_siglip_224",
    "vit_so400m_patch14_siglip_384",
    "vit_so150m_patch16_reg4_gap_256",
    "vit_so150m_patch16_reg4_map_256",
    "vit_medium_patch16_gap_256",
    "vit_base_patch16_gap_224",
    "vit_srelpos_small_patch16_224",
    "vit_base_patch16_xp_224",
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "vit_small_r26_s32_224",
    "vitamin_small_224",
    "test_vit3",
]
REFUSED = {"resnet18": "no adapter for", "swin_tiny_patch4_window7_224": "windows that partition the full grid"}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_a_registered_model_patches_merges_and_counts(name: str) -> None:
    assert model_entrypoint(name).__module__.startswith("timm.models.")
    with torch.device("meta"):
        model = timm.create_model(name, depth=4)  # of full width and size; counting takes time for every block
    size = model.pretrained_cfg["input_size"]
    unmerged = tokenmerge.flops(model, size)
    handle = tokenmerge.patch(model, r=2)
    assert handle.input_size == tuple(size)
    first = handle.grid[0] * handle.grid[1] + handle.prefix  # type: ignore[index]
    assert handle.tokens == [first - 2 * (i + 1) for i in range(len(handle.tokens))]
    assert 0.6 * unmerged < tokenmerge.flops(model, size) < unmerged
    handle.remove()
    assert tokenmerge.flops(model, size) == unmerged


@pytest.mark.parametrize("name", REFUSED)
def test_a_registered_model_of_another_kind_is_refused(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(tokenmerge.TokenMergeError, match=REFUSED[name]):
        tokenmerge.patch(model, r=2)
