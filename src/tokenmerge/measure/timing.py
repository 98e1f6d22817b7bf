"""Time forwards in interleaved rounds, measure peak memory, and describe the machine."""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge._version import __version__
from tokenmerge.measure.allocator import settle
from tokenmerge.measure.outputs import answer, find_device, shared_copy

__all__ = [
    "ENOUGH_ROUNDS",
    "NOISY",
    "Timing",
    "attention_kernel",
    "environment",
    "interleave",
    "peak_memory",
    "throughput",
    "training_memory",
]

ENOUGH_ROUNDS = 5  # with fewer rounds a difference cannot be told from noise
NOISY = 0.1  # share of the median; from here on, look for other running programs


@dataclass(frozen=True)
class Timing:
    """Seconds per round of one variant; rounds with the same index ran next to each other for all variants."""

    seconds: tuple[float, ...]

    def __add__(self, other: Timing) -> Timing:
        """Return the rounds of both."""
        return Timing(self.seconds + other.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float | None:
        """Half the interquartile range, as a share of the median; None for fewer than four rounds."""
        if len(self.seconds) < 4:
            return None
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median

    def over(self, other: Timing) -> float:
        """Return how many times longer this variant took: the median ratio over rounds, which cancels slow drift."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))

    def noise(self, other: Timing) -> float | None:
        """Return how much `over` varies between rounds: half the interquartile range of the ratios, as a share.

        None if there are too few rounds.
        """
        if len(self.seconds) < ENOUGH_ROUNDS:
            return None
        low, middle, high = statistics.quantiles((a / b for a, b in zip(self.seconds, other.seconds, strict=True)), n=4)
        return (high - low) / 2 / middle


def interleave(
    variants: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    rounds: int = 20,
    warmup: int = 3,
    number: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Time each variant once per round, in turn, without gradients.

    The order changes from round to round, because a variant affects the memory and caches of the next one. With
    `number` > 1 each variant runs that many times in a row, and its time is the mean per call.
    """
    settle()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = random.Random(0)
    with torch.inference_mode():
        for turn in range(warmup + rounds):
            for name in order.sample(list(variants), len(variants)):
                _wait(device)
                start = time.perf_counter()
                for _ in range(number):
                    variants[name]()
                _wait(device)
                if turn >= warmup:
                    seconds[name].append((time.perf_counter() - start) / number)
            if progress is not None:
                progress(turn + 1, warmup + rounds)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def throughput(
    model: nn.Module,
    device: str | int | torch.device,
    input_size: Sequence[int],
    batch_size: int,
    *,
    runs: int = 40,
    throw_out: float = 0.25,
    use_fp16: bool = False,
    verbose: bool = False,
) -> float:
    """Return images per second on random input, without the first `throw_out` share of the runs.

    Moves the model to the device and puts it in eval mode. Raises `UnsupportedError` for an unavailable device.
    """
    where = find_device(device)
    model = model.to(where).eval()
    x = torch.rand(batch_size, *input_size, device=where)
    half = torch.float16 if where.type == "cuda" else torch.bfloat16
    warmup = min(runs - 1, int(runs * throw_out))
    with torch.autocast(where.type, dtype=half) if use_fp16 else nullcontext():
        timing = interleave({"model": lambda: model(x)}, where, rounds=runs - warmup, warmup=warmup)["model"]
    images = batch_size * len(timing.seconds) / sum(timing.seconds)
    if verbose:
        print(f"Throughput: {images:.2f} im/s")
    return images


def environment(device: torch.device) -> dict[str, str]:
    """Return the machine, threads and versions that a measurement depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokenmerge": __version__,
    }
    try:
        found["timm"] = version("timm")
    except PackageNotFoundError:
        found["timm"] = "not installed"
    return found


def attention_kernel(model: nn.Module, x: Tensor) -> str:
    """Return the attention kernel of a forward, as seen by the profiler."""
    with torch.inference_mode():
        names = {event.name() for event in _profile(lambda: model(x), with_memory=False)}
    fused = sorted(name for name in names if name.startswith("aten::_scaled_dot_product") and "math" not in name)
    if fused:
        return str(fused[0]).removeprefix("aten::_scaled_dot_product_")
    return "math" if names & {"aten::softmax", "aten::_softmax"} else "not seen (compiled)"


def peak_memory(model: Callable[[Tensor], Any], x: Tensor) -> int:
    """Return the peak bytes of one forward, on top of weights and input."""
    # a patched model frees the notes of its last forward, which the profiler warns about: a copy has none
    fresh = shared_copy(model) if isinstance(model, nn.Module) else model
    with torch.inference_mode():
        return _peak(lambda: fresh(x), x.device)


def training_memory(model: nn.Module, x: Tensor) -> int:
    """Return the peak bytes of a forward and backward, on top of weights, their gradients and input.

    Runs a copy in train mode that shares the weights; the gradients are removed afterwards.
    """
    first, second = shared_copy(model).train(), shared_copy(model).train()  # a fresh one, as in `peak_memory`

    def step(twin: nn.Module) -> None:
        answer(twin(x)).sum().backward()

    try:
        # the first step allocates the gradients, which are as large as the weights with or without merging
        step(first)
        return _peak(lambda: step(second), x.device)
    finally:
        first.zero_grad(set_to_none=True)


def _peak(call: Callable[[], Any], device: torch.device) -> int:
    if device.type == "cuda":
        call()  # the first call allocates workspaces that are kept
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    now = peak = 0
    for event in sorted((e for e in _profile(call) if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def _profile(call: Callable[[], Any], *, with_memory: bool = True) -> list[Any]:
    from torch.profiler import ProfilerActivity, profile

    # the profiler reads this when it first starts, and else reports its own steps on stderr
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=with_memory) as recorded:
        call()
    # the public event summary does not list single allocations
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    return list(recorded.profiler.kineto_results.events())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()
