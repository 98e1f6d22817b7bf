"""Measure forwards side by side: interleaved rounds, medians and spread, the machine they ran on."""

from __future__ import annotations

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

ENOUGH_ROUNDS = 5  # with fewer nobody can tell a difference from chance
NOISY = 0.1  # from this on it pays to look for what else runs


@dataclass(frozen=True)
class Timing:
    """Seconds of every round of one variant; rounds of different variants with the same index ran one after another."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float | None:
        """Half the distance between the quartiles, as a share of the median; None for fewer than four rounds."""
        if len(self.seconds) < 4:
            return None
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median

    def over(self, other: Timing) -> float:
        """Return how many times longer this variant took: the median over rounds, which cancels slow drift."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))

    def noise(self, other: Timing) -> float | None:
        """Return how far `over` differs from round to round: half the distance between the quartiles, as a share.

        None for fewer rounds than say anything.
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
    """Time each variant once per round, in turn and without gradients.

    Every round has an order of its own: what ran before leaves memory and caches in a state that helps or hinders.
    With `number` > 1 a variant is called as often in a row each round, and its seconds are those of one call.
    """
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
    """Return the images per second of random input, the first `throw_out` share of the runs left out.

    Moves the model to the device and puts it in eval mode. Raises `UnsupportedError` for a device that is not there.
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
    """Return what a reader needs to judge a figure: machine, threads, versions."""
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
    """Return the attention kernel a forward runs on, as the profiler sees it."""
    with torch.inference_mode():
        names = {event.name() for event in _profile(lambda: model(x))}
    fused = sorted(name for name in names if name.startswith("aten::_scaled_dot_product") and "math" not in name)
    if fused:
        return str(fused[0]).removeprefix("aten::_scaled_dot_product_")
    return "math" if names & {"aten::softmax", "aten::_softmax"} else "not seen (compiled)"


def peak_memory(model: Callable[[Tensor], Any], x: Tensor) -> int:
    """Return the bytes one forward holds at most, on top of weights and input."""
    with torch.inference_mode():
        return _peak(lambda: model(x), x.device)


def training_memory(model: nn.Module, x: Tensor) -> int:
    """Return the bytes a forward and its backward hold at most, on top of weights, their gradients and input.

    The model runs as a copy in train mode that shares its weights; their gradients are gone afterwards.
    """
    twin = shared_copy(model).train()

    def step() -> None:
        answer(twin(x)).sum().backward()

    try:
        # the first step makes the gradients, as large as the weights with and without merging
        step()
        return _peak(step, x.device)
    finally:
        twin.zero_grad(set_to_none=True)


def _peak(call: Callable[[], Any], device: torch.device) -> int:
    if device.type == "cuda":
        call()  # the first call of a kind allocates workspaces that stay
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    now = peak = 0
    for event in sorted((e for e in _profile(call) if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def _profile(call: Callable[[], Any]) -> list[Any]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    # the summary of the public events loses single allocations
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
