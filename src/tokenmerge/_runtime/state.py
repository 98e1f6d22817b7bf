"""The state shared by all runners of a model, and the lookup of a layer's input tokens in it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge import kernels
from tokenmerge._runtime.frames import Frame, Known, Own, Pairs
from tokenmerge._torch.memory import recall, remember
from tokenmerge._torch.tracing import (
    fail,
    is_compiling,
    is_exporting,
    is_in_backward,
    is_tracing,
    outside_graph,
    refuse_symbols,
    trace_number,
)
from tokenmerge.errors import UnsupportedError
from tokenmerge.plan import AnyPlan, DroppingPlan, compose
from tokenmerge.schedule import Schedule

__all__ = ["ForwardState"]

_REMEDY = (
    "Unpatch the model and patch it as it is now, or patch with restore='dense', which puts every token back in its "
    "place after every block."
)
_FAMILIES = itertools.count(1)


class ForwardState:
    """The settings shared by all runners of a model, and the frames of its forwards.

    Sizes belong to tokens. Each layer notes its frame with the memory of its output, and looks up the frame of its
    input there; this works in any thread, layer order or copy of the model. Tokens that no layer returned start a new
    frame if that is correct, else they are rejected. A forward traced as a whole keeps its frame in the graph. If only
    a part of a forward is compiled, this code runs outside the graphs.
    """

    def __init__(self, depth: int, schedule: Schedule) -> None:
        self.depth = depth
        self.schedule = schedule
        self.enabled = True
        self.is_removed = False
        self.is_wrapped = False  # blocks were wrapped by other modules, which may change their output
        self.family = next(_FAMILIES)  # shared by copies, so that one can continue a forward of another
        self.track: bool | str = False  # "pairs": the pairs too
        self.restore = ""  # for forwards of the model itself, as `Frame.restore`
        self.hands_out_merged = False  # the user chose restore="merged", which holds for any caller of the blocks
        self.needs_places = False
        self.tokens: int | None = None  # number of input tokens, if the model defines it
        self._model: weakref.ref[nn.Module] | None = None
        self.latest: Frame | None = None
        self._traced: Frame | None = None
        self._traced_out: Tensor | None = None
        self._trace, self._trace_loops = 0, False  # the trace in which the model's own forward, or a part's, runs
        self._forget()

    @property
    def model(self) -> nn.Module | None:
        """The patched model; None in a copy of a part of it, or if it was deleted."""
        return None if self._model is None else self._model()

    @model.setter
    def model(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def begin(self, layer: int, x: Tensor, n: int, has_hooks: bool) -> tuple[Frame, int]:
        """Return the frame of a layer's `n` input tokens `x`, and their entry in it.

        `has_hooks`: hooks may have changed the previous layer's output. Raises `UnsupportedError` for merged tokens of
        unknown sizes.
        """
        if not is_compiling():
            if self.is_merging():
                refuse_symbols((x,))
            return self._enter(layer, x, n, has_hooks)
        if is_tracing():
            return self._begin_traced(layer, x)
        found: tuple[Frame, int] = outside_graph.run(self._enter, layer, x, n, has_hooks)
        return found

    def record(self, frame: Frame, slot: int, layer: int, x: Tensor, size: Tensor | None, plan: AnyPlan | None) -> None:
        """Record a layer's output: its shape `[B, M, ...]`, its sizes `[B, M]` and, if needed, its groups."""
        frame.size[layer + 1] = size
        frame.shape[layer + 1] = (x.shape[0], x.shape[1])
        kept, needs_groups = frame.kept[slot], frame.is_tracked or bool(frame.restore)
        if plan is not None and (needs_groups or self.needs_places):
            kept = plan.keep if kept is None else kept.gather(1, plan.keep)
        similarity = frame.similarity[layer + 1]
        if similarity is not None and plan is not None:
            frame.pairs[layer + 1] = _placed(plan, frame.kept[slot], similarity)
        frame.kept[layer + 1] = kept
        if needs_groups:
            previous = frame.assign[slot]
            if plan is not None:
                previous = compose(previous, plan)
            elif previous is None:
                previous = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
            frame.assign[layer + 1] = previous
        is_last = layer == self.depth - 1
        frame.restored[layer + 1] = frame.restore == "every" or (frame.restore == "last" and is_last)
        frame.last = max(frame.last, layer + 1)  # a backward may run an earlier layer again

    def put_out(self, frame: Frame, layer: int, out: Tensor, has_hooks: bool) -> None:
        """Note the output that a layer returns to the host; `has_hooks`: forward hooks may still change it."""
        if not is_compiling():
            self._put_out(frame, layer, out, has_hooks)
        elif not is_tracing():
            outside_graph.run(self._put_out, frame, layer, out, has_hooks)
        elif is_exporting():
            self._traced_out = out
        else:
            self.latest = frame

    def final_size(self, x: Tensor, cut: int = 0) -> Tensor | None:
        """Return the sizes `[B, M]` of the last block's tokens; None if all are 1.

        `x` `[B, M - cut, C]` holds the pooled tokens, without the first `cut`. Raises `UnsupportedError` for merged
        tokens of unknown sizes.
        """
        if not is_compiling():
            return self._final_size(x, cut)
        if is_tracing():
            frame = self._traced
            return None if frame is None or frame.restored[frame.last] else frame.size[frame.last]
        size: Tensor | None = outside_graph.run(self._final_size, x, cut)
        return size

    def amount(self, frame: Frame, layer: int, tokens: int, prefix: int) -> int:
        """Return how many of `tokens` a layer removes; a recomputation in backward removes as many as the forward."""
        if not is_compiling() and is_in_backward():
            return frame.schedule.at(layer, tokens, prefix) if frame.schedule else 0
        return self.schedule.at(layer, tokens, prefix) if self.is_merging() else 0

    def is_merging(self) -> bool:
        """Return whether a forward started now could remove tokens."""
        return self.enabled and not self.is_removed and self.schedule.is_merging

    def is_at_work(self) -> bool:
        """Return whether a forward could remove tokens now, or the current one did before merging was switched off."""
        if self.is_merging() or is_compiling():
            return self.is_merging()
        frame = self._own.current
        return frame is not None and frame.size[frame.last] is not None

    def is_inside(self) -> bool:
        """Return whether the forward of the model, or of a part that runs the blocks, is running."""
        if not is_compiling():
            return self._own.forwards > 0 or self._own.loops > 0
        if is_tracing():
            is_there: bool = self._trace == trace_number()
            return is_there
        found: bool = outside_graph.run(self.is_inside)
        return found

    def last(self) -> Frame | None:
        """Return the last forward of this thread, else of any thread; a compiled forward belongs to no thread."""
        if self.latest is not None and self.latest.trace:
            return self.latest
        return self._own.newest or self.latest

    @contextmanager
    def running(self, is_loop: bool) -> Iterator[None]:
        """Mark the model's own forward, or with `is_loop` that of a part of it, as running in this thread."""
        own, before = self._own, self._own.current
        is_outermost = not (own.forwards or own.loops)
        own.loops, own.forwards = own.loops + is_loop, own.forwards + (not is_loop)
        if is_outermost or not is_loop:
            own.current = None
        try:
            yield
            self._check_restored(own.current)
        finally:
            own.loops, own.forwards = own.loops - is_loop, own.forwards - (not is_loop)
            # code after a part of the model reads its sizes
            if is_outermost or not is_loop:
                own.current = before

    def trace_running(self, number: int, is_loop: bool) -> tuple[int, bool, Frame | None]:
        """Do in a graph what `running` does in eager mode; returns the argument for `trace_left`."""
        before = (self._trace, self._trace_loops, self._traced)
        if self._trace != number:
            self._trace, self._trace_loops, self._traced = number, is_loop, None
        elif not is_loop:
            self._trace_loops = False
        return before

    def trace_left(self, before: tuple[int, bool, Frame | None]) -> None:
        """Undo `trace_running`; the surrounding forward, if any, keeps the frame."""
        frame = self._traced
        self._trace, self._trace_loops, self._traced = before
        if self._trace:
            self._traced = frame

    def tag(self, tokens: Tensor) -> None:
        """Note the current frame with tokens that the model returns."""
        frame = self._own.current
        if frame is not None and frame.last and recall(tokens)[0] is None:
            remember(tokens, Known(frame, frame.last))

    def _enter(self, layer: int, x: Tensor, n: int, has_hooks: bool) -> tuple[Frame, int]:
        frame, slot = self._begin(layer, x, n, has_hooks)
        kernels.watch(frame.ran)
        return frame, slot

    def _begin(self, layer: int, x: Tensor, n: int, has_hooks: bool) -> tuple[Frame, int]:
        own, (known, is_same), in_backward = self._own, recall(x), is_in_backward()
        if known is not None and known.frame.family != self.family:
            known = None  # of another model
        is_inside, was_run = own.forwards > 0 or own.loops > 0, known is not None and is_same and in_backward
        if not (known.frame.schedule if known is not None and was_run else self.is_at_work()):
            goes_on = known is not None and is_same and (0 < known.slot <= layer or in_backward)
            if known is not None and goes_on and known.frame.size[known.slot] is None:
                return known.frame, known.slot
            return self._open(x, in_backward), 0
        if known is not None and (is_same or known.frame is not own.current) and (known.slot or in_backward):
            slot = self._check_known(known, layer, is_same)
            if slot is not None:
                frame = known.frame
                if frame.shape[layer + 1] is not None and not in_backward:
                    frame = frame.fork(slot)
                    own.newest = self.latest = frame
                own.current = frame if is_inside else own.current
                return frame, slot
        current = own.current
        if in_backward and not is_inside:
            raise UnsupportedError(
                f"block {layer} is run again in a backward (gradient checkpointing) on tokens whose forward is not "
                "known: their memory was copied meanwhile, or what was written into it. Checkpoint without moving what "
                "is saved, or set handle.r = 0."
            )
        if layer and current is not None and current.last and current.restore != "every":
            slot = current.last
            if current.size[slot] is not None:
                self._check_changed(current, layer, x, n, has_hooks or self.is_wrapped)
                remember(x, Known(current, slot))  # a checkpoint may pass them to the layer again
                return current, slot
            if slot <= layer and current.shape[slot] == (_batch(x, n), n):
                return current, slot
        if layer and not is_inside:
            self._check_whole(layer, n)
        return self._open(x, in_backward, layer), 0

    def _check_known(self, known: Known, layer: int, is_same: bool) -> int | None:
        """Return the entry of tokens that a layer returned; None if nothing was merged in them."""
        frame, slot = known.frame, known.slot
        if slot <= layer and (layer or slot == 0) and is_same:
            return slot
        if slot == 0 or frame.size[slot] is None or frame.restored[slot]:
            return None
        what = "the tokens" if is_same else "a part of the tokens, or a rearrangement of them,"
        raise UnsupportedError(
            f"block {layer} was given {what} that block {slot - 1} put out, merged already: blocks run in their order, "
            f"each on all tokens of the one before. {_REMEDY}"
        )

    def _check_changed(self, frame: Frame, layer: int, x: Tensor, n: int, has_hooks: bool) -> None:
        """Reject tokens that are not the previous layer's output, unless a hook, cast or device move explains it."""
        device, dtype, could_change = frame.out
        is_explained = has_hooks or could_change or x.device != device or x.dtype != dtype
        if frame.last == layer and frame.shape[layer] == (_batch(x, n), n) and is_explained:
            return
        raise UnsupportedError(
            f"block {layer} was given tokens that the block before, {frame.last - 1}, did not put out, while tokens "
            "are merged: how many each one stands for is not known. Something between the blocks replaces tokens, or a "
            f"block there was replaced or left out since the model was patched. {_REMEDY}"
        )

    def _check_whole(self, layer: int, n: int) -> None:
        """Reject, outside a forward, tokens that look like merged ones of another process or copy."""
        loose = self._own.loose
        is_next = loose is not None and loose.last == layer and not loose.restored[layer]
        merged = is_next and loose is not None and loose.size[layer] is not None and n in (loose.shape[layer] or ())[1:]
        if merged or (self.tokens is not None and n < self.tokens):
            raise UnsupportedError(
                f"block {layer} was called by itself on {n} tokens that no block of this model put out here; an "
                f"input has {self.tokens or 'another number'}. If they are merged, how many each one stands for is not "
                "known. Run the blocks before it in the same process, or `with handle.disabled():` for it alone."
            )

    def _open(self, x: Tensor, in_backward: bool, layer: int = 0) -> Frame:
        own = self._own
        frame = Frame(self.depth, self._mode(own.forwards > 0, own.loops > 0))
        if layer and own.current is not None and own.current.last == layer:
            # code between the blocks made new tokens: they start with size 1, but the frame's report data stays
            frame = own.current.fork(layer)
            frame.memory = {}
        frame.is_tracked, frame.tracks_pairs, frame.family = bool(self.track), self.track == "pairs", self.family
        frame.schedule = self.schedule if self.is_merging() else None
        if not in_backward:
            own.newest = self.latest = frame
        if own.forwards or own.loops:
            own.current = frame
        elif self.is_merging():
            own.loose, self.ran_loose = frame, True
        remember(x, Known(frame, 0))  # a checkpoint may pass them to the layer again
        return frame

    def _mode(self, is_forward: bool, is_loop: bool) -> str:
        """Return after which layers all tokens are restored, which depends on the code that runs the blocks."""
        if self.restore == "every" or is_forward or self.hands_out_merged:
            return self.restore
        return "last" if is_loop else "every"

    def _put_out(self, frame: Frame, layer: int, out: Tensor, has_hooks: bool) -> None:
        kernels.watch(None)
        if isinstance(out, Tensor):
            remember(out, Known(frame, layer + 1))
            frame.out = (out.device, out.dtype, has_hooks)

    def _begin_traced(self, layer: int, x: Tensor) -> tuple[Frame, int]:
        number, frame = trace_number(), self._traced
        is_inside = self._trace == number
        goes_on = layer > 0 and frame is not None and frame.trace == number and (is_inside or x is self._traced_out)
        if frame is None or not goes_on:
            frame = self._traced = Frame(self.depth, self._mode(is_inside and not self._trace_loops, is_inside), number)
            frame.is_tracked, frame.tracks_pairs = bool(self.track), self.track == "pairs"
        if frame.last > layer:
            fail(f"block {layer} was called behind block {frame.last - 1} in one forward, on merged tokens. {_REMEDY}")
        return frame, frame.last

    def _final_size(self, x: Tensor, cut: int) -> Tensor | None:
        own, known = self._own, recall(x)[0]
        if known is not None and known.slot and known.frame.family == self.family:
            frame, slot = known.frame, known.slot
        elif own.current is not None:
            frame, slot = own.current, own.current.last
        else:
            newest, n = own.newest, x.shape[1] + cut
            is_merged = (
                newest is not None and newest.size[newest.last] is not None and newest.shape[newest.last] == (len(x), n)
            )
            if self.is_merging() and (is_merged or (self.tokens is not None and n != self.tokens)):
                raise UnsupportedError(
                    f"{n} tokens are to be pooled that no forward of this model handed out; an input "
                    f"has {self.tokens}. If they are merged, how many each one stands for is not known. Give what "
                    "forward_features() returned, as it is."
                )
            return None
        size = None if frame.restored[slot] else frame.size[slot]
        if size is not None and size.shape != (x.shape[0], x.shape[1] + cut):
            raise UnsupportedError(
                f"tokens {tuple(x.shape)} are to be pooled, and the forward they are of ended with "
                f"{tuple(size.shape)}: how many each one stands for is not known. Give all of them, as they "
                "were put out."
            )
        return size

    def _check_restored(self, frame: Frame | None) -> None:
        if frame is None or frame.restore != "last" or frame.last in (0, self.depth):
            return
        if frame.size[frame.last] is not None:
            raise UnsupportedError(
                f"the forward ended after block {frame.last - 1} of {self.depth}, and tokens are put back in their "
                f"places after the last one: they are merged still. {_REMEDY}"
            )

    def _forget(self) -> None:
        outside_graph.prepare()
        self._own = Own()
        self.latest = self._traced = self._traced_out = None
        self._trace, self._trace_loops = 0, False
        self.ran_loose = False  # code outside the model called blocks directly

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings, without any forward and with merging enabled, for copies and pickles."""
        fresh = ForwardState(self.depth, self.schedule).__dict__
        runtime = ("_own", "latest", "ran_loose", "_trace", "_trace_loops", "_traced", "_traced_out", "_model")
        return {key: self.__dict__[key] for key in fresh if key not in runtime} | {"enabled": True}

    def __setstate__(self, settings: dict[str, Any]) -> None:
        self.__dict__.update(settings)
        self._model = None  # set by the code that copies a whole model
        self._forget()


def _placed(plan: Any, places: Tensor | None, similarity: Tensor) -> Pairs:
    """Return the pairs of a plan by places; `places` `[B, N]` are those of its tokens, None: 0 to N - 1."""
    into = plan.keep.gather(1, plan.dst)
    gone, into = (plan.src, into) if places is None else (places.gather(1, plan.src), places.gather(1, into))
    into = into.masked_fill(plan.dropped, -1) if isinstance(plan, DroppingPlan) else into
    return Pairs(gone, into, similarity)


def _batch(x: Tensor, n: int) -> int:
    """Return the batch size of tokens `[B, n, C]` or `[n, B, C]`."""
    return int(x.shape[0] if x.shape[1] == n else x.shape[1])
