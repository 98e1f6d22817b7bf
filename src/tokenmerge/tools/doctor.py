"""Examine one model: is it supported, is merging exact, is it faster, what is limited."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import tokenmerge
from tokenmerge.config import MergeConfig, Restore
from tokenmerge.data.prepare import find_preprocessing
from tokenmerge.data.preprocessing import Preprocessing
from tokenmerge.errors import ConfigError, DataError, InvalidScheduleError, TokenMergeError, UnsupportedError
from tokenmerge.handle import attached
from tokenmerge.measure.outputs import answer, find_device, find_dtype, known_size, shared_copy
from tokenmerge.measure.timing import NOISY, Timing, environment, interleave
from tokenmerge.methods import Learned, Reduction, ToMe
from tokenmerge.plan import Plan
from tokenmerge.report.table import measured_on
from tokenmerge.schedule import R

__all__ = ["Diagnosis", "Finding", "examine"]

DELIVERED = 0.9  # share of a written speed-up that is to be reached
TOLERANCE = 1e-4  # of the largest output, in float32
_MARKS = {True: "ok  ", False: "FAIL", None: "    "}
_RIGHT = "Merging computes on this model what it should."
_SLOW = (
    f"{_RIGHT} But it is not as fast here as the configuration says: measure again without other programs, or tune the "
    "model on this machine."
)
_WRONG = (
    "Do not merge this model as it is: {names} failed, so its merged answers are not what the method promises. Examine "
    "a model of the host's own class; what a subclass adds can be patched by names (see docs/your-own-model.md)."
)

_UNSUPPORTED = "This model cannot be merged as it is: do what is said above, or take a model of `tokenmerge list`."
_IDLE = "Nothing is merged at r = {r}, so nothing is gained: give a larger r, or tune for a speed (--target 1.5x)."
_OTHER_CONFIG = "This configuration is of another model: tune this one (tokenmerge tune), or name the right file."


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
    r: R | None = None,
    config: MergeConfig | str | Path | None = None,
    restore: Restore | None = None,
    device: str = "cpu",
    batch: int = 2,
    rounds: int = 10,
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Diagnosis:
    """Check a model on random images: adapter, r = 0, equality with the group-mean simulation, unpatching, speed.

    `config` is a configuration, or the path of a saved one, that merges here instead of ToMe with `r` (8): whether it
    fits the model is checked, and whether it is as fast on this machine as it says, at the batch size and in the dtype
    that it was measured with. `restore` is that of `patch`. `preprocessing` is reported if given, else the
    preprocessing found with the model. `progress` is called with the timed rounds (done, total). The last
    finding is a conclusion with advice. The model is not changed. A model that is unsupported, or that the
    configuration does not fit, is a finding, not an error.
    """
    where = find_device(device)
    if batch < 1 or rounds < 1:
        raise DataError(f"examining needs a batch size and rounds of at least 1; got {batch} and {rounds}.")
    own = _asked(config, r, restore)
    about = environment(where)
    model = copy.deepcopy(model).to(where).eval()
    try:
        handle = attached(model, replace(own, track=True))
    except InvalidScheduleError:
        raise
    except TokenMergeError as error:
        does_not_fit = config is not None and isinstance(error, ConfigError)
        name, advice = ("config", _OTHER_CONFIG) if does_not_fit else ("adapter", _UNSUPPORTED)
        return Diagnosis([Finding(name, False, str(error)), Finding("conclusion", False, advice)], about)
    report = handle.report()
    findings = [] if config is None else [_fits(own, handle)]
    findings += [
        Finding("adapter", True, f"{report.adapter}: {report.blocks} blocks, attention seen by {report.attention}"),
        Finding("blocks", True, f"re-composed, they differ from their own forward by at most {report.parity:.2g}"),
    ]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *known_size(handle), generator=generator).to(where, next(model.parameters()).dtype)
    findings += _exact(model, handle, x, own)
    findings.append(Finding("preprocessing", None, _prepared(model, preprocessing)))
    wrong = [name for name, good, _ in findings if good is False]
    if wrong:
        findings.append(Finding("conclusion", False, _WRONG.format(names=" and ".join(wrong))))
        return Diagnosis(findings, about)
    findings.append(_limited(handle, report.limits))
    return Diagnosis([*findings, *_speed(model, x, own, rounds, None if config is None else about, progress)], about)


def _asked(config: MergeConfig | str | Path | None, r: R | None, restore: Restore | None) -> MergeConfig:
    """Return the configuration to examine."""
    if config is None:
        return MergeConfig("tome", r=8 if r is None else r, restore=restore)
    if r is not None:
        raise ConfigError(f"the configuration has an r of its own; leave out r = {r!r}.")
    found = config if isinstance(config, MergeConfig) else MergeConfig.load(config)
    return found if restore is None else replace(found, restore=restore)


def _fits(config: MergeConfig, handle: tokenmerge.Handle) -> Finding:
    what = f"{config.method!r}, r = {config.r}"
    model = config.fingerprint
    if model is None:
        return Finding("config", None, f"{what}: it fits, and does not say which model it was made for")
    if handle.remarks:
        return Finding("config", None, f"{what}: it fits, but {'; '.join(handle.remarks)}")
    tokens = "" if model.tokens is None else f", {model.tokens} tokens"
    return Finding("config", True, f"{what}: made for this model ({model.architecture}, {model.depth} blocks{tokens})")


def _exact(model: nn.Module, handle: tokenmerge.Handle, x: torch.Tensor, config: MergeConfig) -> list[Finding]:
    """Compare the answers at r = 0, merged, and unpatched; the model is unpatched afterwards."""
    with torch.inference_mode():
        with handle.disabled():
            unmerged = answer(model(x))
        handle.r = 0
        off = _compare("r = 0", answer(model(x)), unmerged, 1e-6, "from the unmerged model")
        merged = _equivalence(model, handle, x, config)
        if tokenmerge.handle_of(model, None):
            handle.remove()
        return [off, merged, _compare("unpatch", answer(model(x)), unmerged, 0.0, "from the model before")]


def _limited(handle: tokenmerge.Handle, limits: list[str]) -> Finding:
    limits = [limit for limit in limits if limit not in handle.remarks]  # these are told of the configuration
    return Finding("limitations", None if limits else True, "; ".join(limits) or "none")


def _prepared(model: nn.Module, given: Preprocessing | None) -> str:
    try:
        found = find_preprocessing(model, given=given)
    except TokenMergeError as error:
        return f"unknown: {error}"
    return found.warning() or str(found)


def _takes_mean(method: Reduction) -> bool:
    """Say whether a method makes the size-weighted mean of each group: plans with weights of their own make another."""
    merge, planned = type(method).merge, type(method).plan.__annotations__.get("return")
    is_mean = merge in (Reduction.merge, Learned.merge) or (
        merge is ToMe.merge and getattr(method, "combine", "") == "weighted"
    )
    return is_mean and planned in ("Plan", Plan)


def _equivalence(model: nn.Module, handle: tokenmerge.Handle, x: torch.Tensor, config: MergeConfig) -> Finding:
    r = handle.r = config.r
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
        if not _takes_mean(config.method):
            return Finding("equivalence", None, f"not checked: {config.method.name} makes no size-weighted means")
        handle.remove()
        try:
            simulated = answer(tokenmerge.simulate(model, groups, x, positions=positions))
        except TokenMergeError as error:  # dropped tokens, windows, a model patched by names
            return Finding("equivalence", None, f"not checked: {error}")
        if merged.shape != simulated.shape:
            # the model returns its tokens: restore them to their places before comparing
            with attached(model, replace(config, restore="dense")):
                merged = answer(model(x))
    sentence = f"from the group-mean simulation at r = {r} ({tokens} tokens left)"
    return _compare("equivalence", merged, simulated, TOLERANCE, sentence)


def _compare(name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> Finding:
    scale = max(1.0, float(expected.abs().max()))
    if got.dtype not in (torch.float32, torch.float64):
        tolerance *= 1e3
    difference = float((got - expected).abs().max())
    return Finding(name, difference <= tolerance * scale, f"max |difference| {difference:.2g} {what}")


def _speed(
    model: nn.Module,
    x: torch.Tensor,
    config: MergeConfig,
    rounds: int,
    here: dict[str, str] | None,
    progress: Callable[[int, int], None] | None,
) -> list[Finding]:
    """Time merging, compare with what the configuration says where it was asked for (`here`), and conclude."""
    if here is not None:
        model, x = _as_measured(model, x, config.measured or {})
    merged, bound = shared_copy(model), shared_copy(model)
    attached(merged, config)
    attached(bound, replace(config, method="drop", prop_attn="auto", track=False, fingerprint=None))
    # a second unmerged run shows how large a difference is noise
    variants = {"unmerged": model, "merged": merged, "bound": bound, "again": model}
    if here is not None and (config.measured or {}).get("compiled"):
        variants = {name: torch.compile(variant) for name, variant in variants.items()}  # type: ignore[misc]
    calls = {name: _call(variant, x) for name, variant in variants.items()}
    timings = interleave(calls, x.device, rounds=rounds, progress=progress)
    gain = timings["unmerged"].over(timings["merged"])
    said = [] if here is None else [_delivers(config, gain, x, here)]
    sentence, advice = _judged(timings, f"batch {len(x)}, r = {config.r}")
    fails = any(good is False for _, good, _ in said)
    with torch.inference_mode():
        merged(x)
    if not tokenmerge.handle_of(merged).has_merged:
        advice = _IDLE.format(r=config.r)
    good = False if fails else None if advice.startswith(_RIGHT) and "SLOWER" in advice else True
    return [Finding("speed", None, sentence), *said, Finding("conclusion", good, _SLOW if fails else advice)]


def _as_measured(model: nn.Module, x: torch.Tensor, measured: Mapping[str, Any]) -> tuple[nn.Module, torch.Tensor]:
    """Return the model and images in the dtype and at the batch size that a configuration was measured with."""
    size, dtype = measured.get("batch size", len(x)), measured.get("dtype", str(x.dtype).removeprefix("torch."))
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ConfigError(f"measured['batch size'] is {size!r}; it takes a whole number of at least 1.")
    try:
        kind = find_dtype(dtype)
    except UnsupportedError as error:
        raise ConfigError(f"measured['dtype'] is {dtype!r}: {error}") from error
    model = model if kind == x.dtype else copy.deepcopy(model).to(kind)
    return model, x[torch.arange(size, device=x.device) % len(x)].to(kind)


def _delivers(config: MergeConfig, gain: float, x: torch.Tensor, here: dict[str, str]) -> Finding:
    """Compare the speed-up measured here with the one in the configuration: a judgement on the same machine only."""
    measured = config.measured or {}
    written, there = measured.get("speed-up"), measured.get("environment")
    if not isinstance(written, int | float) or isinstance(written, bool):
        return Finding("delivers", None, f"the configuration holds no speed-up; measured {gain:.2f}x here")
    where = f"batch {len(x)}, {str(x.dtype).removeprefix('torch.')}"
    sentence = f"{written:.2f}x as written, measured {gain:.2f}x here ({where})"
    if not isinstance(there, Mapping) or "device" not in there:
        return Finding("delivers", None, f"{sentence}; on which machine it was written, it does not say")
    if any(there.get(name, here[name]) != here[name] for name in ("device", "threads", "system")):
        machine = f"{there['device']}, {there.get('threads', '?')} threads, {there.get('system', '?')}"
        return Finding("delivers", None, f"{sentence}; written on another machine ({machine})")
    others = [f"{name} {value}" for name, value in there.items() if name in here and value != here[name]]
    sentence += f"; written with {', '.join(others)}" if others else ""
    return Finding("delivers", gain >= DELIVERED * written, sentence)


def _judged(timings: Mapping[str, Timing], where: str) -> tuple[str, str]:
    """Return what was measured as a sentence, and a conclusion with advice."""
    over, gain = timings["merged"].over(timings["bound"]), timings["unmerged"].over(timings["merged"])
    spread = timings["unmerged"].noise(timings["merged"])
    sentence = f"{gain:.2f} x the unmerged model's ({where}), {over:.3f} x the time of the free bound"
    if spread is None:
        return f"{sentence}; {len(timings['merged'].seconds)} rounds are too few to tell", _RIGHT
    noise = max(spread, abs(timings["unmerged"].over(timings["again"]) - 1))
    sentence += f"; noise {100 * noise:.1f} %"
    sentence += ": other programs are running, measure again without them" if noise >= NOISY else ""
    if abs(gain - 1) <= noise:
        what = f"No difference in speed was measured ({where}): try a larger r, a larger batch, and tokenmerge bench."
    elif gain < 1:
        what = f"It is SLOWER here ({where}): take a larger r or a larger batch; tokenmerge bench finds from where on."
    else:
        what = f"It is {gain:.2f} x as fast here ({where}); tokenmerge eval says what it costs on your images."
    return sentence, f"{_RIGHT} {what}"


def _call(model: nn.Module, x: torch.Tensor) -> Any:
    return lambda: model(x)
