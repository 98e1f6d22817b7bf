"""What a tool asks of labelled images: batches, and what they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor

__all__ = ["Labelled"]


class Labelled(Protocol):
    """Batches of `(images [B, ...], labels [B])`, the same ones in every pass."""

    @property
    def source(self) -> str:
        """Where they are from."""

    @property
    def batch_size(self) -> int: ...

    @property
    def outputs(self) -> int:
        """How many answers a model must have for the labels to count."""

    @property
    def corrupt(self) -> Sequence[str]:
        """The images that the last pass left out, each with the reason."""

    @property
    def notes(self) -> Sequence[str]:
        """What a reader of figures has to know of these images, in sentences."""

    @property
    def preprocessing(self) -> Any:
        """How images were prepared; it has `notes()`."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...
