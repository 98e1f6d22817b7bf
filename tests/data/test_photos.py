"""Photos of every kind are opened as people see them, and the part that is shown is what the model was given."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tokenmerge.data.photos import open_photo, photo_name, seen_part
from tokenmerge.data.prepare import find_preprocessing
from tokenmerge.data.preprocessing import Preprocessing
from tokenmerge.errors import DataError


def _halves() -> Any:
    """Left red, right blue."""
    image = Image.new("RGB", (60, 40), (200, 0, 0))
    image.paste((0, 0, 200), (30, 0, 60, 40))
    return image


def _saved(tmp_path: Path, image: Any, suffix: str = "png", **options: Any) -> Any:
    path = tmp_path / f"photo.{suffix}"
    image.save(path, **options)
    return open_photo(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff"])
def test_a_photo_is_turned_as_its_exif_says(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees
    photo = _saved(tmp_path, _halves(), suffix, exif=exif)
    assert photo.size == (40, 60)
    assert photo.getpixel((20, 5))[0] > 150 and photo.getpixel((20, 55))[2] > 150
    assert open_photo(Image.open(tmp_path / f"photo.{suffix}")).size == (40, 60)


def test_sixteen_bits_are_turned_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = np.zeros((40, 60), dtype=np.uint16)
    grey[:, 30:] = 60000
    photo = _saved(tmp_path, Image.fromarray(grey), exif=exif)
    assert photo.size == (40, 60) and photo.mode == "RGB"
    assert photo.getpixel((20, 5)) == (0, 0, 0) and photo.getpixel((20, 55)) == (234, 234, 234)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0))  # black, if transparency were ignored
    image.paste((100, 100, 100, 255), (0, 0, 10, 20))
    if mode == "P":
        photo = _saved(tmp_path, image.convert("P"), "gif", transparency=image.convert("P").getpixel((15, 10)))
    elif mode == "PA":
        photo = open_photo(image.convert("PA"))
    else:
        photo = _saved(tmp_path, image.convert(mode))
    assert photo.mode == "RGB" and photo.getpixel((15, 10)) == (255, 255, 255)
    assert all(abs(value - 100) < 30 for value in photo.getpixel((4, 10)))


@pytest.mark.parametrize("mode", ["CMYK", "L", "1", "P", "YCbCr"])
def test_every_mode_becomes_red_green_and_blue(tmp_path: Path, mode: str) -> None:
    suffix = "png" if mode in ("L", "1", "P") else "jpg"
    photo = _saved(tmp_path, _halves().convert(mode), suffix)
    assert photo.mode == "RGB" and photo.size == (60, 40)
    if mode in ("CMYK", "P", "YCbCr"):
        assert photo.getpixel((10, 20))[0] > 150 > photo.getpixel((10, 20))[2]


def _png_of(width: int, height: int) -> bytes:
    """A PNG that says it is so large; its pixels are missing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no image at all", r"cannot read the image .*photo.png: cannot identify"),
        (b"", "cannot read the image .*photo.png"),
        (_png_of(20_000, 20_000), "cannot read the image .*photo.png: .*400000000 pixels"),
        (_png_of(200, 200), "cannot read the image .*photo.png"),
    ],
    ids=["text", "empty", "20,000 pixels", "truncated"],
)
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        open_photo(path)


def test_a_missing_file_a_folder_and_a_sliver_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the image .*none.png"):
        open_photo(tmp_path / "none.png")
    with pytest.raises(DataError, match=r"is a folder; give the files"):
        open_photo(tmp_path)
    with pytest.raises(DataError, match=r"image 1 is 20000 x 100 pixels: of so narrow"):
        open_photo(Image.new("L", (20_000, 100)))


def test_an_array_is_no_photo() -> None:
    with pytest.raises(DataError, match=r"not a ndarray: Image.fromarray\(array\) makes one"):
        open_photo(np.zeros((4, 4, 3), dtype=np.uint8))


def test_one_pixel_and_twenty_thousand_are_photos(tmp_path: Path) -> None:
    assert _saved(tmp_path, Image.new("RGB", (1, 1), "red")).size == (1, 1)
    photo = _saved(tmp_path, Image.new("L", (20_000, 500), 9))
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    prepared = find_preprocessing(model)
    picture, is_own = seen_part(photo, prepared(photo), prepared, 640)
    assert is_own and picture.size == (452, 452)  # of 500: 248 are resized, of which 224 are cut out


def test_names() -> None:
    assert photo_name(Path("a/<b>.png"), 3) == "<b>.png" and photo_name(Image.new("L", (1, 1)), 3) == "image 3"


def _noise(width: int, height: int) -> Any:
    """A picture with structure of every size, so that a shift is seen."""
    generator = np.random.default_rng(0)
    small = Image.fromarray(generator.integers(0, 256, (9, 13, 3), dtype=np.uint8))
    return small.resize((width, height), Image.BICUBIC)


STEPS = {
    "shorter side, middle": {"resize": 40, "crops": True},
    "both sides, middle": {"resize": (40, 48), "crops": True},
    "both sides": {"resize": (32, 32), "crops": False},
}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("size", [(200, 140), (140, 200), (97, 97)], ids=str)
def test_the_part_shown_is_what_the_model_is_given(steps: str, size: tuple[int, int]) -> None:
    photo = _noise(*size)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    prepared = Preprocessing((3, 32, 32), **STEPS[steps], interpolation="bicubic", mean=mean, std=std, source="test")
    x = prepared(photo)
    picture, is_own = seen_part(photo, x, prepared, 640)
    assert is_own and min(picture.size) >= 32
    again = torch.from_numpy(np.asarray(picture.resize((32, 32), Image.BICUBIC)).copy()).permute(2, 0, 1) / 255
    seen = x * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    assert (again - seen).abs().mean() < 0.02
    shifted = torch.roll(again, 3, dims=2)
    assert (shifted - seen).abs().mean() > 0.04, "the picture could not tell a shift"
    if steps == "both sides":
        assert picture.size == size


def test_other_steps_show_what_the_model_is_given() -> None:
    photo = _noise(200, 140)
    prepared = Preprocessing((3, 32, 32), None, False, "", None, None, "test", own=_turned)
    picture, is_own = seen_part(photo, prepared(photo), prepared, 640)
    assert not is_own and picture.size == (32, 32)
    assert np.abs(np.asarray(picture, float) - np.asarray(photo.resize((32, 32)).rotate(180), float)).mean() < 2
    grey = Preprocessing((1, 28, 28), 28, True, "bicubic", (0.3,), (0.4,), "test")
    picture, is_own = seen_part(_noise(20, 20), grey(_noise(20, 20)), grey, 640)
    assert not is_own and picture.size == (28, 28) and picture.mode == "RGB"


def _turned(image: Any) -> torch.Tensor:
    turned = np.asarray(image.resize((32, 32)).rotate(180)).copy()
    return torch.from_numpy(turned).permute(2, 0, 1) / 255
