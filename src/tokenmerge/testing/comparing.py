"""Comparisons that say the numbers, and the one loop that runs promises and names the one that is broken."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tokenmerge.errors import ConfigError, unknown_name

__all__ = ["TOLERANCE", "assert_close", "assert_equal", "expect", "keep_promises", "traces"]

Case = TypeVar("Case")

# rounding of one forward, relative to the largest value
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 1e-2}


def expect(condition: object, what: str) -> None:
    """Raise `AssertionError` with these words where a condition does not hold; unlike `assert`, also under `-O`."""
    if not condition:
        raise AssertionError(what)


def assert_close(got: Tensor, expected: Tensor, tolerance: float | None = None, what: str = "") -> None:
    """Raise `AssertionError` with both extremes where two tensors differ by more than the tolerance of their dtype.

    The tolerance is relative to the largest value, and to 1 where that is smaller. `what` opens the message.
    """
    opening = f"{what}: " if what else ""
    expect(got.shape == expected.shape, f"{opening}the shape {tuple(got.shape)} is not {tuple(expected.shape)}")
    tolerance = TOLERANCE[got.dtype] if tolerance is None else tolerance
    difference = (got.double() - expected.double()).abs().max().item() if got.numel() else 0.0
    scale = max(1.0, expected.double().abs().max().item()) if got.numel() else 1.0
    expect(
        difference <= tolerance * scale,
        f"{opening}max |difference| {difference:.3g}, largest value {scale:.3g}, tolerance {tolerance:.3g}",
    )


def assert_equal(got: Tensor, expected: Tensor, what: str) -> None:
    """Raise `AssertionError` with how much differs where two tensors are not equal bit by bit."""
    expect(got.shape == expected.shape, f"{what}: the shape {tuple(got.shape)} is not {tuple(expected.shape)}")
    expect(got.dtype == expected.dtype, f"{what}: {got.dtype} is not {expected.dtype}")
    if torch.equal(got, expected):
        return
    differs = got != expected
    places = differs.nonzero()
    at = tuple(places[0].tolist()) if len(places) else ()
    shown = f"first at {at}: {got[at].item()} is not {expected[at].item()}" if at else "some values are no numbers"
    raise AssertionError(f"{what}: {int(differs.sum())} of {got.numel()} values differ, {shown}")


def traces(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Return what patching could leave behind in each module: its class, its attributes and its hooks."""
    return {
        path: (type(part), sorted(part.__dict__), [*part._forward_hooks], [*part._forward_pre_hooks])
        for path, part in model.named_modules()
    }


def keep_promises(
    subject: str,
    promises: Mapping[str, Callable[[Case], None]],
    case: Case,
    only: Iterable[str] = (),
    skip: Mapping[str, str] | None = None,
) -> None:
    """Run the checks of a case, each with the same random state; that of the caller stays what it was.

    Raises `AssertionError` with the promise that is broken, `UnknownNameError` for one that does not exist or does not
    apply, and `ConfigError` for one that is skipped without a reason and where nothing is left to check.
    """
    skip = {} if skip is None else skip
    for name, value, kind in (("skip", skip, Mapping), ("only", only, Iterable)):
        if not isinstance(value, kind):
            example = "only=['batches'], a list, and skip={'batches': 'why'}, each with its reason"
            raise ConfigError(f"{name}={value!r}: give {example}.")
    chosen = [only] if isinstance(only, str) else [*only]
    for name in (*chosen, *skip):
        if name not in promises:
            raise unknown_name("promise", str(name), promises)
    for name, reason in skip.items():
        if not isinstance(reason, str) or not reason.strip():
            raise ConfigError(f"the promise {name!r} is skipped without a reason: skip={{{name!r}: 'why'}}.")
    left = [name for name in chosen or promises if name not in skip]
    if not left:
        raise ConfigError(
            f"{subject}: nothing is left to check; all of {', '.join(chosen or promises)} are skipped. Check another "
            "promise, or do not check here."
        )
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    for name in left:
        try:
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(0)
                promises[name](case)
        except Exception as error:
            promise = (inspect.getdoc(promises[name]) or "").split("\n")[0]
            seen = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"[:600]
            raise AssertionError(f"{subject} breaks the promise {name!r}. {promise}\n{seen}") from error
