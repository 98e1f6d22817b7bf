"""Hosts besides timm and transformers: torchvision, DINO, video MAE, vit-pytorch; what they share with CLIP."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from other_models import (
    HEADINGS,
    IMAGES,
    VARIANTS,
    LinearProbe,
    Make,
    built,
    check_refused,
    clip,
    images,
    lucidrains,
    timm_tower,
    torchvision_vit,
)
from torch import Tensor, nn

import tokenmerge
from helpers import answer, assert_close, randomised
from promises import Family, check_promises
from tokenmerge.errors import AdapterMismatchError, UnsupportedError, UnsupportedModelError
from tokenmerge.testing.models.clip import ClipStandIn
from tokenmerge.testing.models.dino import DinoStandIn, DinoV2StandIn
from tokenmerge.testing.models.video import VideoMAEStandIn

every_variant = pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_promises(name: str) -> None:
    heading = next(HEADINGS[start] for start in HEADINGS if name.startswith(start))
    model = built(VARIANTS[name]())
    check_promises(model, images(), r=6, output=answer, tolerance=1e-6, family=Family(heading, name))


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
        answer(model(x)).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(grads[0]) > 20
    for plain, again in zip(grads[0], grads[-1], strict=True):
        assert_close(again, plain, 1e-6)


WHOLE: dict[str, Make] = {
    "open-clip": clip,
    "open-clip-timm-siglip": timm_tower,
    "openai-clip-tower": lambda: _Around(ClipStandIn().visual),
    "dinov2-classifier": lambda: LinearProbe(DinoV2StandIn(patch_size=4)),
    "vit-pytorch-vit": lambda: lucidrains("ViT"),
}


@pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE)
def test_copies_are_independent_and_survive_saving(make: Make) -> None:
    model, x = built(make()), images()
    unmerged = answer(model(x))
    tokenmerge.patch(model, r=4)
    merged = answer(model(x))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(answer(twin(x)), merged)
        tokenmerge.unpatch(twin)
        assert torch.equal(answer(twin(x)), unmerged) and torch.equal(answer(model(x)), merged)
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
    model, x = built(make()), images()
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

    model, x = built(torchvision_vit()), images()
    nodes = {"encoder.layers.encoder_layer_1": "middle", "heads.head": "logits"}
    leaves = {"leaf_modules": [EncoderBlock]}
    # one made before patching is a graph of its own and stays unmerged
    before = create_feature_extractor(model, ["heads.head"])
    unmerged = before(x)["heads.head"]
    with tokenmerge.patched(model, r=6) as handle:
        assert torch.equal(before(x)["heads.head"], unmerged)
        expected = model(x)
        with pytest.raises(UnsupportedError, match="create_feature_extractor"):
            create_feature_extractor(model, ["heads.head"])
        # a graph is not the model's own forward: it gets every token
        graph = create_feature_extractor(model, nodes, tracer_kwargs=leaves)(x)
        assert graph["middle"].shape == (2, 65, 32) and handle.tokens[1] == 53
        assert_close(graph["logits"], expected, 1e-6)
    with tokenmerge.patched(model, r=6, restore="merged") as handle:
        merged = create_feature_extractor(model, nodes, tracer_kwargs=leaves)(x)
        assert merged["middle"].shape[1] == handle.tokens[1] and torch.equal(merged["logits"], expected)
    with tokenmerge.patched(model, r=6, restore="dense"):
        restored = create_feature_extractor(model, nodes, tracer_kwargs=leaves)(x)
        assert restored["middle"].shape == (2, 65, 32)
        assert_close(restored["logits"], expected, 1e-6)
    with pytest.raises(UnsupportedModelError, match=r"traced graph.*never calls.*leaf_modules"):
        tokenmerge.patch(before, r=6)


def test_torchvision_with_another_attention_is_refused() -> None:
    model = torchvision_vit()
    model.encoder.layers[1].self_attention = nn.MultiheadAttention(32, 4)
    with pytest.raises(UnsupportedModelError, match=r"self_attention of a EncoderBlock is a MultiheadAttention, not"):
        tokenmerge.patch(model, r=2)


# DINO and DINOv2


def test_dino_hands_out_tokens_only_when_told_how() -> None:
    model, x = built(DinoStandIn(patch_size=4)), images()
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
    model, x = built(DinoV2StandIn(patch_size=4, chunks=chunks)), images()
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


def test_dinov2_inside_a_classifier() -> None:
    model, x = built(LinearProbe(DinoV2StandIn(patch_size=4))), images()
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
    model = built(VideoMAEStandIn(cls_embed=cls_embed, sep_pos_embed=sep_pos_embed, patch=(2, 8, 8)))
    family = Family("spatiotemporal MAE of its own repository (stand-in)", f"mae-st, {cls_embed=}, {sep_pos_embed=}")
    check_promises(model, torch.randn(2, 3, 8, 32, 32).double(), r=9, tolerance=1e-6, family=family)
    handle = tokenmerge.patch(model, r=9)
    assert handle.prefix == cls_embed and handle.input_size == (3, 8, 32, 32)
    assert handle.tokens[0] == 4 * 16 + cls_embed - 9
    assert any("off-the-shelf MAE checkpoint" in limit for limit in handle.report().limits)


def test_tokens_merge_across_frames() -> None:
    # an odd number of places: those of one are then on both sides of the matching
    frames, places = 8, 9
    model = built(VideoMAEStandIn(frames=2 * frames, image_size=48))
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


# vit-pytorch


def test_vit_pytorch_layouts() -> None:
    handle = tokenmerge.patch(lucidrains("ViT", channels=1), r=2)
    assert (handle.prefix, handle.grid, handle.input_size) == (1, (8, 8), (1, 32, 32))
    handle = tokenmerge.patch(lucidrains("SimpleViT", image_size=(16, 32), patch_size=(4, 8)), r=2)
    assert (handle.prefix, handle.grid, handle.input_size) == (0, (4, 4), (3, 16, 32))
    handle = tokenmerge.patch(lucidrains("ViT", image_size=(16, 32)), r=2)
    assert (handle.grid, handle.input_size, handle.tokens[0]) == (None, None, 31)


def test_other_models_of_vit_pytorch_are_refused() -> None:
    vit = lucidrains("ViT")
    from vit_pytorch.cait import CaiT
    from vit_pytorch.extractor import Extractor

    size = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 32, "heads": 4, "mlp_dim": 64}
    cait = CaiT(**size, depth=2, cls_depth=1)
    reason = r"vit_pytorch.cait.CaiT is not described.*only ViT and SimpleViT"
    check_refused(cait, reason, Family("vit-pytorch", "CaiT and others"))
    with pytest.raises(UnsupportedModelError, match=r"Extractor is not described.*Patch the ViT inside"):
        tokenmerge.patch(Extractor(vit), r=2)


def test_a_list_of_pairs_that_is_run_otherwise_is_caught() -> None:
    model = lucidrains("ViT")

    class Twice(type(model.transformer)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    model.transformer.__class__ = Twice
    with pytest.raises(AdapterMismatchError, match=r"transformer does not behave as its adapter describes"):
        tokenmerge.patch(model, r=2)
    assert all("forward" not in module.__dict__ for module in model.modules())
