"""What one forward pass knows about its tokens, one slot per layer."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tokenmerge.plan import AnyPlan, compose
from tokenmerge.schedule import Schedule

__all__ = ["ForwardState", "Frame"]


class Frame:
    """The record of one forward: entry i is what enters layer i, the last one what leaves the model.

    Layers read by index and never consume, so a layer that runs twice (gradient checkpointing) sees the same again.
    """

    def __init__(self, depth: int) -> None:
        self.size: list[Tensor | None] = [None] * (depth + 1)  # [B, N_i]; None while all sizes are 1
        self.assign: list[Tensor | None] = [None] * (depth + 1)  # [B, N_0], kept only while tracking
        self.kept: list[Tensor | None] = [None] * (depth + 1)  # [B, N_i] places in the input; None while all are there
        self.shape: list[tuple[int, int] | None] = [None] * (depth + 1)  # (B, N_i)
        # tokens before and after merging in a window, where they are merged for the attention only
        self.inside: list[tuple[int, int] | None] = [None] * (depth + 1)
        # the memory of the tokens that entered each layer, where a backward may follow
        self.entered: list[tuple[StorageWeakRef, ...]] = [()] * depth
        self.has_padding = False  # some tokens are none: their size is 0
        self.memory: dict[int, Any] = {}  # by layer: what the method notes for itself
        self.grid: tuple[int, int] | None = None  # rows and columns of the image's patches, for methods by place


class ForwardState:
    """The settings all runners of a model share, and the frame of the forward that runs.

    In eager mode every thread has its own frame, so one model can serve several threads. A checkpointed layer that is
    run again in a backward finds the frame of its forward, of the last few, by the memory of its input, which the
    checkpoint has kept; the layers that are run again behind it follow it. Tracers get one plain frame, since
    thread-local storage cannot be captured.
    """

    def __init__(self, depth: int, schedule: Schedule) -> None:
        self.depth = depth
        self.schedule = schedule
        self.enabled = True
        self.track = False
        self.restore = ""  # after which layers every input token is handed out: "every", the "last", none
        self.needs_places = False
        self.latest: Frame | None = None
        self._forget()

    def begin(self, layer: int, x: Tensor) -> Frame:
        """Return the frame that this layer, given `x`, belongs to; the first layer of a forward opens a new one."""
        if torch.compiler.is_compiling():
            if layer == 0:
                self._traced.memory = {}
            return self._traced
        if _is_in_backward():
            return self._begin_again(layer, x)
        frame = getattr(self._own, "frame", None)
        has_backward = torch.is_grad_enabled() or x.requires_grad
        if layer == 0:
            frame = self._own.frame = self.latest = Frame(self.depth)
            if has_backward:
                self._recent.append(frame)
        frame = frame or self.latest or self._traced
        if has_backward:
            frame.entered[layer] = _memory(x)
        return frame

    def _begin_again(self, layer: int, x: Tensor) -> Frame:
        """Return the frame for a layer that a checkpoint runs again."""
        memory = _memory(x)
        known = (frame for frame in list(self._recent) if memory and frame.entered[layer] == memory)
        if layer == 0:
            frame, before = Frame(self.depth), next(known, None)
            frame.grid = before.grid if before else None  # no image is cut again
        else:
            frame = next(known, None) or self._again() or self.latest or self._traced
        self._own.again = torch._C._current_graph_task_id(), frame
        return frame

    def _again(self) -> Frame | None:
        """Return the frame of the layer that the backward in progress ran again last."""
        task, frame = getattr(self._own, "again", (-1, None))
        return frame if task != -1 and task == torch._C._current_graph_task_id() else None

    def record(self, frame: Frame, layer: int, x: Tensor, size: Tensor | None, plan: AnyPlan | None) -> None:
        """Write what leaves a layer: its shape `[B, M, ...]`, its sizes `[B, M]` and, while tracking, its groups."""
        frame.size[layer + 1] = size
        frame.shape[layer + 1] = (x.shape[0], x.shape[1])
        kept = frame.kept[layer] if layer else None
        if plan is not None and (self.track or self.restore or self.needs_places):
            kept = plan.keep if kept is None else kept.gather(1, plan.keep)
        frame.kept[layer + 1] = kept
        if self.track or self.restore:
            previous = frame.assign[layer] if layer else None
            if plan is not None:
                previous = compose(previous, plan)
            elif previous is None:
                previous = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
            frame.assign[layer + 1] = previous
        if torch.compiler.is_compiling() and not _is_exporting():
            self.latest = frame

    def restores(self, layer: int) -> bool:
        """Say whether every input token is handed out after this layer."""
        return self.restore == "every" or (self.restore == "last" and layer == self.depth - 1)

    def is_merging(self) -> bool:
        """Say whether a forward could remove tokens now."""
        return self.enabled and any(amount != 0 for amount in self.schedule.amounts)

    def last(self) -> Frame | None:
        """Return the last forward of this thread, else the last of any; a compiled one belongs to no thread."""
        if self.latest is self._traced:
            return self.latest
        return getattr(self._own, "frame", None) or self.latest

    def final_size(self) -> Tensor | None:
        """Return the sizes `[B, M]` that the forward in progress ended with; None while all are 1."""
        if torch.compiler.is_compiling():
            return self._traced.size[self.depth]
        frame = self._again() or self.last()
        return frame.size[self.depth] if frame else None

    def _forget(self) -> None:
        self._own = threading.local()
        self._recent: deque[Frame] = deque(maxlen=4)
        self._traced = Frame(self.depth)
        self.latest = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the settings, never a forward."""
        return {
            key: value for key, value in self.__dict__.items() if key not in ("_own", "_recent", "_traced", "latest")
        }

    def __setstate__(self, settings: dict[str, Any]) -> None:
        self.__dict__.update(settings)
        self._forget()


def _memory(x: Tensor) -> tuple[StorageWeakRef, ...]:
    """Return what memory `x` lies in, if in any: as long as this is held, no other tensor's compares equal."""
    try:
        # torch.fx traces with objects that only look like tensors
        return (StorageWeakRef(x.untyped_storage()),) if isinstance(x, Tensor) else ()
    except RuntimeError:  # a wrapper of functorch
        return ()


def _is_in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _is_exporting() -> bool:
    # torch 2.6 has no is_exporting
    return bool(getattr(torch.compiler, "is_exporting", lambda: False)())
