"""Hosts besides timm and transformers: torchvision, CLIP, DINO, video MAE, torch's encoder, vit-pytorch."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from helpers import assert_close, bound_attributes, randomised, tiny_vit
from promises import Family, check_promises, note
from tokenmerge.adapters.standins_clip import ClipStandIn, ClipTowerStandIn, NewOpenClipBlockStandIn
from tokenmerge.adapters.standins_dino import DinoStandIn, DinoV2StandIn
from tokenmerge.adapters.standins_video import VideoMAEStandIn
from tokenmerge.errors import AdapterMismatchError, AlreadyPatchedError, UnsupportedError, UnsupportedModelError

Make = Callable[[], nn.Module]
IMAGES = (2, 3, 32, 32)
VISION = {"layers": 4, "width": 32, "head_width": 8, "patch_size": 4, "image_size": 32, "mlp_ratio": 2.0}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2}


def _open_clip(**vision: Any) -> Any:
    """A small CLIP of open_clip; options go to its vision tower."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    return open_clip.CLIP(16, {**VISION, **vision}, TEXT)


def _custom_text_clip() -> Any:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    return open_clip.CustomTextCLIP(16, VISION, TEXT)


def _sequence_first_clip() -> nn.Module:
    model = _open_clip()
    from open_clip.transformer import Transformer

    model.visual.transformer = Transformer(32, 4, 4, 2.0, batch_first=False)
    return model  # type: ignore[no-any-return]


def _timm_tower() -> Any:
    """open_clip's wrapper around a timm model that pools by attention, as SigLIP does."""
    model = _custom_text_clip()
    from open_clip.timm_model import TimmModel

    model.visual = TimmModel("vit_tiny_patch16_224", embed_dim=16, pool="")
    model.visual.trunk = tiny_vit(num_classes=0, class_token=False, global_pool="map")
    model.visual.head = nn.Linear(32, 16)
    return model


