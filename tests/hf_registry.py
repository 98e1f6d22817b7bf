"""transformers' registry as a list of small models: every configuration whose models see or hear."""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from registry import undrawn
from tokenmerge import adapters
from tokenmerge.errors import UnsupportedModelError

# arguments of a forward that takes images, sound or video; the last is the grid of patches in one sequence
MEDIA = re.compile(
    r"pixel_values\w*|input_features|input_values|audio_mel|flattened_patches|patch_embeds|images?|grid_thw"
)
# parts that take text and features, or what another part made of an image
_NO_ENCODERS = {"blt_local_encoder", "blt_local_decoder"}

# what a configuration says of sizes -> what it says here, wherever it stands and is larger
_SMALL: dict[str, int] = {}
_SMALL |= dict.fromkeys(("hidden_size", "d_model", "embed_dim", "encoder_hidden_size", "out_hidden_size"), 32)
_SMALL |= dict.fromkeys(("projection_dim", "text_embed_dim", "output_dim", "projector_hidden_size"), 32)
_SMALL |= dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "mlp_dim"), 64)
_SMALL |= dict.fromkeys(("encoder_intermediate_size", "moe_intermediate_size", "projector_ffn_dim"), 64)
_SMALL |= dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers", "decoder_layers", "num_layers", "layers"), 2)
_SMALL |= dict.fromkeys(("n_layer", "n_layers", "encoder_num_hidden_layers", "decoder_num_hidden_layers"), 2)
_SMALL |= dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads", "attention_heads"), 4)
_SMALL |= dict.fromkeys(("decoder_attention_heads", "num_key_value_heads", "n_head", "n_heads"), 4)
_SMALL |= {"vocab_size": 128, "head_dim": 8, "num_experts": 2, "n_routed_experts": 2, "num_local_experts": 2}
_SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_SMALL |= {"num_frames": 8, "frames_per_clip": 8, "crop_size": 64, "max_source_positions": 16}


@cache
def names() -> list[str]:
    """Return every registered model type whose file mentions images, sound or video; `build` knows for sure."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

    folder = Path(transformers.__file__).parent / "models"
    found = []
    for name in CONFIG_MAPPING_NAMES:
        files = (folder / model_type_to_module_name(name)).glob("modeling_*.py")
        if any(re.search(rf"def forward\(\s*self,[^)]*\b({MEDIA.pattern})\b", file.read_text()) for file in files):
            found.append(name)
    return found


def model_class(name: str) -> Any:
    """Return the class of models to build for a model type, or None if none takes images, sound or video.

    The one that `AutoModel` builds comes first. Raises `ModuleNotFoundError` where a library is missing.
    """
    from transformers import CONFIG_MAPPING, PreTrainedModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    config: Any = CONFIG_MAPPING[name]
    module = importlib.import_module(config.__module__.replace("configuration_", "modeling_"))
    auto = MODEL_MAPPING_NAMES.get(name, ())
    auto = (auto,) if isinstance(auto, str) else auto
    found = [
        cls
        for cls in vars(module).values()
        if inspect.isclass(cls) and issubclass(cls, PreTrainedModel) and cls.__module__ == module.__name__
        if getattr(cls, "config_class", None) is config and takes_media(cls)
    ]
    return min(found, key=lambda cls: cls.__name__ not in auto, default=None)


def takes_media(cls: type) -> bool:
    """Return whether the class's forward takes images, sound or video."""
    return any(MEDIA.fullmatch(argument) for argument in inspect.signature(cls.forward).parameters)  # type: ignore[attr-defined]


def build(name: str, device: str = "cpu") -> nn.Module | None:
    """Return a small model of this type in eval mode, or None; raises what transformers raises for it.

    Its parameters hold anything: they are to be drawn. What does not fit together in small is built in its own size.
    """
    from transformers import CONFIG_MAPPING

    cls = model_class(name)
    if cls is None or name in _NO_ENCODERS:
        return None
    problem: Exception | None = None
    for change in (_shrink, _shorten, lambda config: None):
        try:
            config = CONFIG_MAPPING[name]()
            for path, value in _NEEDS.get(name, {}).items():
                _set(config, path, value)
            change(config)
            with warnings.catch_warnings(), undrawn(), torch.device(device):
                warnings.simplefilter("ignore")
                model: nn.Module = cls(config)
            return model.eval()
        except ImportError:
            raise
        except Exception as error:
            problem = problem or error
    assert problem is not None
    raise problem


# what a configuration needs to be built at all, or to be small
_LLAMA4 = {"hidden_size": 16, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
_STABLE = {"do_stable_layer_norm": True, "layerdrop": 0.0}
_NEEDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("wav2vec2", "hubert", "unispeech", "unispeech-sat"), _STABLE),
    "timm_wrapper": {"architecture": "vit_tiny_patch16_224"},
    "vit_mae": {"mask_ratio": 0.25},
    "llama4_vision_model": _LLAMA4,
    "llama4": {f"vision_config.{key}": value for key, value in _LLAMA4.items()},
    "timm_backbone": {"backbone": "resnet18"},
    "yolos": {"use_mid_position_embeddings": False},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "dots3_note": {"vision_config.adapter_in_dim": 32, "vision_config.adapter_out_dim": 32},
    "omniasr_audio": {"layerdrop": 0.0},
    "omniasr": {"audio_config.layerdrop": 0.0},
    "omniasr_ctc": {"audio_config.layerdrop": 0.0},
    "ernie4_5_vl_moe": {"text_config.moe_intermediate_size": [64, 64], "text_config.moe_num_experts": 2},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "gemma4": {"vision_config": "Gemma4VisionConfig"},
}


