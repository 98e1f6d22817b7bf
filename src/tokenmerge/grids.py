"""Carry the rows and columns of the image in hand from where it is cut into patches to the first block.

Images of several shapes can have as many patches: the count of tokens does not tell which is which.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from tokenmerge.adapters.base import Adapter, Original
from tokenmerge.errors import UnsupportedError

__all__ = ["Grid", "Grids", "Listener"]

Grid = tuple[int, int]  # rows and columns


class Grids:
    """The grids that were noted since the first block ran last, by thread.

    Tracers get one plain slot, since thread-local storage cannot be captured; blocks that are compiled alone read it.
    """

    def __init__(self) -> None:
        self._own = threading.local()
        self._last: Grid | None = None
        self._is_traced = False  # whether a captured graph has noted the last one

    def __reduce__(self) -> tuple[type[Grids], tuple[()]]:
        """Copies and pickles start empty."""
        return Grids, ()

    def note(self, grid: Grid | None) -> None:
        """Note what an image was cut into; None: not into rows and columns."""
        self._last, self._is_traced = grid, torch.compiler.is_compiling()
        if not self._is_traced:
            self._own.waiting = (*getattr(self._own, "waiting", ()), grid)

    def take(self, patches: int) -> Grid | None:
        """Return the grid of the image whose tokens enter the first block, and forget it; None where none is known.

        Raises `UnsupportedError` where images of several shapes wait that have so many patches.
        """
        if torch.compiler.is_compiling():
            return self._last
        waiting: tuple[Grid | None, ...] = getattr(self._own, "waiting", ())
        self._own.waiting = ()
        if not waiting:
            return self._last if self._is_traced else None
        shapes = set(waiting) if len(waiting) > 1 else set()
        fitting = [shape for shape in shapes if shape and shape[0] * shape[1] == patches]
        if len(fitting) > 1:
            shown = " and ".join(sorted(f"{rows} x {columns}" for rows, columns in fitting))
            raise UnsupportedError(
                f"this method merges by place, and images of {shown} patches were cut before the blocks ran: it is not "
                "known which of them these tokens are of. Run the model on one batch after the other."
            )
        return fitting[0] if fitting else waiting[-1]


class Listener(Original):
    """The instance `forward` of what cuts images into patches: notes their rows and columns."""

    def __init__(self, adapter: Adapter, cutter: Any, grids: Grids) -> None:
        super().__init__(cutter)
        self.adapter, self.grids = adapter, grids

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.original(*args, **kwargs)
        image = next(iter((*args, *kwargs.values())), None)
        self.grids.note(self.adapter.grid_of(self.owner, image, out))
        return out
