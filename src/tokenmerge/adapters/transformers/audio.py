"""transformers' audio encoders: the audio spectrogram transformer and Whisper."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from tokenmerge._intercept.taps import AttentionTap
from tokenmerge.adapters.base import HookSpec, TokenLayout
from tokenmerge.adapters.transformers.base import HF, SIZES, HFAdapter, InterfaceTap
from tokenmerge.adapters.transformers.plain import HFViT
from tokenmerge.errors import UnsupportedModelError

__all__ = ["HFAST", "HFWhisper"]


class HFAST(HFAdapter):
    name = "hf_ast"
    families = "transformers audio spectrogram transformer (AST)"
    landmarks = ("audio_spectrogram_transformer", *HFViT.landmarks)
    example, shape = "ASTForAudioClassification", (2, 40, 32)
    sizes: ClassVar = SIZES | {
        "patch_size": 8,
        "frequency_stride": 8,
        "time_stride": 8,
        "max_length": 40,
        "num_mel_bins": 32,
    }
    towers: ClassVar = {"ASTModel": ("layers", "encoder.layer")}
    specs = HFViT.specs
    class_models = frozenset(("ASTForAudioClassification",))

    def layout(self, model: Any) -> TokenLayout:
        tower = self.tower(model)[1]
        rows, columns = tower.embeddings.get_shape(tower.config)  # frequencies and times
        prefix = self.prefix(tower)
        return TokenLayout(
            prefix, (rows, columns), prefix + rows * columns, (tower.config.max_length, tower.config.num_mel_bins)
        )


class HFWhisper(HFAdapter):
    """The cross-attention of the decoder and the mean of the classifier read all tokens, so tokens are restored."""

    name = "hf_whisper"
    families = "transformers Whisper (the encoder)"
    landmarks = ("encoder", "self_attn_layer_norm", "self_attn", "final_layer_norm", "conv1", "conv2")
    example, shape = "WhisperForAudioClassification", (2, 16, 32)
    sizes: ClassVar = {
        "d_model": 32,
        "num_mel_bins": 16,
        "max_source_positions": 16,
        "vocab_size": 64,
        "encoder_layers": 4,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "classifier_proj_size": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 3,
    }
    towers: ClassVar = {"WhisperEncoder": ("layers",)}
    host = replace(HF, ignores_rest=True)  # the attention weights of eager attention in transformers 4
    # hooked: dropouts are functional, and the block's forward clamps half precision at its end
    specs = (HookSpec(attn="self_attn", norm="final_layer_norm", mlp="fc2"),)

    def layout(self, model: Any) -> TokenLayout:
        tower = self.tower(model)[1]
        if tower.layerdrop > 0:
            raise UnsupportedModelError(
                f"{type(tower).__qualname__} skips whole blocks at random in training (layerdrop={tower.layerdrop}): "
                "what one block merged would not reach the next. Set the encoder's layerdrop = 0, then patch."
            )
        tokens = tower.config.max_source_positions
        size = (tower.config.num_mel_bins, tokens * tower.conv1.stride[0] * tower.conv2.stride[0])
        return TokenLayout(0, None, tokens, size)

    def tap(self, block: Any) -> AttentionTap:
        return InterfaceTap(block, "self_attn")
