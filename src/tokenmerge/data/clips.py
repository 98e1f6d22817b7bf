"""Sources of clips: moving Fashion-MNIST, folders of frames, video files; see `sources.KINDS`.

Shapes: T frames, H rows, W columns. A clip is uint8 `[T, H, W]` or, in colour, `[T, H, W, 3]`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from tokenmerge.data.images import part_of_fashion_mnist
from tokenmerge.data.opening import decode
from tokenmerge.data.settings import Data
from tokenmerge.data.sources import SPLITS, Raw, Source, labelled, seed_of
from tokenmerge.errors import ConfigError, DataError, UnsupportedError

__all__ = ["VIDEOS", "Film", "find_decoder", "frames", "moving_fashion_mnist", "read_film", "spread", "videos"]

DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # rows, columns
VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg")


class MovingFashionMNIST(Source):
    """One clip per image: at half its size, it moves across a black canvas with faint noise.

    A class is an item and one of four directions. Direction, speed (1.0 to 2.5 pixels a frame), start (the item stays
    on the canvas) and noise level are drawn from the split and the image's index, so a clip is always the same.
    """

    kind = "clip"
    size = (1, 8, 32, 32)
    item = 14  # pixels
    speed = (1.0, 2.5)
    noise = 48  # largest pixel value of the noise, of 255
    flippable = False  # a flip would swap left and right

    def __init__(self, rest: str, split: str, data: Data) -> None:
        from tokenmerge import assets

        self.images, self.labels = part_of_fashion_mnist(split)
        self.split = list(SPLITS).index(split)
        self.classes = tuple(f"{item} {direction}" for item in assets.CLASSES for direction in DIRECTIONS)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Raw, int]:
        _, T, H, W = self.size
        generator = torch.Generator().manual_seed(seed_of(self.split, index))
        along, across, pace, strength = torch.rand(4, generator=generator).tolist()
        direction = int(torch.randint(len(DIRECTIONS), (1,), generator=generator))
        item = interpolate(self.images[index][None, None].float(), (self.item, self.item), mode="area")[0, 0].byte()
        speed = self.speed[0] + pace * (self.speed[1] - self.speed[0])
        clip = torch.rand((T, H, W), generator=generator).mul_(strength * self.noise).byte()
        steps = tuple(DIRECTIONS.values())[direction]
        ways = [
            _way(length - self.item, step * speed * (T - 1), part)
            for length, step, part in zip((H, W), steps, (along, across), strict=True)
        ]
        for t in range(T):
            row, column = (round(start + end * t / (T - 1)) for start, end in ways)
            place = clip[t, row : row + self.item, column : column + self.item]
            torch.maximum(place, item, out=place)
        return clip, int(self.labels[index]) * len(DIRECTIONS) + direction


def _way(room: float, length: float, part: float) -> tuple[float, float]:
    """Return the start of a path of this signed length that stays within 0 to `room`, and the length."""
    return part * (room - abs(length)) + max(0.0, -length), length


class _Files(Source):
    """Clips in files. T frames are taken at equal distances: the middle frame of each of T equal parts."""

    kind = "clip"
    size = (3, 16, 224, 224)

    def __init__(self, root: str, split: str, suffixes: Sequence[str], data: Data) -> None:
        size = data.size or self.size
        if len(size) != 4:
            raise ConfigError(f"data.size is {size}; clips take (C, T, H, W).")
        self.frames = size[1]
        self.samples, self.classes = labelled(root, split, suffixes, data)

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Raw, int]:
        path, label = self.samples[index]
        try:
            return self.clip(Path(path)), label
        except Exception as error:  # decoders raise any exception
            raise OSError(f"{path}: {error}") from error

    @abstractmethod
    def clip(self, path: Path) -> Tensor:
        """Return the selected frames, uint8 `[T, H, W, 3]`; raises any exception if they cannot be read."""

    def places(self, count: int) -> list[int]:
        """Return the indices of the frames to take from `count` frames; with fewer than T, some repeat."""
        return spread(self.frames, count)


class Frames(_Files):
    """Folders of frames, PATH/train/CLASS/CLIP/x.jpg, sorted by name, all of one size."""

    def __init__(self, root: str, split: str, data: Data) -> None:
        from PIL import Image

        Image.init()
        self.suffixes = set(Image.registered_extensions())
        super().__init__(root, split, (), data)

    def clip(self, path: Path) -> Tensor:
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in self.suffixes)
        return torch.stack([_picture(files[place]) for place in self.places(len(files))])


def _picture(file: Path) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(decode(str(file), lambda: file).convert("RGB")))


class Videos(_Files):
    """Video files, PATH/train/CLASS/x.mp4, decoded by torchcodec if installed, else by PyAV."""

    def __init__(self, root: str, split: str, data: Data) -> None:
        self.decode = find_decoder()
        super().__init__(root, split, VIDEOS, data)

    def clip(self, path: Path) -> Tensor:
        return self.decode(path, self.places).frames


class Film(NamedTuple):
    """Some frames of a video."""

    frames: Tensor  # uint8 [T, H, W, 3], as they are seen: turned as the file says
    places: list[int]  # of each frame among all
    rate: float | None  # frames a second in the file; None: it does not say
    lost: int  # frames that the file says it has, and has not


Decode = Callable[[Path, Callable[[int], list[int]]], Film]  # the file; which of so many frames to take


def read_film(path: str | Path, count: int) -> Film:
    """Return at most `count` frames of a video, at equal distances.

    Raises `DataError` for what is no video or is cut off, `UnsupportedError` where nothing decodes it.
    """
    try:
        decode = find_decoder()
    except ImportError as error:
        raise UnsupportedError("videos need PyAV or torchcodec: pip install av") from error
    try:
        film = decode(Path(path), lambda n: sorted(set(spread(min(count, n), n))))
    except Exception as error:  # decoders raise any exception
        raise DataError(f"cannot read the video {path}: {str(error).rstrip('.')}.") from error
    if film.lost:
        raise DataError(f"cannot read the video {path}: {film.lost} of its frames are not there; it is cut off.")
    return film


def spread(frames: int, count: int) -> list[int]:
    """Return the places of so many frames of `count`: the middle of each of equal parts."""
    if not count:
        raise ValueError("there are no frames")
    return [(2 * t + 1) * count // (2 * frames) for t in range(frames)]


def find_decoder() -> Decode:
    """Return what decodes videos: torchcodec, which decodes only the frames asked for, else PyAV; or `ImportError`."""
    try:
        import torchcodec  # noqa: F401
    except (ImportError, RuntimeError, OSError):  # the last two: installed, but without its FFmpeg
        import av  # noqa: F401 - fail here if it is missing

        return _with_av
    return _with_torchcodec


def _with_torchcodec(path: Path, choose: Callable[[int], list[int]]) -> Film:
    from torchcodec.decoders import VideoDecoder

    decoder: Any = VideoDecoder(str(path), dimension_order="NHWC")
    places = choose(len(decoder))
    rate = getattr(getattr(decoder, "metadata", None), "average_fps", None)
    return Film(decoder.get_frames_at(places).data, places, rate, 0)


def _with_av(path: Path, choose: Callable[[int], list[int]]) -> Film:
    import av

    with av.open(str(path)) as container:
        # the length in the header may be missing or wrong, so count packets, which needs no decoding
        count = sum(packet.size > 0 for packet in container.demux(video=0))
        rate, said = container.streams.video[0].average_rate, container.streams.video[0].frames
    wanted = choose(count)
    found: dict[int, Tensor] = {}
    with av.open(str(path)) as container:
        for place, frame in enumerate(container.decode(video=0)):
            if place in wanted:
                seen = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                # degrees against the clock
                found[place] = torch.rot90(seen, getattr(frame, "rotation", 0) // 90, (0, 1)).contiguous()
            if place == wanted[-1]:
                break
    missing = len(set(wanted) - found.keys())
    if missing:
        raise ValueError(f"{missing} of {len(set(wanted))} frames cannot be decoded")
    return Film(
        torch.stack([found[place] for place in wanted]), wanted, float(rate) if rate else None, max(0, said - count)
    )


# the names used in `sources.KINDS`
moving_fashion_mnist = MovingFashionMNIST
frames = Frames
videos = Videos