def _torchvision(**options: Any) -> Any:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    settings = {"image_size": 32, "patch_size": 4, "num_layers": 4, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
    return models.VisionTransformer(**{**settings, "num_classes": 10, **options})


def _conv_stem() -> nn.Module:
    vit = pytest.importorskip("torchvision.models.vision_transformer", reason="torchvision is not installed")
    return _torchvision(conv_stem_configs=[vit.ConvStemConfig(8, 3, 2), vit.ConvStemConfig(16, 3, 2)])  # type: ignore[no-any-return]


def _lucidrains(name: str, **options: Any) -> Any:
    vit_pytorch = pytest.importorskip("vit_pytorch", reason="vit-pytorch is not installed")
    settings = {"image_size": 32, "patch_size": 4, "num_classes": 10, "dim": 32, "depth": 4, "heads": 4, "mlp_dim": 64}
    return getattr(vit_pytorch, name)(**{**settings, "dim_head": 6, **options})


def _dropping(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    return model


VARIANTS: dict[str, Make] = {
    "torchvision": _torchvision,
    "torchvision-representation": lambda: _torchvision(representation_size=24),
    "torchvision-conv-stem": _conv_stem,
    "torchvision-dropout": lambda: _torchvision(dropout=0.2, attention_dropout=0.2),
    "open-clip": _open_clip,
    "open-clip-tower": lambda: _open_clip().visual,
    "open-clip-layerscale": lambda: _open_clip(ls_init_value=0.5, no_ln_pre=True),
    "open-clip-sequence-first": _sequence_first_clip,
    "open-clip-avg": lambda: _open_clip(pool_type="avg"),
    "open-clip-avg-ln-after-pool": lambda: _open_clip(pool_type="avg", final_ln_after_pool=True),
    "open-clip-attention-pool": lambda: _open_clip(attentional_pool=True, attn_pooler_queries=5, attn_pooler_heads=4),
    "open-clip-custom-blocks": lambda: _open_clip(qk_norm=True, scale_attn=True, scale_fc=True, scale_heads=True),
    "open-clip-custom-text": _custom_text_clip,
    "open-clip-timm-siglip": _timm_tower,
    "openai-clip-tower": lambda: ClipTowerStandIn(patch_size=4),
    "open-clip-main-tower": lambda: ClipTowerStandIn(patch_size=4, make_block=NewOpenClipBlockStandIn),
    "dino": lambda: DinoStandIn(patch_size=4),
    "dino-dropout": lambda: _dropping(DinoStandIn(patch_size=4)),
    "dinov2": lambda: DinoV2StandIn(patch_size=4, registers=0),
    "dinov2-registers-in-chunks": lambda: DinoV2StandIn(patch_size=4, registers=4, chunks=2),
    "vit-pytorch-vit": lambda: _lucidrains("ViT"),
    "vit-pytorch-vit-mean": lambda: _lucidrains("ViT", pool="mean"),
    "vit-pytorch-vit-without-classifier": lambda: _lucidrains("ViT", num_classes=0),
    "vit-pytorch-vit-dropout": lambda: _lucidrains("ViT", dropout=0.2),
    "vit-pytorch-simple-vit": lambda: _lucidrains("SimpleViT"),
}
# where a variant stands on the page of what is supported
HEADINGS = {
    "torchvision": "torchvision",
    "open-clip": "open_clip",
    "openai": "CLIP of OpenAI's repository (stand-in)",
    "dino": "DINO and DINOv2 of their own repositories (stand-ins)",
    "vit-pytorch": "vit-pytorch",
}
TORCH = "torch.nn.TransformerEncoder"
every_variant = pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)


def _built(model: nn.Module) -> Any:
    return randomised(model).eval().double()


def _images() -> Tensor:
    return torch.randn(IMAGES).double()


def _first(out: Any) -> Tensor:
    while not isinstance(out, Tensor):
        out = out[0]
    return out


@pytest.mark.parametrize("name", VARIANTS)
def test_promises(name: str) -> None:
    heading = next(HEADINGS[start] for start in HEADINGS if name.startswith(start))
    model = _built(VARIANTS[name]())
    check_promises(model, _images(), r=6, output=_first, tolerance=1e-6, family=Family(heading, name))


def _check_refused(model: Any, match: str, family: Family) -> None:
    with pytest.raises(UnsupportedModelError, match=match) as refusal:
        tokenmerge.patch(model, r=2)
    note(family, "refused", str(refusal.value))


@every_variant
def test_training_mode_and_gradient_checkpointing(make: Make) -> None:
    model, x = randomised(make()).train(), torch.randn(IMAGES)
    tokenmerge.patch(model, r=6)
    switch = getattr(model, "set_grad_checkpointing", None)
    grads = []
    for enable in (False, True) if switch else (False,):
        if switch:
            switch(enable)
        model.zero_grad()
        _first(model(x)).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(grads[0]) > 20
    for plain, again in zip(grads[0], grads[-1], strict=True):
        assert_close(again, plain, 1e-6)


WHOLE: dict[str, Make] = {
    "open-clip": _open_clip,
    "open-clip-timm-siglip": _timm_tower,
    "openai-clip-tower": lambda: _Around(ClipStandIn().visual),
    "dinov2-classifier": lambda: _LinearProbe(DinoV2StandIn(patch_size=4)),
    "vit-pytorch-vit": lambda: _lucidrains("ViT"),
}


@pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE)
def test_copies_are_independent_and_survive_saving(make: Make) -> None:
    model, x = _built(make()), _images()
    unmerged = _first(model(x))
    tokenmerge.patch(model, r=4)
    merged = _first(model(x))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(_first(twin(x)), merged)
        tokenmerge.unpatch(twin)
        assert torch.equal(_first(twin(x)), unmerged) and torch.equal(_first(model(x)), merged)
        assert all("forward" not in module.__dict__ for module in twin.modules())


