"""Every image of a source through one model, into a folder of Parquet: one row for each, however often it is killed."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenmerge.batch.decoding import MAX_PIXELS, Decoder, Piece, Read
from tokenmerge.batch.embedder import Embedder
from tokenmerge.batch.folder import FAILURES, JobFolder, check_folder, needs_parquet
from tokenmerge.batch.inputs import Inputs, Item, check_unique, open_inputs
from tokenmerge.batch.pool import Pool
from tokenmerge.batch.table import Rows
from tokenmerge.errors import DataError

__all__ = ["Summary", "embed"]

_SECONDS = 120.0  # after which a shard is written although it is small
_SHOWN = 1.0  # seconds between lines of progress
_CLEAR = 0.1  # share of the time spent waiting from which on decoding is what bounds a job


@dataclass
class Summary:
    """What a job did, and how fast: rates are of this call, counts of the whole folder."""

    out: str
    rows: int  # in all shards
    failures: int
    done_before: int  # rows and failures that were there
    images: int  # decoded and embedded in this call
    seconds: float
    loader: float  # images/s that the workers decode while nothing holds them up
    model: float  # images/s of the model
    waited: float  # seconds that the model waited for images
    workers: int
    killed: int  # workers that ended and were replaced
    merging: str
    preprocessing: str
    notes: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Images/s of the whole job."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def bound(self) -> str:
        """One line: what bounds the job, and what would help."""
        if not self.images:
            return "Nothing was left to do."
        decoding = f"{self.loader:,.0f} images/s by {self.workers} worker{'s' if self.workers > 1 else ''}"
        if self.waited > _CLEAR * self.seconds and self.loader < self.model:
            needed = max(self.workers + 1, math.ceil(self.workers * self.model / self.loader))
            return (
                f"Bound by decoding: {decoding}; the model could do {self.model:,.0f}/s. Merging cannot help before "
                f"--workers {needed}."
            )
        return (
            f"Bound by the model: {self.model:,.0f} images/s; decoding could do {decoding}. Merging more (-r) helps, "
            "more workers do not."
        )

    def lines(self) -> list[str]:
        """Return what a reader is told at the end."""
        before = f" ({self.done_before:,} were there before)" if self.done_before else ""
        lost = f"{self.failures:,} images failed: {self.out}/{FAILURES} says why" if self.failures else "none failed"
        again = f" {self.killed} worker processes were killed and replaced." if self.killed else ""
        return [
            f"{self.rows:,} rows in {self.out}{before}; {lost}.{again}",
            *self.notes,
            f"Merging: {self.merging or 'none'}",
            f"Preprocessing: {self.preprocessing}",
            f"{self.images:,} images in {self.seconds:,.1f} s, {self.rate:,.1f}/s.",
            self.bound,
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**vars(self), "rate": self.rate, "bound": self.bound}


def embed(
    embedder: Embedder,
    source: str | Path | Inputs,
    out: str | Path,
    *,
    batch_size: int = 32,
    workers: int | None = None,
    shard_rows: int = 10_000,
    max_pixels: int = MAX_PIXELS,
    draft: int | None = None,
    duplicates: str = "refuse",
    retry: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Summary:
    """Embed every image of a source into a folder: Parquet of id, path, output, width and height.

    Called again with the same settings it goes on: exactly one row or failure for every id, wherever it was killed. An
    image that cannot be read is named with the reason in `failures.parquet`. A worker process that is killed is
    replaced, and its images are read again; an image that kills three is a failure.

    Args:
        embedder: the model.
        source: what `open_inputs` takes, or its result.
        out: the folder to write, or to go on with.
        batch_size: images in a forward.
        workers: processes that decode; None: one for each core.
        shard_rows: rows of a file; a file is also written after two minutes.
        max_pixels: images with more are failures, refused before they are decoded.
        draft: decode JPEGs smaller, see `Decoder`: faster, and embeddings change a little.
        duplicates: "refuse" ids that are there more than once, or "suffix" them.
        retry: read again what failed before.
        progress: called with images done, images in all and both rates.

    Raises `DataError` for a source or a folder that cannot be used and where the source vanishes while it is read,
    `ConfigError` with the differences for a folder of another job, `OSError` for a full disk: what was written stays.
    """
    workers = _checked(batch_size, workers, shard_rows, max_pixels, draft)
    needs_parquet()
    check_folder(out)
    inputs = check_unique(source if isinstance(source, Inputs) else open_inputs(source), duplicates)
    settings = {**embedder.settings(), "source": inputs.name, "draft": "none" if draft is None else str(draft)}
    decoder = Decoder(embedder.prepare, max_pixels, draft)
    with JobFolder.open(out, settings, embedder.output) as folder:
        if retry and folder.failures:
            folder.forget_failures()
        job = _Job(embedder, inputs, folder, batch_size, shard_rows, progress)
        if job.left:
            with Pool(decoder, min(workers, len(job.pieces)), batch_size, embedder.prepare.size) as pool:
                job.run(pool)
                return job.summary(pool)
        return job.summary(None)


def _checked(batch_size: int, workers: int | None, shard_rows: int, max_pixels: int, draft: int | None) -> int:
    """Return the number of workers; raises `DataError` for amounts below 1."""
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = {"batch_size": batch_size, "workers": workers, "shard_rows": shard_rows, "max_pixels": max_pixels}
    for name, value in {**given, **({} if draft is None else {"draft": draft})}.items():
        if value < 1:
            raise DataError(f"{name} is {value}: give 1 or more.")
    return workers


class _Job:
    """One call: what is left, and what was measured."""

    def __init__(
        self,
        embedder: Embedder,
        inputs: Inputs,
        folder: JobFolder,
        batch_size: int,
        shard_rows: int,
        progress: Callable[[int, int, str], None] | None,
    ) -> None:
        self.embedder, self.inputs, self.folder, self.progress = embedder, inputs, folder, progress
        self.shard_rows = shard_rows
        done = folder.done()
        self.before, self.total = len(done), len(inputs)
        # pieces are parts of the whole list, so that a job that goes on makes the batches of one that was not stopped
        missing = [index for index, name in enumerate(inputs.ids()) if name not in done]
        self.pieces: dict[int, list[int]] = {}
        for index in missing:
            self.pieces.setdefault(index // batch_size, []).append(index)
        self.left, self.gone = len(missing), len(done) - (self.total - len(missing))
        self.images = self.tried = 0
        self.seconds = self.in_model = 0.0
        self.shown = self.written = 0.0

    def _wanted(self) -> Iterator[Piece]:
        for number, indices in self.pieces.items():
            yield Piece(number, indices, [self.inputs[index][2] for index in indices])

    def run(self, pool: Pool) -> None:
        """Read and embed what is left; what is ready is written whatever happens."""
        begun = self.written = time.monotonic()
        rows = Rows(self.embedder)
        try:
            for piece, read, tensors in pool.run(self._wanted()):
                self._embed(rows, piece, read, tensors)
                self.tried += len(piece.images)
                if len(rows) >= self.shard_rows or time.monotonic() - self.written > _SECONDS:
                    self._write(rows)
                if read.unread and not self.inputs.is_there():
                    raise self._vanished(rows)
                self._show(pool)
        finally:
            self.seconds = time.monotonic() - begun
            self._write(rows)

    def _embed(self, rows: Rows, piece: Piece, read: Read, tensors: list[Tensor | None]) -> None:
        items = [self.inputs[index] for index in piece.images]
        begun = time.perf_counter()
        found = self.embedder.run_all([tensor for tensor in tensors if tensor is not None])
        self.in_model += time.perf_counter() - begun
        self.images += len(found)
        is_finite = iter(found.flatten(1).isfinite().all(dim=1).tolist())
        good: list[tuple[Item, tuple[int, int]]] = []
        kept: list[bool] = []
        for item, tensor, size, reason in zip(items, tensors, read.sizes, read.reasons, strict=True):
            if tensor is None:
                rows.fail(item, reason, read.unread)
                continue
            kept.append(next(is_finite))
            if kept[-1]:
                good.append((item, size))
            else:
                rows.fail(item, f"the model's {self.embedder.output} of it is not finite")
        rows.add(good, found[kept] if not all(kept) else found)

    def _vanished(self, rows: Rows) -> DataError:
        rows.forget_unread()
        return DataError(
            f"the source {self.inputs.name} is not there any more. What was read before is kept, and the same command "
            "goes on when it is back."
        )

    def _write(self, rows: Rows) -> None:
        if len(rows) or rows.failures:
            self.folder.add(rows.table(), rows.failures)
            rows.clear()
        self.written = time.monotonic()

    def _show(self, pool: Pool) -> None:
        now = time.monotonic()
        if self.progress is not None and (now - self.shown > _SHOWN or self.tried == self.left):
            self.shown = now
            loader, model = self._rates(pool)
            self.progress(self.tried, self.left, f"loader {loader:,.0f}/s, model {model:,.0f}/s")

    def _rates(self, pool: Pool | None) -> tuple[float, float]:
        loader = self.tried * pool.workers / pool.seconds if pool is not None and pool.seconds else 0.0
        return loader, self.images / self.in_model if self.in_model else 0.0

    def summary(self, pool: Pool | None) -> Summary:
        """Return what was done, and how fast."""
        loader, model = self._rates(pool)
        notes = [f"{self.gone:,} rows are of images that the source has no more."] if self.gone else []
        warning = self.embedder.prepare.warning()
        return Summary(
            out=str(self.folder.folder),
            rows=self.folder.rows,
            failures=len(self.folder.failures),
            done_before=self.before,
            images=self.images,
            seconds=self.seconds,
            loader=loader,
            model=model,
            waited=pool.waited if pool else 0.0,
            workers=pool.workers if pool else 0,
            killed=pool.killed if pool else 0,
            merging=self.embedder.merging,
            preprocessing=str(self.embedder.prepare),
            notes=[*notes, *([warning] if warning else [])],
        )
