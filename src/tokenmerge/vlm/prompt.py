"""Shorten prompts: leave out placeholders of visual tokens, row by row, in every tensor that has one entry per token.

Shapes: B rows, L tokens of a prompt, M tokens of the shortened one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "PIXELS",
    "Shortened",
    "has_pixels",
    "pads_on_the_right",
    "positions_after",
    "positions_of",
    "shorten",
    "texts",
]

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}  # the argument with each kind of input


def has_pixels(inputs: Mapping[str, Any]) -> bool:
    """Whether images or videos that are not encoded yet are among the arguments of a call."""
    return any(inputs.get(name) is not None for name in PIXELS.values())


@dataclass(frozen=True)
class Shortened:
    """Which tokens of each row are left, and where."""

    places: Tensor  # [B, M], where each token stood; -1 for padding
    length: int  # L

    @property
    def mask(self) -> Tensor:
        """The attention mask of the shortened prompt, `[B, M]` of 0 and 1."""
        return (self.places >= 0).long()

    def take(self, values: Tensor, padding: int | float = 0) -> Tensor:
        """Return the values of the tokens that are left: from `[..., B, L]` to `[..., B, M]`."""
        index = self.places.clamp_min(0).expand(*values.shape[:-1], -1)
        return values.gather(-1, index).masked_fill(self.places < 0, padding)


def shorten(kept: Tensor, pads_right: bool = False) -> Shortened:
    """Return where the kept tokens (`[B, L]` bool) go: rows of unequal length are padded, on the left by default."""
    counts = kept.sum(dim=1)
    longest = int(counts.max())
    order = (~kept if pads_right else kept).long().argsort(dim=1, stable=True)
    columns = torch.arange(longest, device=kept.device)
    if pads_right:
        places, is_real = order[:, :longest], columns < counts[:, None]
    else:
        places, is_real = order[:, kept.shape[1] - longest :], columns >= longest - counts[:, None]
    return Shortened(places.masked_fill(~is_real, -1), kept.shape[1])


def pads_on_the_right(mask: Tensor | None) -> bool:
    """Return whether a mask `[B, L]` has padding behind the tokens, and none in front."""
    return mask is not None and not bool(mask[:, -1].all()) and bool(mask[:, 0].all())


def positions_of(mask: Tensor) -> Tensor:
    """Return the positions that tokens have in a prompt with this mask `[B, L]`: 0, 1, ... without the padding."""
    return (mask.long().cumsum(dim=-1) - 1).clamp_min(0)


def positions_after(positions: Tensor, steps: Tensor) -> Tensor:
    """Return the positions of tokens so many steps (1, 2, ..., `[n]`) behind a prompt.

    `positions` are the prompt's, `[B, L]`, or `[3, B, L]` on the image's grid, `[4, B, L]` with those of text in front.
    What follows an image stands behind all of it: behind the largest of time, row and column.
    """
    last = positions.amax(dim=-1, keepdim=True)
    if positions.dim() == 3:
        last = torch.cat((last[:-3], last[-3:].amax(dim=0, keepdim=True).expand(3, -1, -1)))
    return last + steps


def texts(ids: Tensor, mask: Tensor | None, special: Mapping[str, int]) -> list[Tensor]:
    """Return the ids of each row that are text: real tokens that are no placeholders."""
    is_text = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    for token in special.values():
        is_text = is_text & (ids != token)
    return [row[of_text] for row, of_text in zip(ids, is_text, strict=True)]
