"""Read the attention of a vision tower while it runs: what each visual token receives, and its key.

One layer is read, the one whose output the features are. Hooks take its queries and keys as its own projections
return them, and change nothing: every implementation of attention stays. The attention of the class token, or of one
tile of queries after another, is computed from them; never the whole map.

Shapes: B tower inputs (images, crops or frames), T tokens of one, H heads, D head width, V visual tokens of a call.
"""

from __future__ import annotations

import inspect
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge import importance
from tokenmerge._intercept.bindings import is_bound
from tokenmerge.errors import ConfigError, UnsupportedError
from tokenmerge.schedule import R
from tokenmerge.vlm.methods import Chooser
from tokenmerge.vlm.releases import window_order

__all__ = ["Layout", "check_tower", "merges", "watched"]

_TOWERS = ("vision_tower", "vision_model", "visual")
_CLASS = ("class_embedding", "cls_token")  # parameters of towers with a class token
_WAY_OUT = "Choose a method that reads no attention, such as divprune."


@contextmanager
def watched(base: Any, given: Mapping[str, Any]) -> Iterator[Watch]:
    """Read the tower of a base model in the calls inside the `with`; `given` are the arguments of the call."""
    watch = Watch(base, given)
    hooks = [watch.module.register_forward_pre_hook(watch.call, with_kwargs=True)]
    for name, part in watch.parts.items():
        hooks.append(part.register_forward_hook(watch.output_of(name)))
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


