"""`tune`: from a model, images and a target to the configuration that reaches it with the least damage."""

from __future__ import annotations

import copy
import hashlib
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenmerge.config import MergeConfig
from tokenmerge.config.fingerprint import Fingerprint
from tokenmerge.data.labelled import Labelled
from tokenmerge.errors import ConfigError, UnsupportedModelError, unknown_name
from tokenmerge.handle import attached, require_free
from tokenmerge.measure.outputs import find_device, find_dtype, run_images, shared_copy
from tokenmerge.measure.quality import answers_pixels
from tokenmerge.methods import LeastLoss, Reduction
from tokenmerge.report.journal import Journal
from tokenmerge.tuning.alike import counted_images
from tokenmerge.tuning.clock import Clock
from tokenmerge.tuning.decide import decide
from tokenmerge.tuning.goals import Goals
from tokenmerge.tuning.parts import Parts, split
from tokenmerge.tuning.result import Tuning
from tokenmerge.tuning.search import FRONT, Search
from tokenmerge.tuning.shapes import fit
from tokenmerge.tuning.space import read_methods, starts
from tokenmerge.tuning.subject import Subject
from tokenmerge.tuning.summary import summarise
from tokenmerge.tuning.target import Target, read_targets

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tokenmerge.config import Options

__all__ = ["tune"]

_VERSION = 2
_HINT = "Give another journal (journal=, --journal), or delete this one to start over."
_TIMINGS = 6  # of a target of speed or loss: to learn what MACs cost here, and until the speed is met
_PER_SHARE = 7  # candidates that the front compares at one share
_REFERENCE = 0.5  # the share of the MACs at which methods and blocks are measured for all targets


def tune(
    model: nn.Module,
    images: Tensor | str | Path | Labelled,
    target: str | Target | Sequence[str | Target] = "2x",
    *,
    labels: Tensor | Sequence[int] | None = None,
    methods: str | Reduction | Sequence[str | Reduction] = (LeastLoss.name,),
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    batch_size: int = 32,
    compile: bool = False,
    budget: int = 64,
    seed: int = 0,
    journal: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    expect: Callable[[float], None] | None = None,
    **options: Unpack[Options],
) -> Tuning:
    """Find the configuration that reaches a target with the least damage, for this model, images and machine.

    The images are dealt into three parts: candidates are searched on one half, the best of them compared on a fifth,
    and the figures of the report are measured on the rest, which nothing was chosen by. Damage is the squared distance
    of the answers to the unmerged model's, relative to their length; labels are used for `drop` and accuracies alone.
    First the method, its options and the family of schedules are chosen on few images, at half of the MACs; then each
    block is probed at equal MACs, once for all targets; the schedule of each target starts from that, and is searched
    on. The model is not changed: `tokenmerge.patch(model, result.config)` uses the result.

    Args:
        model: a model that `patch` takes, not patched.
        images: the model's inputs `[N, ...]`, or labelled data as `evaluate` takes it, or the folder or the name of a
            source, as `--data`. At least 64.
        target: one or more of "2x", "12ms" (a batch), "macs=0.5", "memory=0.7", "drop=0.5", "agreement=99"; "2x
            drop=0.5" asks for both: the fastest within the loss that reaches the speed.
        labels: the class of each image, for images given as a tensor.
        methods: where the search starts: names and objects. The options of tome, tofu and least_loss are searched;
            least_loss contains the other two.
        device, dtype, batch_size, compile: what the result is to run with here; the dtype of the model by default.
        budget: how many candidates are tried on the images to search on, for a target.
        seed: deals the images.
        journal: a file that keeps what was measured: an interrupted call goes on, another target starts from it.
        progress: called with the images that were run and all that are planned.
        expect: called with the seconds that the call will take, before its long part.
        options: those of `patch` but `r`, for all candidates: `restore`, `multiple_of`, `blocks` and so on.

    Raises `DataError` for images that cannot be used, fewer than 64 of them, and a journal of something else;
    `ConfigError` for targets that are none or need labels; `UnsupportedModelError` where no method fits.
    """
    targets = read_targets(target)
    _check_numbers(budget=budget, batch_size=batch_size, seed=seed)
    chosen = read_methods(methods)
    settings: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    shared = _shared(settings)
    require_free(model)
    where = find_device(device)
    own = _copied(model, where, None if dtype is None else find_dtype(dtype))
    parts = split(str(images) if isinstance(images, Path) else images, labels, own, batch_size=batch_size, seed=seed)
    _check_labels(targets, parts, own)
    with attached(own, shared) as handle:
        fingerprint = Fingerprint.of(model, handle._adapter)
    kept = None if journal is None else _journal(Path(journal), fingerprint, own, parts, seed, settings)
    subject = Subject(own, parts, where, settings, kept)
    first = starts(subject, chosen)
    refused = {method.name: why for method in first if (why := subject.refusal(method))}
    usable = [method for method in first if subject.accepts(method)]
    if not usable:
        reasons = " ".join(f"{name}: {why}" for name, why in refused.items())
        raise UnsupportedModelError(f"none of the methods {', '.join(refused)} can run in this model. {reasons}")
    lowest = subject.share(fit(subject, (1.0,) * subject.depth, 0.0))
    search = Search(subject, usable, budget, max(_REFERENCE, min(1.0, 1.2 * lowest)))
    clock = Clock(subject, batch_size, compile)
    _foresee(subject, clock, search, targets, progress, expect)
    decision = decide(Goals(subject, clock, search), targets)
    found = summarise(subject, clock, search, targets, decision)
    config = replace(found.config, fingerprint=fingerprint, measured=found.figures)
    remarks = [f"{name} was left out: {why}" for name, why in refused.items()]
    return replace(found, config=config, corrupt=list(parts.corrupt), remarks=[*found.remarks, *remarks])


