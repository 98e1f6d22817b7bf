"""transformers' speech encoders with rotary positions: GLM-ASR, Moonshine, Nemotron 3, PE audio."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge._intercept import follow
from tokenmerge._intercept.taps import AttentionTap
from tokenmerge.adapters.base import PROBED, BlockSpec, TokenLayout
from tokenmerge.adapters.transformers.base import HF, HFAdapter, InterfaceTap, no_change
from tokenmerge.errors import UnsupportedError

__all__ = ["HFSpeech"]


def _numbers(given: Any, kept: Tensor) -> Any:
    """Gather the numbers of the frames, `[B or 1, N]`; None stays None."""
    return None if given is None else given.expand(kept.shape[0], -1).gather(1, kept)


class _SpeechTap(InterfaceTap):
    """Refuses tables for another number of tokens, as where a block is called by itself on merged ones."""

    def call(self, attention: Any, x: Tensor, given: Any) -> Any:
        places = given["position_embeddings"][0].shape[-2]
        if places != x.shape[1]:
            raise UnsupportedError(
                f"a block was given {x.shape[1]} tokens and position_embeddings for {places}: if tokens are merged, "
                "which places they have is not known. Run the blocks before it too, or `with handle.disabled():` for "
                "it alone."
            )
        return super().call(attention, x, given)


class HFSpeech(HFAdapter):
    """Frames are handed out in order, or read by a head or a language model, so all are put back."""

    name = "hf_speech"
    families = "transformers GLM-ASR, Moonshine, Nemotron 3 (diarization, transcription), PE audio: the encoder"
    landmarks = ("rotary_emb", "layers", "input_layernorm", "self_attn", "post_attention_layernorm", "conv1")
    towers = dict.fromkeys(
        (
            *("GlmAsrEncoder", "MoonshineEncoder", "PeAudioEncoder"),
            *("Nemotron3DiarizationAudioModel", "Nemotron3_5TranscribeAsrAudioModel"),
        ),
        ("layers",),
    )
    specs = (
        BlockSpec(
            attention=("input_layernorm", "self_attn"), attn="self_attn", mlp=("post_attention_layernorm", "mlp")
        ),
        BlockSpec(attention=("layer_norm1", "self_attn"), attn="self_attn", mlp=("layer_norm2", "mlp")),
    )
    host = replace(
        HF,
        followers={
            **HF.followers,
            "position_embeddings": lambda tables, kept: tuple(follow.rows(table, kept) for table in tables),
            "position_ids": _numbers,
            "cache": no_change,  # Moonshine's decoder has one, its encoder is given None
        },
        is_positional=True,
    )

    def layout(self, model: Any) -> TokenLayout:
        # sounds of any length; the class token of PE audio stands first
        return TokenLayout(int(hasattr(self.tower(model)[1], "patch_embedder")), None, None, None)

    def tap(self, block: Any) -> AttentionTap:
        return _SpeechTap(block, "self_attn")

    def is_plain(self, model: Any) -> bool:
        return False

    def sample(self, model: nn.Module, block: Any, layout: TokenLayout) -> tuple[int, dict[str, Any]]:
        tower = self.tower(model)[1]
        rotary = next(part for name, part in tower.named_children() if name.startswith("rotary"))
        weight = next(p for p in block.parameters() if p.dim() > 1)
        numbers = torch.arange(PROBED, device=weight.device)[None]
        given = super().sample(model, block, layout)[1]
        # not by a call: hooks of the user stay out
        return PROBED, {**given, "position_embeddings": rotary.forward(weight[None], numbers)}

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from transformers import GlmAsrEncoder, GlmAsrEncoderConfig

        sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
        config: Any = GlmAsrEncoderConfig(**sizes, num_mel_bins=16, num_key_value_heads=4, head_dim=8)
        return GlmAsrEncoder(config).eval(), torch.randn(2, 16, 32)
