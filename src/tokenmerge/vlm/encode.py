"""Run the vision tower of a model, and put chosen tokens in the place of all."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenmerge import Handle, kernels
from tokenmerge.vlm.families import Family
from tokenmerge.vlm.merging import check_call, targets_of
from tokenmerge.vlm.methods import Chooser
from tokenmerge.vlm.prompt import PIXELS
from tokenmerge.vlm.tower import watched

__all__ = ["Chosen", "Encoded", "Entry", "encode"]


@dataclass(frozen=True)
class Entry:
    """The visual tokens of one image, crop or video."""

    features: Tensor  # [N, C]
    is_fixed: Tensor  # [N] bool: tokens that separate rows, which are always kept
    frames: int  # of a video; 1 for an image
    grid: tuple[int, int, int] | None  # frames, rows, columns of the tokens that are not fixed; None: they form none
    attention: Tensor | None = None  # [N], of the tower, where it was read
    keys: Tensor | None = None  # [N, D]
    targets: Tensor | None = None  # [N], into which of them the tower merged each one


@dataclass(frozen=True)
class Chosen:
    """The tokens of an entry that stay."""

    index: Tensor  # [k], in order
    weights: Tensor | None = None  # [k, N] if others are merged into them

    def of(self, rows: Tensor) -> Tensor:
        """Return the tokens that stay of `[N, C]`."""
        if self.weights is None:
            return rows[self.index]
        exact = rows if rows.dtype == torch.float64 else rows.float()
        with kernels.full_precision(rows.device.type):
            return (self.weights.to(exact) @ exact).to(rows.dtype)


@dataclass(frozen=True)
class Encoded:
    """What a tower returned for all images, or all videos, of a call."""

    output: Any  # of `get_image_features`
    entries: list[Entry]
    groups: list[int]  # how many entries each tensor of the output holds

    def take(self, kept: Sequence[Chosen]) -> Any:
        """Return the output with the tokens that stay of each entry."""
        output = copy.copy(self.output)
        output.pooler_output = self._rows(output.pooler_output, kept)
        planes = getattr(output, "deepstack_features", None)
        if planes is not None:
            output.deepstack_features = [self._rows(plane, kept) for plane in planes]
        return output

    def _rows(self, features: Any, kept: Sequence[Chosen]) -> Any:
        parts, start = [], 0
        for rows, count in zip(features, self.groups, strict=True):
            own = [entry.features.shape[0] for entry in self.entries[start : start + count]]
            split = rows.reshape(-1, rows.shape[-1]).split(own)
            parts.append(torch.cat([chosen.of(part) for part, chosen in zip(split, kept[start:], strict=False)]))
            start += count
        return torch.stack(parts) if isinstance(features, Tensor) else parts


def encode(
    base: Any,
    family: Family,
    kind: str,
    inputs: Mapping[str, Any],
    method: Chooser | None = None,
    tower: Handle | None = None,
) -> Encoded:
    """Encode the images (`kind` "image") or videos ("video") of a call as `generate` does.

    The entries have what a `method` asks for of the tower; `tower` is the handle of merging inside it.
    """
    merging = tower if method is not None and method.merges_tower else None
    function = getattr(base, f"get_{kind}_features")
    names = inspect.signature(function).parameters
    given = {name: inputs[name] for name in names if inputs.get(name) is not None}
    if merging is not None:
        check_call(base, given, kind)
    with watched(base, given) if method is not None and method.reads_tower else nullcontext() as watch:
        output = function(**given, return_dict=True)
    entries: list[Entry] = []
    groups: list[int] = []
    for number, rows in enumerate(output.pooler_output):
        rows = rows.reshape(-1, rows.shape[-1])
        parts = rows.split(family.crop(base)) if family.crop is not None else (rows,)
        groups.append(len(parts))
        entries += [_entry(base, family, kind, inputs, number, part) for part in parts]
    counts = [entry.features.shape[0] for entry in entries]
    if watch is not None:
        device = entries[0].features.device
        read = (values.to(device).split(counts) for values in watch.visual(kind, sum(counts)))
        entries = [replace(entry, attention=a, keys=k) for entry, a, k in zip(entries, *read, strict=True)]
    if merging is not None:
        found = targets_of(merging, base, given, kind, counts)
        entries = [
            replace(entry, targets=own.to(entry.features.device)) for entry, own in zip(entries, found, strict=True)
        ]
    return Encoded(output, entries, groups)


def _entry(base: Any, family: Family, kind: str, inputs: Mapping[str, Any], number: int, features: Tensor) -> Entry:
    is_fixed = torch.zeros(features.shape[0], dtype=torch.bool, device=features.device)
    if family.newline and getattr(base, "image_newline", None) is not None:
        is_fixed = (features == base.image_newline.to(features)).all(dim=-1)
    if family.has_places:
        frames, rows, columns = inputs[f"{kind}_grid_thw"][number].tolist()
        side = base.visual.spatial_merge_size
        return Entry(features, is_fixed, frames, (frames, rows // side, columns // side))
    frames, tokens = inputs[PIXELS[kind]].shape[1] if kind == "video" else 1, int((~is_fixed).sum())
    side = math.isqrt(tokens // frames)
    return Entry(features, is_fixed, frames, (frames, side, side) if side * side * frames == tokens else None)
