"""Pass the patch grid (rows, columns) of the current image from the patch embedding to the first block.

The token count does not determine it: images of different shapes can have the same number of patches.
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
    """The grids noted since the first block last ran, per thread, or per graph while a whole forward is traced."""

    def __init__(self) -> None:
        self._own = threading.local()
        self._traced: Grid | None = None

    def __reduce__(self) -> tuple[type[Grids], tuple[()]]:
        """Make copies and pickles start empty."""
        return Grids, ()

    def note(self, grid: Grid | None) -> None:
        """Note the grid of an image; None if its patches form no grid."""
        if is_tracing():
            self._traced = grid
        elif is_compiling():
            outside_graph.run(self._note, grid)
        else:
            self._note(grid)

    def take(self, patches: int) -> Grid | None:
        """Return and forget the grid of the image whose tokens enter the first block; None if unknown.

        Raises `UnsupportedError` if pending images of different shapes have this number of patches.
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
    """Override of a patch embedding's `forward` that notes the grid."""

    def __init__(self, adapter: Adapter, cutter: Any, grids: Grids) -> None:
        super().__init__(cutter)
        self.adapter, self.grids = adapter, grids

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.original(*args, **kwargs)
        image = next(iter((*args, *kwargs.values())), None)
        self.grids.note(self.adapter.host.grid_of(self.owner, image, out))
        return out
