"""Progress of long work, with the time left."""

from __future__ import annotations

import sys
import time
from typing import Any

__all__ = ["Progress"]


class Progress:
    """A progress line on stderr with the time left: a rich bar on a terminal, else plain lines.

    A plain line is printed at every tenth, or every minute if a tenth takes longer.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self._tenth = -1
        self._bar: Any = None
        self._first: tuple[float, int] | None = None  # start time, and the work already done then
        self._shown = 0.0

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import MofNCompleteColumn
                from rich.progress import Progress as Bar
            except ImportError:
                return self
            # steps may take minutes, so the speed needs a long period
            columns = (*Bar.get_default_columns(), MofNCompleteColumn())
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=3600)
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=None)
        return self

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        self._first = self._first or (now, done)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, description=f"{self.label} {note}".strip())
        elif 10 * done // total > self._tenth or now - self._shown > 60:
            self._tenth, self._shown = 10 * done // total, now
            print(
                f"{self.label}: {done}/{total}{self._left(now, done, total)}{note and f', {note}'}",
                file=sys.stderr,
                flush=True,
            )

    def _left(self, now: float, done: int, total: int) -> str:
        assert self._first is not None
        start, before = self._first
        seconds = (now - start) / max(1, done - before) * (total - done)
        if seconds < 10:
            return ""
        return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()
