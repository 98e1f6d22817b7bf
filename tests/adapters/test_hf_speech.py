"""transformers' speech encoders: pre-norm wav2vec 2.0 and encoders with rotary positions; towers on meta tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokenmerge
from helpers import assert_close, randomised
from promises import check_promises
from tokenmerge.adapters.transformers.audio import HFWav2Vec2
from tokenmerge.adapters.transformers.packed import HFPixtral, HFQwenVision
from tokenmerge.errors import UnsupportedModelError

transformers = pytest.importorskip("transformers", minversion="5.24")

HOSTS = ("Wav2Vec2", "Hubert", "UniSpeech", "UniSpeechSat")


def _model(host: str, head: str = "Model", **more: Any) -> Any:
    cls = getattr(transformers, f"{host}{head}")
    return randomised(cls(cls.config_class(**{**HFWav2Vec2.sizes, **more}))).eval().double()


@pytest.mark.parametrize("host", HOSTS)
def test_wav2vec2_and_its_kind(host: str) -> None:
    x = 0.1 * torch.randn(2, 8000).double()
    assert check_promises(_model(host, "ForCTC"), x, output=lambda out: out.logits) == [21, 18, 15, 12]


@torch.no_grad()
def test_padding_is_never_merged_with_sound() -> None:
    model, x = _model("Wav2Vec2"), 0.1 * torch.randn(2, 8000).double()
    mask = torch.ones(2, 8000, dtype=torch.long)
    mask[1, 4000:] = 0
    model.config.feat_extract_norm = "layer"
    with tokenmerge.patched(model, r=3, prop_attn=True, track=True) as handle:
        merged, groups, positions = model(x, attention_mask=mask).last_hidden_state, handle.groups, handle.positions
    real = int(model._get_feat_extract_output_lengths(torch.tensor(4000)))
    assert not set(groups[-1][1, :real].tolist()) & set(groups[-1][1, real:].tolist())
    simulated = tokenmerge.simulate(model, groups, x, positions=positions, attention_mask=mask).last_hidden_state
    assert_close(merged[0], simulated[0], 1e-6)
    assert_close(merged[1, :real], simulated[1, :real], 1e-6)


@torch.no_grad()
def test_pe_audio_protects_its_class_token_and_never_merges_padding() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    codec = {"encoder_hidden_size": 8, "downsampling_ratios": [2, 2], "codebook_dim": 16}
    config = transformers.PeAudioEncoderConfig(**sizes, dac_config=codec, num_key_value_heads=2, head_dim=8)
    model, x = randomised(transformers.PeAudioEncoder(config)).eval().double(), torch.randn(2, 1, 128).double()
    whole = check_promises(model, x, output=lambda out: torch.cat((out.pooler_output[:, None], out[0]), dim=1))
    assert whole == [30, 27, 24, 21]
    mask = torch.ones(2, 128, dtype=torch.long)
    mask[1, 64:] = 0
    for given in ({}, {"padding_mask": mask}):
        with tokenmerge.patched(model, r=3, prop_attn=True, track=True) as handle:
            merged, groups, positions = model(x, **given), handle.groups, handle.positions
        assert handle.prefix == 1 and (groups[-1] == 0).sum(dim=1).tolist() == [1, 1]  # the class token stands alone
        simulated = tokenmerge.simulate(model, groups, x, positions=positions, **given)
        assert_close(merged.pooler_output, simulated.pooler_output, 1e-6)
        assert_close(merged.last_hidden_state[0], simulated.last_hidden_state[0], 1e-6)
    assert not set(groups[-1][1, :17].tolist()) & set(groups[-1][1, 17:].tolist())
    assert_close(merged.last_hidden_state[1, :16], simulated.last_hidden_state[1, :16], 1e-6)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"do_stable_layer_norm": False}, "post-norm: each sum is normalised"),
        ({"layerdrop": 0.1}, r"skips whole blocks at random in training \(layerdrop=0\.1\)"),
        ({"adapter_attn_dim": 8}, "a third branch, an adapter for a language"),
    ],
)
def test_what_is_refused(more: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        tokenmerge.patch(_model("Wav2Vec2", **more), r=3)


@pytest.mark.parametrize("family", [HFQwenVision, HFPixtral])
def test_packed_towers_are_patched_on_meta_tensors(family: type) -> None:
    model, _ = family().tiny()
    handle = tokenmerge.patch(model.to("meta"), r=2)
    assert len(handle.runners) == 4


def test_a_larger_model_is_refused_for_its_part() -> None:
    config = transformers.Florence2Config()
    with torch.device("meta"):
        model = transformers.Florence2ForConditionalGeneration(config)
    with pytest.raises(UnsupportedModelError, match=r"of its model\.vision_tower, a Florence2Vision.*it is a DaViT"):
        tokenmerge.patch(model, r=2)
