"""timm's vision towers of language models: projectors and pools that need every token in its place, and padding."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from helpers import assert_close, bound_attributes, randomised
from promises import check_promises
from tokenmerge.adapters import find
from tokenmerge.errors import UnsupportedError, UnsupportedModelError

pytest.importorskip("timm", "1.0.30")

from timm.models.deepseek_vit import DeepseekVitClassifier, DeepseekVitEncoder
from timm.models.gemma4_vit import Gemma4VitClassifier, Gemma4VitEncoder
from timm.models.qwen3_vit import Qwen3VitClassifier, Qwen3VitEncoder

Make = Callable[[], nn.Module]
_TINY: dict[str, Any] = {"patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4}
_QWEN = {**_TINY, "img_size": 32, "mlp_ratio": 2.0, "pos_embed_grid_size": 6}
_DEEPSEEK = {**_TINY, "img_size": 32}
_GEMMA = {**_TINY, "head_dim": 8, "intermediate_size": 64, "position_embedding_size": 16, "pooling_kernel_size": 2}
VARIANTS: dict[str, Make] = {
    "qwen3-classifier": partial(Qwen3VitClassifier, **_QWEN, num_classes=10),
    "qwen3-classifier-merge": partial(Qwen3VitClassifier, **_QWEN, encoder_pool="merge", out_features=24),
    "qwen3-encoder-merge": partial(Qwen3VitEncoder, **_QWEN, out_features=24),
    "qwen3-encoder-avg": partial(Qwen3VitEncoder, **_QWEN, global_pool="avg"),
    "qwen3-encoder-map": partial(Qwen3VitEncoder, **_QWEN, global_pool=""),
    "deepseek-classifier": partial(DeepseekVitClassifier, **_DEEPSEEK, num_classes=10),
    "deepseek-classifier-align": partial(DeepseekVitClassifier, **_DEEPSEEK, encoder_pool="align", out_features=24),
    "deepseek-encoder-align": partial(DeepseekVitEncoder, **_DEEPSEEK, out_features=24),
    "deepseek-encoder-avg": partial(DeepseekVitEncoder, **_DEEPSEEK, global_pool="avg"),
    "deepseek-encoder-map": partial(DeepseekVitEncoder, **_DEEPSEEK, global_pool=""),
    "gemma4-classifier": partial(Gemma4VitClassifier, **_GEMMA, num_classes=10),
    "gemma4-classifier-soft": partial(Gemma4VitClassifier, **_GEMMA, encoder_pool="soft", standardize=True),
    "gemma4-encoder-soft": partial(Gemma4VitEncoder, **_GEMMA, use_clipped_linears=True, num_kv_heads=2),
    "gemma4-encoder-avg": partial(Gemma4VitEncoder, **_GEMMA, global_pool="avg"),
    "gemma4-encoder-tokens": partial(Gemma4VitEncoder, **_GEMMA, global_pool="none"),
}
every_variant = pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)
# one of each kind of block; the adapter's own tiny() is a Qwen3
BLOCKS = ("deepseek-encoder-align", "gemma4-classifier", "gemma4-encoder-soft")
every_block = pytest.mark.parametrize("make", [VARIANTS[name] for name in BLOCKS], ids=BLOCKS)


def _built(make: Make) -> nn.Module:
    return randomised(make()).eval().double()


def _run(model: nn.Module, x: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(x)
    return out


def _images(B: int = 2, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(B, 3, height, width, dtype=torch.float64)


@every_variant
def test_a_variant_keeps_the_promises(make: Make) -> None:
    model = _built(make)
    assert find(model).name == "timm_vlm"
    check_promises(model, _images(), r=8)


@every_variant
def test_answers_keep_their_shape_and_the_report_says_why(make: Make) -> None:
    model, x = _built(make), _images(2, 24, 32)
    shape = _run(model, x).shape
    handle = tokenmerge.patch(model, r=8)
    assert _run(model, x).shape == shape
    assert handle.tokens == [40, 32, 24, 16]
    assert "put back in their places after the last block" in handle.report().limits[0]


@every_variant
def test_intermediates_are_refused_or_restored(make: Make) -> None:
    model, x = _built(make), _images()
    with tokenmerge.patched(model, r=8):
        for owner in (model, getattr(model, "encoder", model)):
            with pytest.raises(UnsupportedError, match=r"forward_intermediates.*restore='dense'"):
                owner.forward_intermediates(x)
    with tokenmerge.patched(model, r=8, restore="dense"):
        intermediates = model.forward_intermediates(x, intermediates_only=True)
    assert [y.shape for y in intermediates] == 4 * [(2, 32, 8, 8)]
    assert bound_attributes(model) == []


@every_variant
def test_training_with_gradient_checkpointing(make: Make) -> None:
    model, x = _built(make).train(), _images()
    tokenmerge.patch(model, r=8)
    grads = []
    for is_checkpointed in (False, True):
        model.set_grad_checkpointing(is_checkpointed)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad])
    for plain, again in zip(*grads, strict=True):
        assert plain.isfinite().all()
        assert_close(again, plain, 1e-9)


@every_block
def test_compile_in_one_graph(make: Make) -> None:
    torch._dynamo.reset()
    model, x = _built(partial(make, depth=2)), _images()
    tokenmerge.patch(model, r=8)
    assert_close(_run(torch.compile(model, fullgraph=True, backend="eager"), x), _run(model, x))


@every_block
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_export_with_a_dynamic_batch(make: Make, strict: bool) -> None:
    model, x = _built(partial(make, depth=2)), _images(4)
    tokenmerge.patch(model, r=8)
    expected = _run(model, x)
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(model, (x,), strict=strict, dynamic_shapes=shapes)
    assert_close(_run(program.module(), x[:3]), expected[:3])
    assert torch.equal(_run(model, x), expected)


@every_block
def test_copies_and_saved_models(make: Make) -> None:
    model, x = _built(make), _images()
    tokenmerge.patch(model, r=8)
    expected = _run(model, x)
    assert torch.equal(_run(copy.deepcopy(model), x), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(_run(torch.load(file, weights_only=False), x), expected)


def _padded(sides: list[tuple[int, int]], n: int) -> dict[str, Tensor]:
    """Patches of images of several sizes, filled up with padding."""
    B = len(sides)
    patches, valid = torch.zeros(B, n, 48, dtype=torch.float64), torch.zeros(B, n, dtype=torch.bool)
    coord = torch.full((B, n, 2), -1)
    for image, (height, width) in enumerate(sides):
        count = height * width
        patches[image, :count] = torch.randn(count, 48, dtype=torch.float64)
        coord[image, :count] = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        valid[image, :count] = True
    return {"patches": patches, "patch_coord": coord, "patch_valid": valid}


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("gemma4")])
@pytest.mark.parametrize("prop_attn", [True, False], ids=["proportional", "plain"])
def test_padding_is_merged_with_padding_only(name: str, prop_attn: bool) -> None:
    model, batch = _built(VARIANTS[name]), _padded([(6, 6), (4, 6), (2, 2)], 36)
    valid = batch["patch_valid"]
    unmerged = _run(model, batch)
    handle = tokenmerge.patch(model, r=3, prop_attn=prop_attn, track=True)
    merged, groups, positions = _run(model, batch), handle.groups, handle.positions
    assert handle.tokens == [33, 30, 27, 24]
    assert torch.equal(handle.sizes.sum(dim=1), valid.sum(dim=1).float())
    for image in range(3):
        real, padding = groups[-1][image, valid[image]], groups[-1][image, ~valid[image]]
        assert not set(real.tolist()) & set(padding.tolist())
    # the image without padding is merged as if it were alone
    alone = _run(model, {key: value[:1] for key, value in batch.items()})
    assert_close(merged[:1], alone, 1e-6)
    handle.remove()
    assert (merged - unmerged).abs().max() > 1e-3
    if prop_attn:
        simulated = tokenmerge.simulate(model, groups, batch, positions=positions)
        real = valid if merged.shape[1:2] == valid.shape[1:] else torch.ones(merged.shape[:2], dtype=torch.bool)
        assert_close(merged[real], simulated[real], 1e-6)


def test_a_tower_inside_a_classifier_is_patched_by_itself() -> None:
    model = _built(VARIANTS["qwen3-classifier-merge"])
    x = _images()
    whole = tokenmerge.patch(model, r=8)
    expected = _run(model, x)
    whole.remove()
    tokenmerge.patch(model.encoder, r=8)
    assert torch.equal(_run(model, x), expected)


def test_blocks_of_another_class_are_refused() -> None:
    model = _built(VARIANTS["gemma4-classifier"])
    model.encoder.blocks[1] = nn.TransformerEncoderLayer(32, 4)
    with pytest.raises(UnsupportedModelError, match="TransformerEncoderLayer are not described"):
        tokenmerge.patch(model, r=2)
