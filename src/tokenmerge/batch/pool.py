"""Processes that decode images. One that is killed costs the image it was working on three tries, and nothing else."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any

import torch
from torch import Tensor

from tokenmerge.batch.decoding import IDLE, Decoder, Piece, Read, work
from tokenmerge.errors import DataError

__all__ = ["Pool"]

_SLOTS = 2  # pieces of each worker: one is decoded while the other waits, or is with the model
_TRIES = 3  # of an image in whose decoding a worker was killed
_DEATHS = 10  # of workers that were doing nothing, before it is given up
_SHM = "/dev/shm"


class _Worker:
    """A process, its pipe, the memory it writes to, and the pieces it has in the order they were sent."""

    def __init__(self, decoder: Decoder, memory: list[Tensor], at: Tensor, row: int) -> None:
        self.memory, self.row = memory, row
        self.pipe, its = multiprocessing.Pipe()
        self.process = multiprocessing.Process(
            target=work, args=(decoder, its, self.pipe, memory, at, row), daemon=True, name=f"decoder {row}"
        )
        self.process.start()
        its.close()  # so that the pipe ends with the process
        self.has: deque[tuple[int, Piece]] = deque()
        self.free = [*range(len(memory))]

    def send(self, piece: Piece) -> None:
        slot = self.free.pop()
        self.has.append((slot, piece))
        with suppress(OSError):  # it was killed: found when its pipe is read
            self.pipe.send((slot, piece))

    def end(self) -> int:
        """Stop the process and return its exit code."""
        self.pipe.close()
        self.process.kill()
        self.process.join()
        return self.process.exitcode or 0


class Pool:
    """`workers` processes that decode pieces of at most `batch_size` images.

    `seconds` is the time they spent decoding, `waited` the time that the caller waited for them. `size` is the usual
    shape of a prepared image; larger ones are sent through pipes. Raises `DataError` where processes end at once.
    """

    def __init__(self, decoder: Decoder, workers: int, batch_size: int, size: tuple[int, ...]) -> None:
        self.workers, self.seconds, self.waited, self.killed = workers, 0.0, 0.0, 0
        self._decoder = decoder
        floats = batch_size * torch.Size(size or (3, 224, 224)).numel()
        if not _has_room(4 * floats * workers * _SLOTS):
            floats = 0  # written to, a file system in memory that is full ends the process
        self._memory = [[torch.empty(floats).share_memory_() for _ in range(_SLOTS)] for _ in range(workers)]
        self._at = torch.full((workers,), IDLE, dtype=torch.int64).share_memory_()
        self._strikes, self._idle_deaths = Counter[int](), 0
        self._again: deque[Piece] = deque()
        self._team = [self._hired(row) for row in range(workers)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self._team:
            worker.end()

    def run(self, pieces: Iterator[Piece]) -> Iterator[tuple[Piece, Read, list[Tensor | None]]]:
        """Yield every piece as it is done, what was read of it, and its tensors, which last until the next one."""
        while True:
            for worker in self._team:
                while worker.free and (piece := self._again.popleft() if self._again else next(pieces, None)):
                    worker.send(piece)
            busy = [worker for worker in self._team if worker.has]
            if not busy:
                return
            for worker in self._ready(busy):
                try:
                    slot, read = worker.pipe.recv()
                except (EOFError, OSError):
                    self._bury(worker)
                    continue
                sent, piece = worker.has.popleft()
                assert sent == slot and piece.number == read.number
                self.seconds += read.seconds
                self._idle_deaths = 0
                yield piece, read, read.tensors(worker.memory[slot])
                worker.free.append(slot)

    def _ready(self, busy: list[_Worker]) -> list[_Worker]:
        begun = time.perf_counter()
        found = wait([worker.pipe for worker in busy])
        self.waited += time.perf_counter() - begun
        return [worker for worker in busy if worker.pipe in found]

    def _hired(self, row: int) -> _Worker:
        self._at[row] = IDLE
        return _Worker(self._decoder, self._memory[row], self._at, row)

    def _bury(self, worker: _Worker) -> None:
        """Give the pieces of a worker that was killed to others, without an image that killed several."""
        code, image = worker.end(), int(self._at[worker.row])
        how = _signal_name(-code) if code < 0 else f"exit code {code}"
        self.killed += 1
        lost = [piece for _, piece in worker.has]
        if image == IDLE:
            self._idle_deaths += 1
            if self._idle_deaths >= _DEATHS:
                raise DataError(
                    f"the decoding processes end without having read an image ({how}): see what they print."
                )
        else:
            self._strikes[image] += 1
        for piece in lost:
            if image in piece.images and self._strikes[image] >= _TRIES:
                place = piece.images.index(image)
                said = f"decoding it ended {_TRIES} processes ({how}): it takes too much memory, or breaks the decoder"
                piece.places[place] = replace(piece.places[place], lost=said)
        self._again.extendleft(reversed(lost))
        self._team[worker.row] = self._hired(worker.row)


def _signal_name(number: int) -> Any:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _has_room(size: int) -> bool:
    """Return whether memory that processes share can hold so many bytes."""
    try:
        return shutil.disk_usage(_SHM).free > 2 * size
    except OSError:  # no such file system here: memory is shared otherwise
        return True
