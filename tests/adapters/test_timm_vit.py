"""timm's ViT beyond the plain block: parallel blocks, differential and gated attention, pools without a mask."""

from __future__ import annotations

import copy
import inspect
import io
from typing import Any

import pytest
import timm.layers
import timm.models.vision_transformer as vit
import torch
from torch import Tensor, nn

import tokenmerge
from helpers import assert_close, bound_attributes, randomised, tiny_vit
from promises import check_intermediates, check_promises
from tokenmerge import ToMe
from tokenmerge.errors import UnsupportedError, UnsupportedModelError

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SETTINGS: dict[str, dict[str, Any]] = {
    "things": {"block_fn": "ParallelThingsBlock", "init_values": 0.5},
    "things-qk-norm-registers": {"block_fn": "ParallelThingsBlock", "qk_norm": True, "reg_tokens": 4},
    "things-scale-norms": {"block_fn": "ParallelThingsBlock", "scale_attn_norm": True, "scale_mlp_norm": True},
    "scaling": {"block_fn": "ParallelScalingBlock", "init_values": 0.5},
    "scaling-qk-norm-registers": {"block_fn": "ParallelScalingBlock", "qk_norm": True, "reg_tokens": 1},
    "diff-scaling": {"block_fn": "DiffParallelScalingBlock", "init_values": 0.5},
    "diff-scaling-qk-norm": {"block_fn": "DiffParallelScalingBlock", "qk_norm": True, "qkv_bias": False},
    "diff-attention": {"attn_layer": "diff"},
    "diff-attention-qk-norm": {"attn_layer": "diff", "qk_norm": True, "scale_attn_norm": True},
    "diff-attention-post-norm": {"attn_layer": "diff", "block_fn": "ResPostBlock"},
    "diff-attention-things": {"attn_layer": "diff", "block_fn": "ParallelThingsBlock"},
    "prr": {"global_pool": "prr"},
    "prr-registers": {"global_pool": "prr", "reg_tokens": 2},
    "prr-without-class": {"global_pool": "prr", "class_token": False},
}
PARALLEL = ["things", "scaling", "diff-scaling"]


def _make(name: str, **options: Any) -> Any:
    options = {**SETTINGS[name], **options}
    block = options.pop("block_fn", "Block")
    if not hasattr(vit, block):
        pytest.skip(f"timm {timm.__version__} has no {block}")
    if "attn_layer" in options and "attn_layer" not in inspect.signature(vit.VisionTransformer).parameters:
        pytest.skip(f"timm {timm.__version__} has no choice of attention")
    if options.get("global_pool") == "prr" and not hasattr(timm.layers, "AttentionPoolPrr"):
        pytest.skip(f"timm {timm.__version__} has no AttentionPoolPrr")
    return tiny_vit(block_fn=getattr(vit, block), **{"depth": 3, **options}).double()


