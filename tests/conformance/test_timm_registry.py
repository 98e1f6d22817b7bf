"""Every name that timm's registry holds for its ViT modules keeps the promises, or is refused with a reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tokenmerge
from helpers import answer, assert_close, randomised
from promises import Family, check_promises, note
from registry import build, names
from tokenmerge.errors import UnsupportedModelError
from windows_by_hand import check_windows

NAMES = names()
# name -> what the refusal says; none of them yet
REFUSED: dict[str, str] = {}


@pytest.mark.parametrize("name", sorted(NAMES.keys() - REFUSED.keys()))
def test_a_registered_model_keeps_the_promises(name: str) -> None:
    model, size = build(name)
    model = randomised(model).eval().double()
    family = Family(f"timm {NAMES[name]}", name)
    x = torch.randn(2, *size).double()
    if NAMES[name] == "vision_transformer_sam":
        check_windows(model, x, family=family)
        return
    check_promises(model, x, output=answer, family=family)
    if not tokenmerge.adapters.find(model).host.is_positional:
        _check_constant(model, torch.randn(2, 3, 1, 1).double().expand(2, *size))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_registered_model_is_refused_with_a_reason(name: str) -> None:
    model, _ = build(name)
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]) as refusal:
        tokenmerge.patch(model, r=2)
    note(Family(f"timm {NAMES[name]}", name), "refused", str(refusal.value))


def _check_constant(model: nn.Module, x: torch.Tensor) -> None:
    """Without positions all patches of a constant image are equal, and merging equal tokens changes nothing."""
    for name, parameter in model.named_parameters():
        if "pos_embed" in name:
            nn.init.zeros_(parameter)
    with torch.no_grad():
        patches = model.patch_embed(x)
        patches = patches if patches.dim() == 3 else patches.flatten(1, 2)
        if not torch.allclose(patches, patches[:, :1].expand_as(patches)):
            return  # a stem of padded convolutions sees the borders
        expected = answer(model(x))
        with tokenmerge.patched(model, r=6, prop_attn=True):
            assert_close(answer(model(x)), expected, 1e-6)
