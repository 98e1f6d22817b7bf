"""One's own photographs: open them as people see them, and show the part that a model is given."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenmerge.data.opening import as_seen, decode
from tokenmerge.data.preprocessing import Preprocessing
from tokenmerge.errors import DataError, UnsupportedError

__all__ = ["Box", "given_picture", "open_photo", "photo_name", "seen_box", "seen_part"]

Box = tuple[float, float, float, float]
_SLIVER = 50  # how many times longer than wide a photo may be
_ALIKE = 12  # mean difference of pixels, of 255, up to which a part of a photo is what the model was given


def photo_name(source: Any, number: int) -> str:
    """Return what an image is called: the name of its file, else its number."""
    name = source if isinstance(source, (str, os.PathLike)) else getattr(source, "filename", "")
    return Path(name).name if name else f"image {number}"


def open_photo(source: Any) -> Any:
    """Return a file or a PIL image as people see it: upright, 8 bits of red, green and blue, on white if transparent.

    Raises `DataError` for what is no image, is too large to decode, or too narrow to be seen by a model.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise UnsupportedError('photos need Pillow: pip install "tokenmerge[viz]"') from error
    if isinstance(source, Image.Image):
        image = as_seen(source)
    else:
        if not isinstance(source, (str, os.PathLike)):
            raise DataError(
                f"a photo is a file or a PIL image, not a {type(source).__name__}: Image.fromarray(array) makes one of "
                "an array [height, width, 3] of uint8."
            )
        path = Path(source)
        if path.is_dir():
            raise DataError(f"{path} is a folder; give the files of images, e.g. {path}/*.jpg.")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = decode(str(path), lambda: path)
        except OSError as error:
            raise DataError(f"cannot read the image {error}.") from error
    if max(image.size) > _SLIVER * min(image.size):
        raise DataError(
            f"{photo_name(source, 1)} is {image.width} x {image.height} pixels: of so narrow a photo a model would be "
            "given next to nothing. Cut out the part to look at."
        )
    return image.convert("RGB")


def seen_box(photo: Any, x: Tensor, prepared: Preprocessing) -> Box | None:
    """Return the part of a photo that the model is given, in pixels: left, top, right, bottom.

    `x` `[C, H, W]` is the prepared photo. The part that resizing and cropping leave is compared with it: None where it
    is something else (a preprocessing with more steps).
    """
    from PIL import Image, ImageChops, ImageStat

    given = given_picture(x, prepared)
    for box in _boxes(photo.size, given.size, prepared):
        again = photo.resize(given.size, Image.BICUBIC, box=box).convert("L")
        if ImageStat.Stat(ImageChops.difference(again, given.convert("L"))).mean[0] <= _ALIKE:
            return box
    return None


def seen_part(photo: Any, x: Tensor, prepared: Preprocessing, side: int) -> tuple[Any, bool]:
    """Return a picture of what the model is given, and whether it is the photo's own pixels.

    `x` `[C, H, W]` is the prepared photo. The part that was cut out is taken from the photo, at most `side` pixels wide
    and high. Where it is not known (`seen_box`), and for photos smaller than `x`, the picture is `x` itself.
    """
    from PIL import Image

    given, box = given_picture(x, prepared), seen_box(photo, x, prepared)
    if box is None:
        return given, False
    width, height = box[2] - box[0], box[3] - box[1]
    if width < given.width or height < given.height:
        return given, False
    scale = min(1.0, side / max(width, height))
    size = (max(given.width, round(width * scale)), max(given.height, round(height * scale)))
    if abs(width / height * given.height / given.width - 1) < 0.03:  # all but the rounding of sides to whole pixels
        size = (size[0], round(size[0] * given.height / given.width))
    return photo.resize(size, Image.LANCZOS, box=box), True


def given_picture(x: Tensor, prepared: Preprocessing) -> Any:
    """Return a prepared image as a PIL image again."""
    from PIL import Image

    x = x.detach().cpu().float()
    if prepared.mean is not None and prepared.std is not None and len(prepared.mean) == x.shape[0]:
        x = x * x.new_tensor(prepared.std)[:, None, None] + x.new_tensor(prepared.mean)[:, None, None]
    elif x.min() < -0.01 or x.max() > 1.01:  # scaled by constants that are not known
        x = (x - x.min()) / (x.max() - x.min()).clamp_min(1e-6)
    x = x.expand(3, -1, -1) if x.shape[0] == 1 else x[:3]
    return Image.fromarray((255 * x).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy())


def _boxes(size: tuple[int, int], given: tuple[int, int], prepared: Preprocessing) -> list[Box]:
    """Return the part of a photo that resizing and cropping leave, in its pixels, or what may be it."""
    (W, H), (w, h) = size, given
    if not prepared.crops:
        return [(0.0, 0.0, float(W), float(H))]
    if prepared.resize is None:
        resized = [(W, H)]
    elif isinstance(prepared.resize, tuple):
        high, wide = prepared.resize
        ratio = min(W / wide, H / high)
        # to these sides, or with its own shape until they are covered, as timm does for inputs that are not square
        resized = [(wide, high), (round(W / ratio), round(H / ratio))]
    else:  # the longer side is rounded down, as torchvision does
        wide, high = (max(prepared.resize, int(prepared.resize * side / min(W, H))) for side in (W, H))
        resized = [(wide, high)]
    found = []
    for wide, high in resized:
        if w <= wide and h <= high:  # else it was padded
            left, top = round((wide - w) / 2), round((high - h) / 2)
            across, down = W / wide, H / high
            right, bottom = min(float(W), (left + w) * across), min(float(H), (top + h) * down)
            found.append((left * across, top * down, right, bottom))
    return found