class Layout:
    """Where the tokens of the tower are among the visual tokens of a call."""

    def __init__(self, base: Any, given: Mapping[str, Any]) -> None:
        self.base, self.given = base, given
        self.tower = next(getattr(base, name) for name in _TOWERS if hasattr(base, name))
        self.attentions = _attentions(self.tower)
        layers = self._layers()
        self.depth = max(layers)  # of the deepest layer whose output the features are, from 1
        self.is_one_layer = len(layers) == 1
        if not self.depth:
            raise UnsupportedError(f"the features are the tower's embeddings, before any attention. {_WAY_OUT}")

    def placed(self, values: Tensor, kind: str, total: int) -> Tensor:
        """Return values `[B, T, c]` of the tower's tokens as those of the `total` visual tokens, `[V, c]`.

        A visual token that is made of several has their mean, a newline zeros. Raises `UnsupportedError` if they
        cannot be found.
        """
        found = self._placed(values, kind, total)
        if found.shape[0] != total:
            raise self._lost(f"{found.shape[0]} of {total} were found")
        return found

    def _placed(self, values: Tensor, kind: str, total: int) -> Tensor:
        base, given = self.base, self.given
        if hasattr(self.tower, "spatial_merge_size"):
            return _units_of_sequence(self.tower, values[0], given[f"{kind}_grid_thw"])
        if _is_packed(self.tower):
            grids = self._grids()
            side = math.isqrt(max(1, values.shape[1] // total))
            parts = values[0].split([rows * columns for rows, columns in grids])
            return torch.cat([self._units(part[None], *grid, side) for part, grid in zip(parts, grids, strict=True)])
        if self._setting("vision_feature_select_strategy") == "default":
            values = values[:, 1:]
        if hasattr(base, "pack_image_features") and kind == "image":
            return self._packed(values)
        if kind == "video":
            video = given["pixel_values_videos"].shape[0]
            pooled = base.apply_pooling(values).reshape(video, -1, values.shape[-1])
            return torch.cat((pooled, torch.zeros_like(pooled[:, :1])), dim=1).flatten(0, 1)
        rows, side = math.isqrt(values.shape[1]), math.isqrt(max(1, values.shape[0] * values.shape[1] // total))
        return values.flatten(0, 1) if side == 1 else self._units(values, rows, rows, side)

    def _units(self, values: Tensor, rows: int, columns: int, side: int) -> Tensor:
        """Return the means of units of `side` x `side` on a grid: from `[B, rows * columns, c]` to `[V, c]`."""
        if rows * columns != values.shape[1] or rows % side or columns % side:
            raise self._lost(f"{values.shape[1]} tokens in {rows} rows make no units of {side} x {side}")
        units = values.view(values.shape[0], rows // side, side, columns // side, side, -1)
        return units.mean(dim=(2, 4)).flatten(0, 2)

    def _packed(self, values: Tensor) -> Tensor:
        """Return the values of crops as the base model arranges their features, with zeros for newlines."""
        base, sizes = self.base, self.given["image_sizes"]
        config, source = base.config, sys.modules[type(base).__module__]
        images = self.given.get("batch_num_images")
        alone = [True] * len(sizes) if images is None else [n == 1 for n in images for _ in range(n)]
        side = config.vision_config.image_size
        crops = [
            source.image_size_to_num_patches(
                image_size=size, grid_pinpoints=config.image_grid_pinpoints, patch_size=side
            )
            if is_alone
            else 1
            for size, is_alone in zip(sizes, alone, strict=True)
        ]
        names = inspect.signature(base.pack_image_features).parameters
        more = {
            name: self._setting(name)
            for name in ("vision_feature_select_strategy", "vision_aspect_ratio")
            if name in names
        }
        newline = None if base.image_newline is None else torch.zeros_like(values[0, 0])
        packed, _ = base.pack_image_features(values.split(crops), sizes, image_newline=newline, **more)
        return torch.cat(packed)

    def _grids(self) -> list[tuple[int, int]]:
        """Return rows and columns of each image of a tower that takes images of different sizes in one sequence."""
        side = self.tower.patch_size
        return [(int(height) // side, int(width) // side) for height, width in self.given["image_sizes"]]

    def _lost(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"the visual tokens cannot be found in the attention of the {type(self.tower).__name__}: {what}. {_WAY_OUT}"
        )

    def _setting(self, name: str) -> Any:
        value = self.given.get(name)
        return getattr(self.base.config, name, None) if value is None else value

    def _layers(self) -> list[int]:
        """Return the layers whose outputs the features are, from 1; 0 are the embeddings."""
        layer = self._setting("vision_feature_layer")
        layers = [-1] if layer is None else [layer] if isinstance(layer, int) else list(layer)
        return [number + len(self.attentions) + 1 if number < 0 else number for number in layers]


class Watch(Layout):
    """The queries and keys of one attention in the last call of its tower by this thread."""

    def __init__(self, base: Any, given: Mapping[str, Any]) -> None:
        super().__init__(base, given)
        if any(map(is_bound, self.tower.modules())):
            raise UnsupportedError(
                f"the {type(self.tower).__name__} merges tokens (r): what its attention says is of merged ones. Give "
                f"r=0, or unpatch the tower. {_WAY_OUT}"
            )
        self.module: Any = self.attentions[self.depth - 1]
        self.parts: dict[str, nn.Module] = {}
        for name, children in (("qkv", ("qkv",)), ("q", ("q_norm", "q_proj")), ("k", ("k_norm", "k_proj"))):
            found = [getattr(self.module, child) for child in children if hasattr(self.module, child)]
            if found:
                self.parts[name] = found[0]
        self.seen: dict[str, Tensor] = {}
        self.arguments: dict[str, Any] = {}
        self._thread = threading.get_ident()
        self._names = list(inspect.signature(self.module.forward).parameters)

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == self._thread:
            self.arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}

    def output_of(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            if threading.get_ident() == self._thread:
                self.seen[name] = output.detach()

        return keep

    def visual(self, kind: str, total: int) -> tuple[Tensor, Tensor]:
        """Return the attention `[V]` and the keys `[V, D]` of the `total` visual tokens of a call, in their order."""
        with torch.no_grad():
            q, k, keys = self._heads()
            score = self._received(q, k)
            values = self.placed(torch.cat((score[..., None], keys), dim=-1), kind, total)
        return values[:, 0], values[:, 1:]

    def _heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys `[B, H, T, D]`, and the keys averaged over heads without rotation, `[B, T, D]`."""
        rotary = self.arguments.get("position_embeddings")
        source = sys.modules[type(self.module).__module__]
        if "qkv" in self.seen:
            q, k, _ = self.seen["qkv"].unflatten(-1, (3, self.module.num_heads, -1)).unbind(-3)  # [S, H, D]
            keys = k.float().mean(dim=1)[None]
            if rotary is not None:
                q, k = source.apply_rotary_pos_emb_vision(q, k, *rotary)
            return q.transpose(0, 1)[None], k.transpose(0, 1)[None], keys
        q, k = (self.seen[name].unflatten(-1, (-1, self.module.head_dim)).transpose(1, 2) for name in ("q", "k"))
        keys = k.float().mean(dim=1)
        if rotary is not None:
            q, k = source.apply_rotary_pos_emb(q, k, *rotary, unsqueeze_dim=0)
        return q, k, keys

    def _received(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the attention that tokens receive, `[B, T]`: from the class token, else from all queries, a sum."""
        scale = getattr(self.module, "scale", None) or self.module.scaling
        if _has_class(self.tower):
            score = importance.class_attention(q, k, scale).mean(dim=1)
            score[:, 0] = score.amax(dim=1) + 1  # the class token itself, where it is a visual token, stays
            return score
        parts = self._parts(q)
        if parts is None:
            return importance.received_attention(q, k, scale) * q.shape[2]
        score = torch.zeros_like(q[:, 0, :, 0], dtype=torch.float32)
        for row, index in parts:
            own = importance.received_attention(q[row, None, :, index], k[row, None, :, index], scale)
            score[row, index] = own[0] * own.shape[1]
        return score

    def _parts(self, q: Tensor) -> list[tuple[int, Any]] | None:
        """Return the tokens that attend to each other, as a row and an index of it; None: those of each row."""
        bounds, mask = self.arguments.get("cu_seqlens"), self.arguments.get("attention_mask")
        if bounds is None and _is_packed(self.tower):
            lengths = [rows * columns for rows, columns in self._grids()]
            bounds = torch.tensor([0, *lengths]).cumsum(0)
        if bounds is not None:
            ends = bounds.tolist()
            return [(0, slice(start, end)) for start, end in pairwise(ends)]
        if mask is None:
            return None
        # a number is added per key, or there is one flag per key
        valid = mask[:, 0, 0] >= 0 if mask.is_floating_point() else mask.view(*mask.shape[:1], -1, mask.shape[-1])[:, 0]
        valid = valid.bool().expand(q.shape[0], -1)
        return None if bool(valid.all()) else [(row, own.nonzero().squeeze(1)) for row, own in enumerate(valid)]


def merges(r: R) -> bool:
    """Return whether an `r` merges tokens, now or later."""
    return bool(callable(r) or not isinstance(r, (int, float)) or r)


def check_tower(method: Chooser, base: Any, is_merged: bool) -> None:
    """Raise an error if what a method needs of the tower cannot be had; `is_merged`: by r."""
    if is_merged and method.merges_tower:
        raise ConfigError(
            f"{method.name} merges in the vision tower until keep of the tokens are left: r follows from keep. Leave r "
            "out, or choose a method that looks at the features, such as divprune."
        )
    if is_merged and method.reads_tower:
        raise ConfigError(
            f"{method.name} chooses by the attention of the vision tower, whose tokens r merges. Give r=0, or a method "
            "that looks at the features only, such as divprune."
        )
    if method.reads_tower:
        Watch(base, {})


def _attentions(tower: nn.Module) -> list[nn.Module]:
    """Return the attention of each layer."""
    found = [
        module
        for module in tower.modules()
        if hasattr(module, "qkv") or (hasattr(module, "q_proj") and hasattr(module, "k_proj"))
    ]
    if not found:
        raise UnsupportedError(
            f"a {type(tower).__name__} has no attention with projections called q_proj and k_proj, or qkv, that could "
            f"be read. {_WAY_OUT}"
        )
    return found


def _has_class(tower: nn.Module) -> bool:
    return any(name.rpartition(".")[2] in _CLASS for name, _ in tower.named_parameters())


def _is_packed(tower: nn.Module) -> bool:
    """Whether a tower takes images of different sizes, one after the other in one sequence."""
    return hasattr(tower, "patch_positional_embedding")


def _units_of_sequence(tower: Any, values: Tensor, grids: Tensor) -> Tensor:
    """Return the means of units that are neighbours in the sequence `[S, c]`, in the order of the images."""
    units: Tensor = values.unflatten(0, (-1, tower.spatial_merge_size**2)).mean(dim=1)
    if not hasattr(tower, "window_size"):
        return units
    order = window_order(tower, grids)
    return units[order.to(units.device).argsort()]
