"""One public function per operation, and the table of implementations."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tokenmerge._torch.tracing import is_compiling, trace_number
from tokenmerge.errors import UnsupportedError, unknown_name
from tokenmerge.kernels import attention, cpu, matmul, reference, triton_supports
from tokenmerge.kernels.reference import Side, alternating, choose, full_precision, unit

__all__ = [
    "Ran",
    "Side",
    "alternating",
    "attend",
    "bipartite",
    "choose",
    "fallbacks",
    "force",
    "full_precision",
    "is_replaced",
    "match",
    "merge",
    "note",
    "ran_in_trace",
    "reduce",
    "select",
    "unit",
    "unmerge",
    "watch",
]

Ran = dict[tuple[str, str], str]  # (operation, implementation that ran) -> device type


class Kernel(NamedTuple):
    name: str
    run: Callable[..., Any]
    supports: Callable[[Tensor], bool]  # a pure predicate on device, dtype and shape; never raises
    needs: str = "nothing"  # requirements in words, for the error message
    device: str = ""  # the device type it is made for; "": any
    is_automatic: bool = True  # False: runs only when forced by name
    unmet: Callable[[], str] | None = None  # what is missing where it did not run on its device, in words


def _reference(op: str) -> Kernel:
    return Kernel("reference", getattr(reference, op), lambda x: True)


def _cpu(op: str) -> Kernel:
    needs = (
        "a CPU, float32 or bfloat16, and the part in C++, which is built when tokenmerge is installed where a C++ "
        "compiler (c++) is found"
    )
    unmet = partial(cpu.unmet, op)
    return Kernel("cpu", getattr(cpu, op), getattr(cpu, f"supports_{op}"), needs, device="cpu", unmet=unmet)


# the first call imports triton, not `import tokenmerge`; with statements, since dynamo does not support import_module
def _triton_attend(*args: Any) -> Any:
    from tokenmerge.kernels import triton_attention

    return triton_attention.attend(*args)


def _triton_bipartite(*args: Any) -> Any:
    from tokenmerge.kernels import triton_match

    return triton_match.bipartite(*args)


def _triton_merge(*args: Any) -> Any:
    from tokenmerge.kernels import triton_merge

    return triton_merge.merge(*args)


def _triton(run: Callable[..., Any], supports: Callable[[Tensor], bool]) -> Kernel:
    needs = "triton, a CUDA device (or TRITON_INTERPRET=1) and float32, float16 or bfloat16"
    # not chosen automatically, since it was not measured on a GPU
    unmet = triton_supports.unmet
    return Kernel("triton", run, supports, needs, device="cuda", is_automatic=False, unmet=unmet)


def _by_name(
    name: str, run: Callable[..., Any], supports: Callable[[Tensor], bool] = lambda x: True, needs: str = "nothing"
) -> Kernel:
    """Return a plain torch implementation that runs only when forced by name."""
    return Kernel(name, run, supports, needs, is_automatic=False)


# fastest first; the reference supports everything and comes last
TABLE: dict[str, tuple[Kernel, ...]] = {
    "attend": (
        _triton(_triton_attend, triton_supports.supports_attend),
        _by_name("columns", attention.columns),
        _by_name("values", attention.values),
        _by_name("flex", attention.flex, attention.supports_flex, "a CUDA device, a head width of 2^n"),
        _reference("attend"),
    ),
    "bipartite": (
        _cpu("bipartite"),
        _triton(_triton_bipartite, triton_supports.supports_bipartite),
        _reference("bipartite"),
    ),
    "match": (_reference("match"),),
    "merge": (
        _cpu("merge"),
        _triton(_triton_merge, triton_supports.supports_merge),
        _by_name("matmul", matmul.merge),
        _reference("merge"),
    ),
    "reduce": (_reference("reduce"),),
    "unmerge": (_reference("unmerge"),),
}
NAMES = sorted({kernel.name for row in TABLE.values() for kernel in row})
_forced = ""  # set by `force`, for the whole process like the environment variable


class _Watch(threading.local):
    """Per-thread record of the implementations that run."""

    ran: Ran | None = None


_watch = _Watch()
_traced: dict[int, Ran] = {}  # the implementations in each traced graph, by trace number


def bipartite(metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Match even-placed with odd-placed tokens by cosine similarity and absorb the `r` best.

    Takes keys `[B, H, N, D]`, whose heads are averaged, or one metric `[B, N, D]`. Returns `keep` `[B, N - r]`, `src`
    and `dst` `[B, r]` of a plan; `0 < r <= (N - prefix) // 2`. Of equal scores the first place wins.
    """
    # not while tracing: the comparison would specialise symbolic sizes
    if not is_compiling() and not 0 <= r <= (metric.shape[-2] - prefix) // 2 <= metric.shape[-2] // 2:
        raise UnsupportedError(
            f"matching was asked to remove {r} of {metric.shape[-2]} tokens, of which {prefix} are protected; it "
            "removes at most half of the others."
        )
    plan: tuple[Tensor, Tensor, Tensor] = select("bipartite", metric).run(metric, r, prefix)
    return plan


