"""timm's ViTs with relative positions (BEiT, vit_relpos): the bias between two tokens follows the tokens left."""

from __future__ import annotations

import copy
import inspect
import io
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.models.beit import Attention, Beit
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from torch import Tensor, nn

import tokenmerge
from helpers import assert_close, randomised, run_in_threads
from promises import check_intermediates, check_promises
from tokenmerge import ToMe
from tokenmerge._intercept.pair_bias import pairs
from tokenmerge.errors import UnsupportedModelError

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TABLE, SHARED = {"use_rel_pos_bias": True}, {"use_shared_rel_pos_bias": True}
BEIT: dict[str, dict[str, Any]] = {
    "registered": {**TABLE, "use_abs_pos_emb": False, "init_values": 0.5},
    "absolute-too": {**TABLE, "global_pool": "token"},
    "absolute-only": {},
    "shared": {**SHARED, "init_values": 0.5},
    "shared-token": {**SHARED, "global_pool": "token", "use_abs_pos_emb": False},
    "own-and-shared": {**TABLE, **SHARED},
    "no-qkv-bias": {**TABLE, "qkv_bias": False},
    "swiglu-scaled": {**TABLE, "swiglu_mlp": True, "scale_mlp": True},
    "no-fc-norm": {**TABLE, "use_fc_norm": False},
    "oblong": {**TABLE, "img_size": (32, 24)},
}
RELPOS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "mlp-swin": {"rel_pos_type": "mlp-swin", "rel_pos_dim": 8},
    "mlp-class-token": {"class_token": True, "global_pool": "token"},
    "bias": {"rel_pos_type": "bias"},
    "bias-class-token-average": {"rel_pos_type": "bias", "class_token": True},
    "shared-mlp": {"shared_rel_pos": True, "fc_norm": True},
    "shared-bias-class-token": {"shared_rel_pos": True, "rel_pos_type": "bias", "class_token": True},
    "qk-norm": {"qk_norm": True, "rel_pos_type": "bias"},
    "post-norm": {"block_fn": ResPostRelPosBlock, "rel_pos_type": "bias"},
    "post-norm-shared": {"block_fn": ResPostRelPosBlock, "shared_rel_pos": True},
}
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{f"beit-{name}": (Beit, options) for name, options in BEIT.items()},
    **{f"relpos-{name}": (VisionTransformerRelPos, options) for name, options in RELPOS.items()},
}
SOME = ["beit-registered", "beit-shared", "beit-own-and-shared", "relpos-mlp", "relpos-shared-bias-class-token"]


def _make(name: str, fused: bool = True, **more: Any) -> Any:
    cls, options = VARIANTS[name]
    settings = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 10}
    unknown = sorted(set(options) - set(inspect.signature(cls).parameters))
    if unknown:
        pytest.skip(f"timm {timm.__version__} has no {', '.join(unknown)}")
    model = cls(**{**settings, **options, **more})
    for block in model.blocks:
        block.attn.fused_attn = fused
    return randomised(model).eval().double()


