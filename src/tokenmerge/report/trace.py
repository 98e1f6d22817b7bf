"""What every block of a forward merged with what, as a plain value."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenmerge._runtime.frames import Frame
from tokenmerge.errors import UnsupportedError

__all__ = ["BlockTrace", "Merge", "Trace", "trace_of"]


class Merge(NamedTuple):
    """One step of a group's genealogy: in `block`, the token at place `gone` was merged into that at place `into`.

    `into` is -1 where it was dropped; `similarity` is NaN then.
    """

    block: int
    gone: int
    into: int
    similarity: float


@dataclass(frozen=True, eq=False)
class BlockTrace:
    """What one block did. A token is named by its place: the number of the input token that leads its group."""

    gone: Tensor  # [B, G] the tokens that the block took away
    into: Tensor  # [B, G] the token that each was merged into; -1: it was dropped
    similarity: Tensor  # [B, G] float32, the cosine of the two by what the method compares; NaN where dropped
    kept: Tensor  # [B, M] the tokens that are left, in order
    groups: Tensor  # [B, N] as `handle.groups`: for every input token, the number of its token in `kept`; -1: dropped
    is_mixed: bool  # every token left is a mixture of many: there are no pairs, and `groups` names the largest part


@dataclass(frozen=True, eq=False)
class Trace:
    """The pairs, similarities and groups of every block of a forward; see `BlockTrace`."""

    method: str
    prefix: int  # protected tokens in front
    grid: tuple[int, int] | None  # rows and columns of patches, for the model's own input size
    blocks: tuple[BlockTrace, ...]

    def genealogy(self, place: int, image: int = 0) -> list[Merge]:
        """Return all merges of the group that an input token ends in, in their order; those of mixtures are not known.

        >>> import timm, tokenmerge
        >>> model = timm.create_model("vit_tiny_patch16_224").eval()
        >>> with tokenmerge.patched(model, r=90, track="pairs") as handle:
        ...     _ = model(torch.zeros(1, 3, 224, 224))
        ...     trace = handle.trace()
        >>> [step.block for step in trace.genealogy(place=2)][:1]
        [0]
        """
        found: dict[int, list[Merge]] = {}  # by the token that leads
        lead = place
        for number, block in enumerate(self.blocks):
            parts = (part[image].tolist() for part in (block.gone, block.into, block.similarity))
            for step in (Merge(number, *values) for values in zip(*parts, strict=True)):
                at = step.gone if step.into < 0 else step.into
                found.setdefault(at, []).extend([*(found.pop(step.gone, []) if at != step.gone else []), step])
                lead = at if step.gone == lead else lead
        return sorted(found.get(lead, []), key=lambda step: step.block)

    def to_json(self) -> str:
        """Return everything as JSON; the similarity of a dropped token is null."""
        blocks = [
            {
                **{name: getattr(block, name).tolist() for name in ("gone", "into", "kept", "groups")},
                "similarity": [[_number(value) for value in row] for row in block.similarity.tolist()],
                "is_mixed": block.is_mixed,
            }
            for block in self.blocks
        ]
        about: dict[str, Any] = {"method": self.method, "prefix": self.prefix, "grid": self.grid}
        return json.dumps({**about, "blocks": blocks})


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def trace_of(frame: Frame, method: str, prefix: int, grid: tuple[int, int] | None) -> Trace:
    """Return the trace of a forward whose pairs were recorded.

    Raises `UnsupportedError` if code between the blocks made new tokens: places mean others after it.
    """
    blocks: list[BlockTrace] = []
    left: Tensor | None = None  # [B, M] the places of the tokens that enter a block
    for entry, groups in enumerate(frame.assign):
        if groups is None:
            continue
        groups = groups.cpu()
        B, N = groups.shape
        left = torch.arange(N).expand(B, -1) if left is None else left
        if blocks and blocks[-1].groups.shape != (B, N):
            raise UnsupportedError(
                f"code between the blocks made new tokens before block {entry - 1}: {N} instead of "
                f"{blocks[-1].groups.shape[1]}. What merged before it cannot be told by their places; "
                "handle.groups has the groups of each block."
            )
        kept = frame.kept[entry]
        after = torch.arange(N).expand(B, -1) if kept is None else kept.cpu()
        blocks.append(_block(frame, entry, left, after, groups))
        left = after
    return Trace(method, prefix, grid, tuple(blocks))


def _block(frame: Frame, entry: int, before: Tensor, kept: Tensor, groups: Tensor) -> BlockTrace:
    B, N = groups.shape
    pairs, none = frame.pairs[entry], torch.empty(B, 0, dtype=torch.long)
    is_mixed = pairs is None and kept.shape != before.shape
    if pairs is None:
        return BlockTrace(none, none, none.float(), kept, groups, is_mixed)
    gone, into, similarity = (part.cpu() for part in pairs)
    # what is in neither `keep` nor `src` of a plan was dropped: as many in every image
    is_left = torch.zeros(B, N, dtype=torch.bool).scatter(1, before, True).scatter(1, kept, False)
    dropped = is_left.scatter(1, gone, False).nonzero()[:, 1].view(B, -1)
    nothing = torch.full_like(dropped, -1)
    similarity = similarity.masked_fill(into < 0, math.nan)
    return BlockTrace(
        torch.cat((gone, dropped), dim=1),
        torch.cat((into, nothing), dim=1),
        torch.cat((similarity, nothing.float() * math.nan), dim=1),
        kept,
        groups,
        is_mixed,
    )
