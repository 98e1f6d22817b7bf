"""The one place where images are opened: what every command sees of a file is what people see of it."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable
from typing import Any

from tokenmerge.errors import DataError

__all__ = ["as_seen", "decode", "decode_turned"]

_ORIENTATION = 0x0112  # the tag of EXIF
_SIDEWAYS = (5, 6, 7, 8)  # values by which width and height change places
_TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")


def decode(name: str, content: Callable[[], Any], opened: Callable[[Any], None] | None = None) -> Any:
    """Decode the file or stream that `content` returns, as people see it; raise OSError with its name on any failure.

    `opened` is given the image before its pixels are read, and may refuse it.
    """
    return decode_turned(name, content, opened)[0]


def decode_turned(
    name: str, content: Callable[[], Any], opened: Callable[[Any], None] | None = None
) -> tuple[Any, bool]:
    """Return what `decode` does, and whether its width is the height of the image that `opened` was given."""
    from PIL import Image

    try:
        with Image.open(content()) as image:
            if opened is not None:
                opened(image)
            image.load()
            upright, is_turned = _upright(image)
            return _plain(upright), is_turned
    except Image.DecompressionBombError as error:
        raise OSError(f"{name}: {str(error).partition(', could be')[0]}: make it smaller") from error
    except Exception as error:  # decoders raise any exception: OSError, SyntaxError, struct.error, ...
        raise OSError(f"{name}: {str(error).rstrip('.')}") from error


def as_seen(image: Any) -> Any:
    """Return a PIL image turned as its EXIF says, with 8 bits a channel, and on white where it is transparent.

    The mode stays what it is otherwise (CMYK, grey, a palette). Raises `DataError` for values of any scale.
    """
    return _plain(_upright(image)[0])


def _plain(image: Any) -> Any:
    from PIL import Image

    image = _in_eight_bits(image)
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image


def _upright(image: Any) -> tuple[Any, bool]:
    """Turn an image as its EXIF says; one that cannot be read says nothing, as in any viewer.

    Also returns whether width and height changed places: a square one does not show it.
    """
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "Corrupt EXIF data"
            orientation = image.getexif().get(_ORIENTATION, 1)
            # an image that stands upright would be copied too
            return image if orientation == 1 else ImageOps.exif_transpose(image), orientation in _SIDEWAYS
    except (SyntaxError, ValueError, TypeError, LookupError, OSError, struct.error):
        return image, False


def _in_eight_bits(image: Any) -> Any:
    """Return an image of 16 bits in 8: PIL would make every value above 255 white. Refuse deeper ones of any scale."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        low, high = image.getextrema()
        if low < 0 or high > 255:
            raise DataError(f"values from {low:g} to {high:g} (mode {image.mode}): save it with 8 or 16 bits.")
    return image
