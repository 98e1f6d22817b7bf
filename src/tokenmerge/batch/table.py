"""Rows of a shard while they are collected, and their Arrow types."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenmerge.batch.embedder import Embedder
from tokenmerge.batch.inputs import Item

__all__ = ["Rows"]

_BEST = 5  # classes of an image that are written


class Rows:
    """Rows and failures of one shard.

    Columns: `id`, `path`, the output, `width` and `height` of the upright image. The output is `embedding` (a list of
    fixed size, float32), `dense` (such a list for every place), or for logits `labels` and `scores`: the names of the
    likeliest classes, best first, and their probabilities.
    """

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._clear()

    def _clear(self) -> None:
        self._good: list[tuple[Item, tuple[int, int]]] = []
        self._found: list[Tensor] = []
        self._failures: list[tuple[dict[str, str], bool]] = []

    def __len__(self) -> int:
        return len(self._good)

    def add(self, good: list[tuple[Item, tuple[int, int]]], found: Tensor) -> None:
        """Add rows: items with width and height, and the outputs `[B, ...]`."""
        if good:
            self._good += good
            self._found.append(found)

    def fail(self, item: Item, reason: str, unread: bool = False) -> None:
        """Add an image without a row, and why; `unread` if its bytes may have been out of reach."""
        self._failures.append(({"id": item[0], "path": item[1], "reason": reason}, unread))

    def forget_unread(self) -> None:
        """Drop the failures that the source may be to blame for."""
        self._failures = [(one, unread) for one, unread in self._failures if not unread]

    def taken(self) -> tuple[Any, list[dict[str, str]]]:
        """Return the rows as a table, and the failures, and begin the next shard."""
        table, failures = self.table(), [one for one, _ in self._failures]
        self._clear()
        return table, failures

    def table(self) -> Any:
        """Return the rows as an Arrow table, which also holds what made them, as metadata."""
        import pyarrow as pa

        items = [item for item, _ in self._good]
        columns = {
            "id": pa.array([item[0] for item in items], pa.string()),
            "path": pa.array([item[1] for item in items], pa.string()),
            **self._outputs(),
            "width": pa.array([size[0] for _, size in self._good], pa.int32()),
            "height": pa.array([size[1] for _, size in self._good], pa.int32()),
        }
        settings = {f"tokenmerge.{name}": str(value) for name, value in self._embedder.settings().items()}
        return pa.table(columns).replace_schema_metadata(settings)

    def _outputs(self) -> dict[str, Any]:
        import pyarrow as pa

        name = self._embedder.output
        if not self._found:
            return {}
        if name == "dense":
            parts = [_fixed(one) for part in self._found for one in part]
            offsets = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0).to(torch.int32)
            lists = pa.ListArray.from_arrays(pa.array(offsets.numpy()), pa.concat_arrays(parts))
            return {name: lists}
        found = torch.cat(self._found)
        if name == "embedding":
            return {name: _fixed(found)}
        best = found.softmax(dim=1).topk(min(_BEST, found.shape[1]), dim=1)
        names = self._embedder.classes or list(map(str, range(found.shape[1])))
        labels = [[names[number] for number in row] for row in best.indices.tolist()]
        return {
            "labels": pa.array(labels, pa.list_(pa.string())),
            "scores": pa.array(best.values.tolist(), pa.list_(pa.float32())),
        }


def _fixed(rows: Tensor) -> Any:
    """Return an array of lists of one size from `[B, D]`."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(rows.contiguous().view(-1).numpy()), rows.shape[1])
