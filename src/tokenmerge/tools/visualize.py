"""Draw what a patched model merged in a photo: `tokenmerge.visualize`, and the drawings that it is made of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

import tokenmerge
from tokenmerge import Handle
from tokenmerge._moved import moved_names
from tokenmerge.data.photos import given_picture, open_photo, photo_name, seen_box
from tokenmerge.data.prepare import find_preprocessing
from tokenmerge.data.preprocessing import Preprocessing
from tokenmerge.errors import DataError, NotPatchedError, UnsupportedError, unknown_name
from tokenmerge.measure.outputs import run_images, shared_copy
from tokenmerge.methods import Learned, Reduction
from tokenmerge.methods.base import TokenView
from tokenmerge.plan import Plan
from tokenmerge.report.drawing import Box, draw_cells, draw_values, with_scale
from tokenmerge.report.drawing import draw_clip as draw_clip
from tokenmerge.report.drawing import draw_features as draw_features
from tokenmerge.report.drawing import draw_groups as draw_groups
from tokenmerge.report.drawing import sheet as sheet
from tokenmerge.report.trace import Trace

__all__ = ["SHOWS", "Seen", "draw_clip", "draw_features", "draw_groups", "grid_of", "look", "sheet", "visualize"]

# what a picture shows, and the words below its colours
SHOWS = {
    "groups": "",
    "size": "patches in a token",
    "similarity": "cosine of the least similar pair in a token",
    "attention": "attention of the class token in this block, all patches are 100 %",
}
_SMALL = 8  # pixels: a picture whose patches are smaller is enlarged


@dataclass
class Seen:
    """What a forward on one photo merged, block by block, and where it lies in the photo. Of N patches."""

    name: str
    picture: Any  # the photo, or what the model was given of it
    box: Box | None  # the part that the model was given, in pixels of the picture; None: all of it
    is_own: bool  # the picture is the photo in its own pixels
    grid: tuple[int, int] | None  # rows and columns of patches; None: unknown
    groups: list[Tensor]  # for each block [N]: the group of each patch after it
    tokens: list[int]  # after each block, with class and other tokens that are no patches
    inside: bool = False  # groups are of a block's attention alone, merged inside windows
    trace: Trace | None = None  # where pairs were recorded
    prefix: int = 0
    attention: list[Tensor] | None = None  # for each block [N]: what the class token gives each patch

    def draw(self, block: int, show: str = "groups", *, cut: bool = False, shades: Tensor | None = None) -> Any:
        """Return a picture of what is merged after a block (0 the first, -1 the last); raises `UnsupportedError`.

        `shades` as in `draw_groups`.
        """
        block = range(len(self.groups))[block]
        if self.grid is None:
            if show != "groups":
                raise UnsupportedError(f"{show} is drawn over a grid of patches, and this model says none.")
            return draw_cells(self.groups[block])
        picture, box = self._canvas(cut)
        if show == "groups":
            return draw_groups(picture, self.groups[block], grid=self.grid, box=box, shades=shades)
        values, low, high, ends = self._values(block, show)
        drawn = draw_values(picture, values, grid=self.grid, low=low, high=high, box=box)
        return with_scale(drawn, *ends, SHOWS[show])

    def photo(self, *, cut: bool = False) -> Any:
        """Return the photo as it is drawn on."""
        return self._canvas(cut and self.grid is not None)[0]

    def _canvas(self, cut: bool) -> tuple[Any, Box | None]:
        """Return the picture to draw on, and the part of it that the patches cover."""
        picture, box = self.picture, self.box
        if cut and box is not None:
            # whole pixels: one that lies in it by half belongs to it
            x, y, end, foot = (math.ceil(side - 0.5) for side in box)
            picture = picture.crop((x, y, max(end, x + 1), max(foot, y + 1)))
            box = (box[0] - x, box[1] - y, box[2] - x, box[3] - y)
        if self.grid is None:
            return picture, box
        left, top, right, bottom = box or (0.0, 0.0, *map(float, picture.size))
        patch = min((right - left) / self.grid[1], (bottom - top) / self.grid[0])
        times = math.ceil(_SMALL / patch)
        if times > 1:
            from PIL import Image

            picture = picture.resize((times * picture.width, times * picture.height), Image.NEAREST)
            box = (times * left, times * top, times * right, times * bottom)
        return picture, box

    def _values(self, block: int, show: str) -> tuple[Tensor, float, float, tuple[str, str]]:
        """Return a value for each patch, the ends of the scale, and how they are written.

        Scales of sizes and similarities are those of all blocks, so that blocks can be compared.
        """
        if show == "size":
            every = [_sizes(groups) for groups in self.groups]
            most = max(2, *(int(sizes.nan_to_num(0).max()) for sizes in every))
            return every[block].log2(), 0.0, math.log2(most), ("1", str(most))
        if show == "similarity":
            every = self._similarities()
            known = torch.cat(every)
            least = float(known[known.isfinite()].min()) if known.isfinite().any() else 0.0
            low = min(math.floor(20 * least) / 20, 0.95)
            return every[block], low, 1.0, (f"{low:.2f}", "1.00")
        if self.attention is None:
            raise UnsupportedError("the attention of the class token was not recorded.")
        values = 100 * self.attention[block]
        high = float(values.nan_to_num(0).max()) or 1.0
        return values, 0.0, high, ("0 %", f"{high:.2g} %")

    def _similarities(self) -> list[Tensor]:
        """For each block `[N]`, the lowest similarity of the pairs that each patch's group was merged of; NaN: none."""
        if self.trace is None or self.inside:
            raise UnsupportedError(
                "similarities are of pairs that outlive their block, and blocks that merge inside windows hand on all "
                "their tokens."
            )
        if any(block.is_mixed for block in self.trace.blocks):
            raise UnsupportedError(
                f"{self.trace.method} mixes tokens: every one that is left is made of many, and there are no pairs."
            )
        least = torch.full((self.trace.blocks[0].groups.shape[1],), math.inf)  # by the place that leads a group
        found = []
        for block in self.trace.blocks:
            is_merged = block.into[0] >= 0
            gone, into = block.gone[0][is_merged], block.into[0][is_merged]
            pairs = torch.minimum(block.similarity[0][is_merged], least[gone])
            least = least.scatter_reduce(0, into, pairs, "amin")
            groups = block.groups[0]
            values = least[block.kept[0][groups.clamp_min(0)]]
            values = values.masked_fill((groups < 0) | values.isinf(), math.nan)
            found.append(values[self.prefix : self.prefix + self.groups[0].shape[0]])
        return found


