"""Find the preprocessing of a model in the places where each host stores it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from tokenmerge.data.answers import known_size
from tokenmerge.data.preprocessing import MODES, Preprocessing, Processor
from tokenmerge.data.transforms import eval_transform, statistics
from tokenmerge.errors import ConfigError, DataError, TokenMergeError, UnsupportedError

__all__ = ["PROCESSOR", "choose_preprocessing", "find_preprocessing", "frames_preprocessing", "statistics_of"]

PROCESSOR = "preprocessor_config.json"  # written by a Hugging Face processor
_RUN = "model.json"  # written by `tokenmerge train`


def find_preprocessing(
    model: nn.Module, *, given: Any = None, beside: str | Path | None = None, **changes: Any
) -> Preprocessing:
    """Return the preprocessing of a model, with the changes that `Preprocessing.changed` takes.

    If `given` is not None, it is used: a `Preprocessing`, a Hugging Face image processor, or any function of a PIL
    image, such as torchvision's `weights.transforms()`. Otherwise it is looked up in this order: `beside` the model
    (its folder or file), then in the folder a Hugging Face model was loaded from (`preprocessor_config.json`, or what
    `tokenmerge train` recorded), timm's `pretrained_cfg`, open_clip's settings. If none is found, defaults are assumed
    and the result says so. Raises `DataError` if the input size is unknown, `ConfigError` for a file that cannot be
    read.
    """
    found = _given(given, model) if given is not None else _found(model, beside)
    return found.changed(**changes)


def choose_preprocessing(
    model: nn.Module, kind: str, size: tuple[int, ...], *, beside: str | Path | None, is_own: bool
) -> Preprocessing | None:
    """Return the evaluation preprocessing of a model that is to be trained; None for clips and sounds.

    It is the preprocessing that the model declares (`beside` it, or in itself), at this size. A model that declares
    none gets ImageNet's constants (Fashion-MNIST's for one channel), a resize of the shorter side and a centre crop.
    That default counts as known if `is_own`: the model was not trained elsewhere, with other constants.
    """
    if kind != "image":
        return None
    try:
        found = find_preprocessing(model, beside=beside)
    except ConfigError:
        raise
    except TokenMergeError:  # no adapter, or the input size is unknown
        found = None
    if found is not None and found.is_known and (not found.size or found.size == size):
        return found
    is_known = found is not None and found.is_known and found.mean is not None and len(found.mean) == size[0]
    mean, std = (found.mean, found.std) if is_known and found is not None else ((), ())
    means, stds = statistics(size[0], mean or (), std or ())
    is_square = size[1] == size[2]
    return Preprocessing(
        size=size,
        resize=size[1] if is_square else (size[1], size[2]),
        crops=True,
        interpolation="bicubic",
        mean=tuple(means),
        std=tuple(stds),
        source="as this run prepares them",
        is_known=is_known or is_own,
        extra="" if is_square else "aspect ratio kept",
        own=eval_transform(kind, size, mean=means, std=stds),
    )


def frames_preprocessing(
    model: nn.Module, size: tuple[int, ...], *, given: Any = None, **changes: Any
) -> Preprocessing:
    """Return how the frames of a clip are prepared for a model of clips; `size` is that of a frame.

    The shorter side is resized and the middle cut out, as `tokenmerge train` does. Mean and std are those of the
    model's `preprocessor_config.json` if it has one, else ImageNet's are assumed, and the result says so. Other
    arguments are those of `find_preprocessing`.
    """
    beside = changes.pop("beside", None)
    if given is not None:
        return _given(given, model).changed(**changes)
    folders = [Path(name) for name in (beside, getattr(model, "name_or_path", None)) if name]
    found = next((folder / PROCESSOR for folder in folders if (folder / PROCESSOR).is_file()), None)
    kept: dict[str, Any] = {}
    if found is not None:
        try:
            kept = json.loads(found.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{found} cannot be read: {error}.") from error
    means, stds = statistics(size[0], kept.get("image_mean") or (), kept.get("image_std") or ())
    is_known = bool(kept.get("image_mean")) or any((folder / _RUN).is_file() for folder in folders)
    source = f"from {found}" if kept.get("image_mean") else f"{type(model).__qualname__} has no {PROCESSOR}"
    return Preprocessing(
        size=size,
        resize=min(size[1:]) if size[1] == size[2] else (size[1], size[2]),
        crops=size[1] == size[2],
        interpolation="bicubic",
        mean=tuple(means),
        std=tuple(stds),
        source="as its training prepared them" if is_known and not kept else source,
        is_known=is_known,
    ).changed(**changes)


def statistics_of(prepared: Preprocessing | None) -> dict[str, Any]:
    """Return mean, std and interpolation as arguments of `train_transform`."""
    if prepared is None or prepared.mean is None:
        return {}
    return {"mean": prepared.mean, "std": prepared.std, "interpolation": prepared.interpolation}


def _given(given: Any, model: nn.Module) -> Preprocessing:
    if isinstance(given, Preprocessing):
        return given
    if hasattr(given, "preprocess") and hasattr(given, "image_mean"):
        return _of_processor(given, _channels(model), f"from the {type(given).__name__} given")
    # attribute names of torchvision's presets
    resize, crop = getattr(given, "resize_size", None), getattr(given, "crop_size", None)
    if resize and crop and hasattr(given, "mean"):
        size = (len(given.mean), *(crop * 2)[:2])
        side: Any = resize[0] if len(resize) == 1 else tuple(resize)
        mode = str(given.interpolation.value)
        source = f"from the {type(given).__name__} given"
        return Preprocessing(size, side, True, mode, tuple(given.mean), tuple(given.std), source, own=given)
    if not callable(given):
        raise DataError(
            f"preprocessing is {given!r}; it takes a Hugging Face image processor, or a function of one image (PIL)."
        )
    return Preprocessing((), None, False, "", None, None, "the transform given", own=given)


def _found(model: nn.Module, beside: str | Path | None) -> Preprocessing:
    folders = [Path(beside) if Path(beside).is_dir() else Path(beside).parent] if beside is not None else []
    name = getattr(model, "name_or_path", None)
    folders += [Path(name)] if isinstance(name, str) and name and Path(name).is_dir() else []
    for folder in folders:
        if (folder / PROCESSOR).is_file():
            return _of_processor(_processor(folder), _channels(model), f"from {folder / PROCESSOR}")
        if found := _of_run(folder):
            return found
    for holder in (model, getattr(model, "timm_model", None)):
        if getattr(holder, "pretrained_cfg", None):
            return _of_timm(holder)
    if weights := getattr(model, "torchvision_weights", None):  # as `tokenmerge.load` leaves them
        return replace(_given(weights.transforms(), model), source=f"from torchvision's {weights}")
    return _of_open_clip(model) or _assumed(model)


def _processor(folder: Path) -> Any:
    """Read the settings of a processor, without running code from the folder."""
    try:
        from transformers import AutoImageProcessor
    except ImportError as error:
        raise UnsupportedError(f"{folder / PROCESSOR} needs transformers: pip install transformers") from error
    try:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ConfigError(f"{folder / PROCESSOR} is no image processor that transformers can read: {error}.") from error


def _of_processor(processor: Any, channels: int, source: str) -> Preprocessing:
    size, crop = (_sizes(getattr(processor, name, None)) for name in ("size", "crop_size"))
    side: Any = size.get("shortest_edge") or size.get("longest_edge")
    if "height" in size:
        side = (size["height"], size["width"])
    crops = bool(getattr(processor, "do_center_crop", False)) and "height" in crop
    final = (crop["height"], crop["width"]) if crops else side if isinstance(side, tuple) else (side, side)
    pixels = (processor.image_mean, processor.image_std) if getattr(processor, "do_normalize", True) else (None, None)
    mean, std = (None if part is None else tuple(part) for part in pixels)
    resample = getattr(processor, "resample", None)
    mode = MODES[resample] if isinstance(resample, int) else str(getattr(resample, "value", "bilinear"))
    return Preprocessing(
        size=(channels, *final) if all(final) else (),
        resize=side if getattr(processor, "do_resize", True) else None,
        crops=crops,
        interpolation=mode,
        mean=mean,
        std=std,
        source=source,
        extra=_unusual(processor),
        own=Processor(processor),
    )


def _unusual(processor: Any) -> str:
    """Describe the steps of a processor other than resize, crop and normalise."""
    said = []
    if getattr(processor, "keep_aspect_ratio", False):
        said.append(f"aspect ratio kept, sides multiples of {getattr(processor, 'ensure_multiple_of', 1)}")
    if getattr(processor, "crop_pct", None):
        said.append(f"crop_pct {processor.crop_pct:g}")
    if not getattr(processor, "do_rescale", True):
        said.append("pixels 0 to 255")
    elif abs(float(getattr(processor, "rescale_factor", None) or 1 / 255) - 1 / 255) > 1e-9:
        said.append(f"pixels times {processor.rescale_factor:g}")
    return ", ".join(said)


def _sizes(size: Any) -> dict[str, int]:
    """Return the size settings of a processor: height and width, or one edge."""
    if isinstance(size, int):
        return {"shortest_edge": size}
    values = dict(size) if hasattr(size, "keys") else vars(size) if size is not None else {}
    return {name: int(value) for name, value in values.items() if isinstance(value, (int, float))}


def _of_run(folder: Path) -> Preprocessing | None:
    """Return the preprocessing that `tokenmerge train` recorded, or None."""
    try:
        kept = json.loads((folder / _RUN).read_text(encoding="utf-8")).get("preprocessing")
        if kept is None:
            return None
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()
        }
        return Preprocessing(**{**values, "source": f"from {folder / _RUN}: {values['source']}"})
    except OSError:
        return None
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ConfigError(f"{folder / _RUN} holds no preprocessing that can be read: {error}.") from error


def _of_timm(model: Any) -> Preprocessing:
    try:
        from timm.data import create_transform, resolve_data_config
    except ImportError as error:
        raise UnsupportedError('images need timm and torchvision: pip install "tokenmerge[timm]"') from error
    kept = model.pretrained_cfg if isinstance(model.pretrained_cfg, dict) else asdict(model.pretrained_cfg)
    try:
        # the model may have been built for another size than its configuration names
        given = {"input_size": _input_size(model)}
    except TokenMergeError:
        given = {}
    config = resolve_data_config(given, model=model)
    C, H, W = config["input_size"]
    mean, std = tuple(config["mean"]), tuple(config["std"])
    is_known = bool(kept.get("mean")) and bool(kept.get("std")) and len(mean) == C
    if len(mean) != C:
        mean, std = (sum(mean) / len(mean),) * C, (sum(std) / len(std),) * C
    own = create_transform(**{**config, "mean": mean, "std": std})
    mode = config["crop_mode"]
    is_plain = mode == "center" and H == W
    return Preprocessing(
        size=(C, H, W),
        resize=int(H / config["crop_pct"]) if is_plain else (int(H / config["crop_pct"]), int(W / config["crop_pct"])),
        crops=True,
        interpolation=config["interpolation"],
        mean=mean,
        std=std,
        source="from timm's pretrained_cfg" if is_known else "no mean and std in its pretrained_cfg for its channels",
        is_known=is_known,
        extra="" if is_plain or mode == "squash" else f"crop_mode {mode}",
        own=own,
    )


def _of_open_clip(model: Any) -> Preprocessing | None:
    tower = getattr(model, "visual", model)
    kept = dict(getattr(tower, "preprocess_cfg", None) or {})
    mean = kept.get("mean") or getattr(tower, "image_mean", None)
    std = kept.get("std") or getattr(tower, "image_std", None)
    if not mean or not std:
        return None
    size = kept.get("size") or getattr(tower, "image_size", None) or _input_size(model)[1:]
    H, W = (size, size) if isinstance(size, int) else tuple(size)
    is_squashed = kept.get("resize_mode") == "squash"
    side: Any = (H, W) if is_squashed or H != W else H
    mode = kept.get("interpolation", "bicubic")
    found = ((3, H, W), side, not is_squashed, mode, tuple(mean), tuple(std), "from open_clip's preprocess_cfg")
    return Preprocessing(*found, own=_open_clip_transform(kept, mean, std, (H, W)))


def _open_clip_transform(kept: dict[str, Any], mean: Any, std: Any, size: tuple[int, int]) -> Any:
    """Return open_clip's own transform if open_clip is installed."""
    try:
        from open_clip.transform import PreprocessCfg, image_transform_v2
    except ImportError:
        return None
    return image_transform_v2(PreprocessCfg(**{**kept, "mean": mean, "std": std, "size": size}), is_train=False)


def _assumed(model: nn.Module) -> Preprocessing:
    try:
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    except ImportError as error:
        raise UnsupportedError('images need timm and torchvision: pip install "tokenmerge[timm]"') from error
    size = _input_size(model)
    if len(size) != 3:
        raise DataError(
            f"{type(model).__qualname__} takes inputs of {size}, no images (channels, height, width). `tokenmerge "
            "doctor` and `bench` need none; `tokenmerge train` evaluates on clips and sounds."
        )
    C, H, W = size
    both = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    mean, std = (tuple(part) if C == 3 else (sum(part) / 3,) * C for part in both)
    what = f"{type(model).__qualname__} has no pretrained_cfg and no preprocessor_config.json"
    return Preprocessing((C, H, W), int(min(H, W) / 0.875), True, "bicubic", mean, std, what, False)


def _channels(model: nn.Module) -> int:
    """Return the number of input channels of a model, 3 if it does not declare it."""
    try:
        return _input_size(model)[0]
    except TokenMergeError:
        return 3


def _input_size(model: nn.Module) -> tuple[int, ...]:
    return known_size(model)
