"""What a recipe says of its samples: where they come from, and how they are augmented."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Augment", "Data"]


@dataclass(frozen=True)
class Data:
    source: str = "fashion-mnist"  # see sources.open_source
    valid: str | None = None  # another source to validate on; else the validation split of the same
    size: tuple[
        int, ...
    ] = ()  # what the model takes, without batch: (C, H, W) or (C, T, H, W); () for the source's own
    limit: int | None = None  # only so many training samples
    held: int | None = None  # only so many samples of an evaluation, spread over all
    workers: int = 0
    shuffle: int = 1000  # samples a stream is shuffled among


@dataclass(frozen=True)
class Augment:
    crop: str = "shift"  # shift: by up to `shift` pixels; resize: a random part, timm's; none
    shift: int = 2
    scale: tuple[float, ...] = (0.35, 1.0)  # of the area, for crop = "resize"
    flip: float = 0.5
    auto: str | None = None  # timm's name of a policy, as rand-m9-mstd0.5-inc1
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0
