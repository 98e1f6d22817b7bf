"""timm's NaFlexViT: padded batches of images of any shape, and what its masks mean when tokens are merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from helpers import assert_close, randomised
from promises import check_promises
from tokenmerge.errors import UnsupportedError, UnsupportedModelError

pytest.importorskip("timm.models.naflexvit")
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import ParallelScalingBlock

OPTIONS = NaFlexVitCfg.__dataclass_fields__
VARIANTS: dict[str, dict[str, Any]] = {
    "avg-prefix0": {"global_pool": "avg"},
    "avg-registers": {"global_pool": "avg", "reg_tokens": 4, "fc_norm": True},
    "avg-with-prefix": {"global_pool": "avg", "reg_tokens": 1, "pool_include_prefix": True},
    "avgmax-factorized": {"global_pool": "avgmax", "pos_embed": "factorized", "pos_embed_ar_preserving": True},
    "map": {"global_pool": "map", "reg_tokens": 1},
    "map-with-prefix": {"global_pool": "map", "reg_tokens": 1, "pool_include_prefix": True},
    "radio": {"global_pool": "token", "class_token": True, "reg_tokens": 3, "final_norm": False},
    "qk-norm-pre-norm": {"qk_norm": True, "pre_norm": True},
    "rope-axial": {"rope_type": "axial", "reg_tokens": 2, "swiglu_mlp": True, "pos_embed": "none"},
    "rope-mixed": {"rope_type": "mixed", "class_token": True},
    "rope-dinov3": {"rope_type": "dinov3", "rope_rotate_half": True},
    "rope-mrope": {"rope_type": "mrope", "rope_mrope_section": (1, 2, 2), "attn_gated": True},
    "rope-separate-qkv": {"rope_type": "axial", "attn_type": "eva", "qkv_fused": False, "init_values": None},
    "grouped-queries": {"rope_type": "axial", "qkv_fused": False, "num_kv_heads": 2},
    "parallel": {"block_fn": ParallelScalingBlock, "reg_tokens": 1, "fix_init": False},
    "key-only-mask": {"use_key_only_attn_mask": True},
}
SHAPES = [(4, 5), (2, 3), (3, 6), (1, 2)]  # of the images in a batch, padded to LONGEST tokens
LONGEST = 20


def _model(**options: Any) -> nn.Module:
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        pytest.skip(f"this timm's NaFlexVit has no {', '.join(unknown)}")
    settings = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "pos_embed_grid_size": (4, 4)}
    model = NaFlexVit(num_classes=10, **{**settings, "init_values": 0.5, **options})
    return randomised(model).eval().double()


def _batch(shapes: list[tuple[int, int]] = SHAPES, longest: int = LONGEST) -> dict[str, Tensor]:
    """Patches of images of these shapes, random where there are none."""
    B = len(shapes)
    coordinates = torch.zeros(B, longest, 2, dtype=torch.long)
    for image, (rows, columns) in enumerate(shapes):
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        coordinates[image, : len(grid)] = grid
    real = torch.tensor([rows * columns for rows, columns in shapes])
    valid = torch.arange(longest) < real[:, None]
    patches = torch.randn(B, longest, 8 * 8 * 3).double()
    return {"patches": patches, "patch_coord": coordinates, "patch_valid": valid}


def _alone(batch: dict[str, Tensor], image: int) -> dict[str, Tensor]:
    """The image as a batch of its own, without padding."""
    real = int(batch["patch_valid"][image].sum())
    return {name: value[image : image + 1, :real] for name, value in batch.items()}


def _run(model: nn.Module, *inputs: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(*inputs, **options)
    return out


every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


@every_variant
def test_images_keep_the_promises(options: dict[str, Any]) -> None:
    left = check_promises(_model(**options), torch.randn(2, 3, 32, 48).double(), r=4)
    prefix = options.get("reg_tokens", 0) + options.get("class_token", False)
    assert left == [prefix + n for n in (20, 16, 12)]


@every_variant
def test_padded_batches_equal_the_simulation_and_each_image_alone(options: dict[str, Any]) -> None:
    model, batch = _model(**options), _batch()
    unmerged = _run(model, batch)
    handle = tokenmerge.patch(model, r=3, prop_attn=True, track=True)
    merged, groups, positions, sizes = _run(model, batch), handle.groups, handle.positions, handle.sizes
    valid = torch.cat((torch.ones(4, handle.prefix).bool(), batch["patch_valid"]), dim=1)
    assert handle.tokens == [handle.prefix + n for n in (17, 14, 11)]
    assert torch.equal(sizes.sum(dim=1), valid.sum(dim=1).float())
    for assign in groups:
        same = assign[:, :, None] == assign[:, None, :]
        assert not (same & (valid[:, :, None] != valid[:, None, :])).any(), "padding was merged with a patch"
    assert merged.isfinite().all()
    # there is padding enough in these two, all that was merged was padding
    assert_close(merged[[1, 3]], unmerged[[1, 3]], 1e-9)
    assert (merged[[0, 2]] - unmerged[[0, 2]]).abs().amax(dim=1).min() > 1e-4
    handle.r = 0
    assert torch.equal(_run(model, batch), unmerged)
    for image in range(4):
        assert_close(_run(model, _alone(batch, image)), unmerged[image : image + 1], 1e-6)
    handle.remove()
    assert torch.equal(_run(model, batch), unmerged)
    assert_close(tokenmerge.simulate(model, groups, batch, positions=positions), merged, 1e-6)


@every_variant
def test_what_padding_holds_does_not_matter(options: dict[str, Any]) -> None:
    model, batch = _model(**options), _batch()
    other = {**batch, "patches": batch["patches"].masked_fill(~batch["patch_valid"][..., None], 7.0)}
    with tokenmerge.patched(model, r=3):
        assert_close(_run(model, other), _run(model, batch), 1e-9)


@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("r", [7, 10, 100])
def test_where_nothing_else_is_left_to_remove_the_answer_is_still_the_simulation(r: int, prop_attn: bool) -> None:
    model, batch = _model(global_pool="avg"), _batch([(4, 5), (1, 1), (1, 3), (19, 1)])
    with tokenmerge.patched(model, r=r, prop_attn=prop_attn, track=True) as handle:
        merged, groups, positions = _run(model, batch), handle.groups, handle.positions
        assert torch.equal(handle.sizes.sum(dim=1), batch["patch_valid"].sum(dim=1).float())
        # a mask at the places that are kept says which groups are real
        assert torch.equal(handle.sizes > 0, batch["patch_valid"].gather(1, positions[-1]))
    assert merged.isfinite().all()
    # one patch is one patch, whatever is merged around it
    assert_close(merged[1], _run(model, batch)[1], 1e-9)
    has_room = [image for image in range(4) if not _mixes(groups, batch["patch_valid"], image)]
    if prop_attn:
        simulated = tokenmerge.simulate(model, groups, batch, positions=positions)
        assert_close(merged[has_room], simulated[has_room], 1e-6)


def _mixes(groups: list[Tensor], valid: Tensor, image: int) -> bool:
    real = {int(slot) for slot in groups[-1][image][valid[image]]}
    return bool(real & {int(slot) for slot in groups[-1][image][~valid[image]]})


@pytest.mark.parametrize("pool", ["avg", "map"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_and_an_image_of_padding_alone_give_no_nan(pool: str, dtype: torch.dtype) -> None:
    model, batch = _model(global_pool=pool).to(dtype), _batch()
    batch["patches"] = batch["patches"].to(dtype)
    batch["patch_valid"][3] = False
    expected = _run(model, batch)
    with tokenmerge.patched(model, r=3):
        merged = _run(model, batch)
    has_patches = [0, 1, 2] if dtype == torch.float16 else [0, 1, 2, 3]
    assert merged.dtype == dtype and merged[has_patches].isfinite().all()
    assert_close(merged[1].float(), expected[1].float(), {torch.float32: 1e-5}.get(dtype, 0.1))


@pytest.mark.parametrize("is_bool", [False, True], ids=["additive", "bool"])
@pytest.mark.parametrize("shape", ["[N, N]", "[1, 1, N, N]", "[B, H, N, N]"])
def test_a_mask_of_the_users_follows_the_tokens(shape: str, is_bool: bool) -> None:
    model, images = _model(reg_tokens=1), torch.randn(2, 3, 32, 40).double()
    mask = torch.randn({"[N, N]": (21, 21), "[1, 1, N, N]": (1, 1, 21, 21), "[B, H, N, N]": (2, 4, 21, 21)}[shape])
    mask = mask > -1 if is_bool else 3 * mask.double()
    with tokenmerge.patched(model, r=4, track=True, restore="dense", prop_attn=True) as handle, torch.no_grad():
        merged = model.forward_features(images, attn_mask=mask)
        groups, positions = handle.groups, handle.positions
        assert (handle.sizes.sum(dim=1) == 21).all()
    model.forward, forward = _Features(model, mask), model.forward
    simulated = tokenmerge.simulate(model, groups, images, positions=positions)
    model.forward = forward
    assert_close(merged, simulated, 1e-6)


class _Features:
    def __init__(self, model: nn.Module, mask: Tensor) -> None:
        self.model, self.mask = model, mask

    def __call__(self, x: Tensor) -> Tensor:
        return self.model.forward_features(x, attn_mask=self.mask)


def test_tokens_are_handed_out_by_place_only_where_that_was_asked_for() -> None:
    model, images = _model(reg_tokens=1), torch.randn(2, 3, 32, 32).double()
    with tokenmerge.patched(model, r=3) as handle:
        assert any("back in their places" in limit for limit in handle.report().limits)
        for name in ("forward_features", "forward_intermediates"):
            with pytest.raises(UnsupportedError, match=rf"{name}\(\) hands out one token per place.*restore='dense'"):
                getattr(model, name)(images)
    with tokenmerge.patched(model, r=3, restore="dense"), torch.no_grad():
        features = model.forward_features(images)
        final, maps = model.forward_intermediates(images)
    assert features.shape == final.shape == (2, 17, 32) and maps[0].shape == (2, 32, 4, 4)
    assert_close(features, final, 1e-12)


def test_features_of_a_padded_batch_are_those_of_the_simulation() -> None:
    model, batch = _model(reg_tokens=1), _batch()
    with tokenmerge.patched(model, r=3, restore="dense", track=True, prop_attn=True) as handle, torch.no_grad():
        # an older timm's gives the tokens alone
        features = model.forward_features(batch["patches"], batch["patch_coord"], batch["patch_valid"])
        groups, positions = handle.groups, handle.positions
    tokens = features["patches"] if isinstance(features, dict) else features
    model.global_pool, model.attn_pool, model.fc_norm, model.head = "", None, nn.Identity(), nn.Identity()
    simulated = tokenmerge.simulate(model, groups, batch, positions=positions)
    valid = torch.cat((torch.ones(4, 1).bool(), batch["patch_valid"]), dim=1)
    assert_close(tokens[valid], simulated[valid], 1e-6)


WITHOUT_MASK = r"got patch_coord \(4, 20, 2\) without patch_valid while tokens are merged.*Pass patch_valid \[B, N\]"


@pytest.mark.parametrize("restore", [None, "dense", "merged"])
def test_sizes_that_differ_without_a_mask_are_refused(restore: str | None) -> None:
    model, batch = _model(), _batch()
    del batch["patch_valid"]
    with tokenmerge.patched(model, r=3, restore=restore):
        with pytest.raises(UnsupportedError, match=WITHOUT_MASK):
            model(batch)
        with pytest.raises(UnsupportedError, match=WITHOUT_MASK):
            model({**batch, "patch_valid": None})
        with pytest.raises(UnsupportedError, match=WITHOUT_MASK):
            model(batch["patches"], batch["patch_coord"])
        # without `restore` it is refused whatever it is given
        with pytest.raises(UnsupportedError, match=WITHOUT_MASK if restore else "hands out one token per place"):
            model.forward_features(batch["patches"], patch_coord=batch["patch_coord"])
    assert "forward" not in model.__dict__ and "forward_features" not in model.__dict__


class _OtherBlock(nn.Module):
    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__()
        self.mix = nn.Linear(dim, dim)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return self.mix(x)


def test_other_blocks_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="_OtherBlock are not described"):
        tokenmerge.patch(_model(block_fn=_OtherBlock, fix_init=False), r=2)


def test_a_padded_batch_compiles_in_one_graph() -> None:
    # other ways of timm's to embed positions in a padded batch are not for tracers
    model, batch = _model(pos_embed_use_grid_sample=True, use_key_only_attn_mask=True), _batch()
    handle = tokenmerge.patch(model, r=3, track=True)
    expected, sizes = _run(model, batch), handle.sizes
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(_run(compiled, batch), expected, 1e-9)
    assert torch.equal(handle.sizes, sizes)


def test_gradients_of_a_padded_batch_are_finite_and_those_of_checkpointing() -> None:
    model, batch = _model(reg_tokens=1), _batch()
    tokenmerge.patch(model.train(), r=4)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(batch).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert plain.isfinite().all()
        assert_close(again, plain, 1e-9)


@pytest.mark.parametrize(("name", "size"), [("vit_tiny_patch16_224", 64), ("eva02_tiny_patch14_224", 56)])
def test_classic_names_built_as_naflex(name: str, size: int) -> None:
    timm = pytest.importorskip("timm", "1.0.20")
    model = timm.create_model(name, use_naflex=True, depth=2, embed_dim=32, num_heads=4, img_size=size)
    assert isinstance(model, NaFlexVit) and tokenmerge.adapters.find(model).name == "timm_naflex"
    check_promises(randomised(model).eval().double(), torch.randn(2, 3, size, size).double(), r=2)


def test_the_planned_tokens_are_those_of_the_input_size_that_the_model_names() -> None:
    import timm

    model = timm.create_model("naflexvit_base_patch16_gap", depth=2, embed_dim=32, num_heads=4)
    handle = tokenmerge.patch(model, r=16)
    assert handle.input_size == (3, 384, 384) and handle.tokens == [4 + 560, 4 + 544]
    handle = tokenmerge.patch(_model(class_token=True), r=2)
    assert handle.input_size == (3, 32, 32) and handle.tokens == [15, 13, 11]
