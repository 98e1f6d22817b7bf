"""`tome.utils`: throughput of a model, and the schedule of an `r`."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokenmerge.measure.timing import throughput
from tokenmerge.schedule import parse_r

__all__ = ["benchmark", "parse_r"]


def benchmark(
    model: nn.Module,
    device: Any = 0,
    input_size: tuple[int, ...] = (3, 224, 224),
    batch_size: int = 64,
    runs: int = 40,
    throw_out: float = 0.25,
    use_fp16: bool = False,
    verbose: bool = False,
) -> float:
    """Return the images per second for random batches, without the first `throw_out` of the runs.

    Raises `UnsupportedError` if the device does not exist. `use_fp16` runs under autocast.
    """
    return throughput(
        model, device, input_size, batch_size, runs=runs, throw_out=throw_out, use_fp16=use_fp16, verbose=verbose
    )
