"""Recipe settings of the data: the source of the samples and their augmentation."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Augment", "Data"]


@dataclass(frozen=True)
class Data:
    source: str = "fashion-mnist"  # see sources.open_source
    valid: str | None = None  # source to validate on; None: the validation split of `source`
    size: tuple[int, ...] = ()  # input size without batch: (C, H, W) or (C, T, H, W); () for that of the source
    limit: int | None = None  # use only this many training samples
    held: int | None = None  # use only this many samples of an evaluation, spread evenly
    workers: int = 0
    shuffle: int = 1000  # size of the shuffle buffer of a stream


@dataclass(frozen=True)
class Augment:
    crop: str = "shift"  # shift: by up to `shift` pixels; resize: a random part, timm's; none
    shift: int = 2
    scale: tuple[float, ...] = (0.35, 1.0)  # share of the area, for crop = "resize"
    flip: float = 0.5
    auto: str | None = None  # timm's name of a policy, such as rand-m9-mstd0.5-inc1
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0
