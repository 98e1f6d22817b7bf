"""What an engine is: it makes of pieces what is written of them; and the work on one piece, alike in all of them."""

from __future__ import annotations

import pickle
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmerge.batch.decoding import Piece, Read
from tokenmerge.batch.embedder import Embedder
from tokenmerge.errors import DataError

__all__ = ["Done", "Engine", "carried", "finish"]


@dataclass
class Done:
    """What was made of a piece: an entry of `sizes` and `reasons` for every image, a row of `found` for each read."""

    images: list[int]  # their numbers in the source
    found: Tensor  # outputs [n, ...]
    sizes: list[tuple[int, int]]  # width and height
    reasons: list[str]  # why it could not be read; "" if it was
    unread: bool = False  # the bytes of at least one image could not be fetched
    decoding: float = 0.0  # seconds
    embedding: float = 0.0
    who: str = ""  # the process of the model, where there are several


class Engine(ABC):
    """One way to work through pieces. What it measured so far stands in its attributes, and may grow while it runs."""

    name = "local"
    workers = 1  # processes that decode, all together
    models = 1  # models at work at once
    killed = 0  # processes that ended and were replaced
    waited: float | None = None  # seconds that the model waited for images; None: not measured

    @abstractmethod
    def run(self, pieces: Iterator[Piece], count: int) -> Generator[Done, None, None]:
        """Yield each of `count` pieces once, in any order, however many processes are killed; to be closed."""


def finish(embedder: Embedder, piece: Piece, read: Read, tensors: Sequence[Tensor | None], who: str = "") -> Done:
    """Embed the images of a piece that could be read."""
    begun = time.perf_counter()
    found = embedder.run_all([tensor for tensor in tensors if tensor is not None])
    # a class token may be a view of all tokens of its batch, which would be kept, or sent, with it
    found = found.clone(memory_format=torch.contiguous_format)
    seconds = time.perf_counter() - begun
    return Done(piece.images, found, read.sizes, read.reasons, read.unread, read.seconds, seconds, who)


def carried(error: Exception) -> Exception:
    """Return an error that can be sent to another process: itself, or what it says."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # one that takes other arguments than it keeps
        return DataError(f"{type(error).__name__}: {error}")
