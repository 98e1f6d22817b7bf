"""Transforms from a raw sample to the input of a model: crop, flip, augmentation policy, normalise, erase."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenmerge.data.settings import Augment
from tokenmerge.data.sources import needed
from tokenmerge.errors import ConfigError, DataError

__all__ = ["eval_transform", "statistics", "train_transform"]


def train_transform(
    augment: Augment,
    kind: str,
    size: Sequence[int],
    *,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    interpolation: str = "bicubic",
    flippable: bool = True,
) -> Callable[[Any], Tensor]:
    """Return the training transform: from a raw sample of this kind to an augmented tensor of this size.

    An image becomes `[C, H, W]` with C 1 or 3; a clip `[C, T, H, W]`, with the same crop, flip and erasing in all
    frames; a sound is not augmented. Raises `ConfigError` for a size that does not fit the kind, and for a policy
    (`augment.auto`) for clips.

    Args:
        augment: the augmentation settings.
        kind: "image", "clip" or "sound".
        size: of the result, without batch.
        mean: of pixels on a scale of 0 to 1; default: ImageNet's, for one channel Fashion-MNIST's.
        std: likewise.
        interpolation: of resizing.
        flippable: False leaves out the flip.
    """
    _check_size(kind, size)
    if kind == "sound":
        return _spectrogram(size)
    flip = augment.flip if flippable else 0.0
    with needed("augmentation"):
        if kind == "clip":
            return _Clip(augment, flip, size, *statistics(size[0], mean, std))
        return _Image(augment, flip, size, *statistics(size[0], mean, std), interpolation=interpolation)


def eval_transform(
    kind: str,
    size: Sequence[int],
    *,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    crop_pct: float = 1.0,
) -> Callable[[Any], Tensor]:
    """Return the transform without augmentation: resize the shorter side to `size / crop_pct`, then a centre crop."""
    _check_size(kind, size)
    if kind == "sound":
        return _spectrogram(size)
    plain = Augment(crop="none", flip=0.0)
    with needed("evaluation"):
        if kind == "clip":
            return _Clip(plain, 0.0, size, *statistics(size[0], mean, std), crop_pct)
        return _Image(plain, 0.0, size, *statistics(size[0], mean, std), crop_pct)


def _check_size(kind: str, size: Sequence[int]) -> None:
    form = {"image": "(C, H, W)", "clip": "(C, T, H, W)", "sound": "(1, mels, frames)"}[kind]
    channels = (1,) if kind == "sound" else (1, 3)
    if len(size) != form.count(",") + 1 or size[0] not in channels or min(size) < 1:
        raise ConfigError(f"data.size is {tuple(size)}; {kind}s take {form}, C {' or '.join(map(str, channels))}.")


def statistics(channels: int, mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return pixel mean and std: the ones given, else ImageNet's, or Fashion-MNIST's for one channel."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    from tokenmerge import assets

    means = mean or ((assets.MEAN,) if channels == 1 else IMAGENET_DEFAULT_MEAN)
    deviations = std or ((assets.STD,) if channels == 1 else IMAGENET_DEFAULT_STD)
    if not len(means) == len(deviations) == channels:
        raise ConfigError(f"mean {means} and deviation {deviations} of pixels do not fit {channels} channels.")
    return list(means), list(deviations)


def _spectrogram(size: Sequence[int]) -> Callable[[Any], Tensor]:
    from tokenmerge.data.sounds import spectrogram

    made: Callable[[Any], Tensor] = spectrogram(tuple(size))
    return made


class _Image:
    """timm's transforms; torchvision's for crops other than a random resized crop."""

    def __init__(
        self,
        augment: Augment,
        flip: float,
        size: Sequence[int],
        mean: list[float],
        std: list[float],
        crop_pct: float = 1.0,
        interpolation: str = "bicubic",
    ) -> None:
        from timm.data import create_transform
        from torchvision import transforms

        C, H, W = size
        self.mode = "L" if C == 1 else "RGB"
        try:
            area, policy, final = create_transform(
                (C, H, W),
                is_training=True,
                scale=augment.scale,
                hflip=0.0,
                color_jitter=None,
                auto_augment=augment.auto,
                interpolation=interpolation,
                mean=tuple(mean),
                std=tuple(std),
                re_prob=augment.erase,
                re_mode="pixel",
                separate=True,
            )
        except (AssertionError, KeyError, ValueError) as error:  # the errors timm raises for an invalid policy
            raise ConfigError(f"augment.auto is {augment.auto!r}, no policy timm knows: {error}.") from error
        for operation in _operations(policy.transforms):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
        # resize of the shorter side and centre crop, without ToTensor
        middle = create_transform((C, H, W), interpolation=interpolation, crop_pct=crop_pct, normalize=False)
        middle = middle.transforms[:2]
        shift = [transforms.RandomCrop((H, W), padding=augment.shift)] if augment.crop == "shift" else []
        flips = [transforms.RandomHorizontalFlip(flip)] if flip else []
        crop = [area] if augment.crop == "resize" else [*middle, *shift]
        self.transform = transforms.Compose([*crop, *flips, policy, final])

    def __call__(self, image: Any) -> Tensor:
        tensor: Tensor = self.transform(image if image.mode == self.mode else image.convert(self.mode))
        return tensor


def _operations(policy: Any) -> Iterator[Any]:
    """Yield timm's `AugmentOp`s from its policies: lists, nested lists, or objects that contain them."""
    for part in policy:
        if hasattr(part, "aug_fn"):
            yield part
        else:
            yield from _operations(
                part if isinstance(part, list) else vars(part).get("ops", vars(part).get("policy", ()))
            )


