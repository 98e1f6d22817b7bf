"""Sources of clips: what moves is what the label says, and files that cannot be read are named."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenmerge import assets
from tokenmerge.data.clips import MovingFashionMNIST, frames, moving_fashion_mnist, videos
from tokenmerge.errors import ConfigError, DataError
from tokenmerge.training.recipe import Data

pytestmark = pytest.mark.usefixtures("bundled_images")

SIZE = Data(size=(3, 4, 8, 8))
COLOURS = (0, 60, 120, 180, 240, 30, 90, 150)


@pytest.fixture
def moving() -> Any:
    return moving_fashion_mnist("", "test", Data())


def centre(frame: Tensor) -> Tensor:
    """Row and column of the middle of what is brighter than noise."""
    bright = (frame > MovingFashionMNIST.noise).nonzero().double()
    return (bright.amin(dim=0) + bright.amax(dim=0)) / 2


def test_an_item_moves_as_its_label_says_and_stays_on_the_canvas(moving: Any) -> None:
    assert len(moving) == 10_000 and len(moving.classes) == 40 and not moving.flippable and moving.kind == "clip"
    labels = assets.fashion_mnist("test")[1]
    steps = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
    seen = set()
    for index in range(60):
        clip, label = moving.read(index)
        assert clip.dtype == torch.uint8 and clip.shape == (8, 32, 32)
        item, _, direction = moving.classes[label].rpartition(" ")
        assert item == assets.CLASSES[int(labels[index])]
        seen.add(direction)
        moved = centre(clip[-1]) - centre(clip[0])
        way = torch.tensor(steps[direction]).double()
        assert 6 <= (moved * way).sum() <= 18.5 and (moved * (1 - way.abs())).abs().sum() <= 0.5
        # nothing of it is cut off: as much is bright in every frame
        bright = (clip > MovingFashionMNIST.noise).sum(dim=(1, 2))
        assert (bright == bright[0]).all() and bright[0] > 5
    assert seen == steps.keys()


def test_a_clip_is_always_the_same_and_splits_differ(moving: Any) -> None:
    state = torch.get_rng_state()
    first = moving.read(3)[0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(moving_fashion_mnist("", "test", Data()).read(3)[0], first)
    assert not torch.equal(moving.read(4)[0], first)


def test_the_training_images_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = torch.zeros(60_000, 28, 28, dtype=torch.uint8), torch.arange(60_000) % 10
    labels[58_000:] = 3
    monkeypatch.setattr(assets, "fashion_mnist", lambda split: (images, labels))
    train, valid = (moving_fashion_mnist("", split, Data()) for split in ("train", "valid"))
    assert (len(train), len(valid)) == (58_000, 2_000)
    assert {valid.classes[valid.read(i)[1]].split()[0] for i in range(5)} == {"Dress"}
    assert not torch.equal(train.read(0)[0], valid.read(0)[0])


def test_missing_training_images_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(split: str) -> Any:
        raise FileNotFoundError("train-images-idx3-ubyte.gz not found")

    monkeypatch.setattr(assets, "fashion_mnist", missing)
    with pytest.raises(DataError, match=r"not bundled: train-images"):
        moving_fashion_mnist("", "train", Data())


def write_frames(folder: Path, count: int) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    for t in range(count):
        Image.new("RGB", (8, 6), (COLOURS[t], 0, 255)).save(folder / f"{t:03}.png")


def test_frames_are_taken_evenly_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_frames(tmp_path / "train" / "a" / "clip", 8)
    write_frames(tmp_path / "train" / "b" / "short", 2)
    (tmp_path / "train" / "a" / "clip" / "notes.txt").write_text("no frame")
    source = frames(str(tmp_path), "train", SIZE)
    assert source.classes == ("a", "b") and len(source) == 2
    clip, label = source.read(0)
    assert label == 0 and clip.dtype == torch.uint8 and clip.shape == (4, 6, 8, 3)
    assert clip[:, 0, 0, 0].tolist() == [COLOURS[t] for t in (1, 3, 5, 7)] and (clip[..., 2] == 255).all()
    assert source.read(1)[0][:, 0, 0, 0].tolist() == [0, 0, 60, 60]
    with pytest.raises(ConfigError, match=r"\(C, T, H, W\)"):
        frames(str(tmp_path), "train", Data(size=(3, 8, 8)))


def test_frames_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    write_frames(tmp_path / "train" / "a" / "broken", 2)
    (tmp_path / "train" / "a" / "broken" / "000.png").write_bytes(b"no image")
    (tmp_path / "train" / "a" / "empty").mkdir()
    write_frames(tmp_path / "train" / "a" / "uneven", 1)
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "train" / "a" / "uneven" / "001.png")
    source = frames(str(tmp_path), "train", SIZE)
    for index, (name, says) in enumerate((("broken", "000.png"), ("empty", "no frames"), ("uneven", "equal size"))):
        with pytest.raises(OSError, match=rf"a/{name}: .*{says}"):
            source.read(index)


def write_video(path: Path, count: int = 8) -> None:
    import av
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for t in range(count):
            frame = np.full((32, 32, 3), COLOURS[t], dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def test_videos_are_decoded(tmp_path: Path) -> None:
    pytest.importorskip("av")
    write_video(tmp_path / "train" / "a" / "x.mp4")
    write_video(tmp_path / "train" / "b" / "y.avi", 3)
    (tmp_path / "train" / "b" / "z.mp4").write_bytes(b"no video" * 100)
    (tmp_path / "train" / "b" / "zz.mp4").write_bytes((tmp_path / "train" / "a" / "x.mp4").read_bytes()[:600])
    source = videos(str(tmp_path), "train", SIZE)
    clip, label = source.read(0)
    assert label == 0 and clip.dtype == torch.uint8 and clip.shape == (4, 32, 32, 3)
    # the encoder loses little
    assert (clip[:, 16, 16, 0].int() - torch.tensor([COLOURS[t] for t in (1, 3, 5, 7)])).abs().max() <= 8
    short = source.read(1)[0][:, 16, 16, 0].int()
    assert (short - torch.tensor([COLOURS[t] for t in (0, 1, 1, 2)])).abs().max() <= 8
    for index, name in ((2, "z.mp4"), (3, "zz.mp4")):
        with pytest.raises(OSError, match=rf"b/{name}: "):
            source.read(index)


def test_torchcodec_is_asked_for_the_frames_wanted_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Decoder:
        def __init__(self, path: str, dimension_order: str) -> None:
            asked.append((path, dimension_order))

        def __len__(self) -> int:
            return 8

        def get_frames_at(self, places: list[int]) -> Any:
            asked.append(places)
            return type("Batch", (), {"data": torch.zeros(4, 32, 32, 3, dtype=torch.uint8)})

    package, decoders = ModuleType("torchcodec"), ModuleType("torchcodec.decoders")
    decoders.VideoDecoder = Decoder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchcodec", package)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    path = tmp_path / "train" / "a" / "x.mp4"
    path.parent.mkdir(parents=True)
    path.touch()
    assert videos(str(tmp_path), "train", SIZE).read(0)[0].shape == (4, 32, 32, 3)
    assert asked == [(str(path), "NHWC"), [1, 3, 5, 7]]
