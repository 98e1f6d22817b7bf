"""Interleaved rounds, their medians, and what the profiler reads off a forward."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from helpers import tiny_vit
from tokenmerge.errors import UnsupportedError
from tokenmerge.measure import timing
from tokenmerge.measure.timing import (
    Timing,
    attention_kernel,
    environment,
    interleave,
    peak_memory,
    throughput,
    training_memory,
)

CPU = torch.device("cpu")


def _recorders(names: str) -> tuple[dict[str, Callable[[], None]], list[str]]:
    calls: list[str] = []

    def record(name: str) -> None:
        assert torch.is_inference_mode_enabled()
        calls.append(name)

    return {name: lambda name=name: record(name) for name in names}, calls


def test_interleave_calls_each_once_a_round_in_every_order() -> None:
    variants, calls = _recorders("abc")
    timings = interleave(variants, CPU, rounds=40, warmup=1)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 41 and {"".join(sorted(order)) for order in rounds} == {"abc"} and len(set(rounds)) == 6
    assert {len(timing.seconds) for timing in timings.values()} == {40}
    again, repeated = _recorders("abc")
    interleave(again, CPU, rounds=40, warmup=1)
    assert repeated == calls


def test_interleave_times_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def take(seconds: float) -> None:
        clock[0] += seconds

    timings = interleave({"slow": lambda: take(3.0), "fast": lambda: take(1.0)}, CPU, rounds=5, warmup=2)
    assert timings == {"slow": Timing((3.0,) * 5), "fast": Timing((1.0,) * 5)}


def test_interleave_calls_in_a_row_and_counts_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def take(name: str, seconds: float) -> None:
        calls.append(name)
        clock[0] += seconds

    variants = {"a": lambda: take("a", 2.0), "b": lambda: take("b", 0.5)}
    timings = interleave(variants, CPU, rounds=2, warmup=0, number=3)
    assert timings == {"a": Timing((2.0, 2.0)), "b": Timing((0.5, 0.5))}
    assert "".join(calls) == "bbbaaa" + "aaabbb"


def test_interleave_reports_every_round_with_the_warm_up() -> None:
    variants, _ = _recorders("ab")
    seen: list[tuple[int, int]] = []
    interleave(variants, CPU, rounds=2, warmup=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("seconds", "median", "spread"),
    [
        ((2.0,), 2.0, None),
        ((1.0, 2.0, 30.0), 2.0, None),
        ((4.0, 4.0, 4.0, 4.0), 4.0, 0.0),
        ((5.0, 1.0, 3.0, 2.0, 4.0), 3.0, 0.5),  # quartiles 1.5 and 4.5
    ],
    ids=["one", "three", "equal", "five"],
)
def test_median_and_spread(seconds: tuple[float, ...], median: float, spread: float | None) -> None:
    assert Timing(seconds).median == median
    assert Timing(seconds).spread == (spread if spread is None else pytest.approx(spread))


def test_over_pairs_the_rounds() -> None:
    # the machine became ten times slower: each round still says 2, the ratio of the medians would not
    slow, fast = Timing((2.0, 20.0, 200.0, 9.0)), Timing((1.0, 10.0, 100.0, 3.0))
    assert slow.over(fast) == 2.0
    assert fast.over(slow) == 0.5
    with pytest.raises(ValueError, match="shorter"):
        slow.over(Timing((1.0,)))


def test_peak_memory_grows_with_the_batch() -> None:
    model = tiny_vit()
    one, eight = (peak_memory(model, torch.randn(batch, 3, 32, 32)) for batch in (1, 8))
    # at least the tokens of one layer, float32
    assert one >= 65 * 32 * 4
    assert 4 * one < eight < 16 * one


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    class Steps(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(5):
                x = x + 1  # at each step the old and the new one
            return x

    x = torch.zeros(1000, 1000)
    assert peak_memory(Steps(), x) == pytest.approx(2 * x.nbytes, rel=0.01)


def test_training_memory_is_what_a_backward_needs_besides_the_gradients() -> None:
    class Layers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64, bias=False) for _ in range(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x).relu()
            return x

    model, x = Layers().eval(), torch.randn(1000, 64)
    measured = training_memory(model, x)
    # the result of each relu is kept, at the end a layer's output and a gradient or two are there beside them
    assert 8 * x.nbytes < measured < 12 * x.nbytes
    assert peak_memory(model, x) < 4 * x.nbytes
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


def test_training_memory_is_that_of_train_mode() -> None:
    x = torch.randn(1000, 64)
    kept = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(0.5)).eval()
    assert training_memory(kept, x) > training_memory(kept[:1], x) + x.nbytes / 2


@pytest.mark.parametrize("is_fused", [True, False], ids=["fused", "unfused"])
def test_attention_kernel(is_fused: bool) -> None:
    model = tiny_vit()
    for block in model.blocks:
        block.attn.fused_attn = is_fused
    kernel = attention_kernel(model, torch.randn(2, 3, 32, 32))
    assert ("attention" in kernel and "math" not in kernel) if is_fused else kernel == "math"


def test_attention_kernel_of_a_model_without_attention() -> None:
    assert attention_kernel(torch.nn.Linear(4, 4), torch.randn(2, 4)) == "not seen (compiled)"


def test_environment_names_machine_and_versions() -> None:
    import timm

    import tokenmerge

    found = environment(CPU)
    assert list(found) == ["device", "threads", "system", "python", "torch", "tokenmerge", "timm"]
    assert found["threads"] == str(torch.get_num_threads())
    assert (found["torch"], found["tokenmerge"]) == (torch.__version__, tokenmerge.__version__)
    assert found["timm"] == timm.__version__
    assert found["device"]


@pytest.mark.parametrize(
    ("runs", "throw_out", "warmup"), [(40, 0.25, 10), (10, 0.0, 0), (4, 1.0, 3), (1, 0.25, 0)], ids=str
)
def test_throughput_leaves_the_first_runs_out(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    runs: int,
    throw_out: float,
    warmup: int,
) -> None:
    def fake(variants: dict[str, Any], device: torch.device, **given: Any) -> dict[str, Timing]:
        assert given == {"rounds": runs - warmup, "warmup": warmup}
        assert variants["model"]().shape == (4, 10)
        return {"model": Timing((0.5, 1.5))}

    monkeypatch.setattr(timing, "interleave", fake)
    model = tiny_vit().train()
    assert throughput(model, "cpu", (3, 32, 32), 4, runs=runs, throw_out=throw_out, verbose=True) == 4.0
    assert not model.training
    assert capsys.readouterr().out == "Throughput: 4.00 im/s\n"


def test_throughput_in_half_precision_runs_under_autocast() -> None:
    seen: list[torch.dtype] = []
    model = tiny_vit()
    model.head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    assert throughput(model, "cpu", (3, 32, 32), 1, runs=2, use_fp16=True) > 0
    assert throughput(model, "cpu", (3, 32, 32), 1, runs=2) > 0
    assert seen == [torch.bfloat16] * 2 + [torch.float32] * 2


def test_throughput_on_a_device_that_is_not_there() -> None:
    with pytest.raises(UnsupportedError, match="no device 'cuda:99' on this machine"):
        throughput(tiny_vit(), "cuda:99", (3, 32, 32), 1)


def test_the_profiler_writes_nothing_to_stderr() -> None:
    code = (
        "import torch; from tokenmerge.measure.timing import attention_kernel;"
        "print(attention_kernel(torch.nn.Softmax(dim=-1), torch.zeros(1, 2)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("math\n", "")


@pytest.mark.parametrize("measured", ["attention_kernel", "peak_memory", "training_memory"])
def test_measuring_a_model_that_has_run_warns_of_nothing(measured: str) -> None:
    code = (
        "import torch, tokenmerge; from tokenmerge.measure import timing; from tokenmerge.testing import tiny_vit;"
        "model, x = tiny_vit(), torch.randn(2, 3, 32, 32); tokenmerge.patch(model, r=8); model(x);"
        f"assert timing.{measured}(model, x)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr == ""
