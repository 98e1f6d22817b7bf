"""A search in which merged and unmerged embeddings meet: what is still found, and at which speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tokenmerge.batch.heads import head_of
from tokenmerge.data.labelled import Labelled, check_labelled, none_read
from tokenmerge.errors import DataError
from tokenmerge.measure.outputs import find_device, run_images, shared_copy
from tokenmerge.measure.retrieval import LEAST, MOST, NEAREST, found_again, nearest
from tokenmerge.measure.timing import environment
from tokenmerge.report import columns
from tokenmerge.report.columns import Record
from tokenmerge.report.table import Table
from tokenmerge.schedule import R
from tokenmerge.tools.models import Method, apply_method, choices_of

__all__ = ["Retrieval", "RetrievalRow", "retrieve"]

_UNMERGED, _MERGED = "unmerged", "merged"
# queries and index: with an index that stays, with an index embedded anew and clients that are not, all anew
_SEARCHES = ((_MERGED, _UNMERGED), (_UNMERGED, _MERGED), (_MERGED, _MERGED))


class RetrievalRow(Record):
    """One search: the model at one `r`, and which of its embeddings are searched for in which index."""

    __slots__ = ()
    r = columns.R
    search = columns.SEARCH
    recall_first = columns.RECALL_FIRST
    recall_ten = columns.RECALL_TEN
    cosine = columns.COSINE
    images_per_second = columns.IMAGES_PER_SECOND
    speed_up = columns.SPEED_UP


@dataclass(repr=False)
class Retrieval(Table[RetrievalRow]):
    """Three searches for every `r` (r = 0 is the unmerged model), images left out, and the environment."""

    rows: list[RetrievalRow]
    environment: dict[str, str]
    images: int
    corrupt: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def remarks(self) -> list[str]:
        """Notes for the reader, line by line."""
        lost = f"{len(self.corrupt)} of {self.images + len(self.corrupt)} images could not be read and were left out:"
        return [*self.notes, *([lost, *(f"  {line}" for line in self.corrupt)] if self.corrupt else [])]


def retrieve(
    model: nn.Module,
    data: Labelled,
    *,
    rs: Sequence[R] = (0, 8, 16),
    method: Method = "tome",
    calibrate: Tensor | None = None,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Retrieval:
    """Search for every image among the others, by embeddings of the unmerged model and of the merged one at each `r`.

    The embeddings are those of `Embedder`: a classifier is left out. Wanted are the 1 and the 10 images nearest by
    cosine where queries and index are unmerged; recall@k is the share of them among the k that are found by merged
    queries in an unmerged index, by unmerged ones in a merged index, and where both are merged. `cosine` compares an
    image's two embeddings. The first 20,000 images are used.

    `method` is anything `read_method` takes or returns, `calibrate` the images for `"auto"`. The model moves to the
    device and is not changed otherwise. Raises `UnsupportedError` for a model without an embedding, `DataError` for
    fewer than 50 images that can be read, and for embeddings that hold NaN.
    """
    check_labelled(data)
    where = find_device(device)
    model = model.to(where)
    amounts: list[R] = [0, *(r for r in rs if r != 0)]
    names, twins = [*map(str, amounts)], [shared_copy(model).eval() for _ in amounts]
    for twin, r in zip(twins[1:], amounts[1:], strict=True):
        apply_method(twin, method, r=r, calibrate=calibrate)
    found, seconds = _embedded(twins, data, where, progress)
    count = found[0].shape[0]
    if count < LEAST:
        raise DataError(f"a search needs at least {LEAST} images, and {count} were read: chance finds the others.")
    odd = [name for name, vectors in zip(names, found, strict=True) if not vectors.isfinite().all()]
    if odd:
        raise DataError(f"embeddings at r = {', '.join(odd)} hold NaN or infinity: nothing can be searched by them.")
    rows = _rows(names, found, [count / one for one in seconds])
    notes = [*data.preprocessing.notes(), *data.notes, _explained(count)]
    notes += choices_of(zip(amounts[1:], twins[1:], strict=True))
    return Retrieval(rows, environment(where), count, list(data.corrupt), notes)


def _embedded(
    models: Sequence[nn.Module], data: Labelled, where: torch.device, progress: Callable[[int, int], None] | None
) -> tuple[list[Tensor], list[float]]:
    """Return the embeddings `[N, D]` of each model, and the seconds of its forwards; they take turns at each batch."""
    heads = [head_of(model, "embedding") for model in models]
    dtype = next(models[0].parameters()).dtype
    found: list[list[Tensor]] = [[] for _ in heads]
    seconds, done = [0.0] * len(heads), 0
    for turn, (images, _) in enumerate(data):
        x = images[: MOST - done].to(where, dtype)
        for i in (*range(turn % len(heads), len(heads)), *range(turn % len(heads))):
            if not turn:
                run_images(heads[i], x)  # a warm-up
            begun = time.perf_counter()
            found[i].append(run_images(heads[i], x).float().cpu())
            seconds[i] += time.perf_counter() - begun
        done += x.shape[0]
        if progress is not None:
            progress(done, min(MOST, len(data)))
        if done == MOST:
            break
    if not done:
        raise none_read(data)
    return [torch.cat(parts) for parts in found], seconds


def _rows(names: Sequence[str], found: Sequence[Tensor], speeds: Sequence[float]) -> list[RetrievalRow]:
    old = found[0]
    wanted = nearest(old, old, NEAREST)
    rows = []
    for name, new, speed in zip(names, found, speeds, strict=True):
        sides = {_UNMERGED: old, _MERGED: new}
        for queries, index in _SEARCHES if new is not old else ((_UNMERGED, _UNMERGED),):
            got = nearest(sides[queries], sides[index], NEAREST)
            row = {
                "r": name,
                "search": f"{queries} in {index}",
                "recall@1": round(found_again(wanted[:, :1], got[:, :1]), 4),
                "recall@10": round(found_again(wanted, got), 4),
                "cosine": round(float(torch.cosine_similarity(new, old, dim=1).mean()), 5),
                "images/s": round(speed, 1),
                "speed-up": round(speed / speeds[0], 2),
            }
            rows.append(RetrievalRow(row))
    return rows


def _explained(count: int) -> str:
    return (
        f"Of the images nearest to each of {count} where queries and index are unmerged, the share that is found: "
        "merged in unmerged asks an index that stays as it is, unmerged in merged an index that was embedded anew."
    )
