"""The record of one forward: what is known of the tokens that enter each layer."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from tokenmerge.schedule import Schedule

__all__ = ["Call", "Frame", "Known", "Own"]


class Frame:
    """The record of one forward: entry i of a list is of the tokens that enter layer i, the last one of what is left.

    Layers read and never consume, so a layer that runs twice (gradient checkpointing) sees the same again. `last` is
    the newest entry: where a layer is left out, the next one goes on from there.
    """

    def __init__(self, depth: int, restore: str = "", trace: int = 0) -> None:
        self.depth = depth
        self.size: list[Tensor | None] = [None] * (depth + 1)  # [B, N_i]; None while all sizes are 1
        self.assign: list[Tensor | None] = [None] * (depth + 1)  # [B, N_0], kept while tracking or restoring
        self.kept: list[Tensor | None] = [None] * (depth + 1)  # [B, N_i] places in the input; None while all are there
        self.shape: list[tuple[int, int] | None] = [None] * (depth + 1)  # (B, N_i)
        # tokens before and after merging in a window, where they are merged for the attention only
        self.inside: list[tuple[int, int] | None] = [None] * (depth + 1)
        self.restored = [False] * (depth + 1)  # every input token was handed out
        self.last = 0
        self.is_tracked = False
        self.restore = restore  # after which layers every input token is handed out: "every", the "last", none
        self.trace = trace  # number of the trace whose graph it belongs to; 0: eager mode
        self.out: Any = None  # what was put out last: device and dtype, and whether hooks may have changed it since
        self.has_padding = False  # some tokens are none: their size is 0
        self.memory: dict[int, Any] = {}  # by layer: what the method notes for itself
        self.grid: tuple[int, int] | None = None  # rows and columns of the image's patches, for methods by place
        self.schedule: Schedule | None = None  # that of its time; None: nothing was to be merged then
        self.family = 0  # of the model and its copies
        self.ran: dict[tuple[str, str], str] = {}  # which kernels ran, see `kernels.watch`

    def fork(self, slot: int) -> Frame:
        """Return a frame that goes on from an entry in another way: somebody may hold what came of the first."""
        other, blank = copy.copy(self), vars(Frame(self.depth))
        for name in ("size", "assign", "kept", "shape", "inside", "restored"):
            setattr(other, name, [*getattr(self, name)[: slot + 1], *blank[name][slot + 1 :]])
        other.last, other.memory, other.ran = slot, dict(self.memory), dict(self.ran)
        return other


class Call(NamedTuple):
    """One call of a block in which tokens are merged, or were before it."""

    x: Tensor  # [B, N, C] what enters the block
    size: Tensor | None  # [B, N]
    bias: Tensor | None  # [B, N] what is added to the attention's scores per key
    kept: Tensor | None  # [B, N] the places of the tokens
    r: int  # how many tokens go
    span: tuple[int, int]  # the tokens that may be merged, from the first number to before the second
    given: Mapping[str, Any]  # the block's further arguments
    frame: Frame


class Known(NamedTuple):
    """What is known of tokens by the memory they lie in: the entry of a frame."""

    frame: Frame
    slot: int


class Own(threading.local):
    """What one thread does with the model."""

    def __init__(self) -> None:
        self.forwards = 0  # of the model itself, one inside the other
        self.loops = 0  # of parts of it that run the blocks and hand tokens out
        self.current: Frame | None = None  # of the innermost of these
        self.loose: Frame | None = None  # of blocks that other code calls
        self.newest: Frame | None = None
