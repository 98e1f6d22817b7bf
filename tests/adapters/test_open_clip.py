"""CLIP of open_clip and of OpenAI's repository: which tower is patched, what it hands out, what is refused."""

from __future__ import annotations

import pytest
import torch
from other_models import (
    HEADINGS,
    IMAGES,
    TEXT,
    VISION,
    Make,
    built,
    check_refused,
    clip,
    custom_text_clip,
    images,
    timm_tower,
)
from torch import Tensor, nn

import tokenmerge
from helpers import answer, assert_close, bound_attributes, randomised
from promises import Family, check_promises
from tokenmerge.errors import AlreadyPatchedError, UnsupportedError, UnsupportedModelError
from tokenmerge.testing.models.clip import ClipStandIn, ClipTowerStandIn, NewOpenClipBlockStandIn


def test_only_the_vision_tower_of_clip_is_patched() -> None:
    model, x = built(clip()), images()
    text = torch.randint(1, 49, (2, 8))
    before, texts = model(x, text)[:2]
    attributes = [dict(block.__dict__) for block in model.transformer.resblocks]
    handle = tokenmerge.patch(model, r=6, prop_attn=True)
    assert handle.report().adapter == "open_clip" and handle.input_size == (3, 32, 32)
    assert [dict(block.__dict__) for block in model.transformer.resblocks] == attributes
    merged = model(x, text)
    assert torch.equal(merged[1], texts) and torch.equal(model.encode_text(text, normalize=True), texts)
    assert torch.equal(model.encode_image(x, normalize=True), merged[0])
    assert (merged[0] - before).abs().max() > 1e-3


@pytest.mark.parametrize("make", [clip, timm_tower], ids=["own-tower", "timm-tower"])
def test_intermediates_of_clip(make: Make) -> None:
    model, x = built(make()), images()
    expected = model.forward_intermediates(x)["image_intermediates"]
    tokenmerge.patch(model, r=6, prop_attn=True)
    merged = answer(model(x))
    for part in (model, model.visual):
        with pytest.raises(UnsupportedError, match=r"forward_intermediates\(\) hands out one token per place"):
            part.forward_intermediates(x)
    tokenmerge.unpatch(model)
    with tokenmerge.patched(model, r=6, restore="dense", prop_attn=True):
        restored = model.forward_intermediates(x)
        assert [y.shape for y in restored["image_intermediates"]] == [y.shape for y in expected]
        assert_close(restored["image_features"], merged, 1e-6)
    assert bound_attributes(model) == []


@pytest.mark.parametrize("pool", ["tok", "avg", "none", "attention"])
def test_tokens_of_the_tower_stay_in_their_places(pool: str) -> None:
    pooling = {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 4}
    options = pooling if pool == "attention" else {"pool_type": pool}
    model, x = built(clip(output_tokens=True, **options).visual), images()
    pooled, tokens = model(x)
    handle = tokenmerge.patch(model, r=6, track=True, prop_attn=True)
    merged, restored = model(x)
    assert merged.shape == pooled.shape and restored.shape == tokens.shape
    assert any("put back in their places" in limit for limit in handle.report().limits)
    groups = handle.groups
    handle.remove()
    for got, expected in zip((merged, restored), tokenmerge.simulate(model, groups, x), strict=True):
        assert_close(got, expected, 1e-6)


def test_coca() -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    pool = {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 4, "output_tokens": True}
    text = {**TEXT, "embed_cls": True, "output_tokens": True, "width": 16}
    model = built(open_clip.CoCa(16, {**TEXT, "width": 16}, text, {**VISION, **pool}))
    x, words = images(), torch.randint(1, 49, (2, 7))
    check_promises(
        model,
        x,
        r=6,
        output=lambda out: torch.cat((out["image_features"][:, None], out["image_embs"]), dim=1),
        family=Family("open_clip", "coca"),
    )
    before = model(x, words)
    tokenmerge.patch(model, r=6)
    after = model(x, words)
    assert torch.equal(after["text_features"], before["text_features"])
    assert after["logits"].shape == before["logits"].shape and not torch.equal(after["logits"], before["logits"])


