"""Merge in blocks that take the tokens of all images as one sequence: each image is merged by itself.

Shapes: B images, N tokens of each, M tokens left, C channels, D width of a rotary table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tokenmerge._runtime.residual import ResidualRunner
from tokenmerge.errors import UnsupportedError

__all__ = ["PackedRunner"]


class PackedRunner(ResidualRunner):
    """Makes a batch of the images in a sequence, merges in that, and puts them back behind each other.

    Tokens of different images are in different rows of the batch: they neither attend to each other nor merge.
    """

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = self.by_name(args, kwargs)
        if not self.state.is_at_work():
            # as if it were one image: the block's own forward gets what it was given
            return _packed(super().__call__(_batch(x, 1), **given), x)
        images = self._images(given)
        return _packed(super().__call__(_batch(x, images), **self._by_image(given, images)), x)

    def original(self, x: Tensor, *args: Any, **given: Any) -> Any:
        """Run the block's own forward on a batch `[B, N, C]`."""
        tables = given[self.spec.tables]
        if tables[0].dim() == 3:
            given = {**given, self.spec.tables: tuple(table.flatten(0, 1) for table in tables)}
        sequence = x.flatten(0, 1)
        out: Tensor = super().original(sequence[None] if self.spec.is_batch else sequence, **given)
        return out.view(x.shape)

    def parity(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = self.by_name(args, kwargs)
        if given[self.spec.tables][0].dim() == 3:  # a probe makes batches
            return super().parity(x, **given)
        images = self._images(given)
        return _packed(super().parity(_batch(x, images), **self._by_image(given, images)), x)

    def _images(self, given: Mapping[str, Any]) -> int:
        """Return how many images there are; raises `UnsupportedError` if they are not of one size."""
        ends = given.get(self.spec.ends)
        if ends is None:
            raise UnsupportedError(
                f"block {self.layer} was called without {self.spec.ends!r}, which says where each image ends, while "
                "tokens are merged: those of different images would be merged with each other. Call the tower itself, "
                "or set handle.r = 0."
            )
        images = (ends.shape[0] if isinstance(ends, Tensor) else len(ends)) - 1
        total = given[self.spec.tables][0].shape[0]
        if not _share(ends, images, total):  # at every layer: merging may be switched on between two
            lengths = torch.as_tensor(ends).diff().tolist()
            raise UnsupportedError(
                f"images (or frames) of {', '.join(map(str, lengths))} tokens stand in one sequence, and tokens are "
                "merged (r is not 0): as many are merged in each, which needs images of one size. Give those of one "
                "size in one call and others in another, resize them alike, or set handle.r = 0."
                if len(set(lengths)) > 1
                else f"block {self.layer} was told of {images} images (or frames) with {', '.join(map(str, lengths))} "
                f"tokens, and the sequence has {total}: which token is of which image is not known. Give one size for "
                "each image, or set handle.r = 0."
            )
        return images

    def _by_image(self, given: dict[str, Any], images: int) -> dict[str, Any]:
        tables = tuple(table.unflatten(0, (images, -1)) for table in given[self.spec.tables])
        return {**given, self.spec.tables: tables}


def _share(ends: Tensor | Sequence[int], images: int, total: int) -> bool:
    """Return whether so many images share all the tokens equally."""
    if isinstance(ends, Tensor):
        return bool((ends.diff() * images == total).all())
    return all((end - start) * images == total for start, end in pairwise(ends))


def _batch(x: Tensor, images: int) -> Tensor:
    """Return tokens as `[B, N, C]`, in the same memory."""
    return x.reshape(images, -1, x.shape[-1])


def _packed(out: Tensor, like: Tensor) -> Tensor:
    sequence = out.flatten(0, 1)
    return sequence if like.dim() == 2 else sequence[None]