def _posterize(image: Any, bits: int, **_: Any) -> Any:
    """Keep this many bits. timm also draws 0 (a black image), which Pillow 13 rejects."""
    from PIL import Image, ImageOps

    return ImageOps.posterize(image, min(bits, 8)) if bits > 0 else Image.new(image.mode, image.size)


class _Clip:
    """torchvision's transforms, which treat all frames of one tensor alike."""

    def __init__(
        self,
        augment: Augment,
        flip: float,
        size: Sequence[int],
        mean: list[float],
        std: list[float],
        crop_pct: float = 1.0,
    ) -> None:
        from torchvision import transforms

        if augment.auto is not None:
            raise ConfigError(f"augment.auto is {augment.auto!r}: policies are for images; for clips it must be none.")
        self.C, self.T, H, W = size
        if augment.crop == "resize":
            crop = [transforms.RandomResizedCrop((H, W), augment.scale, antialias=True)]
        else:
            # resize the shorter side, as for images
            crop = [_Cover(round(H / crop_pct), round(W / crop_pct)), transforms.CenterCrop((H, W))]
            if augment.crop == "shift":
                crop.append(transforms.RandomCrop((H, W), padding=augment.shift))
        flips = [transforms.RandomHorizontalFlip(flip)] if flip else []
        erase = [transforms.RandomErasing(augment.erase, value="random")] if augment.erase else []
        floats = [transforms.ConvertImageDtype(torch.float32), transforms.Normalize(mean, std)]
        self.transform = transforms.Compose([*crop, *flips, *floats, *erase])

    def __call__(self, clip: Any) -> Tensor:
        from torchvision.transforms.functional import rgb_to_grayscale

        frames = torch.as_tensor(clip)
        frames = frames[:, None] if frames.dim() == 3 else frames.permute(0, 3, 1, 2)
        if len(frames) != self.T:
            raise DataError(f"a clip has {len(frames)} frames where data.size asks for {self.T}.")
        if frames.shape[1] != self.C:
            frames = rgb_to_grayscale(frames) if self.C == 1 else frames.expand(-1, self.C, -1, -1)
        tensor: Tensor = self.transform(frames).transpose(0, 1).contiguous()
        return tensor


class _Cover:
    """Resize frames to cover (height, width): both sides at least as large, one exactly."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width

    def __call__(self, frames: Tensor) -> Tensor:
        from torchvision.transforms.functional import resize

        H, W = frames.shape[-2:]
        scale = max(self.height / H, self.width / W)
        if scale == 1:
            return frames
        resized: Tensor = resize(frames, [round(H * scale), round(W * scale)], antialias=True)
        return resized
