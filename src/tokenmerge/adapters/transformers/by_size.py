"""Images of different sizes in one call of a tower that takes them as one sequence: one call per size.

Shapes: S tokens (or patches) of all images, C channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge._torch.tracing import is_compiling
from tokenmerge.adapters.base import Override
from tokenmerge.errors import UnsupportedError

__all__ = ["BySize"]


class BySize(Override):
    """The forward of a tower: while merging, images with as many tokens as each other run in a call of their own.

    So as many tokens go from each image as if it were given alone. What comes back is in the order of the images.
    `side` is how many pixels a patch is wide, for images `[B, 3, height, width]` with `image_sizes`; 0 for patches
    `[S, C]` with `grid_thw`.
    """

    def __init__(self, owner: nn.Module, is_merging: Callable[[], bool], side: int = 0) -> None:
        super().__init__(owner)
        self.is_merging, self.side = is_merging, side
        self.names = list(inspect.signature(type(owner).forward).parameters)[1:]
        self.sizes = "image_sizes" if side else "grid_thw"

    @property
    def __code__(self) -> Any:
        """The code object by which `torch.export` names the forward."""
        return type(self.owner).forward.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.owner).forward.__get__(self.owner))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_compiling() or not self.is_merging():
            return self.original(*args, **kwargs)
        given = self.by_name(args, kwargs)
        counts = self._counts(given)
        lengths = list(dict.fromkeys(tokens for _, tokens in counts))
        if len(lengths) < 2:
            return self.original(*args, **kwargs)
        groups = [[i for i, (_, tokens) in enumerate(counts) if tokens == length] for length in lengths]
        outs = [self.original(**{**given, **self._chosen(given, counts, group)}) for group in groups]
        frames = [[counts[i][0] for i in group] for group in groups]
        found = [i for group in groups for i in group]
        return _joined(outs, frames, [found.index(i) for i in range(len(found))])

    def _counts(self, given: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Return frames and tokens per frame of each image or video; none if it is not known how to part them."""
        pixels, sizes = given.get(self.names[0]), given.get(self.sizes)
        others = [value for name, value in given.items() if name not in (self.names[0], self.sizes)]
        if not isinstance(pixels, Tensor) or sizes is None or any(isinstance(value, Tensor) for value in others):
            return []
        rows = [[int(x) for x in size] for size in (sizes.tolist() if isinstance(sizes, Tensor) else sizes)]
        if self.side:
            counts = [(1, (height // self.side) * (width // self.side)) for height, width in rows]
            return counts if len(counts) == pixels.shape[0] else []
        counts = [(frames, height * width) for frames, height, width in rows]
        return counts if sum(frames * tokens for frames, tokens in counts) == pixels.shape[0] else []

    def _chosen(self, given: Mapping[str, Any], counts: list[tuple[int, int]], group: list[int]) -> dict[str, Any]:
        """Return the arguments of some of the images."""
        pixels, sizes = given[self.names[0]], given[self.sizes]
        own = sizes[group] if isinstance(sizes, Tensor) else [sizes[i] for i in group]
        if self.side:
            return {self.names[0]: pixels[group], self.sizes: own}
        parts = pixels.split([frames * tokens for frames, tokens in counts])
        return {self.names[0]: torch.cat([parts[i] for i in group]), self.sizes: own}


def _joined(outs: Sequence[Any], frames: list[list[int]], order: list[int]) -> Any:
    """Return the outputs of several calls as one; each has the tokens of some images, of so many frames."""
    first = outs[0]
    if isinstance(first, Tensor):
        dim = first.dim() - 2
        if dim not in (0, 1) or any(out.shape[dim] % sum(own) for out, own in zip(outs, frames, strict=True)):
            raise UnsupportedError(
                f"an output {tuple(first.shape)} of a tower cannot be put together for images of different sizes while "
                "tokens are merged. Ask for its tokens only, give images of one size, or set handle.r = 0."
            )
        parts: list[Tensor] = []
        for out, own in zip(outs, frames, strict=True):
            each = out.shape[dim] // sum(own)
            parts += out.split([each * count for count in own], dim)
        return torch.cat([parts[i] for i in order], dim)
    if isinstance(first, Mapping):
        return type(first)(**{name: _joined([out[name] for out in outs], frames, order) for name in first})
    if isinstance(first, (tuple, list)):
        return type(first)(_joined(same, frames, order) for same in zip(*outs, strict=True))
    return first
