"""Images are opened in one place: every command sees a file as people see it, whatever its mode."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tokenmerge.batch.decoding import Decoder
from tokenmerge.data.labelled import open_data
from tokenmerge.data.opening import as_seen, decode
from tokenmerge.data.preprocessing import Preprocessing
from tokenmerge.errors import DataError
from tokenmerge.testing.models.drawn import tiny_vit

PLAIN = Preprocessing((3, 32, 32), (32, 32), False, "nearest", None, None, "test")


def _halves() -> Any:
    """Left red, right blue."""
    image = Image.new("RGB", (32, 32), (200, 0, 0))
    image.paste((0, 0, 200), (16, 0, 32, 32))
    return image


def _turned() -> Any:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees
    return exif


def _clear() -> Any:
    """Red on the left, on the right transparent: black, if transparency were ignored."""
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((200, 0, 0, 255), (0, 0, 16, 32))
    return image


def _first(folder: Path) -> torch.Tensor:
    return next(iter(open_data(f"files:{folder}", tiny_vit(), batch_size=1, workers=0, preprocessing=PLAIN)))[0][0]


WAYS = {
    "eval": lambda path: _first(path.parent.parent),
    "embed": lambda path: Decoder(PLAIN)(path.name, path.read_bytes())[0],
    "a PIL image": lambda path: PLAIN(Image.open(path)),
    "train": lambda path: PLAIN(decode(str(path), lambda: path)),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_a_model_turns_and_puts_on_white(way: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "x.png"
    _halves().save(path, exif=_turned())
    x = WAYS[way](path)
    assert x.shape == (3, 32, 32)
    assert x[0, :16].min() > 0.7 and x[2, 16:].min() > 0.7 and x[2, :16].max() == 0, "it was not turned"
    _clear().save(path)
    x = WAYS[way](path)
    assert x[:, :, 16:].min() == 1 and x[1, :, :16].max() == 0, "what is transparent is not white"


def test_seen_twice_is_seen_once() -> None:
    content = io.BytesIO()
    _halves().save(content, "PNG", exif=_turned())
    once = as_seen(Image.open(content))
    assert once.getpixel((16, 2))[0] == 200 and as_seen(once).tobytes() == once.tobytes()
    upright = _halves()
    assert as_seen(upright) is upright, "an image that is as it is seen was copied"


def test_what_is_too_large_to_be_decoded_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _halves().save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # refused from twice that on
    said = r"x\.png: Image size \(1024 pixels\) exceeds limit of 1000 pixels: make it smaller$"
    with pytest.raises(OSError, match=said):
        decode(str(tmp_path / "x.png"), lambda: tmp_path / "x.png")


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "YCbCr"])
def test_other_modes_stay(mode: str) -> None:
    assert as_seen(_halves().convert(mode)).mode == mode


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # PIL speaks of it while it opens the file
def test_a_corrupt_exif_says_nothing() -> None:
    generator = random.Random(0)
    for exif in (b"Exif\x00\x00broken", b"Exif\x00\x00MM\x00*\x00\x00\xff\xff", generator.randbytes(64)):
        content = io.BytesIO()
        _halves().save(content, "JPEG", exif=exif, quality=95)
        image = decode("x", lambda content=content: content)  # type: ignore[misc]
        assert image.getpixel((2, 16))[0] > 150 and image.size == (32, 32)


def test_values_of_any_scale_are_refused() -> None:
    with pytest.raises(DataError, match=r"values from 0 to 5000 \(mode F\): save it with 8 or 16 bits\.$"):
        as_seen(Image.fromarray(np.array([[0.0, 5000.0]], dtype=np.float32)))
    deep = as_seen(Image.fromarray(np.array([[0, 256 * 7]], dtype=np.uint16)))
    assert torch.from_numpy(np.array(deep)).tolist() == [[0, 7]]
