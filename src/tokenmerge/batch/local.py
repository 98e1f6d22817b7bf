"""The engine of one machine: processes that decode, and a model in this process or one in a process for every GPU."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from tokenmerge.batch.decoding import Decoder, Piece
from tokenmerge.batch.embedder import Embedder
from tokenmerge.batch.engine import Done, Engine, carried, finish
from tokenmerge.batch.pool import Pool
from tokenmerge.errors import DataError, UnsupportedError

__all__ = ["Devices", "Local"]

_DEATHS = 3  # of one model's process without a piece done, before it is given up


class Local(Engine):
    """The model in this process, and `workers` processes that decode."""

    def __init__(self, embedder: Embedder, decoder: Decoder, workers: int, batch_size: int) -> None:
        self.workers, self.waited = workers, 0.0
        self._embedder, self._decoder, self._batch_size = embedder, decoder, batch_size

    def run(self, pieces: Iterator[Piece], count: int) -> Generator[Done, None, None]:
        """Yield every piece as it is done."""
        self.workers = min(self.workers, count)
        with Pool(self._decoder, self.workers, self._batch_size, self._embedder.prepare.size) as pool:
            for piece, read, tensors in pool.run(pieces):
                self.waited, self.killed = pool.waited, pool.killed
                yield finish(self._embedder, piece, read, tensors)


class _Member:
    """A process that runs `Local` on its pieces, by their first images, and sends what it made of them."""

    def __init__(self, arguments: tuple[Any, ...], left: dict[int, Piece]) -> None:
        self.arguments, self.left, self.deaths, self.killed = arguments, left, 0, 0
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.pipe, its = context.Pipe(duplex=False)
        # not a daemon: it has processes of its own
        what = (*self.arguments, [*self.left.values()], its)
        self.process = context.Process(target=_work, args=what, name="model process")
        self.process.start()
        its.close()

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


class Devices(Engine):
    """`models` processes with a model each, on the first so many GPUs or on the CPU, and a share of the workers.

    Every process has its share of the pieces from the start. One that is killed is replaced, and goes on with what is
    left of its share. Raises `UnsupportedError` for more models than GPUs, `DataError` where a process is killed again
    and again; an error of the model is raised as it is.
    """

    def __init__(self, embedder: Embedder, decoder: Decoder, workers: int, batch_size: int, models: int) -> None:
        kind, there = embedder.device.type, torch.cuda.device_count()
        if kind == "cuda" and models > there:
            raise UnsupportedError(f"{models} models (--models) need as many GPUs; this machine has {there}.")
        if kind not in ("cuda", "cpu"):
            raise UnsupportedError(f"several models (--models) run on GPUs of CUDA or on the CPU, not on {kind}.")
        each = max(1, workers // models)
        self.models, self.workers = models, models * each
        names = [f"cuda:{i}" if kind == "cuda" else "cpu" for i in range(models)]
        self._arguments = [(embedder.maker(name), decoder, each, batch_size) for name in names]

    def run(self, pieces: Iterator[Piece], count: int) -> Generator[Done, None, None]:
        """Yield every piece as it is done."""
        every = [*pieces]
        shares = [{piece.images[0]: piece for piece in every[i :: self.models]} for i in range(self.models)]
        team = [_Member(*both) for both in zip(self._arguments, shares, strict=True) if both[1]]
        try:
            while busy := {member.pipe: member for member in team if member.left}:
                for pipe in wait([*busy]):
                    member = busy[pipe]  # type: ignore[index]
                    try:
                        found, killed = pickle.loads(member.pipe.recv_bytes())
                    except (EOFError, OSError):
                        self._bury(member)
                        continue
                    if isinstance(found, Exception):
                        raise found
                    self.killed += killed - member.killed
                    member.killed, member.deaths = killed, 0
                    del member.left[found.images[0]]
                    yield found
        finally:
            for member in team:
                member.end()

    def _bury(self, member: _Member) -> None:
        member.end()
        self.killed, member.killed, member.deaths = self.killed + 1, 0, member.deaths + 1
        if member.deaths >= _DEATHS:
            code = member.process.exitcode
            raise DataError(
                f"the process of a model ended {_DEATHS} times without an image (exit code {code}): see what it "
                "prints, and whether the memory suffices for so many models (--models)."
            )
        member.start()


def _work(
    make: Callable[[], Embedder], decoder: Decoder, workers: int, batch_size: int, pieces: list[Piece], pipe: Connection
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal
    with suppress(OSError):  # whom it would tell is gone
        killed = 0
        try:
            engine = Local(make(), decoder, workers, batch_size)
            for done in engine.run(iter(pieces), len(pieces)):
                killed = engine.killed
                pipe.send_bytes(pickle.dumps((done, killed)))
        except Exception as error:
            pipe.send_bytes(pickle.dumps((carried(error), killed)))