def _run(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_variant_keeps_the_promises(name: str, fused: bool) -> None:
    model = _make(name)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    check_promises(model, X, tolerance=1e-6)


def test_gated_attention_keeps_the_promises() -> None:
    if "gated" not in inspect.signature(timm.layers.Attention).parameters:
        pytest.skip(f"timm {timm.__version__} has no gated attention")
    model: Any = tiny_vit()
    for block in model.blocks:
        block.attn = timm.layers.Attention(32, num_heads=4, gated=True)
    check_promises(randomised(model).eval().double(), X, tolerance=1e-6)


@pytest.mark.parametrize("name", PARALLEL)
@pytest.mark.parametrize("metric", ["q", "v", "x"])
def test_every_metric_is_seen(name: str, metric: str) -> None:
    check_promises(_make(name), X, tolerance=1e-6, patch={"method": ToMe(metric=metric)})


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk-norm"])
@pytest.mark.parametrize("name", ["scaling", "diff-scaling"])
def test_what_is_seen_of_a_scaling_block_is_what_its_attention_uses(name: str, qk_norm: bool) -> None:
    # four heads and four tokens: a tap that mistakes one for the other would go unnoticed by its shape
    model = _make(name, qk_norm=qk_norm, num_heads=4)
    block, x = model.blocks[0], torch.randn(2, 4, 32, dtype=torch.float64)
    handle = tokenmerge.patch(model, _AllThree(), r=2)
    with torch.no_grad():
        handle.runners[0].tap(x, None)
        seen = handle.runners[0].tap.take()
        q, k, v = block.in_proj(block.in_norm(x)).split([128, 32, 32, 32], dim=-1)[1:]
        heads = 8 if name == "diff-scaling" else 4
        for got, part, norm in ((seen["q"], q, block.q_norm), (seen["k"], k, block.k_norm)):
            assert torch.equal(got, norm(part.reshape(2, 4, heads, -1)).transpose(1, 2))
        assert torch.equal(seen["v"], v.reshape(2, 4, 4, -1).transpose(1, 2))


class _AllThree(tokenmerge.Reduction):
    """Looks at q, k and v, and merges as ToMe does."""

    name = "all_three"
    needs = frozenset({"q", "k", "v"})

    def plan(self, view: Any, r: int) -> Any:
        return ToMe().plan(view, r)


def test_keys_of_all_parallel_attentions_count() -> None:
    model = _make("things")
    handle = tokenmerge.patch(model, r=2)
    tap = handle.runners[0].tap
    with torch.no_grad():
        tap(torch.randn(2, 5, 32, dtype=torch.float64), None)
    assert tap.take()["k"].shape == (2, 8, 5, 8)


@pytest.mark.parametrize("name", PARALLEL)
def test_a_parallel_block_is_captured_copied_and_saved(name: str) -> None:
    torch._dynamo.reset()
    model = _make(name, depth=2)
    unmerged = _run(model)
    tokenmerge.patch(model, r=3)
    expected = _run(model)
    assert_close(_run(torch.compile(model, fullgraph=True, backend="eager")), expected)
    assert_close(_run(torch.export.export(model, (X,)).module()), expected)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    tokenmerge.handle_of(twin).r = 0
    assert torch.equal(_run(twin), unmerged) and torch.equal(_run(loaded), expected)
    tokenmerge.unpatch(loaded)
    assert torch.equal(_run(loaded), unmerged) and bound_attributes(loaded) == []
    assert torch.equal(_run(model), expected)


@pytest.mark.parametrize("name", PARALLEL)
def test_a_parallel_block_trains(name: str) -> None:
    model = _make(name, drop_path_rate=0.5, proj_drop_rate=0.2, attn_drop_rate=0.2).train()
    tokenmerge.patch(model, r=3)
    model(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["things", "scaling", "diff-attention"])
def test_feature_maps_are_dense_or_refused(name: str) -> None:
    check_intermediates(_make(name), X)


def test_intermediate_layers_are_dense_or_refused() -> None:
    model = _make("things", reg_tokens=1)
    with (
        tokenmerge.patched(model, r=3),
        pytest.raises(UnsupportedError, match=r"get_intermediate_layers\(\) hands out"),
    ):
        model.get_intermediate_layers(X, n=2)
    with tokenmerge.patched(model, r=3, restore="dense"), torch.no_grad():
        layers = model.get_intermediate_layers(X, n=2)
        maps = model.forward_intermediates(X, indices=2, intermediates_only=True)
    assert len(layers) == 2
    for tokens, features in zip(layers, maps, strict=True):
        assert tokens.shape == (2, 64, 32) and torch.equal(tokens, features.flatten(2).mT)


def test_a_pool_without_a_mask_gets_every_token_in_its_place() -> None:
    report = tokenmerge.patch(_make("prr"), r=2).report()
    assert report.limits == [
        "tokens are put back in their places after the last block: AttentionPoolPrr takes no mask to weigh merged "
        "tokens by"
    ]


def test_a_pool_with_positions_of_its_own_gets_every_token_in_its_place() -> None:
    model: Any = tiny_vit(global_pool="map", reg_tokens=1)
    model.attn_pool = timm.layers.AttentionPoolLatent(32, num_heads=4, pos_embed="abs", feat_size=64)
    model = randomised(model).eval().double()
    check_promises(model, X, tolerance=1e-6)
    assert "adds position embeddings of its own" in tokenmerge.patch(model, r=2).report().limits[0]


def test_a_block_of_somebody_else_is_refused() -> None:
    class Strange(nn.Module):
        def __init__(self, dim: int, **_: Any) -> None:
            super().__init__()
            self.mix = nn.Linear(dim, dim)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mix(x)

    model = tiny_vit(block_fn=Strange)
    with pytest.raises(
        UnsupportedModelError, match=r"blocks of class .*Strange are not described.*timm's Block, .*CONTRIBUTING.md"
    ):
        tokenmerge.patch(model, r=2)
    assert bound_attributes(model) == []