class _Around(nn.Module):
    """A model that holds a vision tower as CLIP does, and no text tower."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.visual(x)
        return out


@pytest.mark.parametrize("make", [WHOLE["openai-clip-tower"], WHOLE["dinov2-classifier"]], ids=["clip", "dinov2"])
def test_whole_models_compile_in_one_graph(make: Make) -> None:
    torch._dynamo.reset()
    model, x = _built(make()), _images()
    tokenmerge.patch(model, r=4)
    assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x), 1e-6)


# torchvision


@pytest.mark.parametrize(
    ("name", "tokens"), [("vit_b_16", 197), ("vit_l_32", 50), ("vit_h_14", 257)], ids=["b-16", "l-32", "h-14"]
)
def test_torchvision_layouts(name: str, tokens: int) -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    with torch.device("meta"):
        model = getattr(models, name)(num_classes=5)
    handle = tokenmerge.patch(model, r=2)
    assert handle.report().adapter == "torchvision_vit"
    assert handle.tokens[0] == tokens - 2 and handle.input_size == (3, 224, 224)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchvision_feature_extractors() -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    from torchvision.models.feature_extraction import create_feature_extractor
    from torchvision.models.vision_transformer import EncoderBlock

    model, x = _built(_torchvision()), _images()
    nodes = {"encoder.layers.encoder_layer_1": "middle", "heads.head": "logits"}
    leaves = {"leaf_modules": [EncoderBlock]}
    # one made before patching is a graph of its own and stays unmerged
    before = create_feature_extractor(model, ["heads.head"])
    unmerged = before(x)["heads.head"]
    with tokenmerge.patched(model, r=6) as handle:
        assert torch.equal(before(x)["heads.head"], unmerged)
        expected = model(x)
        with pytest.raises(torch.fx.proxy.TraceError):
            create_feature_extractor(model, ["heads.head"])
        merged = create_feature_extractor(model, nodes, tracer_kwargs=leaves)(x)
        assert merged["middle"].shape[1] == handle.tokens[1] and torch.equal(merged["logits"], expected)
    with tokenmerge.patched(model, r=6, restore="dense"):
        restored = create_feature_extractor(model, nodes, tracer_kwargs=leaves)(x)
        assert restored["middle"].shape == (2, 65, 32)
        assert_close(restored["logits"], expected, 1e-6)
    with pytest.raises(UnsupportedModelError, match=r"traced graph.*never calls.*leaf_modules"):
        tokenmerge.patch(before, r=6)


def test_torchvision_with_another_attention_is_refused() -> None:
    model = _torchvision()
    model.encoder.layers[1].self_attention = nn.MultiheadAttention(32, 4)
    with pytest.raises(UnsupportedModelError, match=r"self_attention of a EncoderBlock is a MultiheadAttention, not"):
        tokenmerge.patch(model, r=2)


# CLIP


def test_only_the_vision_tower_of_clip_is_patched() -> None:
    model, x = _built(_open_clip()), _images()
    text = torch.randint(1, 49, (2, 8))
    images, texts = model(x, text)[:2]
    attributes = [dict(block.__dict__) for block in model.transformer.resblocks]
    handle = tokenmerge.patch(model, r=6, prop_attn=True)
    assert handle.report().adapter == "open_clip" and handle.input_size == (3, 32, 32)
    assert [dict(block.__dict__) for block in model.transformer.resblocks] == attributes
    merged = model(x, text)
    assert torch.equal(merged[1], texts) and torch.equal(model.encode_text(text, normalize=True), texts)
    assert torch.equal(model.encode_image(x, normalize=True), merged[0])
    assert (merged[0] - images).abs().max() > 1e-3


@pytest.mark.parametrize("make", [_open_clip, _timm_tower], ids=["own-tower", "timm-tower"])
def test_intermediates_of_clip(make: Make) -> None:
    model, x = _built(make()), _images()
    expected = model.forward_intermediates(x)["image_intermediates"]
    tokenmerge.patch(model, r=6, prop_attn=True)
    merged = _first(model(x))
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
    model, x = _built(_open_clip(output_tokens=True, **options).visual), _images()
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
    model = _built(open_clip.CoCa(16, {**TEXT, "width": 16}, text, {**VISION, **pool}))
    x, words = _images(), torch.randint(1, 49, (2, 7))
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
    model, x = randomised(_open_clip(patch_dropout=0.5)).train(), torch.randn(IMAGES)

    def run() -> Tensor:
        torch.manual_seed(1)
        return _first(model(x))

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
    model = randomised(ClipStandIn() if name == "openai" else _open_clip()).eval()
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
    model, x, text = _built(ClipStandIn()), _images(), torch.randint(0, 19, (3, 6))
    family = Family(HEADINGS["openai"], "openai-clip")
    check_promises(model, x, text, r=3, output=_first, tolerance=1e-6, family=family)
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
    model = _open_clip(layers=[1, 1, 1, 1], width=8, head_width=8)
    for part in (model, model.visual):
        _check_refused(part, r"ModifiedResNet is convolutional: .* Choose a ViT", Family("open_clip", "ModifiedResNet"))


def test_text_towers_are_refused() -> None:
    standin = ClipStandIn()
    standin.visual.transformer = standin.transformer
    with pytest.raises(UnsupportedModelError, match=r"_ClipBlock has a mask or a cross-attention of its own"):
        tokenmerge.patch(standin, r=2)
    text = _custom_text_clip().text
    _check_refused(text, r"TextTransformer is a text tower: .*causal", Family("open_clip", "TextTransformer"))


def test_a_timm_tower_that_is_no_vit_is_refused() -> None:
    model = _timm_tower()
    model.visual.trunk = nn.Sequential(nn.Conv2d(3, 8, 3))
    with pytest.raises(UnsupportedModelError, match=r"no adapter for torch.nn.modules.container.Sequential"):
        tokenmerge.patch(model, r=2)


# DINO and DINOv2


def test_dino_hands_out_tokens_only_when_told_how() -> None:
    model, x = _built(DinoStandIn(patch_size=4)), _images()
    expected = model.get_intermediate_layers(x, n=2)
    handle = tokenmerge.patch(model, r=6)
    merged = model(x)
    for name in ("get_intermediate_layers", "get_last_selfattention"):
        with pytest.raises(UnsupportedError, match=rf"{name}\(\) hands out one token per place.*restore='dense'"):
            getattr(model, name)(x)
    handle.r = 0
    assert torch.equal(model.get_intermediate_layers(x, n=2)[0], expected[0])
    assert model.get_last_selfattention(x).shape == (2, 4, 65, 65)
    handle.remove()
    with tokenmerge.patched(model, r=6, restore="dense"):
        restored = model.get_intermediate_layers(x, n=2)
        assert [y.shape for y in restored] == [y.shape for y in expected]
        assert_close(restored[-1][:, 0], merged, 1e-6)
        with pytest.raises(UnsupportedError, match=r"block 3 was called with 'return_attention' while tokens are"):
            model.get_last_selfattention(x)


@pytest.mark.parametrize("chunks", [0, 2], ids=["list", "chunks"])
def test_dinov2_hands_out_every_token(chunks: int) -> None:
    model, x = _built(DinoV2StandIn(patch_size=4, chunks=chunks)), _images()
    plain = model(x, is_training=True)
    maps = model.get_intermediate_layers(x, n=2, reshape=True)
    handle = tokenmerge.patch(model, r=6, track=True, prop_attn=True)
    assert handle.prefix == 3 and len(handle.tokens) == 4
    features = model(x, is_training=True)
    assert {name: y.shape for name, y in features.items()} == {name: y.shape for name, y in plain.items()}
    assert torch.equal(model.forward_features(x)["x_norm_patchtokens"], features["x_norm_patchtokens"])
    groups = handle.groups
    with pytest.raises(UnsupportedError, match=r"get_intermediate_layers\(\) hands out one token per place"):
        model.get_intermediate_layers(x)
    handle.remove()
    simulated = tokenmerge.simulate(model, groups, x, is_training=True)
    for name, tokens in features.items():
        assert_close(tokens, simulated[name], 1e-6)
    with tokenmerge.patched(model, r=6, restore="dense", prop_attn=True):
        restored = model.get_intermediate_layers(x, n=2, reshape=True)
    assert [y.shape for y in restored] == [y.shape for y in maps] == [(2, 32, 8, 8)] * 2
    assert_close(restored[-1].flatten(2).mT, features["x_norm_patchtokens"], 1e-6)


@pytest.mark.parametrize("restore", [None, "dense", "merged"], ids=str)
def test_dinov2_does_not_take_lists_of_batches(restore: str | None) -> None:
    model, x = DinoV2StandIn().eval(), torch.randn(IMAGES)
    with (
        tokenmerge.patched(model, r=0, restore=restore),
        pytest.raises(UnsupportedError, match=r"list of batches .* one by one, or unpatch"),
    ):
        model([x, x], is_training=True)
    assert len(model([x, x], is_training=True)) == 2


class _LinearProbe(nn.Module):
    """The structure of DINOv2's classifiers: the class token and the mean patch of a backbone."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.linear_head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone.forward_features(x)
        mean = features["x_norm_patchtokens"].mean(dim=1)
        return self.linear_head(torch.cat((features["x_norm_clstoken"], mean), dim=1))