def _set(config: Any, path: str, value: Any) -> None:
    *parts, last = path.split(".")
    for part in parts:
        config = getattr(config, part)
    if isinstance(value, str) and value.endswith("Config"):
        import transformers

        value = getattr(transformers, value)()
    setattr(config, last, value)


def _shrink(config: Any) -> None:
    for part in _parts(config):
        for name, value in list(vars(part).items()):
            if name in _SMALL and isinstance(value, int) and not isinstance(value, bool) and value > _SMALL[name]:
                setattr(part, name, _SMALL[name])
            elif name.endswith("layer_types") and isinstance(value, list):
                setattr(part, name, value[:2])
        stages = getattr(part, "stage_names", None)
        if stages and len(stages) > 3 and getattr(part, "num_hidden_layers", None) == 2:
            part.stage_names = stages[:3]
            part.set_output_features_output_indices(out_indices=[1, 2], out_features=None)
        if str(getattr(part, "architecture", "")).startswith("vit"):  # a ViT of timm's
            part.architecture, part.model_args = "vit_tiny_patch16_224", {"depth": 2, "img_size": 64}
        patch, image = getattr(part, "patch_size", None), getattr(part, "image_size", None)
        if isinstance(patch, int) and isinstance(image, int):
            part.patch_size, part.image_size = min(patch, 8), 4 * min(patch, 8)


def _shorten(config: Any) -> None:
    """Change the depth alone."""
    for part in _parts(config):
        for name, value in list(vars(part).items()):
            if _SMALL.get(name) == 2 and isinstance(value, int) and value > 2:
                setattr(part, name, 2)


def _parts(config: Any) -> list[Any]:
    """Return the configuration and all inside it."""
    from transformers import PretrainedConfig

    inside = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    return [config, *(part for value in inside for part in _parts(value))]


_CHANNELS = dict.fromkeys(("OmniASRAudioModel", "PeAudioEncoder"), (1,))  # of sound


def entry(model: nn.Module, block: str) -> str:
    """Return the path of the smallest tower around a block that takes images, sound or video."""
    parts = block.split(".")
    around = [".".join(parts[:depth]) for depth in reversed(range(len(parts)))]
    kinds = {path: type(model.get_submodule(path)) for path in around}
    taking = [path for path, kind in kinds.items() if takes_media(kind) and not _takes_tokens(kind)]
    return next(path for path in taking if _is_described(model.get_submodule(path)))


def _is_described(part: nn.Module) -> bool:
    try:
        return bool(adapters.find(part))
    except UnsupportedModelError:
        return False  # a part of a tower


def _takes_tokens(cls: Any) -> bool:
    arguments = [*inspect.signature(cls.forward).parameters]
    return "inputs_embeds" in arguments and not any(name.startswith(("pixel", "input_")) for name in arguments)


def everything(out: Any) -> Tensor:
    """Return all that a model returns, as one vector."""
    return torch.cat([value.flatten() for value in _tensors(out) if value.is_floating_point()])


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    values = out.values() if isinstance(out, dict) else out if isinstance(out, (list, tuple)) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def inputs(part: Any, size: tuple[int, ...] | None) -> dict[str, Any]:
    """Return two different inputs of this size, or of some patches or a piece of sound where the size is free."""
    config, arguments = part.config, inspect.signature(type(part).forward).parameters
    media = re.compile(rf"(?!grid_thw)(?:{MEDIA.pattern}|hidden_states)")
    first = next(name for name in arguments if media.fullmatch(name))
    if "grid_thw" in arguments:  # patches of all images behind each other
        width = getattr(config, "in_channels", 3) * getattr(config, "temporal_patch_size", 1) * config.patch_size**2
        pixels = torch.randn(48, width).double()
        if "Kimi" in type(part).__name__:
            pixels = pixels.view(48, 3, config.patch_size, config.patch_size)
        if "PaddleOCR" in type(part).__name__:
            pixels = pixels.view(1, 48, 3, config.patch_size, config.patch_size)
        given = {first: pixels, "grid_thw": torch.tensor([[1, 4, 6], [1, 6, 4]])}
        return given | ({"merge_sizes": torch.ones(2, dtype=torch.long)} if "merge_sizes" in arguments else {})
    if "spatial_shapes" in arguments:
        shapes, mask = torch.tensor([[4, 4], [2, 8]]), torch.ones(2, 16, dtype=torch.long)
        pixels = torch.randn(2, 16, 3 * config.patch_size**2).double()
        given = {"pixel_values": pixels, "spatial_shapes": shapes}
        masks = [name for name in ("pixel_attention_mask", "attention_mask") if name in arguments]
        return {**given, masks[0]: mask}
    if "pixel_position_ids" in arguments:
        at = torch.arange(36)
        places = torch.stack((at % 6, at // 6), dim=-1).expand(2, -1, -1)
        return {"pixel_values": torch.rand(2, 36, 3 * config.patch_size**2).double(), "pixel_position_ids": places}
    if "image_sizes" in arguments:
        side = 4 * config.patch_size
        return {"pixel_values": torch.randn(2, 3, side, side).double(), "image_sizes": torch.tensor(2 * [[side, side]])}
    if first == "input_values" and size is None:
        return {first: torch.randn(2, *_CHANNELS.get(type(part).__name__, ()), 8000).double()}
    if first == "input_features" and size is None:
        size = (config.num_mel_bins, 64)
        size = size[::-1] if "Nemotron" in type(part).__name__ else size
    if size is None:
        side = 4 * config.patch_size if isinstance(getattr(config, "patch_size", None), int) else 32
        size = (3, side, side)
    given = {first: torch.randn(2, *size).double()}
    if "noise" in arguments:  # which patches are masked
        given["noise"] = torch.rand(2, 16)
    if "input_features_mask" in arguments:
        given["input_features_mask"] = torch.ones(2, size[-1], dtype=torch.long)
    return given
