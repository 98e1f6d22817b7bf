"""Image preprocessing as a value: apply it, change it by options, and describe it in every output."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from textwrap import shorten
from typing import Any

from torch import Tensor

from tokenmerge.data.opening import as_seen
from tokenmerge.errors import DataError, UnsupportedError

__all__ = ["MODES", "Preprocessing", "Processor"]

_OPTIONS = ", or give --mean and --std (and --resize, --crop-pct, --interpolation); in Python preprocessing="

MODES = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # in the order of PIL's enum values


@dataclass(frozen=True)
class Preprocessing:
    """How an image (PIL) becomes the tensor `[C, H, W]` that a model takes; call it to apply it.

    The image is resized (both sides to `resize`, or the shorter side) and, if `crops`, centre-cropped. Pixels become
    `(x - mean) / std` on a scale of 0 to 1. `own` is the model's own preprocessing code, used if no setting was
    changed. `is_known` is False if a part was assumed; `warning` then says so.
    """

    size: tuple[int, ...]  # C, H, W; () if unknown
    resize: int | tuple[int, int] | None
    crops: bool
    interpolation: str
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    source: str
    is_known: bool = True
    extra: str = ""  # steps that the fields do not describe
    own: Callable[[Any], Tensor] | None = field(default=None, compare=False, repr=False)

    def __call__(self, image: Any) -> Tensor:
        image = as_seen(image)
        mode = "L" if self.size[:1] == (1,) else "RGB"
        image = image if image.mode == mode else image.convert(mode)
        tensor: Tensor = (self.own or self._built())(image)
        return tensor

    def __str__(self) -> str:
        return f"{self._steps()} ({self.source})"

    def warning(self, options: str = _OPTIONS) -> str:
        """Return a warning with a remedy if the preprocessing was assumed; "" if it is known.

        `options` names what can be given instead of the model's file.
        """
        if self.is_known:
            return ""
        return (
            f"WARNING: the model does not say how its images are prepared ({self.source}). Assumed: {self._steps()}. "
            f"If that is wrong, so is every accuracy: put the model's preprocessor_config.json beside it{options}."
        )

    def notes(self, options: str = _OPTIONS) -> list[str]:
        """Return the lines for every output; `options` as in `warning`."""
        warning = self.warning(options)
        return [f"Preprocessing: {self}", *([warning] if warning else [])]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for files."""
        return {name: value for name, value in asdict(replace(self, own=None)).items() if name != "own"}

    def changed(
        self,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        resize: Sequence[int] | int | None = None,
        crop_pct: float | None = None,
        interpolation: str | None = None,
    ) -> Preprocessing:
        """Return a copy with these changes; `resize` is the shorter side, or height and width.

        `crop_pct` resizes the shorter side to size / crop_pct and takes a centre crop. Raises `DataError` for invalid
        values.
        """
        given = {"mean": mean, "std": std, "resize": resize, "crop_pct": crop_pct, "interpolation": interpolation}
        names = [name for name, value in given.items() if value is not None]
        if not names:
            return self
        if resize is not None and crop_pct is not None:
            raise DataError("give either resize (--resize) or crop_pct (--crop-pct): both say how large images become.")
        if self._is_opaque:
            raise DataError(f"{', '.join(names)} cannot be changed in {self.source}: change that transform itself.")
        values: dict[str, Any] = {name: self._pixels(name, given[name]) for name in ("mean", "std") if name in names}
        if interpolation is not None:
            if interpolation not in MODES:
                raise DataError(f"no interpolation {interpolation!r}; there are: {', '.join(MODES)}.")
            values["interpolation"] = interpolation
        if resize is not None or crop_pct is not None:
            values |= self._sides(resize, crop_pct)
        own = self.own.changed(values) if isinstance(self.own, Processor) else None
        if own is None and self.extra and "resize" not in values:
            raise DataError(
                f"{', '.join(names)} cannot be changed alone: this model's images are also prepared by {self.extra} "
                f"({self.source}). Give --resize too, or change the model's own file."
            )
        extra = self.extra if own is not None else ""
        is_known = self.is_known or (mean is not None and std is not None)
        source = f"{self.source}; as given: {', '.join(names)}"
        return replace(self, **values, own=own, extra=extra, is_known=is_known, source=source)

    @property
    def _is_opaque(self) -> bool:
        return self.own is not None and not self.interpolation

    def _pixels(self, name: str, given: Any) -> tuple[float, ...]:
        channels = self.size[0] if self.size else 3
        values = tuple(float(value) for value in (given if isinstance(given, Sequence) else (given,)))
        values = values * channels if len(values) == 1 else values
        if len(values) != channels or min(values) < 0 or max(values) > 1 or (name == "std" and 0 in values):
            raise DataError(
                f"{name} is {' '.join(map(str, given if isinstance(given, Sequence) else (given,)))}: give 1 or "
                f"{channels} numbers on the scale 0 to 1 (a mean of 127.5 is 0.5 there)."
            )
        return values

    def _sides(self, resize: Any, crop_pct: float | None) -> dict[str, Any]:
        if not self.size:
            raise DataError("the model does not say which input size it takes: resize cannot be given.")
        H, W = self.size[1:]
        if crop_pct is not None:
            if not 0 < crop_pct <= 1:
                raise DataError(f"crop_pct (--crop-pct) is a share above 0 and up to 1; got {crop_pct}.")
            return {"resize": int(min(H, W) / crop_pct), "crops": True}
        sides = tuple(resize) if isinstance(resize, Sequence) else (resize,)
        if len(sides) not in (1, 2) or any(side < 1 for side in sides):
            raise DataError(f"resize (--resize) takes the shorter side, or height and width; got {sides}.")
        return {"resize": sides[0] if len(sides) == 1 else sides, "crops": sides != (H, W)}

    def _steps(self) -> str:
        if self._is_opaque:
            return shorten(repr(self.own), 200, placeholder=" ...")
        parts = ["not resized"] if self.resize is None else []
        if isinstance(self.resize, tuple):
            parts = [f"resize {self.resize[0]} x {self.resize[1]}"]
        elif self.resize is not None:
            parts = [f"shorter side {self.resize}"]
        parts += [f"middle {self.size[1]} x {self.size[2]}"] if self.crops and self.size else []
        parts += [self.interpolation] if self.resize is not None else []
        parts += [self.extra] if self.extra else []
        parts += [f"mean {_short(self.mean)}", f"std {_short(self.std)}"] if self.mean else ["pixels not normalised"]
        return ", ".join(parts)

    def _built(self) -> Callable[[Any], Tensor]:
        try:
            from torchvision import transforms
        except ImportError as error:
            raise UnsupportedError('images need torchvision: pip install "tokenmerge[timm]"') from error
        mode = transforms.InterpolationMode(self.interpolation)
        side = list(self.resize) if isinstance(self.resize, tuple) else self.resize
        steps: list[Any] = [] if side is None else [transforms.Resize(side, interpolation=mode)]
        steps += [transforms.CenterCrop(self.size[1:])] if self.crops else []
        steps += [transforms.ToTensor()]
        steps += [transforms.Normalize(self.mean, self.std)] if self.mean else []
        made: Callable[[Any], Tensor] = transforms.Compose(steps)
        return made


class Processor:
    """A Hugging Face image processor as a function of one image."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Any) -> Tensor:
        tensor: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return tensor

    def changed(self, values: dict[str, Any]) -> Processor | None:
        """Return a copy with other constants; None if something else is to be changed."""
        if not values.keys() <= {"mean", "std"}:
            return None
        processor = copy.copy(self.processor)
        processor.do_normalize = True
        for name, value in values.items():
            setattr(processor, f"image_{name}", list(value))
        return Processor(processor)


def _short(values: tuple[float, ...] | None) -> str:
    """Return one number if all channels have the same."""
    values = values or ()
    return " ".join(f"{value:.4g}" for value in (values[:1] if len(set(values)) == 1 else values))