def test_dinov2_inside_a_classifier() -> None:
    model, x = _built(_LinearProbe(DinoV2StandIn(patch_size=4))), _images()
    check_promises(model, x, r=6, tolerance=1e-6, family=Family(HEADINGS["dino"], "dinov2-classifier"))
    handle = tokenmerge.patch(model, r=6)
    assert handle.report().adapter == "dinov2"
    with pytest.raises(UnsupportedError, match="get_intermediate_layers"):
        model.backbone.get_intermediate_layers(x)


def test_dinov2_that_drops_samples_in_its_own_way_is_refused() -> None:
    model = DinoV2StandIn()
    model.blocks[1].sample_drop_ratio = 0.3
    with pytest.raises(UnsupportedModelError, match=r"sample_drop_ratio=0.3.*drop_path_rate=0"):
        tokenmerge.patch(model, r=2)


class _Temperature(nn.Module):
    """An attention with a step of its own behind the projections."""

    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj, self.proj_drop = attn.num_heads, attn.qkv, attn.proj, attn.proj_drop
        self.attn_drop = attn.attn_drop
        self.inner = (attn,)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, weights = self.inner[0](x)
        return 1.1 * out, weights


def test_an_attention_with_a_step_of_its_own_is_caught() -> None:
    model = DinoStandIn()
    model.blocks[0].attn = _Temperature(model.blocks[0].attn)
    with pytest.raises(AdapterMismatchError, match=r"blocks\.0 .*does not behave as its adapter describes"):
        tokenmerge.patch(model, r=2)


