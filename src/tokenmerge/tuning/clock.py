"""Time and memory of configurations on this machine, against the unmerged model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from tokenmerge.config import MergeConfig
from tokenmerge.measure.allocator import return_freed
from tokenmerge.measure.timing import NOISY, Timing, environment, interleave, peak_memory
from tokenmerge.tuning.subject import Subject, is_figure

__all__ = ["Clock", "Timed"]

_ENOUGH = 0.01  # noise of the speed-up, as a share, that needs no more rounds
_ROUNDS = (5, 4, 9, 18)  # are added until the noise is that low
_LONGEST = 20.0  # seconds after which no more are added: rounds of seconds vary less, each is a mean already
_SHORTEST = 1e-9  # seconds, or times as fast, that anything takes
_SECONDS = 0.05  # shortest round; shorter forwards run several times in one


class Timed(NamedTuple):
    """A configuration beside the unmerged model: times as fast, seconds of one batch, noise of the ratio as a share."""

    speed_up: float
    seconds: float
    unmerged: float
    noise: float


class Clock:
    """Times configurations in turn with the unmerged model, on a batch of the images."""

    def __init__(self, subject: Subject, batch_size: int, is_compiled: bool) -> None:
        self.subject, self.batch_size, self.is_compiled = subject, batch_size, is_compiled
        self._compiled: Callable[[nn.Module], Any] = torch.compile if is_compiled else lambda model: model
        images = next(iter(subject.parts.search))[0]
        rows = torch.arange(batch_size) % len(images)
        self.batch = images[rows].to(subject.device, next(subject.model.parameters()).dtype)
        self.environment, self.dtype = environment(subject.device), str(self.batch.dtype).removeprefix("torch.")
        where = {**self.environment, "batch size": batch_size, "compiled": is_compiled}
        self._where = json.dumps({key: str(value) for key, value in where.items()})
        self._noise: dict[str, float] = {}  # by configuration, as a share
        self._saved: list[tuple[float, float]] = []  # of the MACs, of the time, as shares of the unmerged model's
        self._unmerged: Any = None

    def time(self, config: MergeConfig) -> Timed:
        """Return the speed-up over the unmerged model: the median ratio of interleaved rounds."""
        timed = Timed(*self._kept(f"time {config!r}", partial(self._time, config), _is_timed))
        self._noise[repr(config)] = timed.noise
        self._saved.append((1 - self.subject.share(config.r), 1 - 1 / timed.speed_up))
        return timed

    @staticmethod
    def expected(seconds: float) -> float:
        """Return how long a timing is about to take on a quiet machine; `seconds` of both models on one batch."""
        return min(1.5 * sum(_ROUNDS[:2]) * max(2 * _SECONDS, seconds), _LONGEST + (2 + _ROUNDS[0]) * seconds)

    @property
    def remarks(self) -> list[str]:
        """Where the machine was too noisy to tell, also when a time in the journal was measured."""
        noisy = [noise for noise in self._noise.values() if noise >= NOISY]
        if not noisy:
            return []
        return [
            f"The machine was busy: {len(noisy)} of the {len(self._noise)} speed-ups measured varied by up to "
            f"{100 * max(noisy):.0f} % between rounds. Tune on a quiet machine."
        ]

    def estimated(self, share: float) -> float:
        """Return the speed-up at a share of the MACs: a straight line from the unmerged model through those timed."""
        macs = sum(saved * saved for saved, _ in self._saved)
        slope = sum(saved * time for saved, time in self._saved) / macs if macs else 0.0
        return 1 / max(share / 2, 1 - slope * (1 - share))  # noise can make the line too steep

    def memory(self, config: MergeConfig) -> float:
        """Return the peak memory of a forward as a share of the unmerged model's."""
        found: float = self._kept(
            f"memory {config!r}", partial(self._memory, config), lambda share: is_figure(share, 0.0)
        )
        return found

    def _kept(self, what: str, measure: Callable[[], Any], holds: Callable[[Any], bool]) -> Any:
        """Return a measurement of this machine from the journal, or make it."""
        return self.subject.kept(f"{what} on {self._where}", measure, holds)

    def _time(self, config: MergeConfig) -> Timed:
        if self._unmerged is None:
            self._unmerged = self._compiled(self.subject.trial("search").model)
        models = {"unmerged": self._unmerged, "merged": self._compiled(self.subject.trial("search").reduced(config))}
        calls = {name: partial(model, self.batch) for name, model in models.items()}
        once = interleave(calls, self.subject.device, rounds=1, warmup=1)["merged"].median
        number, start = max(1, round(_SECONDS / once)), time.perf_counter()
        merged = unmerged = Timing(())
        for rounds in _ROUNDS:
            timings = interleave(calls, self.subject.device, rounds=rounds, warmup=0, number=number)
            merged, unmerged = merged + timings["merged"], unmerged + timings["unmerged"]
            noise = unmerged.noise(merged) or 0.0
            is_long = time.perf_counter() - start > _LONGEST
            if is_long or noise / len(merged.seconds) ** 0.5 <= _ENOUGH:
                break
        return_freed()
        return Timed(unmerged.over(merged), merged.median, unmerged.median, noise)

    def _memory(self, config: MergeConfig) -> float:
        model = self.subject.trial("search").model
        return peak_memory(self.subject.trial("search").reduced(config), self.batch) / peak_memory(model, self.batch)


def _is_timed(value: Any) -> bool:
    """Whether a value from a journal can be a `Timed`: no speed or time is 0."""
    if not isinstance(value, list) or len(value) != len(Timed._fields):
        return False
    *times, noise = value
    return all(is_figure(time, _SHORTEST) for time in times) and is_figure(noise, 0.0)
