"""Merge in the vision tower as much as is to be left out, and find which visual tokens became one."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

import tokenmerge
from tokenmerge import Handle
from tokenmerge.errors import ConfigError, UnsupportedError
from tokenmerge.vlm.families import Family
from tokenmerge.vlm.tower import Layout

__all__ = ["check_call", "merge_tower", "set_keep", "targets_of"]


def merge_tower(model: nn.Module, base: Any, family: Family, keep: float | int, name: str) -> Handle:
    """Patch the tower of a model so that it leaves `keep` of its tokens; return the handle of the tower.

    Raises `UnsupportedError` where a visual token is made of several of the tower's, `ConfigError` for a `keep` that
    cannot be reached, and the errors of `tokenmerge.patch`.
    """
    if family.has_units or getattr(base.config.vision_config, "hidden_stride", 1) > 1:
        raise UnsupportedError(
            f"{name} gives the language model what the vision tower merged. A visual token of a {family.name} model is "
            "made of several of the tower's, which may be merged with different ones. Choose a method that works "
            "behind the tower, such as divprune."
        )
    handle = tokenmerge.patch(model, r=0, restore="dense", track=True)
    try:
        set_keep(handle, base, family, keep, name)
    except Exception:
        handle.remove()
        raise
    return handle


def set_keep(handle: Handle, base: Any, family: Family, keep: float | int, name: str) -> None:
    """Set `r` of the tower so that `keep` of the tokens of each image or crop are left where its features come from.

    As many are merged in each layer, as in the paper; where that is more than the half of its tokens that a layer can
    merge, earlier layers merge more. Raises `ConfigError` for a `keep` that cannot be reached.
    """
    grid = handle.grid
    assert grid is not None  # of every tower here
    total, depth = grid[0] * grid[1], _depth(base, {}, name)
    if isinstance(keep, Integral) and family.newline:
        raise ConfigError(
            f"keep is {keep}, and {name} merges in each crop of an image, whose number differs. Give a share."
        )
    k = int(keep) if isinstance(keep, Integral) else max(1, round(float(keep) * total))
    least = -(-total // 2**depth)
    if not least <= k <= total:
        raise ConfigError(
            f"keep is {keep}, {k} of the {total} tokens of an image: {name} merges them in {depth} layers of the "
            f"tower, of which each leaves at least half. Give a number from {least} to {total}, or a share."
        )
    left = [total]
    for layer in range(1, depth + 1):
        even, most = total - round(layer * (total - k) / depth), k * 2 ** (depth - layer)
        left.append(max(min(even, most), -(-left[-1] // 2)))
    handle.r = [before - after for before, after in pairwise(left)]


def check_call(base: Any, given: Mapping[str, Any], kind: str) -> None:
    """Raise `UnsupportedError` for videos, and for features of another layer, before they are encoded."""
    own, asked = _depth(base, {}, "tome"), _depth(base, given, "tome")
    if own != asked:
        raise UnsupportedError(
            f"the features are taken after layer {asked} of the tower (vision_feature_layer), and tome merges down to "
            f"keep until layer {own}, that of the model's configuration. Set config.vision_feature_layer before "
            "patching, or choose another method."
        )
    if kind == "video":
        raise UnsupportedError(
            "the visual tokens of a video are means of several of the tower's, which may be merged with different "
            "ones. Choose another method than tome for videos."
        )


def _depth(base: Any, given: Mapping[str, Any], name: str) -> int:
    """Return the layer of the tower that the features come from; raises `UnsupportedError` for several."""
    layout = Layout(base, given)
    if not layout.is_one_layer:
        raise UnsupportedError(
            f"the features come from several layers of the tower (vision_feature_layer), in which {name} has merged "
            "different tokens. Choose a method that works behind the tower, such as divprune."
        )
    return layout.depth


def targets_of(handle: Handle, base: Any, given: Mapping[str, Any], kind: str, counts: list[int]) -> list[Tensor]:
    """Return for each visual token of each entry (`counts` are their tokens) into which of the entry it was merged.

    That is the token whose place the group keeps, or the first of its tokens that are left if the image's padding was
    cut off there. Newlines have their own index.
    """
    layout = Layout(base, given)
    groups, places = handle.groups[layout.depth - 1], handle.positions[layout.depth - 1]  # [B, T], [B, M]
    first = 1 + groups.shape[1] * torch.arange(groups.shape[0], device=groups.device)[:, None]
    own = first + torch.arange(groups.shape[1], device=groups.device)  # numbers of all, from 1; newlines have 0
    numbers = torch.stack((own, first + places.gather(1, groups)), dim=-1).double()
    found = layout.placed(numbers, kind, sum(counts))
    if not found.equal(found.round()) or found[:, 0].count_nonzero() != found[:, 0].unique().count_nonzero():
        raise UnsupportedError(
            "the visual tokens of this image are resampled from several of the tower's. Choose another method than "
            "tome, or give a smaller image."
        )
    return [_within(*part.long().unbind(dim=1)) for part in found.split(counts)]


def _within(own: Tensor, target: Tensor) -> Tensor:
    """Return the index of each token's target among the tokens with these numbers `[N]`."""
    index = torch.arange(own.shape[0], device=own.device)
    _, group = target.unique(return_inverse=True)
    # the target itself before all others
    rank = torch.where(own == target, index - own.shape[0], index)
    first = torch.full_like(rank, own.shape[0]).scatter_reduce(0, group, rank, "amin")
    return torch.where(own > 0, first[group] % own.shape[0], index)