def visualize(
    handle: Handle,
    image: Any,
    *,
    block: int | Literal["all"] = -1,
    show: str = "groups",
    cut: bool = False,
    preprocessing: Any = None,
) -> Any:
    """Run a patched model on a photo and return a PIL image of what merged in it.

    Patches of one token are a flat area in their mean colour, with an edge; a patch of its own keeps its pixels, a
    dropped one is black. The image has the photo's own size, with what the model was not given in pale. Where that part
    is unknown, it is the model's input; where patches would be smaller than 8 pixels, it is a whole number of times as
    large; without a grid of patches, tokens are drawn as cells in order. Blocks that merge inside windows are drawn as
    their attention saw them.

    Args:
        handle: of `patch`; nothing but its record of the last forward changes.
        image: a file or a PIL image, opened as people see it: upright, and on white where it is transparent.
        block: after which block: 0 the first, -1 the last; "all" is a sheet of all.
        show: "groups"; "size", how many patches are one token; "similarity", the cosine of the least similar pair in a
            token; "attention", what the class token attends to.
        cut: leave out what the model was not given.
        preprocessing: as in `tokenmerge.data.prepare.find_preprocessing`; by default the model's own.

    Raises `DataError` for what is no image or no block, `UnsupportedError` for what the model or its method has not,
    `NotPatchedError` for a handle that was removed.

    >>> from PIL import Image
    >>> with tokenmerge.patch(tokenmerge.load("reference"), r=8) as handle:
    ...     tokenmerge.visualize(handle, Image.radial_gradient("L")).size
    (256, 256)
    """
    prepared = find_preprocessing(handle.model, given=preprocessing)
    check_show(show)
    depth = len(handle.runners)
    blocks = numbers_of_blocks(block, depth)
    seen = look(handle, image, prepared, shows=(show,))
    return sheet_of_blocks(seen, blocks, show, cut=cut) if block == "all" else seen.draw(blocks[0], show, cut=cut)


