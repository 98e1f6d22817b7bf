"""transformers' audio encoders: the audio spectrogram transformer, Whisper and its copies, wav2vec 2.0 (pre-norm)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from tokenmerge._intercept.taps import AttentionTap
from tokenmerge.adapters.base import BlockSpec, HookSpec, Spec, Surroundings, TokenLayout
from tokenmerge.adapters.transformers.base import HF, SIZES, HFAdapter, InterfaceTap, hf_names
from tokenmerge.adapters.transformers.plain import HFViT
from tokenmerge.errors import UnsupportedModelError

__all__ = ["HFAST", "HFWav2Vec2", "HFWhisper"]


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


# encoders of Whisper's kind that join every two frames at their end
_AVERAGING = ("Qwen2AudioEncoder", "AudioFlamingo3Encoder")


class HFWhisper(HFAdapter):
    """The cross-attention of the decoder and the mean of the classifier read all tokens, so tokens are restored."""

    name = "hf_whisper"
    families = "transformers Whisper, Voxtral, Qwen2-Audio, Audio Flamingo 3, MOSS-Transcribe (the encoder)"
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
    towers = dict.fromkeys(
        ("WhisperEncoder", "VoxtralEncoder", "MossTranscribeDiarizeAudioModel", *_AVERAGING), ("layers",)
    )
    host = replace(HF, ignores_rest=True)  # the attention weights of eager attention in transformers 4
    # hooked: dropouts are functional, and the block's forward clamps half precision at its end
    specs = (HookSpec(attn="self_attn", norm="final_layer_norm", mlp="fc2"),)

    def layout(self, model: Any) -> TokenLayout:
        tower = self.tower(model)[1]
        _check_layerdrop(tower, getattr(tower, "layerdrop", 0.0), "the encoder's layerdrop")
        tokens = tower.config.max_source_positions
        size = (tower.config.num_mel_bins, tokens * tower.conv1.stride[0] * tower.conv2.stride[0])
        return TokenLayout(0, None, tokens, size)

    def tap(self, block: Any) -> AttentionTap:
        return InterfaceTap(block, "self_attn")

    def surroundings(self, model: Any) -> Surroundings:
        around = super().surroundings(model)
        if not set(_AVERAGING).intersection(hf_names(self.tower(model)[1])):
            return around
        return replace(around, last=around.last or "it averages every two frames", handed_out=None)


def _check_layerdrop(tower: Any, layerdrop: float, where: str) -> None:
    """Raise `UnsupportedModelError` for an encoder that leaves out blocks."""
    if layerdrop > 0:
        raise UnsupportedModelError(
            f"{type(tower).__qualname__} skips whole blocks at random in training (layerdrop={layerdrop}): "
            f"what one block merged would not reach the next. Set {where} = 0, then patch."
        )


class HFWav2Vec2(HFAdapter):
    """The variants with `do_stable_layer_norm=True`, whose blocks are pre-norm. Heads read every frame."""

    name = "hf_wav2vec2"
    families = "transformers wav2vec 2.0, HuBERT, UniSpeech, UniSpeech-SAT with do_stable_layer_norm; OmniASR"
    landmarks = ("feature_extractor", "feature_projection", "encoder", "pos_conv_embed", "layer_norm", "feed_forward")
    example, shape = "Wav2Vec2ForCTC", (2, 8000)
    sizes: ClassVar = {
        **SIZES,
        "do_stable_layer_norm": True,
        "layerdrop": 0.0,
        "apply_spec_augment": False,
        "conv_dim": [16] * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "vocab_size": 12,
    }
    towers = dict.fromkeys(
        (
            *(f"{host}EncoderStableLayerNorm" for host in ("Wav2Vec2", "Hubert", "UniSpeech", "UniSpeechSat")),
            "OmniASRAudioModel",
        ),
        ("layers",),
    )
    specs = (
        BlockSpec(
            attention=("layer_norm", "attention", "dropout"),
            attn="attention",
            mlp=("final_layer_norm", "feed_forward"),
        ),
    )

    def layout(self, model: Any) -> TokenLayout:
        tower = self.tower(model)[1]
        drop = tower.config.layerdrop if "OmniASRAudioModel" not in hf_names(tower) else tower.layerdrop
        _check_layerdrop(tower, drop, "the encoder's layerdrop (and that of its config)")
        return TokenLayout(0, None, None, None)  # sounds of any length

    def spec(self, block: Any) -> Spec:
        if getattr(block, "adapter_layer", None) is not None:
            raise UnsupportedModelError(
                f"{type(block).__qualname__} has a third branch, an adapter for a language (adapter_attn_dim): its "
                "blocks are described with two, attention and MLP. Take a model without adapters."
            )
        spec = super().spec(block)
        if isinstance(spec, BlockSpec) and "OmniASREncoderLayer" in hf_names(block):
            return replace(spec, mlp=(*spec.mlp, "dropout"))
        return spec

    def is_plain(self, model: Any) -> bool:
        return False  # heads read every frame

    def surroundings(self, model: Any) -> Surroundings:
        return replace(super().surroundings(model), handed_out=None)

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from torch.nn.utils.parametrize import remove_parametrizations

        model, x = super().tiny()
        host: Any = model
        host.wav2vec2.feature_extractor._requires_grad = False  # it would ask the input for gradients in training
        # no pickle takes weight norm, nor the hook that it leaves
        conv = host.wav2vec2.encoder.pos_conv_embed.conv
        remove_parametrizations(conv, "weight")
        conv._load_state_dict_pre_hooks.clear()
        return model, x
