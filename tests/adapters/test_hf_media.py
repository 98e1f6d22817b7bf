"""transformers' towers with positions in the attention, videos and audio: BEiT, DINOv3, VideoMAE, V-JEPA 2, Whisper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from helpers import answer, assert_close, randomised
from promises import check_promises
from tokenmerge.errors import UnsupportedError, UnsupportedModelError
from tokenmerge.measure.counting import flops

transformers = pytest.importorskip("transformers")
Case = tuple[str, dict[str, Any], dict[str, Any]]  # class, settings of its configuration, what it is called with

IMAGE = {"pixel_values": torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1)).double()}
CLIP = torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(2)).double()
VIDEO, VIDEOS = {"pixel_values": CLIP}, {"pixel_values_videos": CLIP}
SOUND = {"input_values": torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(3)).double()}
MEL = {"input_features": torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(4)).double()}
SPEECH = {**MEL, "decoder_input_ids": torch.tensor([[3, 5, 6], [3, 7, 8]])}
MASK = (torch.arange(16) % 4 == 1).expand(2, -1)

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
BEIT = {**SIZES, "image_size": 40, "patch_size": 8, "layer_scale_init_value": 0.5, "use_relative_position_bias": True}
BEIT |= {"drop_path_rate": 0.2, "num_labels": 10}
SHARED = {**BEIT, "use_relative_position_bias": False, "use_shared_relative_position_bias": True}
PYRAMID = {**BEIT, "num_hidden_layers": 4, "image_size": 48, "out_indices": [1, 2, 3, 4], "auxiliary_channels": 8}
DINO = {**SIZES, "image_size": 40, "patch_size": 8, "num_register_tokens": 2, "drop_path_rate": 0.2}
VIDEOMAE = {**SIZES, "image_size": 32, "patch_size": 16, "num_frames": 8, "decoder_hidden_size": 32}
VIDEOMAE |= {"decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4, "decoder_intermediate_size": 64}
VIVIT = {**SIZES, "image_size": 32, "tubelet_size": [2, 16, 16], "num_frames": 8}
VJEPA2 = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "mlp_ratio": 2.0, "crop_size": 32}
VJEPA2 |= {"frames_per_clip": 8, "pred_hidden_size": 48, "pred_num_hidden_layers": 1, "pred_num_attention_heads": 4}
VJEPA2 |= {"num_pooler_layers": 1, "drop_path_rate": 0.2}
AST = {**SIZES, "patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 40, "num_mel_bins": 32}
WHISPER = {"d_model": 32, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "vocab_size": 64}
WHISPER |= {"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "num_mel_bins": 16}
WHISPER |= {"max_source_positions": 20, "max_target_positions": 12, "classifier_proj_size": 16, "dropout": 0.1}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
WHISPER |= {"attention_dropout": 0.1, "activation_dropout": 0.1, "suppress_tokens": None, "begin_suppress_tokens": None}

CASES: dict[str, Case] = {
    "beit": ("BeitModel", BEIT, IMAGE),
    "beit-classifier": ("BeitForImageClassification", BEIT, IMAGE),
    "beit-class-token": ("BeitForImageClassification", {**BEIT, "use_mean_pooling": False}, IMAGE),
    "beit-no-layer-scale": ("BeitForImageClassification", {**BEIT, "layer_scale_init_value": 0.0}, IMAGE),
    "beit-shared": ("BeitForImageClassification", SHARED, IMAGE),
    "beit-own-and-shared": ("BeitModel", {**BEIT, "use_shared_relative_position_bias": True}, IMAGE),
    "beit-absolute": (
        "BeitForImageClassification",
        {**BEIT, "use_relative_position_bias": False, "use_absolute_position_embeddings": True},
        IMAGE,
    ),
    "beit-interpolated": ("BeitModel", {**BEIT, "image_size": 32}, {**IMAGE, "interpolate_pos_encoding": True}),
    "beit-shared-interpolated": (
        "BeitModel",
        {**SHARED, "image_size": 32},
        {**IMAGE, "interpolate_pos_encoding": True},
    ),
    "beit-masked": ("BeitForMaskedImageModeling", {**BEIT, "vocab_size": 12, "use_mask_token": True}, IMAGE),
    "data2vec": ("Data2VecVisionModel", BEIT, IMAGE),
    "data2vec-classifier": ("Data2VecVisionForImageClassification", BEIT, IMAGE),
    "data2vec-shared": ("Data2VecVisionForImageClassification", SHARED, IMAGE),
    "dinov3": ("DINOv3ViTModel", DINO, IMAGE),
    "dinov3-gated": ("DINOv3ViTModel", {**DINO, "use_gated_mlp": True, "num_register_tokens": 0}, IMAGE),
    "videomae": ("VideoMAEModel", VIDEOMAE, VIDEO),
    "videomae-visible": ("VideoMAEModel", VIDEOMAE, {**VIDEO, "bool_masked_pos": MASK}),
    "videomae-classifier": ("VideoMAEForVideoClassification", VIDEOMAE, VIDEO),
    "videomae-first-token": ("VideoMAEForVideoClassification", {**VIDEOMAE, "use_mean_pooling": False}, VIDEO),
    "videomae-pretraining": (
        "VideoMAEForPreTraining",
        {**VIDEOMAE, "norm_pix_loss": False},
        {**VIDEO, "bool_masked_pos": MASK},
    ),
    "vivit": ("VivitModel", VIVIT, VIDEO),
    "vivit-classifier": ("VivitForVideoClassification", VIVIT, VIDEO),
    "vjepa2": ("VJEPA2Model", VJEPA2, VIDEOS),
    "vjepa2-classifier": ("VJEPA2ForVideoClassification", VJEPA2, VIDEOS),
    "ast": ("ASTModel", AST, SOUND),
    "ast-classifier": ("ASTForAudioClassification", AST, SOUND),
    "whisper": ("WhisperModel", WHISPER, SPEECH),
    "whisper-speech": ("WhisperForConditionalGeneration", WHISPER, SPEECH),
    "whisper-classifier": ("WhisperForAudioClassification", WHISPER, MEL),
}
# they read the tokens of several blocks
DENSE_CASES: dict[str, Case] = {
    "beit-segmentation": ("BeitForSemanticSegmentation", PYRAMID, {"pixel_values": torch.randn(2, 3, 48, 48).double()}),
    "data2vec-segmentation": (
        "Data2VecVisionForSemanticSegmentation",
        PYRAMID,
        {"pixel_values": torch.randn(2, 3, 48, 48).double()},
    ),
    "beit-backbone": ("BeitBackbone", {**BEIT, "out_indices": [1, 3], "reshape_hidden_states": True}, IMAGE),
    "dinov3-backbone": ("DINOv3ViTBackbone", {**DINO, "out_indices": [1, 3]}, IMAGE),
    "whisper-weighted": ("WhisperForAudioClassification", {**WHISPER, "use_weighted_layer_sum": True}, MEL),
}
# one of each tower
TOWERS = ("beit", "data2vec", "dinov3", "videomae", "vivit", "vjepa2", "ast", "whisper")


def _make(case: Case, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    cls = getattr(transformers, case[0], None)
    if cls is None:
        pytest.skip(f"this transformers has no {case[0]}")
    settings = {**case[1], **more}
    return randomised(cls(cls.config_class(**settings))).eval().double()


def _output(out: Any) -> Tensor:
    """What depends on all tokens: what a predictor or a head gives, before the tokens themselves."""
    out = getattr(out, "predictor_output", None) or out
    names = ("logits", "feature_maps", "last_hidden_state")
    return answer(next(getattr(out, name) for name in names if getattr(out, name, None) is not None))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_promises(name: str, implementation: str) -> None:
    model = _make(CASES[name], attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    check_promises(model, **CASES[name][2], output=_output, tolerance=1e-6)


@pytest.mark.parametrize("name", DENSE_CASES)
def test_what_reads_the_tokens_of_several_blocks_gets_them_restored_by_itself(name: str) -> None:
    model, given = _make(DENSE_CASES[name]), DENSE_CASES[name][2]
    with torch.no_grad():
        unmerged = _output(model(**given))
    with tokenmerge.patched(model, r=3, prop_attn=True, track=True) as handle, torch.no_grad():
        restored, groups, positions = _output(model(**given)), handle.groups, handle.positions
        assert any("in their places after every block" in limit for limit in handle.report().limits)
    assert_close(restored, _output(tokenmerge.simulate(model, groups, positions=positions, **given)), 1e-6)
    assert (restored - unmerged).abs().max() > 1e-3
    with torch.no_grad():
        assert torch.equal(_output(model(**given)), unmerged)


@pytest.mark.parametrize("name", TOWERS)
def test_restored_hidden_states_are_those_of_the_simulation(name: str) -> None:
    model, given = _make(CASES[name]), CASES[name][2]
    asked = {**given, "output_hidden_states": True}
    with tokenmerge.patched(model, r=3), pytest.raises(UnsupportedError, match="output_hidden_states"):
        model(**asked)
    with tokenmerge.patched(model, r=3, restore="dense", prop_attn=True, track=True) as handle, torch.no_grad():
        restored, groups, positions = _hidden(model(**asked)), handle.groups, handle.positions
    expected = _hidden(tokenmerge.simulate(model, groups, positions=positions, **asked))
    assert len(restored) == len(expected) == 4
    assert_close(restored[0], expected[0], 1e-6)
    for got, state, assign in zip(restored[1:], expected[1:], groups, strict=True):
        # transformers 4 takes a block's tokens before the simulation has made them means
        same = (assign[:, :, None] == assign[:, None, :]).double()
        assert_close(got, (same @ state) / same.sum(dim=-1, keepdim=True), 1e-6)


def _hidden(out: Any) -> tuple[Tensor, ...]:
    states = getattr(out, "encoder_hidden_states", None)
    return out.hidden_states if states is None else states


@pytest.mark.parametrize("name", TOWERS)
def test_attention_maps_are_refused(name: str) -> None:
    model, given = _make(CASES[name], attn_implementation="eager"), CASES[name][2]
    with tokenmerge.patched(model, r=3, restore="dense") as handle:
        with pytest.raises(UnsupportedError, match=r"output_attentions: .*handle\.r = 0"):
            model(**given, output_attentions=True)
        handle.r = 0
        model(**given, output_attentions=True)


@pytest.mark.parametrize("name", ["beit-classifier", "videomae-classifier", "vivit-classifier", "ast-classifier"])
def test_constant_input_without_positions_is_unchanged(name: str) -> None:
    model, given = _make(CASES[name]), CASES[name][2]
    _forget_positions(model)
    given = {argument: torch.full_like(value, 0.7) for argument, value in given.items()}
    with torch.no_grad():
        expected = answer(model(**given))
        with tokenmerge.patched(model, r=6, prop_attn=True):
            assert_close(answer(model(**given)), expected, 1e-6)


def _forget_positions(model: nn.Module) -> None:
    for module in model.modules():
        for name in ("position_embeddings", "relative_position_bias_table"):
            table = getattr(module, name, None)
            if isinstance(table, Tensor):
                table.detach().zero_()


@pytest.mark.parametrize("name", ["videomae-classifier", "vivit-classifier"])
def test_a_still_clip_merges_across_frames(name: str) -> None:
    # nine places a frame: the tokens of one place lie on both sides of the bipartite matching
    model = _make(CASES[name], image_size=48)
    _forget_positions(model)
    clip = torch.randn(1, 1, 3, 48, 48).double().expand(2, 8, -1, -1, -1)
    with tokenmerge.patched(model, r=8, track=True) as handle, torch.no_grad():
        model(pixel_values=clip)
        groups, prefix = handle.groups[0][:, handle.prefix :], handle.prefix
        assert handle.tokens[0] == prefix + 36 - 8
    for row in groups:
        for group in row.unique():
            members = (row == group).nonzero()[:, 0]
            assert (members % 9 == members[0] % 9).all()
        assert len(row.unique()) == 28


def test_a_merged_token_keeps_its_place() -> None:
    # V-JEPA 2 numbers its tokens by itself: without the places of those left, they would be taken for the first ones
    model = _make(CASES["vjepa2"])
    with tokenmerge.patched(model, r=3, prop_attn=True) as handle, torch.no_grad():
        merged = model(**VIDEOS, skip_predictor=True).last_hidden_state
        for runner in handle.runners:
            runner.tap.move = _first_places
        assert (model(**VIDEOS, skip_predictor=True).last_hidden_state - merged).abs().max() > 1e-3


def _first_places(told: None, kept: Tensor) -> Tensor:
    return torch.arange(kept.shape[1]).expand_as(kept)


def test_images_of_another_size() -> None:
    image = {"pixel_values": torch.randn(2, 3, 48, 32).double()}
    for name in ("beit", "dinov3", "data2vec"):
        check_promises(_make(CASES[name]), **image, output=_output, tolerance=1e-6)


def test_speech_is_generated_from_all_places() -> None:
    model = _make(CASES["whisper-speech"])
    with tokenmerge.patched(model, r=3, prop_attn=True, track=True) as handle:
        ids, groups, positions = model.generate(**MEL, max_new_tokens=6), handle.groups, handle.positions
        assert handle.tokens == [17, 14, 11]
    encoded = tokenmerge.simulate(model.model.encoder, groups, positions=positions, **MEL)
    assert torch.equal(model.generate(encoder_outputs=encoded, max_new_tokens=6), ids)


@pytest.mark.parametrize(
    "name", ["beit-classifier", "dinov3", "videomae", "vivit", "vjepa2-classifier", "ast", "whisper-classifier"]
)
def test_flops_take_every_kind_of_input(name: str) -> None:
    model = _make(CASES[name])
    if name == "dinov3" and transformers.__version__.startswith("4."):
        pytest.skip("its rotary tables ask autocast about the meta device, which torch refuses")
    handle = tokenmerge.patch(model, r=3)
    size = handle.input_size
    assert size == tuple(answer(CASES[name][2]).shape[1:])
    merged = flops(model, size)
    assert flops(model, (2, *size)) == 2 * merged
    handle.r = 0
    assert flops(model, size) > merged > 0
    handle.remove()
    assert flops(model, size) > merged


@pytest.mark.parametrize(
    ("name", "prefix", "tokens", "grid"),
    [
        ("beit", 1, 26, (5, 5)),
        ("dinov3", 3, 28, (5, 5)),
        ("videomae", 0, 16, None),
        ("vivit", 1, 17, None),
        ("vjepa2", 0, 16, None),
        ("ast", 2, 22, (4, 5)),
        ("whisper", 0, 20, None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layout(name: str, prefix: int, tokens: int, grid: Any) -> None:
    handle = tokenmerge.patch(_make(CASES[name]), r=1)
    assert (handle.prefix, handle.grid, handle.tokens) == (prefix, grid, [tokens - 1, tokens - 2, tokens - 3])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("name", TOWERS)
def test_gradient_checkpointing_gives_equal_gradients(name: str) -> None:
    model, given = _make(CASES[name]).train(), CASES[name][2]
    tokenmerge.patch(model, r=3)
    grads = []
    for options in (None, {"use_reentrant": False}):
        if options:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.zero_grad()
        torch.manual_seed(0)
        _output(model(**given)).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 20
    for parameter, plain in grads[0].items():
        assert_close(grads[1][parameter], plain, 1e-9)


def test_a_mask_beside_relative_positions_is_refused() -> None:
    model = _make(CASES["beit"])
    mask = torch.ones(2, 26, dtype=torch.bool)
    with tokenmerge.patched(model, r=3), pytest.raises((UnsupportedError, TypeError), match="attention_mask"):
        model(**IMAGE, attention_mask=mask)


def test_whole_blocks_skipped_at_random_are_refused() -> None:
    model = _make(CASES["whisper"], encoder_layerdrop=0.1)
    with pytest.raises(
        UnsupportedModelError, match=r"WhisperEncoder skips whole blocks.*layerdrop=0\.1.*layerdrop = 0"
    ):
        tokenmerge.patch(model, r=3)
    model.encoder.layerdrop = 0.0
    tokenmerge.patch(model, r=3)


def test_an_encoder_alone() -> None:
    model = _make(CASES["whisper"])
    check_promises(model.encoder, **MEL, output=_output, tolerance=1e-6)


BARE = ("beit", "data2vec", "dinov3", "videomae", "vivit", "vjepa2", "ast")


@pytest.mark.parametrize("name", BARE)
def test_bare_models_hand_out_every_token(name: str) -> None:
    model, given = _make(CASES[name]), CASES[name][2]
    with torch.no_grad():
        expected = model(**given).last_hidden_state
    with tokenmerge.patched(model, r=3, prop_attn=True, track=True) as handle, torch.no_grad():
        restored, groups, positions = model(**given).last_hidden_state, handle.groups, handle.positions
        left = handle.tokens[-1]
        assert any("after the last block" in limit for limit in handle.report().limits)
    assert restored.shape == expected.shape and left < expected.shape[1]
    simulated = tokenmerge.simulate(model, groups, positions=positions, **given).last_hidden_state
    assert_close(restored, simulated, 1e-6)
    with tokenmerge.patched(model, r=3, prop_attn=True, restore="merged", track=True) as handle, torch.no_grad():
        merged, limits = model(**given).last_hidden_state, handle.report().limits
        if name in ("beit", "data2vec", "vjepa2"):
            # what follows looks at every token
            assert_close(merged, restored, 1e-9)
            assert any("after the last block" in limit for limit in limits)
        else:
            assert_close(handle.dense(merged), restored, 1e-9)
            assert any("merged tokens are handed out" in limit for limit in limits)
