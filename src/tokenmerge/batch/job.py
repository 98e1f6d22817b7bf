"""Every image of a source through one model, into a folder of Parquet: one row for each, however often it is killed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import torch

from tokenmerge.batch.cluster import Cluster, import_ray
from tokenmerge.batch.decoding import MAX_PIXELS, Decoder, Piece
from tokenmerge.batch.embedder import Embedder
from tokenmerge.batch.engine import Done, Engine
from tokenmerge.batch.folder import REPORT, JobFolder, check_folder, needs_parquet
from tokenmerge.batch.inputs import Inputs, Item, check_unique, open_inputs
from tokenmerge.batch.local import Devices, Local
from tokenmerge.batch.page import write_page
from tokenmerge.batch.rates import Meter
from tokenmerge.batch.summary import Summary
from tokenmerge.batch.table import Rows
from tokenmerge.errors import DataError, unknown_name
from tokenmerge.handle import handle_of

__all__ = ["ENGINES", "Summary", "check_engine", "embed"]

ENGINES = ("local", "ray")
_SECONDS = 120.0  # after which a shard is written although it is small
_SHOWN = 1.0  # seconds between lines of progress


def embed(
    embedder: Embedder,
    source: str | Path | Inputs,
    out: str | Path,
    *,
    engine: str = "local",
    models: int | None = None,
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

    Called again with the same settings it goes on, also by another engine: exactly one row or failure for every id,
    wherever it was killed. An image that cannot be read is named with the reason in `failures.parquet`. A process that
    is killed is replaced, and its images are read again; an image that ends three is a failure. At the end
    `report.html` says what bounded it, with both rates over time.

    Args:
        embedder: the model.
        source: what `open_inputs` takes, or its result.
        out: the folder to write, or to go on with, on a disk of this machine.
        engine: "local", or "ray": Ray Data, on the cluster of RAY_ADDRESS or on this machine.
        models: models at once. Local: a process for each, with a GPU of its own; None: one, in this process. Ray: at
            most so many actors; None: one for each GPU, without GPUs one for two CPUs.
        batch_size: images in a forward.
        workers: processes that decode; None: one for each core, or as many as Ray finds room for.
        shard_rows: rows of a file; a file is also written after two minutes.
        max_pixels: images with more are failures, refused before they are decoded.
        draft: decode JPEGs smaller, see `Decoder`: faster, and embeddings change a little.
        duplicates: "refuse" ids that are there more than once, or "suffix" them.
        retry: read again what failed before.
        progress: called with images done, images in all and both rates.

    Raises `DataError` for a source or a folder that cannot be used and where the source vanishes while it is read,
    `ConfigError` with the differences for a folder of another job, `UnsupportedError` without a library or a GPU that
    is asked for, `OSError` for a full disk: what was written stays.
    """
    check_engine(engine)
    amounts = {"batch_size": batch_size, "workers": workers, "shard_rows": shard_rows, "max_pixels": max_pixels}
    for name, value in {**amounts, "draft": draft, "models": models}.items():
        if value is not None and value < 1:
            raise DataError(f"{name} is {value}: give 1 or more.")
    check_folder(out)
    inputs = check_unique(source if isinstance(source, Inputs) else open_inputs(source), duplicates)
    settings = {**embedder.settings(), "source": inputs.name, "draft": "none" if draft is None else str(draft)}
    found = _engine(engine, embedder, Decoder(embedder.prepare, max_pixels, draft), workers, batch_size, models)
    with JobFolder.open(out, settings, embedder.output) as folder:
        meter = Meter(folder.folder, embedder.device)
        if retry and folder.failures:
            folder.forget_failures()
        job = _Job(embedder, inputs, folder, meter, batch_size, shard_rows, progress)
        page = folder.folder / REPORT
        if job.left:
            page.unlink(missing_ok=True)  # it would be of less than the folder holds, should this call be killed
            job.run(found)
        summary = job.summary(found)
        if not page.exists():
            write_page(folder, summary, embedder.device, batch_size)
        return summary


def check_engine(name: str) -> None:
    """Raise `UnknownNameError` for an engine that there is not, `UnsupportedError` if a library is missing."""
    if name not in ENGINES:
        raise unknown_name("engine", name, ENGINES)
    needs_parquet()
    if name == "ray":
        import_ray()


def _engine(
    name: str, embedder: Embedder, decoder: Decoder, workers: int | None, batch_size: int, models: int | None
) -> Engine:
    if name == "ray":
        return Cluster(embedder, decoder, workers, models)
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if models is None or models == 1:
        return Local(embedder, decoder, workers, batch_size)
    return Devices(embedder, decoder, workers, batch_size, models)


