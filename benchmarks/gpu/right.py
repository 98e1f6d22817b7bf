"""Whether it is right: patched models against the simulation, the tests that need a GPU, every Triton kernel, NCCL.

Kernels are compared with the reference in float64. Shapes: B batch, H heads, N tokens, D head width, C channels.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks import registry
from benchmarks.gpu.common import error_of, has_triton, sized, using, versions
from benchmarks.gpu.steps import ROOT, WRONG, Job, Row, Say
from benchmarks.registry import OpCase
from torch import Tensor, nn

import tokenmerge
from tokenmerge.kernels import reference
from tokenmerge.measure.simulate import simulate

sys.path.insert(0, str(ROOT / "tests"))
from helpers import randomised, tiny_vit

# error of the norm, and of the largest value; sums over thousands of terms
ALLOWED = {torch.float32: (2e-5, 1e-4), torch.float16: (4e-3, 1e-2), torch.bfloat16: (2e-2, 4e-2)}
SCORES = 2**27  # scores in float64 that a comparison holds at a time


def smoke(job: Job, say: Say) -> None:
    """Patched models against the unpatched ones: untouched, merged as the simulation says, and given back."""
    device = torch.device(job.device)
    for name, build in {"timm ViT": partial(tiny_vit, init_values=0.5), "Hugging Face ViT": _hf_vit}.items():
        torch.manual_seed(0)
        model: Any = build()
        if model is None:
            say({"check": name, "result": "not measured: transformers is not installed"})
            continue
        plain = model.to(device)
        x = torch.randn(1 if job.is_tiny else 4, 3, 32, 32, device=device)
        with torch.no_grad():
            _untouched(say, name, plain, x)
            for dtype, allowed in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
                for forced in versions(job):
                    say(_merged(f"{name}, {forced or 'chosen'} kernels", plain, x, dtype, forced, allowed))
    say(_ties(device))


def _hf_vit() -> nn.Module | None:
    if not find_spec("transformers"):
        return None
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    return randomised(ViTForImageClassification(ViTConfig(image_size=32, patch_size=4, **sizes))).eval()


def _answer(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out.logits


def _untouched(say: Say, name: str, plain: nn.Module, x: Tensor) -> None:
    model, before = copy.deepcopy(plain), _answer(plain, x)
    handle = tokenmerge.patch(model, r=0)
    say(_check(f"{name}: r = 0 is the model itself", _answer(model, x), before, 0.0))
    handle.r = 8
    merged = _answer(model, x)
    say({"check": f"{name}: r = 8 merges", "result": "right" if handle.tokens[-1] < handle.tokens[0] else WRONG})
    handle.remove()
    say(_check(f"{name}: given back bit for bit", _answer(model, x), before, 0.0))
    say({"check": f"{name}: finite", "result": "right" if bool(merged.isfinite().all()) else WRONG})


def _merged(name: str, plain: nn.Module, x: Tensor, dtype: torch.dtype, forced: str, allowed: float) -> Row:
    plain, x = copy.deepcopy(plain).to(dtype), x.to(dtype)
    model = copy.deepcopy(plain)
    handle = tokenmerge.patch(model, r=8, prop_attn=True, track=True)
    with using(forced):
        got = _answer(model, x)
    expected = simulate(plain, handle.groups, x)
    expected = expected if isinstance(expected, Tensor) else expected.logits
    return _check(
        f"{name}: {str(dtype).removeprefix('torch.')} is the simulation by group means", got, expected, allowed
    )


def _ties(device: torch.device) -> Row:
    """Of equal scores the first place must win on every device; torch promises it of no `max`."""
    metric = F.one_hot(torch.randint(0, 6, (4, 197)), 6).float()
    here, there = reference.bipartite(metric, 60, 1), reference.bipartite(metric.to(device), 60, 1)
    same = all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
    return {"check": "ties go to the first place, as on the CPU", "result": "right" if same else WRONG}


def _check(name: str, got: Tensor, expected: Tensor, allowed: float) -> Row:
    error = error_of(got, expected)[1]
    return {"check": name, "error": error, "allowed": allowed, "result": "right" if error <= allowed else WRONG}


def tests(job: Job, say: Say, paths: Sequence[str]) -> None:
    """Run tests that need a GPU, one row each; in a dry run they are collected and skip themselves."""
    import pytest

    ran = []

    class Rows:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                why = "" if report.outcome == "passed" else str(report.longrepr)[-300:]
                result = {"passed": "right", "failed": WRONG, "skipped": "skipped"}[report.outcome]
                say({"test": report.nodeid, "seconds": round(report.duration, 2), "result": result, "why": why})
                ran.append(result != "skipped")

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                say({"test": report.nodeid, "seconds": 0.0, "result": WRONG, "why": str(report.longrepr)[-300:]})

    # the settings of pyproject.toml want plug-ins, and no warning from any version of anything
    options = ["-o", "addopts=", "-o", "filterwarnings=default", "-p", "no:cacheprovider", "-p", "no:timeout"]
    options += ["--continue-on-collection-errors", "--tb=short", "-m", "gpu"]
    code = pytest.main([*options, *paths], plugins=[Rows()])
    if code not in (0, 1):
        raise RuntimeError(f"pytest ended with {code!r}; what it said is in the log")
    if not any(ran) and not job.is_tiny:
        raise RuntimeError("every test skipped itself: nothing was shown")


def correct(job: Job, say: Say, op: str) -> None:
    """One Triton kernel, forward and backward, against the reference in float64, at the shapes of the registry."""
    if not has_triton(job):
        say({"op": op, "result": "not measured: Triton is not installed"})
        return
    cases = [case for case in registry.choose() if isinstance(case, OpCase) and case.op == op and case.device == "cuda"]
    shapes = dict.fromkeys(replace(sized(case, job), name="", group="", bars=(), dtype="") for case in cases)
    for case in shapes:
        for dtype in ALLOWED:
            torch.manual_seed(0)
            given = replace(case, dtype=str(dtype).removeprefix("torch."))
            shape = f"B{case.B} H{case.H} N{case.N} D{case.D} r{case.r}"
            say({"op": op, "shape": shape, "dtype": given.dtype, **_CORRECT[op](given, dtype)})


def _correct_attend(case: OpCase, dtype: torch.dtype) -> Row:
    from tokenmerge.kernels import triton_attention

    q, k, v, bias, _ = registry.arguments(case)
    inputs = [part.detach().requires_grad_() for part in (q, k, v)]
    out = triton_attention.attend(*inputs, bias)
    seed = torch.randn_like(out)
    got = [out, *torch.autograd.grad(out, inputs, seed)]
    step = max(1, SCORES // (case.H * case.N**2))
    parts = []
    for i in range(0, case.B, step):
        whole = [part[i : i + step].detach().double().requires_grad_() for part in inputs]
        expected = reference.attend(*whole, bias[i : i + step])
        parts.append([expected, *torch.autograd.grad(expected, whole, seed[i : i + step].double())])
        parts[-1] = [part.detach() for part in parts[-1]]
    return _compared(got, [torch.cat(column) for column in zip(*parts, strict=True)], dtype)


def _correct_merge(case: OpCase, dtype: torch.dtype) -> Row:
    from tokenmerge.kernels import triton_merge

    x, size, keep, src, dst, branch = registry.arguments(case)
    inputs = [x.detach().requires_grad_(), branch.detach().requires_grad_()]
    out, sizes = triton_merge.merge(inputs[0], size, keep, src, dst, inputs[1])
    seed = torch.randn_like(out)
    # the sum of the two is rounded as an add of its own would be
    both = (x + branch).double().requires_grad_()
    expected, expected_sizes = reference.merge(both, size, keep, src, dst)
    (grad,) = torch.autograd.grad(expected, both, seed.double())
    row = _compared([out, *torch.autograd.grad(out, inputs, seed)], [expected, grad, grad], dtype)
    return row if torch.equal(sizes, expected_sizes) else {**row, "result": WRONG, "why": "sizes differ"}


def _correct_bipartite(case: OpCase, dtype: torch.dtype) -> Row:
    from tokenmerge.kernels import triton_match

    metric, r, prefix = registry.arguments(case)
    keep, src, dst = triton_match.bipartite(metric, r, prefix)
    N = case.N
    tokens = torch.cat((keep, src), dim=1).sort(dim=1).values
    if not torch.equal(tokens, torch.arange(N, device=tokens.device).expand_as(tokens)):
        return {"result": WRONG, "why": "not every token is there once"}
    side_a, side_b = reference.alternating(N, prefix)
    best, _ = reference.match(metric.double(), side_a, side_b, "cosine")
    unit = F.normalize(metric.double().mean(dim=1), dim=-1)
    partner = keep.gather(1, dst)
    rows = torch.arange(len(keep), device=keep.device)[:, None]
    reached = (unit[rows, src] * unit[rows, partner]).sum(dim=-1)  # [B, r]
    place = (src - (prefix + prefix % 2)) // 2  # in side A
    missed = best.gather(1, place) - reached
    # what is left of A must score no better than the worst that was absorbed
    left = best.scatter(1, place, float("-inf")).amax(dim=1) - best.gather(1, place).amin(dim=1)
    error = float(torch.stack((missed.max(), left.max())).max())
    same = [a == b for a, b in zip((src, dst), reference.bipartite(metric, r, prefix)[1:], strict=True)]
    share = float((same[0] & same[1]).double().mean()) * 100
    right = error <= 1e-5 and bool((partner % 2 == 1).all())  # NaN is not
    return {"error": error, "allowed": 1e-5, "same pairs %": round(share, 3), "result": "right" if right else WRONG}


def _compared(got: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> Row:
    norms, ones = zip(*map(error_of, got, expected), strict=True)
    allowed = ALLOWED[dtype]
    # forward and backward apart: the first entry is the output
    row = {"error": ones[0], "gradient error": max(ones[1:]), "allowed": allowed[1], "norm's error": max(norms)}
    right = max(ones) <= allowed[1] and max(norms) <= allowed[0] and all(part.dtype == dtype for part in got)
    return {**row, "norm's allowed": allowed[0], "result": "right" if right else WRONG}


_CORRECT = {"attend": _correct_attend, "bipartite": _correct_bipartite, "merge": _correct_merge}


def parallel(job: Job, say: Say) -> None:
    """DDP and FSDP2 around a patched model in one process: the same steps as without. NCCL on CUDA, else gloo."""
    from torch import distributed

    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device = torch.device(job.device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        expected = _three_steps(device, "")
        for way in ("DDP", "FSDP2"):
            began = time.monotonic()
            got = _three_steps(device, way)
            error = error_of(got, expected)[1]
            row: Row = {"backend": backend, "way": way, "error": error, "allowed": 1e-4}
            row["seconds"] = round(time.monotonic() - began, 2)
            say({**row, "result": "right" if error <= 1e-4 else WRONG})
    finally:
        distributed.destroy_process_group()


def _three_steps(device: torch.device, way: str) -> Tensor:
    """Return all parameters after three steps."""
    torch.manual_seed(0)
    model: Any = tiny_vit(init_values=0.5, depth=2).train().to(device)
    tokenmerge.patch(model, r=5)
    called = model
    if way == "DDP":
        called = nn.parallel.DistributedDataParallel(model)
    if way == "FSDP2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.randn(4, 3, 32, 32, device=device)
        F.cross_entropy(called(x), torch.arange(4, device=device)).backward()
        optimizer.step()
    values = (parameter.detach() for parameter in model.parameters())
    return torch.cat([(v.full_tensor() if hasattr(v, "full_tensor") else v).flatten().cpu() for v in values])