# video


@pytest.mark.parametrize("cls_embed", [True, False], ids=["class-token", "no-class-token"])
@pytest.mark.parametrize("sep_pos_embed", [True, False], ids=["separate-positions", "joint-positions"])
def test_video_promises(cls_embed: bool, sep_pos_embed: bool) -> None:
    model = _built(VideoMAEStandIn(cls_embed=cls_embed, sep_pos_embed=sep_pos_embed, patch=(2, 8, 8)))
    family = Family("spatiotemporal MAE of its own repository (stand-in)", f"mae-st, {cls_embed=}, {sep_pos_embed=}")
    check_promises(model, torch.randn(2, 3, 8, 32, 32).double(), r=9, tolerance=1e-6, family=family)
    handle = tokenmerge.patch(model, r=9)
    assert handle.prefix == cls_embed and handle.input_size == (3, 8, 32, 32)
    assert handle.tokens[0] == 4 * 16 + cls_embed - 9
    assert any("off-the-shelf MAE checkpoint" in limit for limit in handle.report().limits)


def test_tokens_merge_across_frames() -> None:
    # an odd number of places: those of one are then on both sides of the matching
    frames, places = 8, 9
    model = _built(VideoMAEStandIn(frames=2 * frames, image_size=48))
    still = torch.randn(2, 3, 1, 48, 48).double().expand(2, 3, 2 * frames, 48, 48)
    with torch.no_grad():
        model.pos_embed_temporal.zero_()
    expected = model(still)
    handle = tokenmerge.patch(model, r=[36, 18, 9], track=True, prop_attn=True)
    # every frame holds the same tokens: merging equal ones changes nothing, down to one token for each place
    assert_close(model(still), expected, 1e-6)
    assert handle.tokens == [37, 19, 10, 10] and handle.sizes[:, 1:].eq(frames).all()
    for groups in handle.groups[-1]:
        by_frame = groups[1:].view(frames, places)
        assert (by_frame == by_frame[0]).all() and by_frame[0].unique().numel() == places


