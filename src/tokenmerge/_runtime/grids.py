"""Carry the rows and columns of the image in hand from where it is cut into patches to the first block.

Images of several shapes can have as many patches: the count of tokens does not tell which is which.
"""

from __future__ import annotations

import threading
from typing import Any

from tokenmerge._torch.tracing import is_compiling, is_tracing, outside_graph
from tokenmerge.adapters.base import Adapter, Override
from tokenmerge.errors import UnsupportedError

__all__ = ["Grid", "Grids", "Listener"]

Grid = tuple[int, int]  # rows and columns


class Grids:
    """The grids that were noted since the first block ran last, by thread, or in a whole forward's graph."""

    def __init__(self) -> None:
        self._own = threading.local()
        self._traced: Grid | None = None

    def __reduce__(self) -> tuple[type[Grids], tuple[()]]:
        """Copies and pickles start empty."""
        return Grids, ()

    def note(self, grid: Grid | None) -> None:
        """Note what an image was cut into; None: not into rows and columns."""
        if is_tracing():
            self._traced = grid
        elif is_compiling():
            outside_graph.run(self._note, grid)
        else:
            self._note(grid)

    def take(self, patches: int) -> Grid | None:
        """Return the grid of the image whose tokens enter the first block, and forget it; None where none is known.

        Raises `UnsupportedError` where images of several shapes wait that have so many patches.
        """
        if is_tracing():
            return self._traced
        taken: Grid | None = outside_graph.run(self._take, patches) if is_compiling() else self._take(patches)
        return taken

    def _note(self, grid: Grid | None) -> None:
        self._own.waiting = (*getattr(self._own, "waiting", ()), grid)

    def _take(self, patches: int) -> Grid | None:
        waiting: tuple[Grid | None, ...] = getattr(self._own, "waiting", ())
        self._own.waiting = ()
        shapes = set(waiting) if len(waiting) > 1 else set()
        fitting = [shape for shape in shapes if shape and shape[0] * shape[1] == patches]
        if len(fitting) > 1:
            shown = " and ".join(sorted(f"{rows} x {columns}" for rows, columns in fitting))
            raise UnsupportedError(
                f"this method merges by place, and images of {shown} patches were cut before the blocks ran: it is not "
                "known which of them these tokens are of. Run the model on one batch after the other."
            )
        return fitting[0] if fitting else waiting[-1] if waiting else None


class Listener(Override):
    """The instance `forward` of what cuts images into patches: notes their rows and columns."""

    def __init__(self, adapter: Adapter, cutter: Any, grids: Grids) -> None:
        super().__init__(cutter)
        self.adapter, self.grids = adapter, grids

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.original(*args, **kwargs)
        image = next(iter((*args, *kwargs.values())), None)
        self.grids.note(self.adapter.host.grid_of(self.owner, image, out))
        return out
