"""timm's Eva: every block, attention, rotary table and pooling of its registered models, small."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import timm.layers
import torch
from timm.models.eva import Eva
from torch import Tensor, nn

import tokenmerge
from helpers import assert_close, randomised
from promises import check_promises
from tokenmerge import ToMe
from tokenmerge.adapters import find
from tokenmerge.adapters.timm.eva import RopeTap
from tokenmerge.errors import UnsupportedError, UnsupportedModelError

KNOWN = inspect.signature(Eva).parameters
ROPE: dict[str, Any] = {"use_rot_pos_emb": True}
PE = {"use_pre_transformer_norm": True, "use_post_transformer_norm": True, "use_fc_norm": False}
DINOV3 = {"use_abs_pos_emb": False, "qkv_bias": False, "rope_rotate_half": True, "use_fc_norm": False}
SAPIENS2 = {
    "qkv_fused": False,
    "qk_norm": True,
    "num_kv_heads": 2,
    "attn_only_layer_scale": True,
    "swiglu_mlp": True,
    "swiglu_align_to": 8,
    "global_pool": "token",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "eva-absolute": {"init_values": 0.5},
    "eva-token": {"global_pool": "token"},
    "eva-post-norm": {"use_post_norm": True, "global_pool": "token"},
    "eva02-swiglu": {**ROPE, "swiglu_mlp": True},
    "eva02-unfused-scaled": {**ROPE, "qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True},
    "eva02-inner-scale": {**ROPE, "scale_attn_inner": True},
    "eva02-grid-offset": {**ROPE, "ref_feat_shape": 16, "rope_grid_offset": 0.5, "rope_grid_indexing": "xy"},
    "rope-post-norm": {**ROPE, "use_post_norm": True},
    "rope-no-bias": {**ROPE, "qkv_bias": False},
    "rope-registers": {**ROPE, "num_reg_tokens": 4, "init_values": 0.5},
    "rope-registers-gap": {**ROPE, "num_reg_tokens": 2, "class_token": False, "use_abs_pos_emb": False},
    "rope-attention": {**ROPE, "attn_type": "rope"},
    "rope-attention-unfused": {**ROPE, "attn_type": "rope", "qkv_fused": False},
    "pe-core": {**ROPE, "attn_type": "rope", "global_pool": "map", "attn_pool_num_heads": 2, **PE},
    "pe-without-prefix": {**ROPE, "attn_type": "rope", "class_token": False, "init_values": 0.5},
    "pool-avgmax": {**ROPE, "global_pool": "avgmax"},
    "pool-max": {**ROPE, "global_pool": "max"},
    "pool-none": {**ROPE, "global_pool": ""},
    "dynamic-size": {**ROPE, "dynamic_img_size": True},
    "dinov3": {**ROPE, "rope_type": "dinov3", "num_reg_tokens": 4, "init_values": 0.5, **DINOV3},
    "mixed": {**ROPE, "rope_type": "mixed", "attn_type": "rope", "use_abs_pos_emb": False},
    "mixed-absolute": {**ROPE, "rope_type": "mixed", "attn_type": "rope", "num_reg_tokens": 1},
    "mrope": {**ROPE, "rope_type": "mrope", "rope_mrope_section": (0, 2, 2), "attn_type": "rope"},
    "no-embedded-class": {**ROPE, "no_embed_class": True, "num_reg_tokens": 1},
    "sapiens2": {
        **ROPE,
        "rope_type": "dinov3",
        "attn_type": "rope",
        "num_reg_tokens": 2,
        "init_values": 0.5,
        **SAPIENS2,
    },
}


def _eva(**options: Any) -> Eva:
    missing = sorted(options.keys() - KNOWN)
    if missing:
        pytest.skip(f"timm {timm.__version__} has no {', '.join(missing)} in its Eva")
    if "rope_type" not in KNOWN and options.get("num_reg_tokens") and options.get("class_token", True):
        pytest.skip(f"timm {timm.__version__} counts registers beside a class token wrongly in its Eva")
    settings = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 10}
    model: Eva = randomised(Eva(**{**settings, "head_init_scale": 1.0, **options})).eval().double()
    return model


def _run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(x)
    return out


def _images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.float64)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_variant_keeps_the_promises(options: dict[str, Any]) -> None:
    model = _eva(**options)
    assert find(model).name == "timm_eva"
    check_promises(model, _images(), r=6)


def test_rows_follow_the_tokens_whatever_the_shape_of_the_table() -> None:
    turn = RopeTap(_eva(**ROPE).blocks[0], "attn").turned
    kept = torch.tensor([[0, 1, 5, 3], [0, 4, 2, 1]])  # a prefix of one
    table = torch.randn(9, 16)
    expected = torch.stack([table[[0, 4, 2]], table[[3, 1, 0]]])
    assert torch.equal(turn(table, kept), expected[:, None])
    by_image = torch.stack([table, -table])
    assert torch.equal(turn(by_image[:, None], kept), torch.stack([expected[0], -expected[1]])[:, None])
    turned = turn(by_image, kept)
    if hasattr(timm.layers, "RotaryEmbeddingMixed"):
        assert torch.equal(turned, torch.stack([expected, -expected], dim=1))
    else:
        assert torch.equal(turned, torch.stack([expected[0], -expected[1]])[:, None])


@pytest.mark.parametrize("kind", ["cat", "mixed"])
def test_patch_dropout_in_training_keeps_places(kind: str) -> None:
    # tables come one per image then; the same patches are dropped as the random state is the same
    options = {**ROPE, "patch_drop_rate": 0.5, "num_reg_tokens": 1}
    model = _eva(**options) if kind == "cat" else _eva(**options, rope_type=kind, attn_type="rope")
    model.train()
    x = _images()
    handle = tokenmerge.patch(model, r=4, track=True)
    torch.manual_seed(0)
    merged, groups, positions = _run(model, x), handle.groups, handle.positions
    assert handle.tokens == [30, 26, 22, 18] and (handle.sizes.sum(dim=1) == 34).all()
    handle.remove()
    torch.manual_seed(0)
    unmerged = _run(model, x)
    torch.manual_seed(0)
    assert_close(merged, tokenmerge.simulate(model, groups, x, positions=positions), 1e-6)
    assert (merged - unmerged).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [{**ROPE, "drop_path_rate": 0.2, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1}, VARIANTS["mixed"]],
    ids=["dropout", "mixed"],
)
def test_training_reaches_every_parameter(options: dict[str, Any]) -> None:
    model = _eva(**options).train()
    tokenmerge.patch(model, r=6)
    grads = []
    for is_checkpointed in (False, True):
        model.set_grad_checkpointing(is_checkpointed)
        model.zero_grad()
        torch.manual_seed(0)
        model(torch.ones(2, 3, 32, 32, dtype=torch.float64)).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad])
    assert all(grad.isfinite().all() for grad in grads[0])
    for plain, again in zip(*grads, strict=True):
        assert_close(again, plain, 1e-9)


def test_augmented_rotary_coordinates_train() -> None:
    model = _eva(**ROPE, rope_shift_coords=0.5, rope_jitter_coords=2.0).train()
    before = torch.get_rng_state()
    handle = tokenmerge.patch(model, r=6)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    assert _run(model, _images()).isfinite().all()
    assert handle.tokens[-1] == 65 - 24


def test_another_input_size_gets_its_own_tables() -> None:
    check_promises(_eva(**ROPE, dynamic_img_size=True), _images(24), r=3)


@pytest.mark.parametrize("metric", ["q", "k", "v", "x", "x_pre"])
def test_every_metric_with_grouped_queries(metric: str) -> None:
    model = _eva(**VARIANTS["sapiens2"])
    handle = tokenmerge.patch(model, ToMe(metric=metric), r=6)
    assert _run(model, _images()).isfinite().all()
    assert handle.tokens[-1] == 67 - 24


def test_values_of_grouped_queries_have_their_own_heads() -> None:
    model = _eva(**VARIANTS["sapiens2"])
    tokenmerge.patch(model, ToMe(metric="v"), r=6)
    runner = tokenmerge.handle_of(model).runners[0]
    runner.tap(torch.randn(2, 9, 32, dtype=torch.float64), None)
    assert runner.tap.take()["v"].shape == (2, 2, 9, 8)


def test_values_behind_separate_biases_are_seen() -> None:
    model, x = _eva(**ROPE), torch.randn(2, 9, 32, dtype=torch.float64)
    attn: Any = model.blocks[0].attn
    weight, bias = attn.qkv.weight[64:], attn.v_bias
    assert attn.q_bias is not None
    expected, own = (x @ weight.T + bias).view(2, 9, attn.num_heads, -1).transpose(1, 2), attn(x)
    tokenmerge.patch(model, ToMe(metric="v"), r=2)
    tap = tokenmerge.handle_of(model).runners[0].tap
    assert_close(tap(x, None), own, 1e-12)
    assert_close(tap.take()["v"], expected, 1e-12)


def test_attention_that_reads_masks_as_true_and_false_gets_no_bias() -> None:
    from timm.models import eva

    model = _eva(**ROPE)
    for block in model.blocks:
        block.attn.fused_attn = False
    if hasattr(eva, "maybe_add_mask"):
        check_promises(model, _images(), r=6)
        return
    with pytest.raises(UnsupportedError, match="takes no mask to add log"):
        tokenmerge.patch(model, r=2, prop_attn=True)
    assert "no proportional attention" in tokenmerge.patch(model, r=2).report().limits[0]
    assert _run(model, _images()).isfinite().all()


@pytest.mark.parametrize("given", [{"is_causal": True}, {"attn_mask": torch.ones(65, 65, dtype=torch.bool)}], ids=repr)
def test_masks_are_refused(given: dict[str, Any]) -> None:
    model = _eva(**ROPE)
    if "attn_mask" not in inspect.signature(model.forward).parameters:
        pytest.skip(f"timm {timm.__version__} takes no masks in the forward of its Eva")
    handle = tokenmerge.patch(model, r=2)
    with pytest.raises(UnsupportedError, match=rf"'{next(iter(given))}' while tokens are merged.*handle.r = 0"):
        model(_images(), **given)
    handle.r = 0
    model(_images(), **given)


def test_tokens_by_their_place_are_refused_or_restored() -> None:
    model, x = _eva(**ROPE), _images()
    with tokenmerge.patched(model, r=4):
        for call in (model.forward_features, partial(model.forward_intermediates, indices=2)):
            with pytest.raises(UnsupportedError, match=r"one token per place.*restore='dense'"):
                call(x)
    with tokenmerge.patched(model, r=4, restore="dense"):
        assert model.forward_intermediates(x, intermediates_only=True)[-1].shape == (2, 32, 8, 8)
    with tokenmerge.patched(model, r=4, restore="merged"):
        assert model.forward_features(x).shape[1] == 65 - 16


def test_a_model_that_puts_out_tokens_says_so() -> None:
    model, x = _eva(**VARIANTS["pool-none"]), _images()
    for restore in (None, "merged", "dense"):
        with tokenmerge.patched(model, r=4, restore=restore) as handle:
            assert _run(model, x).shape[1] == (65 - 16 if restore == "merged" else 65)
            said = [limit for limit in handle.report().limits if "global_pool='' hands out every token" in limit]
            assert len(said) == (restore != "dense")


def test_blocks_of_another_class_are_refused() -> None:
    model = _eva(**ROPE)
    model.blocks[1] = nn.TransformerEncoderLayer(32, 4)
    with pytest.raises(UnsupportedModelError, match=r"TransformerEncoderLayer are not described.*EvaBlock"):
        tokenmerge.patch(model, r=2)


def test_the_layout_is_the_models_own() -> None:
    handle = tokenmerge.patch(_eva(**ROPE, num_reg_tokens=3), r=(6, -1.0))
    assert (handle.prefix, handle.grid, handle.input_size) == (4, (8, 8), (3, 32, 32))
    assert handle.tokens[0] == 68 - 12
