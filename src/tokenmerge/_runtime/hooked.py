"""Merge inside a block we cannot recompose: run its own forward and intercept its attention, second norm and MLP.

The block computes `out = x + f(x)`, with x the input of its second norm and f the norm, MLP and layer scale. Here the
norm receives `merge(x)`, and the MLP output is unmerged to N tokens, so `out = x + unmerge(f(merge(x)))`. At the rows
of kept tokens, `merge(x) + (out - x) = merge(x) + f(merge(x))`: the result of a recomposed block.

Shapes: B batch, N tokens in, M tokens out, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from tokenmerge import kernels
from tokenmerge._intercept.follow import rows
from tokenmerge._intercept.taps import Slot
from tokenmerge._runtime.frames import Call, Frame
from tokenmerge._runtime.residual import ResidualRunner
from tokenmerge._torch.tracing import in_pieces, outside_graph
from tokenmerge.adapters.base import Binding, Override, first_of
from tokenmerge.errors import AdapterMismatchError, UnsupportedError
from tokenmerge.plan import AnyPlan, assignment

__all__ = ["HookedRunner"]


@dataclass(eq=False)
class _Turn:
    """State of one block call, shared between the overrides of its children."""

    call: Call
    is_silent: bool = False  # a probe: the MLP returns zeros
    mid: Tensor | None = None  # [B, N, C] input of the norm
    plan: AnyPlan | None = None
    merged: Tensor | None = None  # [B, M, C]
    size: Tensor | None = None  # [B, M]


class HookedRunner(ResidualRunner):
    """Runs the block's own forward and merges the input of its second norm; see the module docstring."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.slot = Slot()
        self.listeners: dict[str, _Norm] = {}

    def seams(self) -> list[Binding]:
        norm, mlp = (self.block.get_submodule(name) for name in (self.spec.norm, self.spec.mlp))
        listeners = [_Norm(norm, self), _Mlp(mlp, self)]
        self.listeners = dict(zip((self.spec.norm, self.spec.mlp), listeners, strict=True))
        return [Binding(listener.owner, "forward", listener) for listener in listeners]

    def turn(self) -> _Turn | None:
        """Return the state of the running call of this block in this thread; None if it merges nothing."""
        found: _Turn | None = self.slot.peek().get("turn")
        return found

    def compose(self, call: Call) -> tuple[Tensor, Tensor | None, AnyPlan | None]:
        self._follow(call.given, None)
        turn = _Turn(call)
        out = outside_graph.run(self._run, turn) if in_pieces() else self._run(turn)
        if turn.plan is None or turn.mid is None or turn.merged is None:
            return out, call.size, None
        tokens = turn.merged + (rows(out, turn.plan.keep) - rows(turn.mid, turn.plan.keep))
        return tokens, turn.size, turn.plan

    def parity(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        tokens = x if self.layout.batch_first else x.transpose(0, 1)
        call = self._call(tokens, None, None, 0, self.by_name(args, kwargs), Frame(0))
        out = self._run(_Turn(call))
        silent = _Turn(call, is_silent=True)
        rest = self._run(silent) - silent.mid  # type: ignore[operator]
        if not rest.is_meta and not rest.abs().max().item() <= 1e-4 * max(1.0, out.abs().max().item()):
            raise AdapterMismatchError(
                f"block {self.layer} ({type(self.block).__qualname__}) is not norm={self.spec.norm!r} and "
                f"mlp={self.spec.mlp!r} on a residual: with the MLP put to zero it should return what enters the norm, "
                f"and it differs by {rest.abs().max().item():.2g}. Only pre-norm blocks, x + mlp(norm(x)) after the "
                "attention, can be merged in; parallel and post-norm blocks cannot."
            )
        return self._mirror(out)

    def counted(self, x: Tensor, size: Tensor | None, kept: Tensor | None, given: Mapping[str, Any]) -> Tensor:
        self._follow(given, None)
        return self._run(_Turn(self._call(x, size, kept, 0, given, Frame(0))))

    def _check_children(self) -> None:
        for name, listener in self.listeners.items():
            found = attrgetter(name)(self.block)
            if found is not listener.owner:
                raise UnsupportedError(
                    f"since the model was patched, {name!r} of block {self.layer} ({type(self.block).__qualname__}) "
                    f"was replaced: it was a {type(listener.owner).__qualname__} and is a {type(found).__qualname__}. "
                    "Tokens are merged on the way into it or out of it. Call handle.remove() and patch the model as it "
                    "is now."
                )

    def _run(self, turn: _Turn) -> Tensor:
        x = turn.call.x
        self._check_children()
        self.slot.put({"turn": turn})
        self.tap.expect(turn.call.bias, None)
        try:
            out = first_of(self.original(x if self.layout.batch_first else x.transpose(0, 1), **turn.call.given))
        finally:
            self.slot.take()
            self.tap.forget()
        if turn.mid is None:
            raise AdapterMismatchError(
                f"block {self.layer} ({type(self.block).__qualname__}) did not call {self.spec.norm!r} before "
                f"{self.spec.mlp!r}: it is not pre-norm, or it computes them in one piece."
            )
        tokens: Tensor = out if self.layout.batch_first else out.transpose(0, 1)
        return tokens

    def reduce(self, turn: _Turn, mid: Tensor) -> Tensor:
        """Merge the input of the norm, `[B, N, C]` to `[B, M, C]`."""
        self.tap.check()
        seen = self.tap.take()
        turn.mid = turn.merged = mid
        if not turn.call.r:
            if not turn.is_silent:
                self._check_seen(seen, mid.shape[1])
            return mid
        plan = self._choose(turn.call, mid, None, seen)
        turn.merged, turn.size, turn.plan = self._apply(plan, turn.call, mid, None)
        return turn.merged


class _Norm(Override):
    def __init__(self, owner: torch.nn.Module, runner: HookedRunner) -> None:
        super().__init__(owner)
        self.runner = runner

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        turn = self.runner.turn()
        if turn is None:
            return self.original(x, *args, **kwargs)
        is_first = self.runner.layout.batch_first
        tokens = self.runner.reduce(turn, x if is_first else x.transpose(0, 1))
        return self.original(tokens if is_first else tokens.transpose(0, 1), *args, **kwargs)


class _Mlp(_Norm):
    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        turn = self.runner.turn()
        out = self.original(x, *args, **kwargs)
        if turn is None or turn.mid is None:
            return out
        if turn.is_silent:
            return torch.zeros_like(out)
        if turn.plan is None:
            return out
        is_first = self.runner.layout.batch_first
        spread = kernels.unmerge(out if is_first else out.transpose(0, 1), assignment(turn.plan))
        return spread if is_first else spread.transpose(0, 1)
