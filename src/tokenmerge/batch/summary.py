"""What a job did, how fast, and what bounded it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from tokenmerge.batch.folder import FAILURES, REPORT

__all__ = ["Summary"]

_IDLE = 0.5  # share of the time spent waiting from which on the model does not bound it either
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
    model: float  # images/s of the model, of all together where there are several
    waited: float  # seconds that the model waited for images
    workers: int
    killed: int  # workers that ended and were replaced
    merging: str
    preprocessing: str
    notes: list[str] = field(default_factory=list)
    engine: str = "local"
    models: int = 1

    @property
    def rate(self) -> float:
        """Images/s of the whole job."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def bound(self) -> str:
        """One line: what bounds the job, and what would help."""
        if not self.images:
            return "Nothing was left to do."
        decoding = f"{self.loader:,.0f} images/s by {_many(self.workers, 'worker')}"
        models = f"{_many(self.models, 'model')}" if self.models > 1 else "the model"
        if self.waited > _CLEAR * self.seconds and self.loader < self.model:
            needed = max(self.workers + 1, math.ceil(self.workers * self.model / self.loader))
            return (
                f"Bound by decoding: {decoding}; {models} could do {self.model:,.0f}/s. Merging cannot help before "
                + (f"--workers {needed}." if self.engine == "local" else f"{needed} CPUs of the cluster decode.")
            )
        if self.waited > _IDLE * self.seconds:
            return (
                f"Bound by neither: {models} waited {self.waited:,.0f} of {self.seconds:,.0f} s for processes to start "
                f"or images to arrive, and could do {self.model:,.0f} images/s; decoding {decoding}."
            )
        return (
            f"Bound by {models}: {self.model:,.0f} images/s; decoding could do {decoding}. Merging more (-r) helps, "
            "more workers do not."
        )

    @property
    def counts(self) -> str:
        """One line: what the folder holds."""
        before = f" ({self.done_before:,} were there before)" if self.done_before else ""
        lost = f"{self.failures:,} images failed: {self.out}/{FAILURES} says why" if self.failures else "none failed"
        again = f" {self.killed} worker processes were killed and replaced." if self.killed else ""
        return f"{self.rows:,} rows in {self.out}{before}; {lost}.{again}"

    @property
    def pace(self) -> str:
        """One line: how fast this call was."""
        return f"{self.images:,} images in {self.seconds:,.1f} s, {self.rate:,.1f}/s."

    def lines(self) -> list[str]:
        """Return what a reader is told at the end."""
        return [
            self.counts,
            *self.notes,
            f"Merging: {self.merging or 'none'}",
            f"Preprocessing: {self.preprocessing}",
            self.pace,
            f"Over time: {self.out}/{REPORT}",
            self.bound,
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**vars(self), "rate": self.rate, "bound": self.bound}


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"
