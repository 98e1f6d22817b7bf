"""The time of drawing what was merged, without the model's forward: `python benchmarks/drawing.py`, in seconds."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from tables import write

from tokenmerge.measure.timing import environment
from tokenmerge.report.drawing import draw_clip, draw_groups, draw_values

SIZES = {
    "224 pixels, 196 patches": (224, 14),
    "518 pixels, 1,369 patches": (518, 37),
    "4,000 pixels, 1,369 patches": (4000, 37),
}
ROUNDS = 5


def main() -> None:
    """Time each drawing at each size, and write `results/drawing.md`."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for name, (pixels, side) in SIZES.items():
        noise = torch.randint(0, 256, (pixels, pixels, 3), generator=generator, dtype=torch.uint8)
        photo = Image.fromarray(noise.numpy())
        groups = torch.randint(0, side * side // 4, (side * side,), generator=generator)
        values = groups.float()
        grid = (side, side)
        calls: dict[str, Callable[[], Any]] = {
            "groups": lambda photo=photo, groups=groups, grid=grid: draw_groups(photo, groups, grid=grid),
            "values": lambda photo=photo, values=values, grid=grid: draw_values(
                photo, values, grid=grid, low=0.0, high=400.0
            ),
        }
        if pixels < 1000:
            calls["clip of 8 frames"] = lambda photo=photo, groups=groups, side=side: draw_clip(
                [photo] * 8, groups.repeat(8), grid=(8, side, side)
            )
        for drawing, call in calls.items():
            rows.append({"photo": name, "drawing": drawing, "seconds": round(_median(call), 4)})
    busy = f"{os.getloadavg()[0]:.0f} processes wanted its {os.cpu_count()} cores"
    notes = [f"Medians of {ROUNDS} rounds, seconds of the processor, one thread. At the end {busy}."]
    title = "Drawing groups and values of tokens, without the forward"
    write("drawing", title, rows, environment(torch.device("cpu")), notes)


def _median(call: Callable[[], Any]) -> float:
    call()
    found = []
    for _ in range(ROUNDS):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return statistics.median(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
