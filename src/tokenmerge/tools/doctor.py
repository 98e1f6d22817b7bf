"""Examine one model: is it supported, is merging exact, is it faster, what is limited."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

import tokenmerge
from tokenmerge.config import Restore
from tokenmerge.data.prepare import find_preprocessing
from tokenmerge.data.preprocessing import Preprocessing
from tokenmerge.errors import DataError, TokenMergeError, UnsupportedError
from tokenmerge.measure.outputs import answer, find_device, known_size, shared_copy
from tokenmerge.measure.timing import NOISY, environment, interleave
from tokenmerge.report.table import measured_on
from tokenmerge.schedule import R

__all__ = ["Diagnosis", "Finding", "examine"]

TOLERANCE = 1e-4  # of the largest output, in float32
_MARKS = {True: "ok  ", False: "FAIL", None: "    "}
_RIGHT = "Merging computes on this model what it should."
_WRONG = (
    "Do not merge this model as it is: {names} failed, so its merged answers are not what the method promises. Examine "
    "a model of the host's own class; what a subclass adds can be patched by names (see docs/your-own-model.md)."
)


class Finding(NamedTuple):
    """One check: its name, the result (None: no judgement), and a sentence."""

    name: str
    good: bool | None
    sentence: str


@dataclass(repr=False)
class Diagnosis:
    """The findings and the environment; `str()` is a table."""

    findings: list[Finding]
    environment: dict[str, str]

    @property
    def is_healthy(self) -> bool:
        """Whether no check failed."""
        return all(good is not False for _, good, _ in self.findings)

    def __str__(self) -> str:
        lines = [f"{_MARKS[good]} {name:<18} {sentence}" for name, good, sentence in self.findings]
        return "\n".join(lines + ([measured_on(self.environment)] if self.is_healthy else []))

    __repr__ = __str__

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "is_healthy": self.is_healthy}


def examine(
    model: nn.Module,
    *,
    r: R = 8,
    restore: Restore | None = None,
    device: str = "cpu",
    batch: int = 2,
    rounds: int = 10,
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
) -> Diagnosis:
    """Check a model on random images: adapter, r = 0, equality with the group-mean simulation, unpatching, speed.

    `restore` is that of `patch`. `preprocessing` is reported if given, else the preprocessing found with the model. The
    last finding is a conclusion with advice. The model is not changed. An unsupported model is a finding, not an error.
    """
    where = find_device(device)
    if batch < 1 or rounds < 1:
        raise DataError(f"examining needs a batch size and rounds of at least 1; got {batch} and {rounds}.")
    about = environment(where)
    model = copy.deepcopy(model).to(where).eval()
    try:
        handle = tokenmerge.patch(model, r=0, track=True, restore=restore)
    except TokenMergeError as error:
        return Diagnosis([Finding("adapter", False, str(error))], about)
    report = handle.report()
    findings: list[Finding] = [
        Finding("adapter", True, f"{report.adapter}: {report.blocks} blocks, attention seen by {report.attention}"),
        Finding("blocks", True, f"re-composed, they differ from their own forward by at most {report.parity:.2g}"),
    ]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *known_size(handle), generator=generator).to(where, next(model.parameters()).dtype)
    with torch.inference_mode(), handle.disabled():
        unmerged = answer(model(x))
    with torch.inference_mode():
        findings.append(_compare("r = 0", answer(model(x)), unmerged, 1e-6, "from the unmerged model"))
    findings.append(_equivalence(model, handle, x, r))
    if tokenmerge.handle_of(model, None):
        handle.remove()
    with torch.inference_mode():
        findings.append(_compare("unpatch", answer(model(x)), unmerged, 0.0, "from the model before"))
    findings.append(Finding("preprocessing", None, _prepared(model, preprocessing)))
    wrong = [name for name, good, _ in findings if good is False]
    if wrong:
        findings.append(Finding("conclusion", False, _WRONG.format(names=" and ".join(wrong))))
        return Diagnosis(findings, about)
    findings.append(Finding("limitations", None if report.limits else True, "; ".join(report.limits) or "none"))
    return Diagnosis([*findings, *_speed(model, x, r, restore, rounds)], about)


def _prepared(model: nn.Module, given: Preprocessing | None) -> str:
    try:
        found = find_preprocessing(model, given=given)
    except TokenMergeError as error:
        return f"unknown: {error}"
    return found.warning() or str(found)


def _equivalence(model: nn.Module, handle: tokenmerge.Handle, x: torch.Tensor, r: R) -> Finding:
    handle.r = r
    with torch.inference_mode():
        try:
            merged = answer(model(x))
        except TokenMergeError as error:
            return Finding("merging", False, f"at r = {r} the model refuses: {error}")
        if not handle.has_merged:
            return Finding("equivalence", None, f"not checked: r = {r} merges nothing in this model")
        groups, positions, tokens = handle.groups, handle.positions, handle.tokens[-1]
        if not handle.report().prop_attn:
            return Finding("equivalence", None, "not checked: it does not hold without proportional attention")
        handle.remove()
        try:
            simulated = answer(tokenmerge.simulate(model, groups, x, positions=positions))
        except UnsupportedError as error:
            return Finding("equivalence", None, f"not checked: {error}")
        if merged.shape != simulated.shape:
            # the model returns its tokens: restore them to their places before comparing
            with tokenmerge.patched(model, r=r, restore="dense"):
                merged = answer(model(x))
    sentence = f"from the group-mean simulation at r = {r} ({tokens} tokens left)"
    return _compare("equivalence", merged, simulated, TOLERANCE, sentence)


def _compare(name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> Finding:
    scale = max(1.0, float(expected.abs().max()))
    if got.dtype not in (torch.float32, torch.float64):
        tolerance *= 1e3
    difference = float((got - expected).abs().max())
    return Finding(name, difference <= tolerance * scale, f"max |difference| {difference:.2g} {what}")


def _speed(model: nn.Module, x: torch.Tensor, r: R, restore: Restore | None, rounds: int) -> list[Finding]:
    """Time merging and conclude from all findings."""
    merged, bound = shared_copy(model), shared_copy(model)
    tokenmerge.patch(merged, r=r, restore=restore)
    tokenmerge.patch(bound, "drop", r=r, restore=restore)
    # a second unmerged run shows how large a difference is noise
    variants = {"unmerged": model, "merged": merged, "bound": bound, "again": model}
    timings = interleave({name: _call(variant, x) for name, variant in variants.items()}, x.device, rounds=rounds)
    over, gain = timings["merged"].over(timings["bound"]), timings["unmerged"].over(timings["merged"])
    spread = timings["unmerged"].noise(timings["merged"])
    where = f"batch {len(x)}, r = {r}"
    sentence = f"{gain:.2f} x the unmerged model's ({where}), {over:.3f} x the time of the free bound"
    if spread is None:
        few = f"{sentence}; {rounds} rounds are too few to tell"
        return [Finding("speed", None, few), Finding("conclusion", True, _RIGHT)]
    noise = max(spread, abs(timings["unmerged"].over(timings["again"]) - 1))
    sentence += f"; noise {100 * noise:.1f} %"
    sentence += ": other programs are running, measure again without them" if noise >= NOISY else ""
    if abs(gain - 1) <= noise:
        what = f"No difference in speed was measured ({where}): try a larger r, a larger batch, and tokenmerge bench."
    elif gain < 1:
        what = f"It is SLOWER here ({where}): take a larger r or a larger batch; tokenmerge bench finds from where on."
    else:
        what = f"It is {gain:.2f} x as fast here ({where}); tokenmerge eval says what it costs on your images."
    return [Finding("speed", None, sentence), Finding("conclusion", True, f"{_RIGHT} {what}")]


def _call(model: nn.Module, x: torch.Tensor) -> Any:
    return lambda: model(x)
