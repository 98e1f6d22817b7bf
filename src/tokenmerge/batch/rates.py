"""How fast a job goes: both rates of the whole call, and over time in a table beside the manifest."""

from __future__ import annotations

import csv
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from tokenmerge.batch.engine import Done, Engine
from tokenmerge.errors import DataError

__all__ = ["RATES", "Meter", "read_rates"]

RATES = "rates.csv"
_COLUMNS = ("started", "seconds", "images", "loader", "model", "gpu")
_SECONDS = 1.0  # between lines at least,
_SHARE = 0.01  # and this share of the time that passed: a long job has few hundred lines


@dataclass
class _Counts:
    at: float = 0.0  # seconds since the start
    images: int = 0  # that were read or failed
    embedded: int = 0
    decoding: float = 0.0  # seconds, of all processes together
    embedding: float = 0.0


class Meter:
    """Counts what an engine does, and writes a line now and then.

    A line is `started` (when the call began), `seconds` since then, `images` done, and of the time since the line
    before: `loader` and `model`, images/s that the decoding processes and the models could do while nothing holds them
    up, and `gpu`, the percentage of time that the GPUs were at work. What is not known is empty.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._path, self._device = folder / RATES, device
        self._begun, self._started = time.monotonic(), datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._now, self._before = _Counts(), _Counts()
        _whole_lines(self._path)
        read_rates(folder)  # what is none is refused before anything is done

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begun

    @property
    def images(self) -> int:
        """Images that were embedded."""
        return self._now.embedded

    @property
    def tried(self) -> int:
        """Images that were embedded or failed."""
        return self._now.images

    @property
    def embedding(self) -> float:
        """Seconds that the models were at work, together."""
        return self._now.embedding

    def add(self, done: Done, engine: Engine) -> None:
        """Count a piece, and write a line if it is time to."""
        now = self._now
        now.at, now.images, now.embedded = self.seconds, now.images + len(done.images), now.embedded + len(done.found)
        now.decoding, now.embedding = now.decoding + done.decoding, now.embedding + done.embedding
        if now.at - self._before.at >= max(_SECONDS, _SHARE * now.at):
            self.write(engine)

    def write(self, engine: Engine) -> None:
        """Write a line for the time since the last one; raises `OSError`."""
        if self._now.images == self._before.images:
            return
        rates = [_or_empty(rate) for rate in _between(self._before, self._now, engine)]
        gpu = _or_empty(gpu_use(self._device, engine.models))
        line = (self._started, f"{self._now.at:.1f}", self._now.images, *rates, gpu)
        is_new = not self._path.exists() or not self._path.stat().st_size
        with self._path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([_COLUMNS, line] if is_new else [line])
        self._before = _Counts(**vars(self._now))

    def rates(self, engine: Engine) -> tuple[float, float]:
        """Return the images/s of loader and model since the start; 0 where nothing was measured."""
        loader, model = _between(_Counts(), self._now, engine)
        return loader or 0.0, model or 0.0


def _between(before: _Counts, now: _Counts, engine: Engine) -> tuple[float | None, float | None]:
    decoding, embedding = now.decoding - before.decoding, now.embedding - before.embedding
    loader = (now.images - before.images) * engine.workers / decoding if decoding > 0 else None
    return loader, (now.embedded - before.embedded) * engine.models / embedding if embedding > 0 else None


def gpu_use(device: torch.device, models: int = 1) -> float | None:
    """Return the percentage of time that the first `models` GPUs are at work, on average; None where it is unknown."""
    if device.type != "cuda":
        return None
    numbers = range(models) if models > 1 else [device.index or 0]
    with suppress(Exception):  # it takes a library of NVIDIA's
        return sum(float(torch.cuda.utilization(number)) for number in numbers) / len(numbers)
    return None


def read_rates(folder: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a job's folder, of all calls one after the other; numbers are floats, None what is unknown.

    Where nothing was written there are none. Raises `DataError` for a file that holds something else.
    """
    path = Path(folder) / RATES
    try:
        with path.open(encoding="utf-8", newline="") as file:
            head, *lines = [tuple(line) for line in csv.reader(file)] or [_COLUMNS]
        if head != _COLUMNS:
            raise ValueError(f"its columns are {', '.join(head)}")
        return [_line(dict(zip(_COLUMNS, line, strict=True))) for line in lines]
    except FileNotFoundError:
        return []
    except (ValueError, csv.Error) as error:
        raise DataError(
            f"{path} does not hold the rates of a job: {error}. Take it away: the rows do not depend on it."
        ) from error


def _line(texts: dict[str, str]) -> dict[str, Any]:
    found = {name: text if name == "started" else (float(text) if text else None) for name, text in texts.items()}
    if found["seconds"] is None or found["images"] is None:
        raise ValueError("a line has no seconds, or no images")
    return found


def _or_empty(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _whole_lines(path: Path) -> None:
    """Take off a last line that a killed process, or a full disk, left unfinished."""
    if path.exists():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            path.write_bytes(whole)
