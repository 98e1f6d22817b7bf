"""Families that merging does not fit: each is refused with its own reason, and nothing else is by accident."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

import tokenmerge
from helpers import tiny_vit
from tokenmerge.adapters import find
from tokenmerge.adapters.refused import REFUSED
from tokenmerge.errors import UnsupportedModelError

TIMM = {
    "swin_tiny_patch4_window7_224": "windows that partition the full grid",
    "swinv2_tiny_window8_256": "windows that partition the full grid",
    "swinv2_cr_tiny_ns_224": "windows that partition the full grid",
    "gcvit_xxtiny": "windows that partition the full grid",
    "nest_tiny": "windows that partition the full grid",
    "tiny_vit_5m_224": "between attention and MLP there is a convolution",
    "twins_pcpvt_small": "keys that are pooled",
    "davit_tiny": "every second block attends between channels",
    "xcit_nano_12_p16_224": "local patch interaction is a convolution",
    "edgenext_xx_small": "attention is between channels",
    "hiera_tiny_224": "mask units",
    "sam2_hiera_tiny": "mask units",
    "mvitv2_tiny": "keys and values are convolved and pooled",
    "pvt_v2_b0": "keys and values are convolved and pooled",
    "levit_128s": "every second row and column",
    "pit_ti_224": "pool patches by strided convolutions",
    "convit_tiny": "second softmax",
    "crossvit_tiny_240": "different patch sizes at once",
    "tnt_s_patch16_224": "pixel tokens inside a patch",
    "coat_tiny": "attention is factorised",
    "volo_d1_224": "outlook attention",
    "maxvit_tiny_tf_224": "two-dimensional feature map",
    "coatnet_0_224": "two-dimensional feature map",
    "efficientformer_l1": "two-dimensional feature map",
    "efficientformerv2_s0": "two-dimensional feature map",
    "efficientvit_b0": "two-dimensional feature map",
    "efficientvit_m0": "two-dimensional feature map",
    "fastvit_t8": "two-dimensional feature map",
    "caformer_s18": "two-dimensional feature map",
    "nextvit_small": "two-dimensional feature map",
    "visformer_tiny": "two-dimensional feature map",
    "focalnet_tiny_srf": "no attention over tokens",
    "mixer_s32_224": "no attention over tokens",
}
TRANSFORMERS = {
    "SwinModel": "windows that partition the full grid",
    "Swinv2Model": "windows that partition the full grid",
    "DonutSwinModel": "windows that partition the full grid",
    "HieraModel": "mask units",
    "Sam3ViTModel": "tokens stand as a full grid",
    "VideoPrismVisionModel": "the patches of one frame and a second one the frames of one place",
    "PvtModel": "keys and values are convolved and pooled",
    "PvtV2Model": "keys and values are convolved and pooled",
    "SegformerModel": "keys and values are convolved and pooled",
    "LevitModel": "every second row and column",
    "CvtModel": "keys and values are convolutions",
    "MobileViTModel": "two-dimensional feature map",
    "SwiftFormerModel": "two-dimensional feature map",
    "FocalNetModel": "no attention over tokens",
    "PoolFormerModel": "no attention over tokens",
}
TORCHVISION = {
    "swin_t": "windows that partition the full grid",
    "maxvit_t": "every block begins with a convolution",
    "video.mvit_v2_s": "keys and values are convolved and pooled",
}


def _refuses(model: nn.Module, reason: str) -> None:
    assert not tokenmerge.supports(model)
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    with pytest.raises(UnsupportedModelError) as error:
        tokenmerge.patch(model, r=2)
    message = str(error.value)
    assert message.startswith(f"tokens cannot be merged in {name}: ") and reason in message
    assert "keeps one plain sequence of tokens" in message
    assert "_tokenmerge_handle" not in model.__dict__


@pytest.mark.parametrize("name", TIMM)
def test_a_family_of_timm_is_refused_with_its_reason(name: str) -> None:
    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    except (NotImplementedError, RuntimeError):  # older versions compute tables while they are built
        model = timm.create_model(name)
    _refuses(model, TIMM[name])


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_family_of_transformers_is_refused_with_its_reason(name: str) -> None:
    cls: Any = getattr(pytest.importorskip("transformers"), name, None)
    if cls is None:
        pytest.skip(f"this transformers has no {name} yet")
    with torch.device("meta"):
        model = cls(cls.config_class())
    _refuses(model, TRANSFORMERS[name])


@pytest.mark.parametrize("name", TORCHVISION)
def test_a_family_of_torchvision_is_refused_with_its_reason(name: str) -> None:
    module: Any = pytest.importorskip("torchvision.models")
    for part in name.split("."):
        module = getattr(module, part)
    with torch.device("meta"):
        model = module()
    _refuses(model, TORCHVISION[name])


@pytest.mark.parametrize("start", REFUSED)
def test_every_row_is_found_by_the_class_name_wherever_it_is_from(start: str) -> None:
    base = type(f"{start}ForSomething", (nn.Module,), {})
    for cls in (base, type("Mine", (base,), {})):
        with pytest.raises(UnsupportedModelError) as error:
            find(cls())
        assert REFUSED[start] in str(error.value)


@pytest.mark.parametrize("name", ["NestedThing", "NativeViT", "Swinging", "MySwin", "TNTs"])
def test_a_name_that_only_looks_alike_is_just_unknown(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="no adapter for"):
        find(type(name, (nn.Module,), {})())


def test_what_an_adapter_describes_is_never_refused_by_its_name() -> None:
    class Swin(type(tiny_vit())):  # type: ignore[misc]
        pass

    model = tiny_vit()
    model.__class__ = Swin
    assert find(model).name == "timm_vit"


def test_each_reason_is_a_clause_that_ends_in_no_stop() -> None:
    for start, reason in REFUSED.items():
        assert reason[0].islower() and not reason.endswith("."), start
        assert len(reason) > 60, start
