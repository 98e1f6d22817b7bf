"""Every model family keeps the promises of `tokenmerge.testing`, and timm's variants those of merging."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from helpers import answer, assert_close, randomised, tiny_of, tiny_vit
from tokenmerge.adapters import ADAPTERS
from tokenmerge.testing import check_adapter, tiny_model
from tokenmerge.testing.families import PROMISES
from tokenmerge.testing.lives import one_graph
from tokenmerge.testing.merging import FamilyCase
from tokenmerge.testing.models.plain import MAEStandIn, SwagStandIn

Make = Callable[[], nn.Module]
Family = Callable[[], tuple[nn.Module, Tensor]]


def _distilled() -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled

    model = VisionTransformerDistilled(
        img_size=32, patch_size=4, embed_dim=32, depth=4, num_heads=4, num_classes=10, qkv_bias=True
    )
    return randomised(model).eval()


def _respost() -> nn.Module:
    from timm.models.vision_transformer import ResPostBlock

    return tiny_vit(block_fn=ResPostBlock, init_values=0.5)


def _unfused() -> nn.Module:
    model = tiny_vit(qkv_bias=True)
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


VARIANTS: dict[str, Make] = {
    "vit-prefix1": lambda: tiny_vit(qkv_bias=True),
    "vit-unfused": _unfused,
    "deit-distilled-prefix2": _distilled,
    "deit3-layerscale": lambda: tiny_vit(init_values=0.5, no_embed_class=True),
    "dinov2-layerscale": lambda: tiny_vit(init_values=0.5),
    "dinov2-registers-prefix5": lambda: tiny_vit(init_values=0.5, reg_tokens=4, no_embed_class=True),
    "clip-pre-norm": lambda: tiny_vit(pre_norm=True, norm_layer=nn.LayerNorm),
    "siglip-map-prefix0": lambda: tiny_vit(class_token=False, global_pool="map"),
    "map-prefix1": lambda: tiny_vit(global_pool="map"),
    "map-prefix5": lambda: tiny_vit(global_pool="map", reg_tokens=4),
    "avg-prefix0": lambda: tiny_vit(class_token=False, global_pool="avg"),
    "avg-prefix1": lambda: tiny_vit(global_pool="avg"),
    "avg-prefix1-no-fc-norm": lambda: tiny_vit(global_pool="avg", fc_norm=False),
    "avg-prefix2": lambda: tiny_vit(global_pool="avg", reg_tokens=1),
    "avg-prefix5": lambda: tiny_vit(global_pool="avg", reg_tokens=4),
    "avg-with-prefix": lambda: tiny_vit(global_pool="avg", pool_include_prefix=True),
    "avgmax-prefix1": lambda: tiny_vit(global_pool="avgmax"),
    "max-prefix1": lambda: tiny_vit(global_pool="max"),
    "respost": _respost,
    "qk-norm": lambda: tiny_vit(qk_norm=True),
    "scale-norms": lambda: tiny_vit(scale_attn_norm=True, scale_mlp_norm=True),
    "mae-global-pool": lambda: randomised(MAEStandIn(patch_size=4)).eval(),
    "mae-class-token": lambda: randomised(MAEStandIn(patch_size=4, global_pool=False)).eval(),
    "swag-token": lambda: randomised(SwagStandIn(patch_size=4)).eval(),
    "swag-gap-prefix0": lambda: randomised(SwagStandIn(patch_size=4, classifier="gap")).eval(),
}
BY_NAME = {adapter.name: adapter for adapter in ADAPTERS}
WINDOWED = "it merges inside windows: blocks end with all tokens"
LENGTHS = "its own attention reads how many tokens each image has off a tensor: no graph holds that"
IMAGES = (
    "its own forward goes image by image: a graph of it is for one number of them (tests/adapters/test_hf_packed.py)"
)
ENDS = "its blocks are told where images end only while they merge; each is proved when it is patched"
TABLES = "its rotary tables ask for gradients, and the host gives them by name, which no reentrant checkpoint can take"
HOOKS = "a backbone that has run holds hooks of the host's that no pickle takes, patched or not"
# what cannot be promised of a family, with the reason
WITHOUT = {
    "hf_vitpose": {"copies": HOOKS},
    "hf_mlcd": {"checkpointing": TABLES},  # the other kind is checked in tests/adapters/test_hf_rotary.py
    "hf_qwen_vision": {"one_graph": LENGTHS, "export": LENGTHS},
    "hf_pixtral": {"one_graph": IMAGES, "export": IMAGES, "recomposed": ENDS},
    "timm_sam": {"group_mean": WINDOWED, "recomposed": WINDOWED},
}


@pytest.mark.parametrize("promise", PROMISES)
@pytest.mark.parametrize("name", BY_NAME)
def test_a_family_keeps_a_promise(name: str, promise: str) -> None:
    reason = WITHOUT.get(name, {}).get(promise)
    if reason:
        pytest.skip(reason)
    try:
        check_adapter(BY_NAME[name], only=[promise])
    except ModuleNotFoundError:
        tiny_of(BY_NAME[name])  # skips where the host is missing
        raise


every_variant = pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)
X = (3, 3, 32, 32)


def _run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return answer(model(x))


@every_variant
@pytest.mark.parametrize("promise", ["original", "recomposed"])
def test_a_variant_keeps_a_promise(make: Make, promise: str) -> None:
    check_adapter(make(), torch.randn(X), r=3, patch={"prop_attn": "auto"}, only=[promise])


@every_variant
@pytest.mark.parametrize("r", [5, (6, -1.0), 0.2])
def test_merging_equals_the_group_mean_simulation(make: Make, r: Any) -> None:
    report = check_adapter(make().double(), torch.randn(X).double(), r=r, tolerance=1e-6, only=["group_mean"])
    assert report is not None and report.tokens[-1] < report.tokens[0]


@every_variant
def test_constant_input_without_positions_is_unchanged(make: Make) -> None:
    model = make()
    for name, parameter in model.named_parameters():
        if "pos_embed" in name:
            nn.init.zeros_(parameter)
    x = torch.randn(2, 3, 1, 1).expand(2, 3, 32, 32)
    expected = _run(model, x)
    with tokenmerge.patched(model, r=6, prop_attn=True):
        assert_close(_run(model, x), expected, 1e-4)


@pytest.mark.parametrize("name", ["timm_vit", "hf_vit", "swag"])
@pytest.mark.parametrize(("is_dynamic", "track"), [(False, False), (False, True), (True, False)])
def test_compile_in_one_graph(name: str, is_dynamic: bool, track: bool) -> None:
    model, x = tiny_model(name)
    answers = FamilyCase(model, (x,), {}, {"track": track}, 2, answer, 1e-5, True, BY_NAME[name])
    one_graph(answers, is_dynamic)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile_with_inductor(mode: str) -> None:
    torch._dynamo.reset()
    model, x = tiny_vit(depth=2), torch.randn(2, 3, 32, 32)
    tokenmerge.patch(model, r=2)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, mode=mode)
    inputs = [x, torch.cat((x, x.flip(0)))]
    for batch in inputs:
        assert_close(_run(compiled, batch), _run(model, batch), 1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in inputs:
            batch = torch.randn_like(batch)
            assert_close(_run(compiled, batch), _run(model, batch), 1e-4)


def test_timm_gradient_checkpointing() -> None:
    model, x = tiny_vit(init_values=0.5).train(), torch.randn(2, 3, 32, 32)
    tokenmerge.patch(model, r=3)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert_close(again, plain, 1e-6)


def test_every_variant_is_supported() -> None:
    for make in VARIANTS.values():
        assert tokenmerge.supports(make())
