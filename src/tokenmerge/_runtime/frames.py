"""Per-forward state: sizes, positions and assignments of the tokens that enter each layer."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from tokenmerge.schedule import Schedule

__all__ = ["Call", "Frame", "Known", "Own", "Pairs"]


class Pairs(NamedTuple):
    """What one layer merged: tokens by the places that they had in the input."""

    gone: Tensor  # [B, R] the tokens that were absorbed
    into: Tensor  # [B, R] what absorbed each of them; -1: it was dropped
    similarity: Tensor  # [B, R]


class Frame:
    """State of one forward. Entry i of each list describes the tokens that enter layer i, the last entry the output.

    Layers read entries and never remove them, so a layer that runs twice (gradient checkpointing) sees the same values.
    `last` is the newest entry: if a layer is skipped, the next one continues from there.
    """

    def __init__(self, depth: int, restore: str = "", trace: int = 0) -> None:
        self.depth = depth
        self.size: list[Tensor | None] = [None] * (depth + 1)  # [B, N_i]; None while all sizes are 1
        self.assign: list[Tensor | None] = [None] * (depth + 1)  # [B, N_0], kept while tracking or restoring
        self.kept: list[Tensor | None] = [None] * (depth + 1)  # [B, N_i] input positions; None until tokens are removed
        self.shape: list[tuple[int, int] | None] = [None] * (depth + 1)  # (B, N_i)
        self.similarity: list[Tensor | None] = [None] * (depth + 1)  # [B, R] of the pairs before entry i
        self.pairs: list[Pairs | None] = [None] * (depth + 1)
        # tokens of a window before and after merging, for blocks that merge inside the attention only
        self.inside: list[tuple[int, int] | None] = [None] * (depth + 1)
        # [B, N_i] the groups of such a block's attention, over all its windows; kept while tracking
        self.windows: list[Tensor | None] = [None] * (depth + 1)
        self.restored = [False] * (depth + 1)  # the layer returned all input tokens
        self.last = 0
        self.is_tracked = False
        self.tracks_pairs = False
        self.restore = restore  # after which layers all input tokens are restored: "every", "last", or "" for none
        self.trace = trace  # number of the trace whose graph it belongs to; 0: eager mode
        self.out: Any = None  # the last output: device and dtype, and whether hooks may have changed it since
        self.has_padding = False  # some tokens are padding, with size 0
        self.memory: dict[int, Any] = {}  # the method's notes, by layer
        self.grid: tuple[int, int] | None = None  # rows and columns of the image's patches, for positional methods
        self.schedule: Schedule | None = None  # the schedule during this forward; None: merging was off
        self.family = 0  # id shared by the model and its copies
        self.ran: dict[tuple[str, str], str] = {}  # the kernels that ran, see `kernels.watch`

    def fork(self, slot: int) -> Frame:
        """Return a copy that continues from an entry; other code may still use this frame's later entries."""
        other, blank = copy.copy(self), vars(Frame(self.depth))
        for name in ("size", "assign", "kept", "shape", "similarity", "pairs", "inside", "windows", "restored"):
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
    """The frame entry that describes a tensor of tokens, looked up by its memory."""

    frame: Frame
    slot: int


class Own(threading.local):
    """Per-thread state of a patched model."""

    def __init__(self) -> None:
        self.forwards = 0  # nesting depth of running forwards of the model itself
        self.loops = 0  # nesting depth of its parts that run the blocks and return tokens
        self.current: Frame | None = None  # frame of the innermost running forward or loop
        self.loose: Frame | None = None  # frame of blocks called directly by other code
        self.newest: Frame | None = None
