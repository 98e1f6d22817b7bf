"""How fast it is, and how much memory it takes: the registry's cases, CUDA graphs, and training steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks import registry, run
from benchmarks.gpu.common import error_of, sized, using
from benchmarks.gpu.steps import WRONG, Job, Row, Say
from benchmarks.registry import Case, ModelCase
from torch import Tensor, nn

import tokenmerge
from tokenmerge.measure.outputs import shared_copy
from tokenmerge.measure.timing import Timing, interleave, peak_memory
from tokenmerge.tools.models import apply_method


def measured(job: Job, say: Say, names: Sequence[str]) -> None:
    """Cases of the registry, as `run.py` measures them, an operation by all of its versions."""
    for case in registry.choose(names):
        name = _kernels(case, job)
        with using(name), _compiler(job):
            row, _ = run.measure_case(sized(case, job), job.rounds, others=True)
        if "reference ms" in row and row.get("bound ms"):
            row["reference over bound"] = round(row["reference ms"] / row["bound ms"], 3)
        say({**row, "kernels": name or "chosen"})
        _free()


def graphs(job: Job, say: Say, names: Sequence[str]) -> None:
    """Models under CUDA graphs, captured as they are, without a compiler: small batches without the host's time."""
    for case in registry.choose(names):
        assert isinstance(case, ModelCase)
        say({**_replayed(sized(case, job), job), "kernels": _kernels(case, job) or "chosen"})
        _free()


def _replayed(case: ModelCase, job: Job) -> Row:
    x = registry.images(case)
    model = registry.build_model(case).to(x.dtype)
    models = {"unmerged": model}
    for name, method in (("merged", "tome"), ("bound", "drop"), ("reference", "tome")):
        models[name] = shared_copy(model)
        apply_method(models[name], method, r=case.r)
    calls = {
        name: _call(twin, x, "reference" if name == "reference" else _kernels(case, job))
        for name, twin in models.items()
    }
    with torch.inference_mode():
        played = {name: _capture(call, x.device) for name, call in calls.items()}
        play, read = played["merged"]
        play()
        before = read().clone()
        x.copy_(torch.randn_like(x))
        play()
        replay, change = (error_of(out, calls["merged"]())[0] for out in (read(), before))
    timed = {name: play for name, (play, _) in played.items()}
    timed |= {f"eager {name}": calls[name] for name in ("merged", "unmerged")}
    timings = interleave(timed, x.device, rounds=job.rounds, number=1 if job.is_tiny else 5)
    merged = timings["merged"]
    row: Row = {"case": case.name, "model": case.model, "r": str(case.r), "batch": case.batch, "ms": _ms(merged)}
    row["spread %"] = None if merged.spread is None else round(merged.spread * 100, 1)
    for name in ("unmerged", "bound", "reference", "eager merged", "eager unmerged"):
        row[f"{name} ms"] = _ms(timings[name])
    row["speed-up"] = round(timings["unmerged"].over(merged), 3)
    row["over bound"] = round(merged.over(timings["bound"]), 3)
    row["reference / merged"] = round(timings["reference"].over(merged), 3)
    # rounding differs between calls, where sums have no order; what a replay that reads old images gives is `change`
    row |= {"replay error": replay, "old images'": change, "result": "right" if replay <= change / 4 else WRONG}
    return {**row, **run.judge(case, row)}


def _call(model: nn.Module, x: Tensor, forced: str) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with using(forced):
            return model(x)

    return call


def _capture(call: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], Any], Callable[[], Tensor]]:
    """Capture a call; returns what replays it and what reads its output. Without CUDA the call itself is replayed."""
    if device.type != "cuda":
        outputs: list[Tensor] = []
        return lambda: outputs.append(call()), lambda: outputs[-1]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is compiled or allocated once must not be captured
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    return graph.replay, lambda: output


def training(job: Job, say: Say, precision: str) -> None:
    """Training steps of ViT-B/16 under autocast, fp16 with a scaler: time, peak memory, and finite gradients."""
    case = sized(registry.CASES["gpu-memory-vit_base_patch16_224"], job)
    assert isinstance(case, ModelCase)
    case = replace(case, dtype="float32")
    x, labels = registry.images(case), torch.arange(case.batch, device=job.device)
    variants = {"unmerged": None, "chosen": "", **({name: name} if (name := _kernels(case, job)) else {})}
    states, rows = {}, {}
    for name, forced in variants.items():
        model = registry.build_model(case).train()
        if forced is not None:
            tokenmerge.patch(model, r=case.r)
        step = states[name] = _Trainee(model, x, labels, precision, forced or "")
        losses = [step()]
        # fp16 leaves out its first steps, until the scale of the loss fits
        while step.took < 3 and len(losses) < 30:
            losses.append(step())
        peak = peak_memory(lambda _, step=step: step(), x)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        good = step.took >= 3 and all(bool(value.isfinite().all()) for value in (*losses, *gradients))
        rows[name] = {"precision": precision, "variant": name, "batch": case.batch}
        rows[name] |= {"r": 0 if forced is None else case.r, "loss": round(float(losses[-1]), 4)}
        rows[name] |= {"steps left out": len(losses) - 3, "peak MB": round(peak / 2**20, 1)}
        rows[name]["result"] = "right" if good else WRONG
    timings = interleave(states, x.device, rounds=job.rounds)
    for name, timing in timings.items():
        speed = round(timings["unmerged"].over(timing), 3)
        spread = None if timing.spread is None else round(timing.spread * 100, 1)
        say({**rows[name], "ms": _ms(timing), "spread %": spread, "speed-up": speed})


class _Trainee:
    """One training step at each call, gradients kept until the next one."""

    def __init__(self, model: nn.Module, x: Tensor, labels: Tensor, precision: str, forced: str) -> None:
        self.model, self.x, self.labels, self.forced = model, x, labels, forced
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        self.scaler = torch.amp.GradScaler(x.device.type, enabled=precision == "fp16")
        self.took = 0

    def __call__(self) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad(), using(self.forced):
            self.optimizer.zero_grad()
            with torch.autocast(self.x.device.type, self.dtype):
                loss = F.cross_entropy(self.model(self.x), self.labels)
            self.scaler.scale(loss).backward()
            before = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.took += self.scaler.get_scale() >= before
            return loss.detach()


def _kernels(case: Case, job: Job) -> str:
    """What to force for a case: in a dry run no model is timed in Triton's interpreter, with a second for a forward."""
    return "" if job.is_tiny and isinstance(case, ModelCase) else job.kernels


@contextmanager
def _compiler(job: Job) -> Iterator[None]:
    """In a dry run nothing is compiled, which would take minutes."""
    compiler = torch.compile
    if job.is_tiny:
        torch.compile = lambda what, **options: what
    try:
        yield
    finally:
        torch.compile = compiler


def _free() -> None:
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _ms(timing: Timing) -> float:
    return round(timing.median * 1e3, 3)