def test_patch_dropout_in_training() -> None:
    model, x = randomised(clip(patch_dropout=0.5)).train(), torch.randn(IMAGES)

    def run() -> Tensor:
        torch.manual_seed(1)
        return answer(model(x))

    expected = run()
    handle = tokenmerge.patch(model, r=0)
    assert torch.equal(run(), expected)
    handle.r = 6
    run().sum().backward()
    # half of the 64 patches, and the class token
    assert handle.tokens == [27, 21, 15, 9]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["openai", "open-clip"])
def test_clip_in_half_precision(name: str, dtype: torch.dtype) -> None:
    model = randomised(ClipStandIn() if name == "openai" else clip()).eval()
    for module in model.modules():
        # as both repositories do: norms stay in float32, and compute in it
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.MultiheadAttention)):
            module.to(dtype)
        elif name == "open-clip" and isinstance(module, nn.LayerNorm):
            from open_clip.transformer import LayerNormFp32

            module.__class__ = LayerNormFp32
    model.visual.proj.data = model.visual.proj.data.to(dtype)
    x = torch.randn(IMAGES).to(dtype)
    expected = model.encode_image(x)
    assert expected.dtype == dtype
    handle = tokenmerge.patch(model, r=0)
    assert torch.equal(model.encode_image(x), expected)
    handle.r = 2
    merged = model.encode_image(x)
    assert merged.dtype == dtype and merged.isfinite().all() and not torch.equal(merged, expected)


def test_clip_of_openai_as_a_whole() -> None:
    model, x, text = built(ClipStandIn()), images(), torch.randint(0, 19, (3, 6))
    family = Family(HEADINGS["openai"], "openai-clip")
    check_promises(model, x, text, r=3, output=answer, tolerance=1e-6, family=family)
    texts = model.encode_text(text)
    handle = tokenmerge.patch(model, r=3)
    assert torch.equal(model.encode_text(text), texts)
    assert handle.runners[0].block is model.visual.transformer.resblocks[0]


def test_a_metric_that_the_attention_of_clip_does_not_show() -> None:
    model = ClipTowerStandIn(make_block=NewOpenClipBlockStandIn)
    with pytest.raises(UnsupportedError, match=r"needs v, but _MaskedAttention has neither v_norm"):
        tokenmerge.patch(model, tokenmerge.ToMe(metric="v"), r=2)


def test_a_tower_is_not_patched_twice() -> None:
    model = ClipStandIn()
    tokenmerge.patch(model, r=2)
    with pytest.raises(AlreadyPatchedError, match=r"blocks of this ClipTowerStandIn are reduced already"):
        tokenmerge.patch(model.visual, r=2)
    tokenmerge.unpatch(model)
    tokenmerge.patch(model.visual, r=2)
    with pytest.raises(AlreadyPatchedError, match=r"blocks of this ClipStandIn are reduced already.*unpatch"):
        tokenmerge.patch(model, r=2)


def test_resnets_of_clip_are_refused() -> None:
    model = clip(layers=[1, 1, 1, 1], width=8, head_width=8)
    for part in (model, model.visual):
        check_refused(part, r"ModifiedResNet is convolutional: .* Choose a ViT", Family("open_clip", "ModifiedResNet"))


def test_text_towers_are_refused() -> None:
    standin = ClipStandIn()
    standin.visual.transformer = standin.transformer
    with pytest.raises(UnsupportedModelError, match=r"_ClipBlock has a mask or a cross-attention of its own"):
        tokenmerge.patch(standin, r=2)
    text = custom_text_clip().text
    check_refused(text, r"TextTransformer is a text tower: .*causal", Family("open_clip", "TextTransformer"))


def test_a_timm_tower_that_is_no_vit_is_refused() -> None:
    model = timm_tower()
    model.visual.trunk = nn.Sequential(nn.Conv2d(3, 8, 3))
    with pytest.raises(UnsupportedModelError, match=r"no adapter for torch.nn.modules.container.Sequential"):
        tokenmerge.patch(model, r=2)
