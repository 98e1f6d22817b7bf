"""What the handle of a vision-language model did in its last call."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["PARTS", "Clock", "VLMReport"]

PARTS = ("tower", "choose", "prefill", "decode")  # of a call, as they are timed


@dataclass(frozen=True)
class VLMReport:
    """What the handle did in the last call. Prints itself."""

    family: str
    method: str
    keep: float | int
    positions: str
    tokens: list[tuple[int, int]]  # visual tokens before and after, per image, crop or video
    remarks: list[str] = field(default_factory=list)
    tower: Any = None  # the report of merging inside the tower
    seconds: dict[str, float] | None = None  # tower, choose, prefill, decode

    def __str__(self) -> str:
        before, after = (sum(pair[side] for pair in self.tokens) for side in (0, 1))
        lines = [
            f"{self.family}: {self.method}, keep {self.keep}, positions {self.positions}",
            f"visual tokens of the last call: {before} -> {after}, in {len(self.tokens)} images, crops or videos"
            if self.tokens
            else "visual tokens of the last call: none were left out",
        ]
        if self.seconds is not None:
            lines.append(", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in self.seconds.items()))
        lines += self.remarks
        return "\n".join(lines + ([] if self.tower is None else [f"in the tower: {self.tower}"]))


class Clock:
    """The seconds of each of `PARTS` of a call."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._inner = 0.0  # of the parts inside the one that runs now

    @contextmanager
    def part(self, name: str, device: torch.device) -> Iterator[None]:
        """Time what runs in the `with`, without the parts inside it."""
        before, self._inner, start = self._inner, 0.0, now(device)
        try:
            yield
        finally:
            seconds = now(device) - start
            self.seconds[name] += seconds - self._inner
            self._inner = before + seconds


def now(device: torch.device) -> float:
    """Return the seconds of a clock, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
