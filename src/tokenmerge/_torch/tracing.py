"""Tell one trace of a compiler from another: what was noted in another trace, or in eager mode, is not this graph's."""

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
    """The trace that holds a whole forward of a patched model, by its number; 0 outside of one."""

    trace = 0


WHOLE = _Whole()


def is_compiling() -> bool:
    """Return whether this thread is being traced; `torch.compiler.is_compiling` covers all threads."""
    if torch.compiler.is_dynamo_compiling():
        return True
    # torch.export, where it is not strict, runs Python under modes of its own
    return torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def is_tracing() -> bool:
    """Say whether a whole forward is traced into one graph: nothing of it can run, or have run, outside of the graph.

    False in eager mode, and where a compiler has only a piece of a forward: blocks compiled one by one, or what lies
    between two graph breaks. There, eager code keeps the books.
    """
    return is_compiling() and (is_exporting() or WHOLE.trace == trace_number())


def in_pieces() -> bool:
    """Say whether a compiler has a piece of a forward only; `outside_graph` is for what other pieces must see."""
    return is_compiling() and not is_tracing()


def is_in_backward() -> bool:
    """Return whether a backward runs in this thread, e.g. for recomputation in gradient checkpointing."""
    return bool(torch._C._current_graph_task_id() != -1)


def is_exporting() -> bool:
    """Return whether `torch.export` is making the graph."""
    # torch 2.6 has no is_exporting
    return bool(getattr(torch.compiler, "is_exporting", lambda: False)())


def trace_number() -> int:
    """Return the number of the trace at work, -1 where Python itself runs for one. Compilers take it for a constant."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        graph = InstructionTranslator.current_tx().output
    except AttributeError:  # torch.export runs the model's Python where it is not strict
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
        """Tell the compiler, once something is patched: it is not imported before, and hosts have imported it then."""
        if self.run is _call:
            # torch 2.6 takes no reason
            has_reason = "reason" in inspect.signature(torch.compiler.disable).parameters
            self.run = torch.compiler.disable(_call, **({"reason": _APART} if has_reason else {}))


outside_graph = _Outside()


def refuse_symbols(things: Iterable[Any]) -> None:
    """Raise `UnsupportedError` where one of them is what torch.fx traces with: it has no values to merge by."""
    if any(isinstance(thing, torch.fx.Proxy) for thing in things):
        raise UnsupportedError(
            "torch.fx.symbolic_trace (torchvision's create_feature_extractor) has no values, and which tokens are "
            "merged depends on them. Trace the patched model with torch.export or torch.jit.trace, or set handle.r = 0 "
            "for a trace that never merges."
        )


def fail(message: str) -> None:
    """Raise `UnsupportedError`, as itself where a strict export would wrap what the traced code raises."""
    if is_compiling() and is_exporting():
        _fail_now(message)
    raise UnsupportedError(message)


def _fail_now(message: str) -> None:
    raise UnsupportedError(message)


# compilers take what these return for constants; torch.compiler.assume_constant_result does just this, after it has
# imported dynamo and triton
trace_number._dynamo_marked_constant = _fail_now._dynamo_marked_constant = True  # type: ignore[attr-defined]