def test_video_with_another_attention_is_refused() -> None:
    model = VideoMAEStandIn()
    model.blocks[1].attn.requires_t_shape = True
    with pytest.raises(UnsupportedModelError, match=r"not that of spatiotemporal MAE.*one sequence of all the clip's"):
        tokenmerge.patch(model, r=2)
    del model.blocks[0].attn.q
    with pytest.raises(UnsupportedModelError, match=r"attention of a _Block is not that of spatiotemporal MAE"):
        tokenmerge.patch(model, r=2)


# torch.nn.TransformerEncoder


def _encoder(**options: Any) -> nn.TransformerEncoder:
    settings = {"dim_feedforward": 64, "dropout": 0.0, "batch_first": True, "norm_first": True}
    layer = nn.TransformerEncoderLayer(32, 4, **{**settings, **options})
    return nn.TransformerEncoder(layer, 4, norm=nn.LayerNorm(32), enable_nested_tensor=False)


class _Classifier(nn.Module):
    """A ViT as anyone writes it around torch's encoder."""

    def __init__(self, has_class_token: bool, encoder: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 4, 4)
        if has_class_token:
            self.cls_token = nn.Parameter(torch.randn(1, 1, 32))
        self.encoder = encoder
        self.classify = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).mT
        if not hasattr(self, "cls_token"):
            return self.classify(self.encoder(x).mean(dim=1))
        x = self.encoder(torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1))
        return self.classify(x[:, 0])


ENCODERS: dict[str, dict[str, Any]] = {
    "batch-first": {},
    "sequence-first": {"batch_first": False},
    "gelu": {"activation": "gelu"},
    "activation-module": {"activation": nn.Tanh()},
    "no-bias": {"bias": False},
    "dropout": {"dropout": 0.1},
    "sequence-first-dropout": {"dropout": 0.1, "batch_first": False},
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_promises(name: str) -> None:
    options = ENCODERS[name]
    model, x = _built(_encoder(**options)), torch.randn(2, 40, 32).double()
    x = x if options.get("batch_first", True) else x.transpose(0, 1)
    assert check_promises(model, x, r=6, tolerance=1e-6, family=Family(TORCH, name)) == [34, 28, 22, 16]
    with tokenmerge.patched(model.train(), r=6):
        model(x).sum().backward()


@pytest.mark.parametrize("has_class_token", [True, False], ids=["class-token", "mean"])
def test_a_model_around_an_encoder(has_class_token: bool) -> None:
    model, x = _built(_Classifier(has_class_token, _encoder())), _images()
    family = Family(TORCH, f"a model around one encoder, {has_class_token=}")
    check_promises(model, x, r=6, tolerance=1e-6, family=family)
    handle = tokenmerge.patch(model, r=6)
    assert handle.report().adapter == "torch_encoder" and handle.prefix == has_class_token
    assert handle.report().limits == [
        "tokens are put back in their places after the last block: a torch encoder hands out tokens by their place "
        f"(in front, {int(has_class_token)} are protected as class tokens)"
    ]


@pytest.mark.parametrize("prop_attn", [True, False], ids=["proportional", "plain"])
def test_padding_is_never_merged_with_tokens(prop_attn: bool) -> None:
    model, x = _built(_encoder()), torch.randn(2, 24, 32).double()
    lengths = (24, 15)
    padding = torch.stack([torch.arange(24) >= length for length in lengths])
    handle = tokenmerge.patch(model, r=3, prop_attn=prop_attn, track=True)
    merged, groups = model(x, src_key_padding_mask=padding), handle.groups
    for row, length in zip(groups[-1], lengths, strict=True):
        assert not set(row[:length].tolist()) & set(row[length:].tolist())
    assert handle.sizes.sum(dim=1).tolist() == [float(length) for length in lengths]
    # what stands in the padding does not matter
    other = x.masked_fill(padding[..., None], 7.0)
    assert_close(model(other, src_key_padding_mask=padding)[1, :15], merged[1, :15], 1e-6)
    handle.remove()
    if prop_attn:
        simulated = tokenmerge.simulate(model, groups, x, src_key_padding_mask=padding)
        assert_close(merged[0], simulated[0], 1e-6)
        assert_close(merged[1, :15], simulated[1, :15], 1e-6)


def test_masks_of_places_are_refused() -> None:
    model, x = _encoder().eval(), torch.randn(2, 12, 32)
    causal = nn.Transformer.generate_square_subsequent_mask(12)
    expected = model(x, mask=causal)
    handle = tokenmerge.patch(model, r=2)
    with pytest.raises(UnsupportedError, match=r"called with 'src_mask', 'is_causal' while tokens are merged"):
        model(x, mask=causal, is_causal=True)
    with pytest.raises(UnsupportedError, match=r"without a batch, \(12, 32\): give it as a batch of one"):
        model(x[0])
    handle.r = 0
    assert torch.equal(model(x, mask=causal), expected)


def test_encoders_that_cannot_be_merged_in_are_refused() -> None:
    post = _encoder(norm_first=False)
    _check_refused(post, r"norm_first=False, post-norm.*Only norm_first=True", Family(TORCH, "post-norm"))
    two = nn.ModuleDict({"image": _encoder(), "text": _encoder()})
    with pytest.raises(UnsupportedModelError, match=r"holds 2 encoders: image, text\. Patch one of them"):
        tokenmerge.patch(two, r=2)
    other = _encoder()
    other.layers[0] = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"layers are of class Identity"):
        tokenmerge.patch(other, r=2)
    odd = _encoder()
    odd.layers[0].self_attn = nn.MultiheadAttention(32, 4, kdim=16, vdim=16, batch_first=True)
    with pytest.raises(UnsupportedError, match="separate key/value widths"):
        tokenmerge.patch(odd, r=2)


