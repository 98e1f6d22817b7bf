"""What the steps on a GPU share: sizes, versions of the kernels, and the error of a result."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from typing import Any

import torch
from benchmarks.gpu.steps import ROOT, Job
from benchmarks.registry import OpCase
from torch import Tensor

from tokenmerge import kernels


def sized(case: Any, job: Job) -> Any:
    """Return a case on the job's device; in a dry run a tiny one of the same name, without what it must keep."""
    if not job.is_tiny:
        return replace(case, device=job.device)
    if isinstance(case, OpCase):
        return replace(case, B=2, H=2, N=19, D=16, r=4 if case.r else 0, dtype="float32", device=job.device, bars=())
    tiny = {"model": "test_vit", "side": 160, "batch": 1, "r": 16, "dtype": "float32"}
    return replace(case, **tiny, device=job.device, bars=())


def versions(job: Job) -> list[str]:
    """What to force in turn: nothing, and Triton where it runs."""
    return ["", "triton"] if has_triton(job) else [""]


@cache
def _interpret() -> None:
    """Bind the kernels to Triton's interpreter, and mend that, as the tests do."""
    spec = spec_from_file_location("interpreter", ROOT / "tests" / "kernels" / "conftest.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(module_from_spec(spec))


def has_triton(job: Job) -> bool:
    """Say whether Triton is installed; without CUDA its interpreter runs the kernels."""
    if not find_spec("triton"):
        return False
    if torch.device(job.device).type == "cpu":
        _interpret()
    return True


def using(name: str) -> AbstractContextManager[None]:
    """Force a version of the kernels; without a name tokenmerge chooses."""
    return kernels.force(name) if name else nullcontext()


def error_of(got: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the error of the norm and that of one value, over the norm and the largest value; NaN is infinite."""
    difference, expected = got.detach().double() - expected.detach().double(), expected.detach().double()
    norm = float(difference.norm() / expected.norm().clamp_min(1e-30))
    one = float(difference.abs().max() / expected.abs().max().clamp_min(1e-30))
    return (norm, one) if norm == norm and one == one else (float("inf"), float("inf"))
