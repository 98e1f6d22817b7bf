"""Examine one model: is it described, is it right, what does merging cost on it, what could not be done."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import tokenmerge
from tokenmerge.errors import DataError, TokenMergeError, UnsupportedError
from tokenmerge.schedule import R
from tokenmerge.tools.models import answer, find_device, known_size, shared_copy
from tokenmerge.tools.timing import environment, interleave

__all__ = ["Diagnosis", "examine"]

TOLERANCE = 1e-4  # of the largest output, in float32


@dataclass
class Diagnosis:
    """The findings, each a name, whether it is as it should be (None: no judgement), and a sentence."""

    findings: list[tuple[str, bool | None, str]]
    environment: dict[str, str]

    @property
    def is_healthy(self) -> bool:
        return all(good is not False for _, good, _ in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "is_healthy": self.is_healthy}


def examine(
    model: nn.Module, *, r: R = 8, device: str = "cpu", batch: int = 2, rounds: int = 10, seed: int = 0
) -> Diagnosis:
    """Check a model on random images: adapter, r = 0, equivalence to the group-mean simulation, unpatch, overhead.

    The model itself is not changed. An unsupported model is a finding, not an error.
    """
    where = find_device(device)
    if batch < 1 or rounds < 1:
        raise DataError(f"examining needs a batch size and rounds of at least 1; got {batch} and {rounds}.")
    about = environment(where)
    model = copy.deepcopy(model).to(where).eval()
    try:
        handle = tokenmerge.patch(model, r=0, track=True)
    except TokenMergeError as error:
        return Diagnosis([("adapter", False, str(error))], about)
    report = handle.report()
    findings: list[tuple[str, bool | None, str]] = [
        ("adapter", True, f"{report.adapter}: {report.blocks} blocks, attention seen by {report.attention}"),
        ("blocks", True, f"re-composed, they differ from their own forward by at most {report.parity:.2g}"),
    ]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *known_size(handle), generator=generator).to(where, next(model.parameters()).dtype)
    with torch.inference_mode(), handle.disabled():
        unmerged = answer(model(x))
    with torch.inference_mode():
        findings.append(_compare("r = 0", answer(model(x)), unmerged, 1e-6, "from the unmerged model"))
    findings.append(_equivalence(model, handle, x, r))
    if "_tokenmerge_handle" in model.__dict__:
        handle.remove()
    with torch.inference_mode():
        findings.append(_compare("unpatch", answer(model(x)), unmerged, 0.0, "from the model before"))
    findings.append(("overhead", None, _overhead(model, x, r, rounds)))
    limits = "; ".join(report.limits) or "nothing: all of the method is applied"
    findings.append(("could not be done", None if report.limits else True, limits))
    return Diagnosis(findings, about)


def _equivalence(model: nn.Module, handle: tokenmerge.Handle, x: torch.Tensor, r: R) -> tuple[str, bool | None, str]:
    handle.r = r
    with torch.inference_mode():
        merged = answer(model(x))
        if not handle.has_merged:
            return "equivalence", None, f"r = {r} merges nothing in this model"
        groups, positions, tokens = handle.groups, handle.positions, handle.tokens[-1]
        if not handle.report().prop_attn:
            return "equivalence", None, "does not hold without proportional attention"
        handle.remove()
        try:
            simulated = answer(tokenmerge.simulate(model, groups, x, positions=positions))
        except UnsupportedError as error:
            return "equivalence", None, f"not compared: {error}"
        if merged.shape != simulated.shape:
            # the model hands out its tokens: they are compared in their places
            with tokenmerge.patched(model, r=r, restore="dense"):
                merged = answer(model(x))
    sentence = f"from the group-mean simulation at r = {r} ({tokens} tokens left)"
    return _compare("equivalence", merged, simulated, TOLERANCE, sentence)


def _compare(
    name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str
) -> tuple[str, bool | None, str]:
    scale = max(1.0, float(expected.abs().max()))
    if got.dtype not in (torch.float32, torch.float64):
        tolerance *= 1e3
    difference = float((got - expected).abs().max())
    return name, difference <= tolerance * scale, f"max |difference| {difference:.2g} {what}"


def _overhead(model: nn.Module, x: torch.Tensor, r: R, rounds: int) -> str:
    merged, bound = shared_copy(model), shared_copy(model)
    tokenmerge.patch(merged, r=r)
    tokenmerge.patch(bound, "drop", r=r)
    variants = {"unmerged": model, "merged": merged, "bound": bound}
    timings = interleave({name: _call(variant, x) for name, variant in variants.items()}, x.device, rounds=rounds)
    over, speed_up = timings["merged"].over(timings["bound"]), timings["unmerged"].over(timings["merged"])
    return f"{over:.3f} x the free bound, {speed_up:.2f} x the speed of the unmerged model (batch {len(x)}, r = {r})"


def _call(model: nn.Module, x: torch.Tensor) -> Any:
    return lambda: model(x)
