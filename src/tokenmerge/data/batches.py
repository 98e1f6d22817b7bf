"""Batches of a user's own as labelled data for the tools."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any

from torch import Tensor

from tokenmerge.data.preprocessing import Preprocessing
from tokenmerge.errors import DataError

__all__ = ["Batches"]


class _AsGiven:
    def __call__(self, image: Any) -> Any:
        return image

    def __repr__(self) -> str:
        return "done by whoever made the batches"


class Batches:
    """Labelled batches of your own for the tools: a `DataLoader`, or any iterable that can be iterated again.

    `classes` are the class names or their number; `source` is the name of the data in outputs. Raises `DataError` for
    an iterator that can be iterated only once, or that yields no batch, and in a pass for what is no batch: images
    `[B, ...]` as the model takes them, labels `[B]` of 0 to the number of classes less 1.
    """

    corrupt: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __init__(
        self, batches: Iterable[tuple[Tensor, Tensor]], classes: int | Sequence[str], source: str = ""
    ) -> None:
        if iter(batches) is batches:
            raise DataError("an iterator can be walked only once: give a list of batches, or a DataLoader.")
        first = next(iter(batches), None)
        if first is None:
            raise DataError(f"{source or 'batches'}: there is no batch.")
        self.classes = _named(classes)
        self.outputs = len(self.classes)
        images, _ = self._checked(first, 0)
        # other images are other data: a comparison of these does not go on with the rows of those
        digest = hashlib.sha256(images.detach().cpu().float().numpy().tobytes()).hexdigest()[:12]
        self.batches, self.source, self.batch_size = batches, source or f"batches as given ({digest})", len(images)
        self.preprocessing = Preprocessing((), None, False, "", None, None, self.source, own=_AsGiven())
        self._count: int | None = None

    def __len__(self) -> int:
        if self._count is None:
            self._count = sum(len(labels) for _, labels in self)
        return self._count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self._checked(batch, number) for number, batch in enumerate(self.batches))

    def _checked(self, batch: Any, number: int) -> tuple[Tensor, Tensor]:
        """Return images and labels of a batch; raises `DataError` for anything else."""
        pair = tuple(batch) if isinstance(batch, (tuple, list)) else ()
        if len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
            parts = ", ".join(type(part).__name__ for part in pair) or type(batch).__name__
            raise DataError(f"batch {number} is ({parts}); give two tensors, (images, labels).")
        images, labels = pair
        if images.dim() < 2 or labels.dim() != 1 or len(images) != len(labels) or labels.is_floating_point():
            raise DataError(
                f"batch {number}: images {tuple(images.shape)} and labels {tuple(labels.shape)} of {labels.dtype}; "
                "give images [B, ...] and labels [B], the number of each image's class."
            )
        if not images.is_floating_point():
            raise DataError(
                f"batch {number} has images of {images.dtype}: give them as the model takes them, for pixels "
                "images.float() / 255, less the mean, divided by the std."
            )
        low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
        if len(labels) and not 0 <= low <= high < self.outputs:
            raise DataError(
                f"batch {number} has labels from {low} to {high}, and there are {self.outputs} classes: give "
                f"labels from 0 to {self.outputs - 1}."
            )
        return images, labels


def _named(classes: Any) -> tuple[str, ...]:
    """Return the names of classes, given as such or by their number; raises `DataError` for anything else."""
    if isinstance(classes, Integral) and not isinstance(classes, bool):
        names = tuple(map(str, range(int(classes))))
    else:
        is_list = isinstance(classes, Iterable) and not isinstance(classes, (str, bytes))
        names = tuple(map(str, classes)) if is_list else ()
    if not names:
        raise DataError(f"classes={classes!r}: give the number of classes, from 1 on, or their names in a list.")
    return names
