"""Batches of samples, whose content depends on the seed and the position only.

The augmentation of a sample is drawn from (seed, epoch, index), that of a batch from (seed, epoch, position). So the
number of processes and workers, and where a run was interrupted, do not change the batches.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tokenmerge.data.sources import Raw, Source, Stream, open_source, seed_of
from tokenmerge.errors import DataError

__all__ = [
    "Batch",
    "Loader",
    "Position",
    "Source",
    "Stream",
    "evaluation",
    "in_order",
    "open_source",
    "reseed",
    "seed_of",
]

Transform = Callable[[Raw], Tensor]


@dataclass(frozen=True)
class Position:
    """Where the next batch starts: in the next epoch if too few samples are left in this one."""

    epoch: int = 0
    index: int = 0  # samples of the epoch already used, over all processes


@dataclass
class Batch:
    inputs: Tensor  # [b, ...], this process's share
    labels: Tensor  # [b]
    position: Position  # of the batch after this one
    unreadable: list[str] = field(default_factory=list)  # sentences, one for each sample left out

    def pin_memory(self) -> Batch:  # torch's DataLoader calls it by this name
        return replace(self, inputs=self.inputs.pin_memory(), labels=self.labels.pin_memory())


_Sample = tuple[int, Callable[[], tuple[Raw, int]]]  # index, and a function that reads the sample
_Step = tuple[Position, list[_Sample]]


class Loader:
    """Batches of a source for training: shuffled, augmented, endless.

    `batch_size` counts the samples of one optimiser step over all processes; process `rank` of `world` takes its
    contiguous share. An incomplete batch at the end of an epoch is dropped. Each worker process prepares whole batches.
    Raises `DataError` if no batch can be made.

    Every worker of every process reads a whole stream, and a resumed run starts reading at its beginning. A worker
    reads all bytes but decodes only its own samples. With many processes reading dominates; then copy the data to local
    disks.
    """

    def __init__(
        self,
        source: Source | Stream,
        transform: Transform,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        _check_amounts(batch_size, rank, world, workers)
        if batch_size % world:
            raise DataError(
                f"a batch of {batch_size} cannot be shared equally by {world} processes; "
                f"give {batch_size // world * world or world} or {(batch_size // world + 1) * world}."
            )
        if isinstance(source, Source):
            _check_length(len(source), batch_size)
        self.source, self.transform, self.batch_size, self.seed = source, transform, batch_size, seed
        self.workers = workers
        share = batch_size // world
        self._mine = range(rank * share, (rank + 1) * share)

    @property
    def steps_per_epoch(self) -> int | None:
        """Batches per epoch; None for a stream, whose length is unknown."""
        return None if isinstance(self.source, Stream) else len(self.source) // self.batch_size

    def batches(self, start: Position = Position()) -> Iterator[Batch]:
        """Yield this process's share of every batch from `start` on, endlessly.

        A sample that cannot be read is left out and named in `unreadable`. Raises `DataError` if a whole share cannot
        be read, a label has no class, or a stream is shorter than a batch.
        """
        steps = partial(_steps, self.source, self.batch_size, self._mine, self.seed, start)
        for batch in _run(_Work(steps, self.source, self.transform, self.seed), self.workers):
            if not len(batch.labels):
                raise DataError(_none_readable(batch.unreadable))
            yield batch


def evaluation(
    source: Source | Stream,
    transform: Transform,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """Yield every `world`-th sample from `rank` on, once and in order, in batches of `batch_size` (the last smaller).

    Samples that cannot be read are left out and named in `unreadable`; a batch may then be empty. Raises `DataError` if
    all batches are empty.
    """
    _check_amounts(batch_size, rank, world, workers)
    if isinstance(source, Source) and not len(source):
        raise DataError("there are no samples to evaluate on.")
    unreadable: list[str] = []
    read = 0
    for batch in in_order(source, transform, batch_size=batch_size, rank=rank, world=world, workers=workers):
        read += len(batch.labels)
        unreadable += batch.unreadable
        yield batch
    if unreadable and not read:
        raise DataError(_none_readable(unreadable))


def in_order(
    source: Source | Stream, transform: Transform, *, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
) -> Iterator[Batch]:
    """Yield the batches of `evaluation`, without the error if nothing can be read."""
    steps = partial(_ordered_steps, source, batch_size, rank, world)
    return _run(_Work(steps, source, transform, 0), workers)


def _check_amounts(batch_size: int, rank: int, world: int, workers: int) -> None:
    if batch_size < 1 or workers < 0 or not 0 <= rank < world:
        raise DataError(
            "the batch size must be at least 1, the number of workers at least 0, the rank below the number of "
            f"processes; got batch size {batch_size}, {workers} workers, rank {rank} of {world}."
        )


def _check_length(length: int, batch_size: int) -> None:
    if not length:
        raise DataError("there are no samples to train on.")
    if length < batch_size:
        raise DataError(f"a batch of {batch_size} needs as many samples, there are {length}; make batch_size smaller.")


def _none_readable(unreadable: list[str]) -> str:
    return f"none of {len(unreadable)} samples could be read: {'; '.join(unreadable[:3])}."


def _samples(source: Source | Stream, epoch: int, seed: int) -> Iterator[_Sample]:
    if isinstance(source, Stream):
        for index, (decode, label) in enumerate(source.samples(epoch, seed)):
            yield index, partial(_decoded, decode, label)
        return
    generator = torch.Generator().manual_seed(seed_of(seed, epoch))
    for index in torch.randperm(len(source), generator=generator).tolist():
        yield index, partial(source.read, index)


def _decoded(decode: Callable[[], Raw], label: int) -> tuple[Raw, int]:
    return decode(), label


def _steps(source: Source | Stream, batch_size: int, mine: range, seed: int, start: Position) -> Iterator[_Step]:
    epoch, index = start.epoch, start.index
    while True:
        samples = islice(_samples(source, epoch, seed), index, None)
        # skip the samples of other workers without decoding them
        while (
            len(step := [one if i in mine else None for i, one in enumerate(islice(samples, batch_size))]) == batch_size
        ):
            index += batch_size
            yield Position(epoch, index), [sample for sample in step if sample is not None]
        if not index:
            _check_length(len(step), batch_size)
        epoch, index = epoch + 1, 0


def _ordered_steps(source: Source | Stream, batch_size: int, rank: int, world: int) -> Iterator[_Step]:
    mine: Iterator[_Sample]
    if isinstance(source, Stream):
        mine = islice(_samples(source, 0, 0), rank, None, world)
    else:
        mine = ((index, partial(source.read, index)) for index in range(rank, len(source), world))
    over = 0
    while step := list(islice(mine, batch_size)):
        over += len(step)
        yield Position(0, over), step


class _Work(IterableDataset[Any]):
    """A data set that builds the batches of one worker; a failed batch is returned as an error instead of raised."""

    def __init__(
        self, steps: Callable[[], Iterator[_Step]], source: Source | Stream, transform: Transform, seed: int
    ) -> None:
        self.steps, self.classes, self.transform, self.seed = steps, source.classes, transform, seed

    def __iter__(self) -> Iterator[Batch | DataError]:
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        try:
            for position, samples in islice(self.steps(), number, None, count):
                yield self._batch(position, samples)
        except DataError as error:
            yield error  # raised in a worker, it would arrive as a long traceback

    def _batch(self, position: Position, samples: list[_Sample]) -> Batch:
        inputs, labels, unreadable = [], [], []
        with _own_randomness():
            for index, read in samples:
                reseed(seed_of(self.seed, position.epoch, index), devices=False)
                try:
                    raw, label = read()
                except (OSError, ValueError, SyntaxError) as error:  # PIL raises SyntaxError
                    unreadable.append(f"{error}")
                    continue
                if not 0 <= label < len(self.classes):
                    raise DataError(f"sample {index} has label {label}; there are {len(self.classes)} classes.")
                inputs.append(self.transform(raw))
                labels.append(label)
        sizes = dict.fromkeys(str(tuple(one.shape)) for one in inputs)
        if len(sizes) > 1:
            raise DataError(
                f"images of one batch have the sizes {', '.join(sizes)} after preprocessing ({self.transform}): give "
                "--resize HEIGHT WIDTH, or a batch size of 1."
            )
        stacked = torch.stack(inputs) if inputs else torch.empty(0)
        return Batch(stacked, torch.tensor(labels, dtype=torch.long), position, unreadable)


def _ignore_interrupts(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal: only the training process may stop the workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(work: _Work, workers: int) -> Iterator[Batch]:
    # without its own generator, DataLoader draws a seed from the caller's
    loader = DataLoader(
        work,
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        worker_init_fn=_ignore_interrupts,
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _unchanged(batch: Any) -> Any:
    return batch


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Restore the random state of python, numpy and torch (CPU) afterwards."""
    import numpy as np

    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def reseed(seed: int, *, devices: bool = True) -> None:
    """Seed the generators of python, numpy and torch, including the GPU generators by default."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
    if devices:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