class _Job:
    """One call: what is left, and what was measured."""

    def __init__(
        self,
        embedder: Embedder,
        inputs: Inputs,
        folder: JobFolder,
        meter: Meter,
        batch_size: int,
        shard_rows: int,
        progress: Callable[[int, int, str], None] | None,
    ) -> None:
        self.embedder, self.inputs, self.folder, self.meter = embedder, inputs, folder, meter
        self.shard_rows, self.progress = shard_rows, progress
        done = folder.done()
        self.before, self.total = len(done), len(inputs)
        # pieces are parts of the whole list, so that a job that goes on makes the batches of one that was not stopped
        missing = [index for index, name in enumerate(inputs.ids()) if name not in done]
        self.pieces: dict[int, list[int]] = {}
        for index in missing:
            self.pieces.setdefault(index // batch_size, []).append(index)
        self.left, self.gone = len(missing), len(done) - (self.total - len(missing))
        self.seconds = self.shown = self.written = 0.0

    def _wanted(self) -> Iterator[Piece]:
        for number, indices in self.pieces.items():
            yield Piece(number, indices, [self.inputs[index][2] for index in indices])

    def run(self, engine: Engine) -> None:
        """Read and embed what is left; what is ready is written whatever happens."""
        self.written = time.monotonic()
        rows = Rows(self.embedder)
        try:
            with closing(engine.run(self._wanted(), len(self.pieces))) as found:
                for done in found:
                    self._add(rows, done)
                    self.meter.add(done, engine)
                    if len(rows) >= self.shard_rows or time.monotonic() - self.written > _SECONDS:
                        self._write(rows)
                    if done.unread and not self.inputs.is_there():
                        raise self._vanished(rows)
                    self._show(engine)
        finally:
            self.seconds = self.meter.seconds
            self._write(rows)
            self.meter.write(engine)

    def _add(self, rows: Rows, done: Done) -> None:
        is_finite = iter(done.found.flatten(1).isfinite().all(dim=1).tolist())
        good: list[tuple[Item, tuple[int, int]]] = []
        kept: list[bool] = []
        for index, size, reason in zip(done.images, done.sizes, done.reasons, strict=True):
            item = self.inputs[index]
            if reason:
                rows.fail(item, reason, done.unread)
                continue
            kept.append(next(is_finite))
            if kept[-1]:
                good.append((item, size))
            else:
                rows.fail(item, f"the model's {self.embedder.output} of it is not finite")
        rows.add(good, done.found[kept] if not all(kept) else done.found)

    def _vanished(self, rows: Rows) -> DataError:
        rows.forget_unread()
        return DataError(
            f"the source {self.inputs.name} is not there any more. What was read before is kept, and the same command "
            "goes on when it is back."
        )

    def _write(self, rows: Rows) -> None:
        # cleared first: an interruption in between must not write them twice
        table, failures = rows.taken()
        if table.num_rows or failures:
            self.folder.add(table, failures)
        self.written = time.monotonic()

    def _show(self, engine: Engine) -> None:
        now = time.monotonic()
        if self.progress is not None and (now - self.shown > _SHOWN or self.meter.tried == self.left):
            self.shown = now
            loader, model = self.meter.rates(engine)
            self.progress(self.meter.tried, self.left, f"loader {loader:,.0f}/s, model {model:,.0f}/s")

    def summary(self, engine: Engine) -> Summary:
        """Return what was done, and how fast."""
        loader, model = self.meter.rates(engine)
        notes = [f"{self.gone:,} rows are of images that the source has no more."] if self.gone else []
        notes += [f"WARNING: {remark}." for remark in self.embedder.remarks]
        warning = self.embedder.prepare.warning()
        waited = engine.waited
        if waited is None:
            waited = max(0.0, self.seconds - self.meter.embedding / engine.models)
        there = torch.cuda.device_count() if self.embedder.device.type == "cuda" and engine.name == "local" else 0
        if there > engine.models:
            notes.append(f"{engine.models} of {there} GPUs was used: --models {there} uses all.")
        handle = handle_of(self.embedder.model, None)
        return Summary(
            out=str(self.folder.folder),
            rows=self.folder.rows,
            failures=len(self.folder.failures),
            done_before=self.before,
            images=self.meter.images,
            seconds=self.seconds,
            loader=loader,
            model=model,
            waited=waited,
            workers=engine.workers,
            killed=engine.killed,
            merging="" if handle is None else str(handle.config),
            preprocessing=str(self.embedder.prepare),
            notes=[*notes, *([warning] if warning else [])],
            engine=engine.name,
            models=engine.models,
        )