def numbers_of_blocks(asked: Literal["all"] | int | Sequence[int], depth: int) -> list[int]:
    """Return the numbers of blocks from 0, in order; raises `DataError` for one that is not there."""
    if asked == "all":
        return list(range(depth))
    found = [asked] if isinstance(asked, int) else list(asked)
    for number in found:
        if not isinstance(number, int) or not -depth <= number < depth:
            counted = f"{number + 1} (number {number} from 0)" if isinstance(number, int) and number >= 0 else number
            raise DataError(f"no block {counted}: this model has {depth}.")
    if not found:
        raise DataError(f"no block is asked for: this model has {depth}.")
    return sorted({number % depth for number in found})


def check_show(show: str) -> str:
    """Return what is to be shown; raise `UnknownNameError` for what there is not."""
    if show not in SHOWS:
        raise unknown_name("picture of", show, SHOWS)
    return show


def look(
    handle: Handle, image: Any, prepared: Preprocessing, *, shows: Sequence[str] = ("groups",), number: int = 1
) -> Seen:
    """Run a patched model on a photo and return what it merged, with what `shows` need recorded."""
    photo = open_photo(image)
    x = prepared(photo)
    if x.dim() != 3:
        raise DataError(f"the preprocessing makes {tuple(x.shape)} of a photo; expected channels, height, width.")
    box = seen_box(photo, x, prepared)
    picture = given_picture(x, prepared) if box is None else photo
    tower = next(handle.model.parameters())
    return look_at(handle, x[None].to(tower), picture, box, photo_name(image, number), shows, is_own=box is not None)


def look_at(
    handle: Handle,
    x: Tensor,
    picture: Any,
    box: Box | None,
    name: str,
    shows: Sequence[str] = ("groups",),
    *,
    is_own: bool = True,
    grid: tuple[int, int] | None = None,
    part: nn.Module | None = None,
) -> Seen:
    """Run a patched model on one input `x` `[1, ...]` that `picture` is of.

    `grid`: rows and columns of its patches where the caller knows them; `part`: the part of the model that takes `x`.
    """
    if tokenmerge.handle_of(handle.model, None) is not handle:
        raise NotPatchedError(
            "this handle's reduction was taken out of its model: there are no groups. Draw before handle.remove()."
        )
    track: Any = handle.track
    handle.track = "pairs" if "similarity" in shows else track or True
    try:
        run_images(handle.model if part is None else part, x)
        groups, windows = [part[0].cpu() for part in handle.groups], handle.windows
        trace = handle.trace() if "similarity" in shows else None
        tokens = handle.tokens
    finally:
        handle.track = track
    count = groups[0].shape[0] - handle.protected
    patches = slice(handle.prefix, handle.prefix + count)
    inside = any(one is not None for one in windows)
    if inside:
        groups = [whole if one is None else one[0].cpu() for whole, one in zip(groups, windows, strict=True)]
    attention = _class_attention(handle, x, groups) if "attention" in shows else None
    grid = grid or (grid_of(handle, x.shape[2:], count) if x.dim() == 4 else None)
    groups = [one[patches] for one in groups]
    return Seen(name, picture, box, is_own, grid, groups, tokens, inside, trace, handle.prefix, attention)


def grid_of(handle: Handle, size: Sequence[int], patches: int) -> tuple[int, int] | None:
    """Return rows and columns of the patches of an image of `size` (height, width); None if they are unknown."""
    own, whole = handle.grid, handle.input_size
    if own is not None and whole is not None and len(whole) == 3:
        rows, columns = (n * side / of for n, side, of in zip(own, size, whole[1:], strict=True))
        if rows.is_integer() and columns.is_integer() and rows * columns == patches:
            return int(rows), int(columns)
    elif own is not None and own[0] * own[1] == patches:
        return own
    side = math.sqrt(size[0] * size[1] / max(1, patches))  # of a square patch
    found = round(size[0] / side), round(size[1] / side)
    return found if found[0] * found[1] == patches else None


