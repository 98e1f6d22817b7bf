"""Detect tracing and tell traces apart: a graph must not use notes of another trace or of eager mode."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from tokenmerge.errors import UnsupportedError

__all__ = [
    "WHOLE",
    "fail",
    "in_pieces",
    "is_compiling",
    "is_exporting",
    "is_in_backward",
    "is_tracing",
    "outside_graph",
    "refuse_symbols",
    "trace_number",
]

_NUMBERS = itertools.count(1)


class _Whole:
    """The number of the trace that contains a whole forward of a patched model; 0 outside of such a trace."""

    trace = 0


WHOLE = _Whole()


def is_compiling() -> bool:
    """Return whether this thread is being traced; `torch.compiler.is_compiling` covers all threads."""
    if torch.compiler.is_dynamo_compiling():
        return True
    # non-strict torch.export runs Python under its own dispatch modes
    return torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def is_tracing() -> bool:
    """Return whether a whole forward is traced into one graph, so that no part of it runs outside of the graph.

    False in eager mode, and if only a piece of a forward is compiled: single blocks, or code between two graph breaks.
    Eager code keeps the state then.
    """
    return is_compiling() and (is_exporting() or WHOLE.trace == trace_number())


def in_pieces() -> bool:
    """Return whether only a piece of a forward is compiled; `outside_graph` runs what other pieces must see."""
    return is_compiling() and not is_tracing()


def is_in_backward() -> bool:
    """Return whether a backward runs in this thread, e.g. for recomputation in gradient checkpointing."""
    return bool(torch._C._current_graph_task_id() != -1)


def is_exporting() -> bool:
    """Return whether `torch.export` is making the graph."""
    # torch 2.6 has no is_exporting
    return bool(getattr(torch.compiler, "is_exporting", lambda: False)())


def trace_number() -> int:
    """Return the number of the current trace, -1 in non-strict export. Compilers treat the result as a constant."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        graph = InstructionTranslator.current_tx().output
    except AttributeError:  # non-strict torch.export runs the model's Python
        return -1
    number: int = vars(graph).setdefault("_tokenmerge_number", next(_NUMBERS))
    return number


_APART = (
    "the sizes of merged tokens go from block to block outside of the graphs of blocks that are compiled one by one. "
    "Compile the whole model, or its blocks without fullgraph=True."
)


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


class _Outside:
    """Runs functions between two graphs, in eager mode: `outside_graph.run(function, *args)`."""

    run: Callable[..., Any] = staticmethod(_call)

    def prepare(self) -> None:
        """Exclude `run` from compilation; called at the first patch, when the hosts have imported the compiler."""
        if self.run is _call:
            # torch 2.6 has no `reason`
            has_reason = "reason" in inspect.signature(torch.compiler.disable).parameters
            self.run = torch.compiler.disable(_call, **({"reason": _APART} if has_reason else {}))


outside_graph = _Outside()


def refuse_symbols(things: Iterable[Any]) -> None:
    """Raise `UnsupportedError` if one of the inputs is a proxy of torch.fx, which has no values to merge by."""
    if any(isinstance(thing, torch.fx.Proxy) for thing in things):
        raise UnsupportedError(
            "torch.fx.symbolic_trace (torchvision's create_feature_extractor) has no values, and which tokens are "
            "merged depends on them. Trace the patched model with torch.export or torch.jit.trace, or set handle.r = 0 "
            "for a trace that never merges."
        )


def fail(message: str) -> None:
    """Raise `UnsupportedError`; also under strict export, which wraps other errors of the traced code."""
    if is_compiling() and is_exporting():
        _fail_now(message)
    raise UnsupportedError(message)


def _fail_now(message: str) -> None:
    raise UnsupportedError(message)


# compilers treat the results of these as constants; torch.compiler.assume_constant_result sets the same flag, but
# imports dynamo and triton first
trace_number._dynamo_marked_constant = _fail_now._dynamo_marked_constant = True  # type: ignore[attr-defined]
