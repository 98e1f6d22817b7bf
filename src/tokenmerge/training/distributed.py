"""Distributed training: the process group, DDP and FSDP2 wrapping, and detection of lost ranks.

torchrun starts the processes. Each one writes a heartbeat to a TCP store every half second, and the reason when it
stops on an error.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tokenmerge.errors import ConfigError, LostRankError, TokenMergeError, UnsupportedError
from tokenmerge.measure.outputs import find_device

__all__ = ["LostRankError", "World", "is_started", "launch"]

_BEAT = 0.5  # seconds
_PATIENCE = 3.0  # seconds without a beat after which a rank counts as gone
_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class World:
    """This process within the run, alone unless torchrun started it. A context manager: leaving it leaves the group."""

    def __init__(self, device: str | None = None) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        has_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
        name = device or ("cuda" if has_gpu else "cpu")
        self.device = find_device(f"cuda:{local}" if name == "cuda" else name)
        self.asked_to_stop = False
        self.signal = "SIGTERM"  # the signal that asked it to stop
        self._handlers: dict[signal.Signals, Any] = {}
        self._stop = threading.Event()
        if self.size > 1:
            if has_gpu:
                torch.cuda.set_device(self.device)
            distributed.init_process_group("nccl" if has_gpu else "gloo")
            # a separate connection for the thread: a blocking call on a shared one would delay the heartbeat
            self._store, beats = _connect(), _connect()
            beats.set(f"beat/{self.rank}", "0")
            distributed.barrier()
            self._start(beats)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def _start(self, store: TCPStore) -> None:
        self._thread = threading.Thread(target=self._beat, args=(store,), daemon=True)
        self._thread.start()

    def _quiet(self) -> None:
        """End the heartbeat. A thread within a call of the store, when the interpreter ends, aborts the process."""
        self._stop.set()
        self._thread.join(_PATIENCE)

    def _beat(self, store: TCPStore) -> None:
        count = 0
        while not self._stop.wait(_BEAT):
            count += 1
            try:
                store.set(f"beat/{self.rank}", str(count))
            except RuntimeError:  # the store and the process that hosts it are gone: the next collective fails
                return

    def __enter__(self) -> World:
        # only the main thread may set signal handlers
        with suppress(ValueError):
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: object) -> None:
        """Handle SIGTERM and SIGINT: stop after the current step; a second Ctrl-C stops at once.

        A scheduler sends SIGTERM before it takes the machine away, torchrun when another process has failed.
        """
        if number == signal.SIGINT:
            if self.asked_to_stop:
                raise KeyboardInterrupt
            if self.is_first:
                print("stopping after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)
        self.asked_to_stop, self.signal = True, signal.Signals(number).name

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if self.size > 1:
                self._part(error)
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def _part(self, error: BaseException | None) -> None:
        """Leave the process group; raise `LostRankError` if the error was caused by a lost rank."""
        if error is None:
            self._quiet()
            distributed.destroy_process_group()
            return
        if isinstance(error, RuntimeError) and not isinstance(error, TokenMergeError):
            lost = self._lost()
            if lost:
                self._quiet()
                raise LostRankError(f"{'; '.join(lost)}. Rank {self.rank} stops too.") from error
        self._tell(str(error) or type(error).__name__)

    def _tell(self, reason: str) -> None:
        # without a store the reason cannot be passed on
        with suppress(RuntimeError):
            self._store.set(f"reason/{self.rank}", reason)
        self._quiet()

    def _lost(self) -> list[str]:
        """Return one sentence per rank that reported why it stopped, or whose heartbeat has stopped."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        try:
            before = {rank: self._store.get(f"beat/{rank}") for rank in others}
            time.sleep(_PATIENCE)
            found = []
            for rank in others:
                if self._store.check([f"reason/{rank}"]):
                    reason = self._store.get(f"reason/{rank}").decode().rstrip(".")
                    found.append(f"rank {rank} stopped: {reason}")
                elif self._store.get(f"beat/{rank}") == before[rank]:
                    found.append(f"rank {rank} is gone: nothing heard of it for {_PATIENCE:g} seconds")
            return found
        except RuntimeError:
            return ["rank 0 is gone, and with it the connection to the others"]

    def wrap(
        self, model: nn.Module, around: Callable[[nn.Module], nn.Module], parallel: str, *, find_unused: bool
    ) -> nn.Module:
        """Return `around(model)` wrapped for all processes: `"ddp"` gives each a copy, `"fsdp"` shards the parameters.

        DDP wraps the output of `around`, so that it finds unused parameters there. FSDP shards `model` itself, because
        `model` is also run alone.
        """
        if parallel == "fsdp":
            self.shard(model)
        net = around(model)
        if parallel == "fsdp" or self.size == 1:
            return net
        return nn.parallel.DistributedDataParallel(net, find_unused_parameters=find_unused)

    def shard(self, model: nn.Module) -> None:
        """Shard the parameters of a model over the processes, block by block, in place.

        Raises `UnsupportedError` for a model with zero-dimensional parameters.
        """
        if self.size == 1:
            return
        numbers = [name for name, parameter in model.named_parameters() if not parameter.dim()]
        if numbers:
            raise UnsupportedError(
                f"parallel is 'fsdp': single numbers ({', '.join(numbers[:3])}) cannot be spread over processes. Use "
                "parallel = 'ddp'."
            )
        from torch.distributed.fsdp import fully_shard

        for part in list(model.modules()):
            for block in getattr(part, "blocks", ()):
                fully_shard(block)
        fully_shard(model)

    def autocast(self, precision: str) -> AbstractContextManager[Any]:
        """Return the context of a precision on this process's device: `"fp32"`, `"bf16"` or `"fp16"`."""
        dtype = _PRECISIONS.get(precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over all processes."""
        return self.total(values) / self.size

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over all processes."""
        if self.size > 1:
            values = values.clone()
            distributed.all_reduce(values)
        return values


def is_started() -> bool:
    """Return whether torchrun started this process."""
    return "RANK" in os.environ


def launch(arguments: list[str], processes: int, port: int | None) -> int:
    """Run `python -m tokenmerge.cli ARGUMENTS` in several local processes with torchrun and return the exit code.

    Raises `ConfigError` for a port in use, and `LostRankError` with the rank that failed first.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    if processes < 1:
        raise ConfigError(f"a run needs at least 1 process; got {processes} processes.")
    where = ["--standalone"] if port is None else ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    if port is not None:
        _check_free(port)
    try:
        torchrun(["--nproc-per-node", str(processes), *where, "-m", "tokenmerge.cli", *arguments])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        raise LostRankError(f"rank {rank} of {processes} failed first ({how}); the others were stopped.") from error
    except SignalException as error:
        raise LostRankError(
            f"all processes were stopped by {error.sigval.name}; the last checkpoint is kept, the same command goes on "
            "from it."
        ) from error
    return 0


def _connect() -> TCPStore:
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(
                f"port {port} cannot be used: {error.strerror}. Give a free one (--port), or none: then one is chosen."
            ) from error
