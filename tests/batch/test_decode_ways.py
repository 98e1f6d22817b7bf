"""`--decode`: what "fast" keeps of a JPEG, that a folder remembers it, and one image read by itself."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from helpers import randomised, tiny_vit
from tokenmerge import Embedder
from tokenmerge.batch.decoding import Decoder, draft_of
from tokenmerge.cli import main
from tokenmerge.data.preprocessing import Preprocessing
from tokenmerge.errors import DataError

Capture = pytest.CaptureFixture[str]
PLAIN = Preprocessing((3, 32, 32), 36, True, "bicubic", (0.5,) * 3, (0.5,) * 3, "as given")


def _jpeg(width: int, height: int) -> bytes:
    """Smooth colours, so that a smaller image is much the same."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(file, "jpeg", quality=95)
    return file.getvalue()


def test_fast_keeps_twice_the_side_that_is_resized_to() -> None:
    assert draft_of("exact", PLAIN) is None and draft_of("fast", PLAIN) == 72 and draft_of("100", PLAIN) == 100
    from dataclasses import replace

    assert draft_of("fast", replace(PLAIN, resize=(40, 50))) == 100
    for wrong in ("fats", "0", "-3", "1.5", ""):
        with pytest.raises(DataError, match=rf"--decode is {wrong}: give exact, fast, or the least number"):
            draft_of(wrong, PLAIN)
    with pytest.raises(
        DataError, match=r"this model's are prepared by not resized.*: give that number, as --decode 448"
    ):
        draft_of("fast", replace(PLAIN, resize=None))


@pytest.mark.parametrize(("size", "is_same"), [((600, 400), False), ((140, 100), True)], ids=["large", "small"])
def test_fast_changes_large_photographs_a_little_and_small_ones_not_at_all(
    size: tuple[int, int], is_same: bool
) -> None:
    content = _jpeg(*size)
    exact, whole = Decoder(PLAIN)("a", content)
    fast, said = Decoder(PLAIN, draft=draft_of("fast", PLAIN))("a", content)
    assert whole == said == size and exact.shape == fast.shape == (3, 32, 32)
    assert torch.equal(exact, fast) is is_same
    assert float((exact - fast).abs().max()) < 0.05


@pytest.mark.parametrize("way", ["exact", "fast", "100"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_the_size_is_that_of_the_upright_photograph(turn: int, way: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    for width, height in ((600, 400), (401, 400)):  # 1/4 of the second is nearly square
        file = io.BytesIO()
        Image.open(io.BytesIO(_jpeg(width, height))).save(file, "jpeg", exif=exif)
        found, said = Decoder(PLAIN, draft=draft_of(way, PLAIN))("a", file.getvalue())
        assert said == ((height, width) if turn > 4 else (width, height))
        with Image.open(file) as image:
            expected = PLAIN(ImageOps.exif_transpose(image))
        assert float((found - expected).abs().mean()) < (1e-6 if way == "exact" else 0.05), "another image was seen"


@pytest.mark.parametrize("kind", ["jpeg", "mpo", "png", "webp", "tiff", "avif"])
def test_the_size_is_upright_in_every_format_that_says_how_it_was_held(kind: str) -> None:
    Image.init()
    if kind.upper() not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    photo = Image.open(io.BytesIO(_jpeg(64, 40)))
    photo.save(file, kind, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    expected = PLAIN(photo.transpose(Image.Transpose.ROTATE_270))
    for draft in (None, 8):
        found, said = Decoder(PLAIN, draft=draft)("a", file.getvalue())
        assert said == (40, 64)
        assert draft or float((found - expected).abs().mean()) < 0.05, "another image was seen"


def test_a_photograph_that_cannot_be_turned_has_the_size_that_the_model_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(image: Image.Image) -> None:
        raise ValueError("broken EXIF")

    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.open(io.BytesIO(_jpeg(64, 40))).save(file, "jpeg", exif=exif)
    monkeypatch.setattr(ImageOps, "exif_transpose", refuse)
    assert Decoder(PLAIN)("a", file.getvalue())[1] == (64, 40)


def test_a_folder_remembers_how_its_images_were_decoded(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for i in range(3):
        Path(f"photos/{i}.jpg").write_bytes(_jpeg(200 + i, 160))
    model = randomised(tiny_vit())
    model.pretrained_cfg = {"input_size": (3, 32, 32), "crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    torch.save(model, "tiny.pt")
    words = ["embed", "tiny.pt", "--trust-pickle", "--data", "photos", "--out", "out", "--workers", "1"]
    assert main([*words, "--decode", "fast"]) == 0
    before = Path("out/manifest.json").read_bytes()
    assert b'"draft": "64"' in before
    capsys.readouterr()
    for other in ([], ["--decode", "32"]):
        assert main([*words, *other]) == 2
        assert "What differs: draft: 64 there, " in capsys.readouterr().err
        assert Path("out/manifest.json").read_bytes() == before
    assert main([*words, "--decode", "quick"]) == 2
    assert "--decode is quick" in capsys.readouterr().err


def test_one_image_is_read_by_itself() -> None:
    torch.manual_seed(0)
    embed = Embedder(randomised(tiny_vit()), r=4, device="cpu")
    contents = [_jpeg(50, 40), _jpeg(40, 50)]
    read = [embed.read(content) for content in contents]
    assert read[0].shape == (3, 32, 32)
    np.testing.assert_array_equal(embed.run_all(read).numpy(), embed({"image": contents})["embedding"])
    with pytest.raises(DataError, match=r"^the image: cannot identify image file"):
        embed.read(b"no image")
    with pytest.raises(DataError, match=r"^a\.jpg is a list: give a PIL image, "):
        embed.read([1, 2], "a.jpg")