def match(
    metric: Tensor, side_a: Side, side_b: Side, distance: str = "cosine", valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return each A token's best score in side B and that partner's place in B, both `[B, Na]`; metric `[B, N, D]`."""
    best: tuple[Tensor, Tensor] = select("match", metric).run(metric, side_a, side_b, distance, valid)
    return best


def merge(
    x: Tensor, size: Tensor | None, keep: Tensor, src: Tensor, dst: Tensor, branch: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Size-weighted means of groups of `x + branch`: `[B, N, C]` and `[B, N]` to `[B, M, C]` and `[B, M]`."""
    if branch is not None and branch.dtype != x.dtype:
        x, branch = x + branch, None  # autocast makes the dtypes differ
    merged: tuple[Tensor, Tensor] = select("merge", x).run(x, size, keep, src, dst, branch)
    return merged


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None = None) -> Tensor:
    """Compute attention `[B, H, N, D]` with a bias per key on the scores, `[B, N]`.

    A bias that requires a gradient uses the reference; no other implementation has a gradient for it.
    """
    kernel = note("attend", TABLE["attend"][-1], q) if bias.requires_grad else select("attend", q)
    out: Tensor = kernel.run(q, k, v, bias, scale)
    return out


def reduce(x: Tensor, keep: Tensor, src: Tensor, dst: Tensor, mode: str) -> Tensor:
    """Combine groups by `mode` without weights: `[B, N, C]` to `[B, M, C]`."""
    reduced: Tensor = select("reduce", x).run(x, keep, src, dst, mode)
    return reduced


def unmerge(y: Tensor, assignment: Tensor) -> Tensor:
    """Copy every group's row to its members: `[B, M, C]` and `[B, N]` to `[B, N, C]`."""
    spread: Tensor = select("unmerge", y).run(y, assignment)
    return spread


@contextmanager
def force(name: str) -> Iterator[None]:
    """Use the implementation `name` for every operation that has it while inside the `with`, like `TOKENMERGE_KERNELS`.

    Raises `UnknownNameError` for a name that no operation has.
    """
    global _forced
    before, _forced = _forced, _known(name)
    try:
        yield
    finally:
        _forced = before


def watch(ran: Ran | None) -> None:
    """Record in `ran` the implementations that this thread runs from now on; None stops recording.

    Only operations with more than one implementation are recorded.
    """
    _watch.ran = ran


def note(op: str, kernel: Kernel, x: Tensor) -> Kernel:
    """Record that an implementation runs on a tensor like `x`, if `watch` is on; return the implementation."""
    if torch.compiler.is_dynamo_compiling():
        _note_traced(trace_number(), op, kernel.name, x.device.type)
    elif _watch.ran is not None:
        _watch.ran[op, kernel.name] = x.device.type
    return kernel


def ran_in_trace(number: int) -> Ran:
    """Return the implementations in the graph of a trace, by trace number."""
    return _traced.get(number, {})


def _note_traced(number: int, op: str, name: str, device: str) -> None:
    _traced.setdefault(number, {})[op, name] = device


# runs once, when the graph is captured: see tracing.py
_note_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def select(op: str, x: Tensor) -> Kernel:
    """Return the first implementation of `op` that supports `x`; `TOKENMERGE_KERNELS` forces one by name.

    Raises `UnknownNameError` for a forced name that does not exist, and `UnsupportedError` if it cannot run. A compiled
    graph keeps the implementation that was chosen at capture; an exported one uses torch's own operators only.
    """
    kernel = _choose(op, x)
    return kernel if len(TABLE[op]) == 1 else note(op, kernel, x)


def _choose(op: str, x: Tensor) -> Kernel:
    row, forced = TABLE[op], _wish()
    if _leaves_torch() and forced != "matmul":
        return row[-1]
    if not forced:
        return next(kernel for kernel in row if kernel.is_automatic and kernel.supports(x))
    named = [kernel for kernel in row if kernel.name == forced] or [row[-1]]  # an op without it has one only
    if named[0].supports(x):
        return named[0]
    raise UnsupportedError(
        f"the {forced!r} version of {op!r} was asked for (TOKENMERGE_KERNELS or kernels.force); it needs "
        f"{named[0].needs}, and this is {tuple(x.shape)} {x.dtype} on {x.device}. Leave the choice to tokenmerge."
    )


def is_replaced(op: str) -> bool:
    """Return whether an implementation other than the reference may run for `op`."""
    if _leaves_torch():
        return False
    forced = _wish()
    return any(kernel.name == forced if forced else kernel.is_automatic for kernel in TABLE[op][:-1])


def fallbacks(ran: Ran) -> list[str]:
    """Return a sentence for each operation that ran without the implementation made for its device."""
    said = []
    for (op, name), device in ran.items():
        made = [kernel for kernel in TABLE[op] if kernel.device == device]
        if made and all(kernel.name != name for kernel in made):
            how = "" if made[0].is_automatic else f" and has to be asked for: TOKENMERGE_KERNELS={made[0].name}"
            needs = made[0].unmet() if made[0].unmet else made[0].needs
            said.append(f"{op} without its {made[0].name} version, which needs {needs}{how}")
    return said


def _wish() -> str:
    """Return the forced name, or "" if none."""
    name = _forced or os.environ.get("TOKENMERGE_KERNELS", "")
    return _known(name)


def _leaves_torch() -> bool:
    """Return whether only torch's own operators may be used: for export, tracers, functorch and forward-mode AD.

    While a dual level is open, any tensor may carry a tangent.
    """
    if is_compiling():
        # torch 2.6 cannot tell export and compilation apart
        is_exporting: bool = getattr(torch.compiler, "is_exporting", lambda: True)()
        return is_exporting
    if forward_ad._current_level >= 0:
        return True
    return torch._C._get_tracing_state() is not None or torch._C._functorch.peek_interpreter_stack() is not None


def _known(name: str) -> str:
    if name and name not in NAMES:
        raise unknown_name("kernel family (TOKENMERGE_KERNELS)", name, NAMES)
    return name
