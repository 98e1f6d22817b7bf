"""transformers' Gemma 4, Llama 4, MLCD and C-RADIO: padding, tables that all images share, images in one sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenmerge
from helpers import assert_close, randomised
from promises import check_promises
from tokenmerge.errors import UnsupportedError

transformers = pytest.importorskip("transformers", minversion="5.24")
hf_models = pytest.importorskip("hf_models")


def _gemma(**more: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 64, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2}
    config = transformers.Gemma4VisionConfig(**sizes, position_embedding_size=16, **more)
    return randomised(transformers.Gemma4VisionModel(config)).eval().double()


def _patches(*shapes: tuple[int, int], longest: int = 24) -> dict[str, Tensor]:
    """Patches of images of so many rows and columns, padded to the longest."""
    places = torch.full((len(shapes), longest, 2), -1)
    for image, (rows, columns) in zip(places, shapes, strict=True):
        at = torch.arange(rows * columns)
        image[: rows * columns] = torch.stack((at % columns, at // columns), dim=-1)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(len(shapes), longest, 48, generator=generator).double()
    return {"pixel_values": pixels, "pixel_position_ids": places}


def _tokens(out: Any) -> Tensor:
    return out.last_hidden_state


@pytest.mark.parametrize("more", [{}, {"standardize": True}, {"attn_implementation": "eager"}])
def test_gemma_4(more: dict[str, Any]) -> None:
    model, given = _gemma(**more), _patches((4, 6), (6, 4), (2, 12))
    if more.get("standardize"):
        model.std_bias.normal_()
        model.std_scale.uniform_(0.5, 1.5)
    with torch.no_grad():
        own = _tokens(model(**given))
        with tokenmerge.patched(model, r=0):
            assert torch.equal(_tokens(model(**given)), own)
    assert check_promises(model, output=_tokens, r=3, **given) == [21, 18, 15, 12]


@torch.no_grad()
def test_padding_of_gemma_4() -> None:
    model, given = _gemma(), _patches((4, 6), (4, 4))
    own = _tokens(model(**given))
    assert own.shape[0] == 6 + 4  # the pooler's units
    with tokenmerge.patched(model, r=2, prop_attn=True, track=True) as handle:
        merged, groups, positions = _tokens(model(**given)), handle.groups, handle.positions
        assert handle.sizes.sum(dim=1).tolist() == [24, 16] and merged.shape == own.shape
        assert not set(groups[-1][1, :16].tolist()) & set(groups[-1][1, 16:].tolist())
        given["pixel_values"][1, 16:] = 0.1
        assert_close(_tokens(model(**given)), merged, 1e-9)
        handle.r = 0
        assert torch.equal(_tokens(model(**given)), own)
    assert_close(merged, _tokens(tokenmerge.simulate(model, groups, positions=positions, **given)), 1e-6)
    assert (merged - own).abs().max() > 1e-3


LLAMA = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
LLAMA |= {"image_size": 32, "patch_size": 8, "projector_input_dim": 16, "projector_output_dim": 16}
LLAMA |= {"vision_output_dim": 16}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_llama_4(implementation: str) -> None:
    config = transformers.Llama4VisionConfig(**LLAMA, attn_implementation=implementation)
    model, x = randomised(transformers.Llama4VisionModel(config)).eval().double(), torch.randn(3, 3, 32, 32).double()
    with torch.no_grad():
        own = _tokens(model(x))
        for restore in (None, "merged", "dense"):
            with tokenmerge.patched(model, r=0, restore=restore) as handle:
                assert torch.equal(_tokens(model(x)), own)
                assert (handle.prefix, handle.protected, handle.grid) == (0, 1, (4, 4))
                handle.r = 3
                assert _tokens(model(x)).shape == own.shape  # pixel shuffle sees every place
                assert (handle.sizes[:, -1] == 1).all()  # the class token stands behind the patches
    # 16 patches and the class token
    assert check_promises(model, x, output=_tokens, r=3) == [14, 11, 8, 5]


def test_llama_4_as_a_whole() -> None:
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    text |= {"intermediate_size": 64, "intermediate_size_mlp": 64, "vocab_size": 64, "head_dim": 8}
    text |= {"num_local_experts": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.Llama4Config(vision_config=LLAMA, text_config=text, image_token_index=63)
    model = randomised(transformers.Llama4ForConditionalGeneration(config)).eval()
    x = torch.randn(2, 3, 32, 32)
    # the forward of the whole model ends in an error of the host's (transformers 5.24)
    features: Callable[[], Tensor] = lambda: model.get_image_features(x).last_hidden_state  # noqa: E731
    with torch.no_grad():
        own = features()
        with tokenmerge.patched(model, r=3, restore="dense") as handle:
            merged = features()
            assert handle.report().untouched == ["language_model"] and merged.shape == own.shape
        with tokenmerge.patched(model.vision_model, r=3, restore="dense"):
            assert torch.equal(features(), merged)
        assert torch.equal(features(), own) and (merged - own).abs().max() > 1e-4


@torch.no_grad()
def test_every_token_of_mlcd_and_radio_comes_back() -> None:
    for name in ("mlcd", "radio"):
        case = hf_models.CASES[name]
        model, given = case.make(), case.inputs()
        with tokenmerge.patched(model, r=3, prop_attn=True, track=True) as handle:
            out, groups, positions = model(**given), handle.groups, handle.positions
            assert handle.prefix == {"mlcd": 1, "radio": 3}[name] and handle.grid == (4, 4)
        expected = tokenmerge.simulate(model, groups, positions=positions, **given)
        assert_close(_tokens(out), _tokens(expected), 1e-6)
        with tokenmerge.patched(model, r=3, prop_attn=True, restore="merged", track=True) as handle:
            again = model(**given)
            assert_close(case.output(again), case.output(out), 1e-9)
            assert_close(handle.dense(_tokens(again)), _tokens(out), 1e-9)


def test_checkpoints_of_mlcd() -> None:
    case, grads = hf_models.CASES["mlcd"], []
    for enable in (False, True):
        torch.manual_seed(0)
        model, given = case.make().train(), case.inputs()
        if enable:
            model.activation_checkpointing_enable({"use_reentrant": False})
        tokenmerge.patch(model, r=3, prop_attn=True)
        case.output(model(**given)).square().sum().backward()
        assert model.class_pos_emb.grad.abs().sum() > 0
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, again in zip(*grads, strict=True):
        assert_close(again, plain, 1e-9)


@torch.no_grad()
def test_masks_of_mlcd_are_refused() -> None:
    case = hf_models.CASES["mlcd"]
    model, given = case.make(), case.inputs()
    mask = torch.zeros(3, 1, 17, 17).double()
    with tokenmerge.patched(model, r=3) as handle:
        with pytest.raises(UnsupportedError, match="called with 'attention_mask' while tokens are merged"):
            model(**given, attention_mask=mask)
        handle.r = 0
        model(**given, attention_mask=mask)


@torch.no_grad()
def test_images_of_radio_in_one_sequence_are_refused() -> None:
    model = hf_models.CASES["radio"].make()
    pixels, grids = torch.randn(16 + 8, 192).double(), torch.tensor([[4, 4], [2, 4]])
    own = _tokens(model(pixels, image_grid_hw=grids))
    with tokenmerge.patched(model, r=2) as handle:
        with pytest.raises(UnsupportedError, match="called with 'cu_seqlens' while tokens are merged"):
            model(pixels, image_grid_hw=grids)
        model(pixels[:16], image_grid_hw=grids[:1])
        assert handle.tokens == [17, 15, 13, 11]
        handle.r = 0
        assert torch.equal(_tokens(model(pixels, image_grid_hw=grids)), own)