def _run(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_keeps_the_promises(name: str, fused: bool) -> None:
    model = _make(name, fused)
    x = X[..., : model.patch_embed.img_size[1]]
    expected = _run(model, x)
    with tokenmerge.patched(model, r=0):
        assert torch.equal(_run(model, x), expected)
    check_promises(model, x, tolerance=1e-6)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("metric", ["q", "v", "x"])
def test_every_metric_is_seen(name: str, metric: str) -> None:
    check_promises(_make(name), X, tolerance=1e-6, patch={"method": ToMe(metric=metric)})


@pytest.mark.parametrize("name", SOME)
def test_feature_maps_are_dense_or_refused(name: str) -> None:
    check_intermediates(_make(name), X)


def test_pairs_are_taken_one_by_one() -> None:
    table, kept = torch.randn(1, 3, 5, 5), torch.tensor([[0, 2, 4], [3, 1, 4]])
    for given in (table, table[0]):
        got = pairs(given, kept)
        assert got.shape == (2, 3, 3, 3)
        for image, places in enumerate(kept.tolist()):
            for query, i in enumerate(places):
                for key, j in enumerate(places):
                    assert torch.equal(got[image, :, query, key], table[0, :, i, j])


@pytest.mark.parametrize(("name", "method"), [("beit-registered", "_get_rel_pos_bias"), ("relpos-bias", "get_bias")])
def test_the_bias_that_the_attention_gets_is_that_of_the_places_kept(name: str, method: str) -> None:
    model = _make(name)
    owners = [block.attn if name.startswith("beit") else block.attn.rel_pos for block in model.blocks]
    with torch.no_grad():
        table = getattr(owners[1], method)()[0]
    handle = tokenmerge.patch(model, r=5, prop_attn=True, track=True)
    seen: list[Tensor] = []
    inner = owners[1].__dict__[method]
    owners[1].__dict__[method] = lambda: seen.append(inner()) or seen[-1]
    _run(model)
    size = torch.stack([torch.bincount(groups) for groups in handle.groups[0]])
    assert seen[0].shape == (2, 4, handle.tokens[0], handle.tokens[0])
    for image, places in enumerate(handle.positions[0]):
        expected = table[:, places][:, :, places] + size[image].log()
        assert_close(seen[0][image], expected)
    assert torch.equal(getattr(owners[1], method)()[0], table), "outside of a block it is that of all places"


def test_beits_keys_are_seen_with_their_biases() -> None:
    model = _make("beit-registered")
    attn, x = model.blocks[0].attn, torch.randn(2, 65, 32, dtype=torch.float64)
    handle = tokenmerge.patch(model, ToMe(metric="v"), r=2)
    with torch.no_grad():
        handle.runners[0].tap(x, None)
        seen = handle.runners[0].tap.take()
        expected = x @ attn.qkv.weight[64:].T + attn._parameters["v_bias"]
    assert list(seen) == ["v"]
    assert_close(seen["v"], expected.view(2, 65, 4, 8).transpose(1, 2))


@pytest.mark.parametrize("separate", [False, True], ids=["together", "separate"])
def test_beits_biases_stay_parameters(separate: bool) -> None:
    model = _make("beit-registered")
    for block in model.blocks:
        block.attn.qkv_bias_separate = separate
    expected, attn = _run(model), model.blocks[0].attn
    names, q_bias = [name for name, _ in model.named_parameters()], attn.q_bias
    handle = tokenmerge.patch(model, r=0)
    assert torch.equal(_run(model), expected)
    assert [name for name, _ in model.named_parameters()] == names
    assert attn.q_bias is q_bias, "whoever shards, prunes or wraps the parameter finds it"
    handle.r = 3
    model.train()
    model(X).square().sum().backward()
    assert q_bias.grad is not None and q_bias.grad.abs().sum() > 0
    with torch.no_grad():
        q_bias += 1
    moved = _run(model)
    handle.remove()
    assert attn.q_bias is q_bias
    with tokenmerge.patched(model, r=3):
        assert torch.equal(_run(model), moved)
    check_promises(model.eval(), X, tolerance=1e-6)


class _Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def test_beits_biases_may_be_made_by_a_parametrization() -> None:
    model = _make("beit-registered")
    handle = tokenmerge.patch(model, r=3)
    before = _run(model)
    for block in model.blocks:
        nn.utils.parametrize.register_parametrization(block.attn, "q_bias", _Half())
    after = _run(model)
    handle.remove()
    for block in model.blocks:
        nn.utils.parametrize.remove_parametrizations(block.attn, "q_bias")
    with tokenmerge.patched(model, r=3):
        assert_close(_run(model), after)
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("where", ["instance", "class"])
def test_beits_attention_in_a_forward_of_somebody_elses(where: str) -> None:
    model = _make("beit-registered")
    with tokenmerge.patched(model, r=3):
        expected = _run(model)
    for block in model.blocks:
        attn = block.attn
        if where == "instance":
            attn.forward = partial(_handed_on, attn.forward)
        else:
            attn.__class__ = _Own
    with tokenmerge.patched(model, r=3):
        assert_close(_run(model), expected)


def _handed_on(forward: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
    out: Tensor = forward(x, shared_rel_pos_bias)
    return out


class _Own(Attention):
    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        return super().forward(x, shared_rel_pos_bias)


@pytest.mark.parametrize("name", SOME)
def test_a_variant_is_captured_copied_and_saved(name: str) -> None:
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
    assert torch.equal(_run(loaded), unmerged)
    assert torch.equal(_run(model), expected)


@pytest.mark.parametrize("name", SOME)
def test_threads_and_checkpointing(name: str) -> None:
    model = _make(name)
    tokenmerge.patch(model, r=3)
    inputs = [torch.randn(1 + i, 3, 32, 32, dtype=torch.float64) for i in range(4)]
    expected, wrong = [_run(model, x) for x in inputs], []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(10) if not torch.equal(_run(model, inputs[i]), expected[i]))

    run_in_threads(work, 4)
    assert wrong == []
    grads = []
    for enable in (False, True):
        model.train().set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(0)
        model(X).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert_close(again, plain, 1e-6)


@pytest.mark.parametrize("name", ["relpos-mlp", "relpos-shared-mlp"])
def test_attaching_in_train_mode_does_not_move_the_random_state(name: str) -> None:
    # the MLP that gives these biases drops out
    model = _make(name).train()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    tokenmerge.patch(model, r=3)
    assert torch.equal(torch.rand(3), expected)


def test_merged_tokens_are_handed_out_as_they_are() -> None:
    # average pooling weighs them in forward_head, not in what is handed out
    model = _make("beit-registered")
    with tokenmerge.patched(model, r=3, restore="merged", track=True) as handle, torch.no_grad():
        merged = model.forward_features(X)
        size = handle.sizes[:, 1:, None].double()
        mean = (merged[:, 1:] * size).sum(dim=1) / size.sum(dim=1)
        assert_close(model(X), model.head(model.fc_norm(mean)))


@pytest.mark.parametrize(
    ("name", "text"),
    [("beit-registered", r"Beit has Block\."), ("relpos-bias", r"timm's Block, .*CONTRIBUTING.md")],
    ids=["beit", "relpos"],
)
def test_a_block_of_somebody_else_is_refused(name: str, text: str) -> None:
    model = _make(name)
    model.blocks[0] = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=rf"blocks of class .*Identity are not described.*{text}"):
        tokenmerge.patch(model, r=2)


@pytest.mark.parametrize(
    "name", ["beit_base_patch16_224", "vit_relpos_small_patch16_224", "vit_srelpos_small_patch16_224"]
)
def test_a_registered_model_counts_its_tokens(name: str) -> None:
    model = timm.create_model(name, depth=2)
    handle = tokenmerge.patch(model, r=8)
    prefix = handle.prefix
    assert (prefix, handle.tokens) == (int(name.startswith("beit")), [188 + prefix, 180 + prefix])
    _run(model, torch.randn(1, 3, 224, 224))
    assert handle.tokens == [188 + prefix, 180 + prefix] and handle.report().limits == []