_KEYWORDS = [name for name, one in inspect.signature(tune).parameters.items() if one.kind is one.KEYWORD_ONLY]


def _check_numbers(**values: Any) -> None:
    for name, value in values.items():
        low = 0 if name == "seed" else 1
        if not isinstance(value, Integral) or not low <= int(value) < 2**63:
            raise ConfigError(f"{name} is {value!r}; it takes a whole number of at least {low}.")


def _shared(options: Mapping[str, Any]) -> MergeConfig:
    """Return the configuration that all candidates share; raises `TokenMergeError` for options that are none."""
    if "r" in options:
        raise ConfigError("tune finds r itself: leave it out, and give a target.")
    known = [one.name for one in fields(MergeConfig) if one.compare and one.name not in ("method", "r")]
    for name in options.keys() - {*known}:
        raise unknown_name("keyword of tune", name, [*_KEYWORDS, *known])
    return MergeConfig(**options)


def _copied(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """Return the model in eval mode on a device, in a dtype; it shares the weights where these need no change."""
    parameter = next(model.parameters())
    is_there = parameter.device.type == device.type and device.index in (None, parameter.device.index)
    is_same = is_there and dtype in (None, parameter.dtype)
    return (shared_copy(model) if is_same else copy.deepcopy(model).to(device, dtype)).eval()


def _check_labels(targets: Sequence[Target], parts: Parts, model: nn.Module) -> None:
    for target in targets:
        if target.kind == "drop" and not parts.has_labels:
            why = f" ({parts.note.rstrip('.')})" if parts.note else ""
            raise ConfigError(
                f"the target {target} is accuracy lost, which needs labels of the images{why}. Give labels, or ask "
                "for what needs none: agreement=99."
            )
        if target.kind == "agreement" and parts.search.outputs < 0 and not _has_pixels(model, parts):
            raise ConfigError(
                f"the target {target} compares classes, and this model answers with none: its outputs are features. "
                "Ask for a speed or for a share of the MACs (2x, macs=0.5)."
            )


def _has_pixels(model: nn.Module, parts: Parts) -> bool:
    images, _ = next(iter(parts.screen))
    return answers_pixels(model, run_images(model, images[:1].to(next(model.parameters()))).shape)


def _journal(
    path: Path, fingerprint: Fingerprint, model: nn.Module, parts: Parts, seed: int, options: Mapping[str, Any]
) -> Journal:
    parameter = next(model.parameters())
    settings = {
        "model": fingerprint.architecture,
        "weights": fingerprint.weights,
        "images": parts.digest,
        # other than in 0.9.0, which dealt labelled images by class: its journals are of other parts
        "labels": hashlib.sha256(f"by seed {parts.search.labels.tolist()}".encode()).hexdigest()[:16]
        if parts.has_labels
        else "none",
        "batch size": parts.search.batch_size,
        "seed": seed,
        "dtype": str(parameter.dtype),
        "options": repr(sorted(options.items())),
        "torch": torch.__version__,
    }
    return Journal(path, "tuning", settings, version=_VERSION, columns=("key", "measured"), hint=_HINT)


def _foresee(
    subject: Subject,
    clock: Clock,
    search: Search,
    targets: Sequence[Target],
    progress: Callable[[int, int], None] | None,
    expect: Callable[[float], None] | None,
) -> None:
    """Say how long it will take, from two passes over the screening images, and follow what is done."""
    sizes = {name: len(getattr(subject.parts, name)) for name in ("screen", "search", "select", "report")}
    # where a target was reached, the next ones start from what it measured
    is_begun = subject.journal is not None and any(key.startswith("report ") for key in subject.journal.rows)
    total = int(search.searched * sizes["search"]) + (2 if is_begun else 3) * sizes["report"]
    total += len(FRONT) * sizes["select"] * (1 if is_begun else _PER_SHARE)
    total += 0 if is_begun else int(search.screened * sizes["screen"]) + subject.depth * sizes["search"]
    if expect is not None:
        merged, unmerged = _seconds(subject, search)  # of one image
        timings = 1 if all(target.kind == "macs" for target in targets) else _TIMINGS
        timed = timings * clock.expected((merged + unmerged) * clock.batch_size)
        counted = counted_images(1 if is_begun else len(FRONT) + 1)
        expect((total + counted) * merged + sum(sizes.values()) * unmerged + timed)
    done = 0

    def follow(part: str, images: int) -> None:
        nonlocal done
        done = min(total, done + images)
        if progress is not None:
            progress(done, total)

    subject.on_outcome = follow


def _seconds(subject: Subject, search: Search) -> tuple[float, float]:
    """Return the seconds of one image merged, in the faster of two passes over the screening images, and unmerged."""
    trial = subject.trial("screen")
    reduced = trial.reduced(subject.config(search.starts[0], fit(subject, (1.0,) * subject.depth, search.reference)))
    ends = [time.perf_counter()]
    for _ in range(3):  # the first pass computes the unmerged answers too
        trial.judge([reduced])
        ends.append(time.perf_counter())
    both, *merged = ((end - start) / len(trial.data) for start, end in pairwise(ends))
    return min(merged), max(0.0, both - min(merged))