def sheet_of_blocks(seen: Seen, blocks: Sequence[int], show: str = "groups", *, cut: bool = False) -> Any:
    """Return the photo and what is merged after each of these blocks as one PIL image, with the tokens below each."""
    pictures = [seen.photo(cut=cut), *(seen.draw(block, show, cut=cut) for block in blocks)]
    texts = [seen.name, *(f"block {block + 1}: {seen.tokens[block]} tokens" for block in blocks)]
    # as few empty places as can be, in few rows
    columns = min(range(4, 8), key=lambda n: (-len(pictures) % n, -n)) if len(pictures) > 7 else len(pictures)
    side = min(480, max(picture.width for picture in pictures))
    lines = [slice(start, start + columns) for start in range(0, len(pictures), columns)]
    return sheet(
        [pictures[line] for line in lines],
        [""] * columns,
        side=max(160, side),
        captions=[texts[line] for line in lines],
        font=14,
    )


def _sizes(groups: Tensor) -> Tensor:  # [N]
    """Return how many patches are in the group of each patch, `[N]` float; NaN where it was dropped."""
    _, index, counts = groups.unique(return_inverse=True, return_counts=True)
    sizes: Tensor = counts[index].float().masked_fill(groups < 0, math.nan)
    return sizes


def _class_attention(handle: Handle, x: Tensor, groups: list[Tensor]) -> list[Tensor]:  # each [N], of all tokens
    """Return the share of the class token's attention that falls on each patch, `[N]` for each block.

    A token's share is that of its patches together, and is spread over them evenly. A block sees the tokens that the
    blocks before it left. Runs a copy of the model, in which every block looks, also where it merges nothing.
    """
    config, method = handle.config, handle.config.method
    if not handle.has_class:
        raise UnsupportedError("this model has no class token, whose attention could be shown.")
    if isinstance(method, Learned):
        raise UnsupportedError(f"the class token's attention cannot be shown for {method.name}, which has modules.")
    amounts = [n - left for n, left in pairwise([groups[0].shape[0], *handle.tokens])]
    seen: dict[int, Tensor] = {}  # by block, [M]
    twin = shared_copy(handle.model)
    tokenmerge.unpatch(twin)
    r = [max(1, amount) for amount in amounts]
    own: dict[str, Any] = {
        "method": _watching(method, amounts, seen),
        "r": r,
        "multiple_of": 1,
        "fingerprint": None,
        "measured": None,
    }
    tokenmerge.patch(twin, dataclasses.replace(config, **own))
    run_images(twin, x)
    before = [torch.arange(groups[0].shape[0]), *groups[:-1]]
    part = slice(handle.prefix, groups[0].shape[0] - handle.protected + handle.prefix)
    found = []
    for block, entering in enumerate(before):
        tokens, counts = entering[part], torch.bincount(entering[part].clamp_min(0))
        if block not in seen:  # too few tokens for the method to be asked
            found.append(torch.full((tokens.shape[0],), math.nan))
            continue
        share = (seen[block][tokens] / counts[tokens]).masked_fill(tokens < 0, math.nan)
        found.append(share / share.nansum())
    return found


def _watching(method: Reduction, amounts: Sequence[int], seen: dict[int, Tensor]) -> Reduction:
    """Return a method that does the same, and notes the class token's attention of each block."""
    kind = type(method)

    def plan(self: Any, view: TokenView, r: int) -> Any:
        seen[view.layer] = view.score("class")[0].float().cpu()
        if amounts[view.layer]:
            return kind.plan(self, view, r)
        B, n = view.stream.shape[:2]
        none = torch.empty(B, 0, dtype=torch.long, device=view.stream.device)
        return Plan(keep=torch.arange(n, device=none.device).expand(B, -1), src=none, dst=none, n=n)

    watching = type(kind.__name__, (kind,), {"needs": method.needs | {"q", "k"}, "plan": plan})
    options = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    return watching(**options)  # type: ignore[no-any-return]


if not TYPE_CHECKING:
    __getattr__ = moved_names(__name__)