def test_a_compiled_model_is_refused_with_what_to_patch() -> None:
    compiled = torch.compile(_Classifier(True, _encoder()), backend="eager")
    with pytest.raises(UnsupportedModelError, match="wraps a _Classifier: patch that one"):
        tokenmerge.patch(compiled, r=2)


# vit-pytorch


def test_vit_pytorch_layouts() -> None:
    handle = tokenmerge.patch(_lucidrains("ViT", channels=1), r=2)
    assert (handle.prefix, handle.grid, handle.input_size) == (1, (8, 8), (1, 32, 32))
    handle = tokenmerge.patch(_lucidrains("SimpleViT", image_size=(16, 32), patch_size=(4, 8)), r=2)
    assert (handle.prefix, handle.grid, handle.input_size) == (0, (4, 4), (3, 16, 32))
    handle = tokenmerge.patch(_lucidrains("ViT", image_size=(16, 32)), r=2)
    assert (handle.grid, handle.input_size, handle.tokens[0]) == (None, None, 31)


def test_other_models_of_vit_pytorch_are_refused() -> None:
    vit = _lucidrains("ViT")
    from vit_pytorch.cait import CaiT
    from vit_pytorch.extractor import Extractor

    size = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 32, "heads": 4, "mlp_dim": 64}
    cait = CaiT(**size, depth=2, cls_depth=1)
    reason = r"vit_pytorch.cait.CaiT is not described.*only ViT and SimpleViT"
    _check_refused(cait, reason, Family("vit-pytorch", "CaiT and others"))
    with pytest.raises(UnsupportedModelError, match=r"Extractor is not described.*Patch the ViT inside"):
        tokenmerge.patch(Extractor(vit), r=2)


def test_a_list_of_pairs_that_is_run_otherwise_is_caught() -> None:
    model = _lucidrains("ViT")

    class Twice(type(model.transformer)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    model.transformer.__class__ = Twice
    with pytest.raises(AdapterMismatchError, match=r"transformer does not behave as its adapter describes"):
        tokenmerge.patch(model, r=2)
    assert all("forward" not in module.__dict__ for module in model.modules())
