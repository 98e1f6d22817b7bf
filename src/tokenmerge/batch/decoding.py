"""From bytes to the input of a model, in processes of their own: what a worker does."""

from __future__ import annotations

import io
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from tokenmerge.batch.places import Place
from tokenmerge.data.opening import decode_turned
from tokenmerge.data.preprocessing import Preprocessing
from tokenmerge.errors import DataError

__all__ = ["EXACT", "FAST", "MAX_PIXELS", "Decoder", "Piece", "Read", "draft_of", "work"]

MAX_PIXELS = 178_956_970  # where PIL itself speaks of a decompression bomb
EXACT, FAST = "exact", "fast"  # ways to decode
_KEPT = 2  # times the side that is resized to: what "fast" decodes at least
IDLE = -1


@dataclass(frozen=True)
class Decoder:
    """How images are decoded and prepared.

    Args:
        prepare: from a PIL image to a tensor `[C, H, W]`.
        max_pixels: an image with more is refused by its header, before its pixels are read.
        draft: decode a JPEG at the smallest of the sizes 1, 1/2, 1/4, 1/8 whose sides have so many pixels at least;
            None: at its whole size.
    """

    prepare: Callable[[Any], Tensor]
    max_pixels: int = MAX_PIXELS
    draft: int | None = None

    def __call__(self, name: str, content: bytes) -> tuple[Tensor, tuple[int, int]]:
        """Return the input for the model, and width and height of the image as people see it, upright.

        Raises `OSError` with its name.
        """
        size: list[int] = []
        try:
            image, is_turned = decode_turned(name, partial(io.BytesIO, content), partial(self._opened, size))
        except OSError as error:
            raise OSError(re.sub(r" <_io\.BytesIO object at \w+>", "", str(error))) from error
        width, height = reversed(size) if is_turned else size
        try:
            return self.prepare(image).contiguous(), (width, height)
        except Exception as error:  # of whatever prepares it
            raise OSError(f"{name}: {width} x {height} pixels cannot be prepared: {error}") from error

    def _opened(self, size: list[int], image: Any) -> None:
        size[:] = width, height = image.size
        if width * height > self.max_pixels:
            raise ValueError(
                f"{width} x {height} are {width * height:,} pixels, more than the limit of {self.max_pixels:,} "
                "(--max-pixels); it was not decoded"
            )
        if self.draft is not None:
            image.draft(None, (self.draft, self.draft))


def draft_of(way: str, prepare: Preprocessing) -> int | None:
    """Return the `draft` of a `Decoder` for a way to decode: "exact" (None), "fast", or a number of pixels.

    "fast" keeps at least twice the side that images are resized to, so that resizing still averages over pixels. Raises
    `DataError` for another way, and for "fast" where the preprocessing does not say to which size it resizes.
    """
    if way == EXACT:
        return None
    if way.isdecimal() and int(way) > 0:
        return int(way)
    if way != FAST:
        raise DataError(f"--decode is {way}: give {EXACT}, {FAST}, or the least number of pixels of a side.")
    sides = prepare.resize if prepare.interpolation else None
    if sides is None:
        raise DataError(
            f"--decode {FAST} keeps twice the side that images are resized to, and this model's are prepared by "
            f"{prepare}: give that number, as --decode 448."
        )
    return _KEPT * (sides if isinstance(sides, int) else max(sides))


@dataclass
class Piece:
    """The images of one batch, by their numbers in the source."""

    number: int
    images: list[int]
    places: list[Place]


@dataclass
class Read:
    """What a worker made of a piece: an entry of each list for every image, in the order of the piece."""

    number: int
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # of its tensor; () if it could not be read
    sizes: list[tuple[int, int]] = field(default_factory=list)  # width and height of the upright image
    reasons: list[str] = field(default_factory=list)  # why it could not be read; "" if it was
    unread: bool = False  # the bytes of at least one image could not be fetched
    seconds: float = 0.0
    rest: list[Any] = field(default_factory=list)  # arrays that did not fit into the memory that is shared

    def tensors(self, memory: Tensor) -> list[Tensor | None]:
        """Return the prepared images, of which most are views of the shared memory."""
        found: list[Tensor | None] = []
        start, rest = 0, iter(self.rest)
        for shape in self.shapes:
            count = torch.Size(shape).numel()
            if not shape:
                found.append(None)
            elif start + count <= len(memory):
                found.append(memory[start : start + count].view(shape))
                start += count
            else:
                found.append(torch.from_numpy(next(rest)))
        return found


def read_piece(decoder: Decoder, piece: Piece, memory: Tensor, at: Tensor, row: int) -> Read:
    """Fetch, decode and prepare the images of a piece into shared memory (float32).

    `at[row]` says which image is being worked on: should this process be killed, it is known whose fault that may be.
    """
    read, start, begun = Read(piece.number), 0, time.perf_counter()
    for image, where in zip(piece.images, piece.places, strict=True):
        at[row] = image
        found: tuple[Tensor, tuple[int, int]] | None = None
        content, reason = None, ""
        try:
            content = where.read()
            found = decoder(where.path, content)
        except OSError as error:
            reason = str(error).removeprefix(f"{where.path}: ")
        read.unread |= content is None
        tensor, size = found or (torch.empty(0), (0, 0))
        if start + tensor.numel() <= len(memory):
            memory[start : start + tensor.numel()] = tensor.reshape(-1)
            start += tensor.numel()
        else:
            read.rest.append(tensor.float().numpy())
        read.shapes.append(tuple(tensor.shape) if found else ())
        read.sizes.append(size)
        read.reasons.append(reason)
    at[row] = IDLE
    read.seconds = time.perf_counter() - begun
    return read


def work(decoder: Decoder, mine: Connection, its: Connection, memory: Sequence[Tensor], at: Tensor, row: int) -> None:
    """Decode the pieces that come through a pipe until it is closed; `its` is the other end, which is closed here.

    A process that is left alone ends: its pipe ends with the one that started it.
    """
    from PIL import Image

    its.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal
    torch.set_num_threads(1)
    Image.MAX_IMAGE_PIXELS = None  # the limit is the decoder's
    try:
        while True:
            slot, piece = mine.recv()
            mine.send((slot, read_piece(decoder, piece, memory[slot], at, row)))
    except (EOFError, OSError):
        return
