"""Draw what was merged into pictures: groups in their mean colour with an edge, and values of tokens as colours.

Shapes: N patches, `rows` x `columns` of a grid; pictures are PIL images of width W and height H.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenmerge.errors import DataError
from tokenmerge.report.plots import import_pil

__all__ = [
    "Box",
    "draw_cells",
    "draw_clip",
    "draw_features",
    "draw_groups",
    "draw_values",
    "shades_of",
    "sheet",
    "with_scale",
]

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
_EDGE = 16  # a patch is so many times as wide as the edge of a group
_PALE = 0.7  # of white, over what no patch covers
_CELL = 24  # pixels of a token that has no place in the picture
# from low to high, also for people who see few colours; nine points of matplotlib's viridis (CC0)
_SCALE = (
    (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
    (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37),
)  # fmt: skip


class _Cells(NamedTuple):
    """Which patch covers each pixel: `across` and `down` are -1 where none does."""

    across: Tensor  # [W] the column of a pixel
    down: Tensor  # [H] its row

    def spread(self, of_patches: Tensor) -> Tensor:  # [rows, columns, ...]
        """Return the value of the patch of each pixel, `[H, W, ...]`; those of no patch get any."""
        return of_patches[self.down.clamp_min(0)][:, self.across.clamp_min(0)]

    def sums(self, pixels: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the sum of the pixels of each patch, `[rows, columns, 3]` int64, and how many they are."""
        is_across, is_down = self.across >= 0, self.down >= 0
        part = pixels[is_down][:, is_across].int()
        lines = part.new_zeros(grid[0], *part.shape[1:]).index_add_(0, self.down[is_down], part)
        found = torch.zeros(grid[0], grid[1], 3, dtype=torch.long)
        found.index_add_(1, self.across[is_across], lines.long())
        counts = (_count(line, n) for line, n in zip((self.down, self.across), grid, strict=True))
        tall, wide = counts
        return found, tall[:, None] * wide

    def near(self, edge: int) -> list[Tensor]:
        """Return the pixels at the left, right, upper and lower edge of their patch, each `[1, W]` or `[H, 1]`."""
        found = []
        for line, dim in ((self.across, 0), (self.down, 1)):
            place = torch.arange(line.shape[0])
            _, of, counts = line.unique_consecutive(return_inverse=True, return_counts=True)
            end = counts.cumsum(0)
            first, last = (end - counts)[of], end[of] - 1
            found += [(place - first < edge).unsqueeze(dim), (last - place < edge).unsqueeze(dim)]
        return found


def draw_groups(
    image: Any,
    groups: Tensor,
    *,
    patch_size: int = 16,
    grid: tuple[int, int] | None = None,
    box: Box | None = None,
    shades: Tensor | None = None,
) -> Any:
    """Return a PIL image of the same size, in which groups of patches are flat areas with an edge.

    `groups` `[N]` holds the group of each patch, row by row over `grid` (rows, columns; by default from the image
    size), which covers the whole image or a `box` of it; around that the image is pale. A group of one patch keeps its
    pixels, dropped patches (-1) are black. An edge has the colour of a number, `shades` `[N]`: by default that of the
    group's first patch, so that a group that grows keeps its colour. Raises `DataError` if patches do not fit.
    """
    import_pil()
    rows, columns = grid or (image.height // patch_size, image.width // patch_size)
    if groups.numel() != rows * columns:
        raise DataError(f"{groups.numel()} patches do not fit an image of {rows} x {columns} patches of {patch_size}.")
    groups = groups.detach().cpu().view(rows, columns)
    pixels, cells = _pixels(image), _cells(image.size, (rows, columns), box)
    shades = shades_of(groups.flatten()) if shades is None else shades.cpu()
    _, index, counts = groups.unique(return_inverse=True, return_counts=True)
    sums, areas = cells.sums(pixels, (rows, columns))
    total = torch.zeros(counts.shape[0], 3).double().index_add_(0, index.flatten(), sums.view(-1, 3).double())
    area = torch.zeros(counts.shape[0]).double().index_add_(0, index.flatten(), areas.flatten().double())
    flat = (total / area.clamp_min(1)[:, None]).round().byte()[index]
    is_merged = counts[index] > 1
    drawn = torch.where(cells.spread(is_merged)[..., None], cells.spread(flat), pixels)
    is_edge = _edges(cells, index, is_merged, _edge(image.size, (rows, columns), box))
    drawn = torch.where(is_edge[..., None], cells.spread(_colours(shades.view(rows, columns))), drawn)
    drawn[cells.spread(groups < 0)] = 0
    return _picture(_around(drawn, pixels, cells))


def draw_values(
    image: Any, values: Tensor, *, grid: tuple[int, int], low: float, high: float, box: Box | None = None
) -> Any:
    """Return a PIL image of the same size in grey, with the value of each patch as a colour from `low` to `high`.

    `values` `[N]` run row by row over `grid`; a patch without one (NaN) stays grey. Raises `DataError` if they do not
    fit.
    """
    import_pil()
    if values.numel() != grid[0] * grid[1]:
        raise DataError(f"{values.numel()} values do not fit {grid[0]} x {grid[1]} patches.")
    values = values.detach().cpu().float().view(grid)
    pixels, cells = _pixels(image), _cells(image.size, grid, box)
    grey = pixels.float().mean(dim=2, keepdim=True).expand(-1, -1, 3)
    colours = cells.spread(as_colours((values - low) / ((high - low) or 1.0)))
    is_known = cells.spread(values.isfinite())[..., None]
    drawn = torch.where(is_known, 0.3 * grey + 0.7 * colours, grey).round().byte()
    return _picture(_around(drawn, pixels, cells))


def draw_cells(groups: Tensor) -> Any:
    """Return a PIL image of tokens that have no place in a picture: cells in order, each in the colour of its group.

    A token that was not merged is grey, a dropped one black; cells behind the last token are white.
    """
    import_pil()
    count = groups.numel()
    columns = max(1, round(count**0.5))
    rows = -(-count // columns)
    groups = groups.detach().cpu().flatten()
    colours = _colours(shades_of(groups))
    _, index, counts = groups.unique(return_inverse=True, return_counts=True)
    colours[counts[index] == 1] = 200
    colours[groups < 0] = 0
    whole = torch.full((rows * columns, 3), 255, dtype=torch.uint8)
    whole[:count] = colours
    sheet = whole.view(rows, columns, 3).repeat_interleave(_CELL, 0).repeat_interleave(_CELL, 1)
    sheet[::_CELL] = sheet[:, ::_CELL] = 255
    return _picture(sheet)


def draw_clip(
    frames: Sequence[Any],
    groups: Tensor,
    *,
    grid: tuple[int, int, int],
    patch_size: int = 16,
    box: Box | None = None,
) -> list[Any]:
    """Draw the frames of a clip like `draw_groups`; a group has the same colour in all frames.

    `grid` is (time, rows, columns) in tubelets. `frames` holds one PIL image per step in time, all of one size;
    `groups` `[N]` runs over them frame by frame. Raises `DataError` if they do not fit.
    """
    times, rows, columns = grid
    if len(frames) != times:
        raise DataError(f"{len(frames)} frames do not fit tubelets of {times} times; give one frame for each.")
    left, top, right, bottom = map(round, box or (0, 0, *frames[0].size))
    width, height = right - left, bottom - top
    # stack the frames into one tall image, so that a group extends over time
    strip = import_pil().new("RGB", (width, times * height))
    for number, frame in enumerate(frames):
        strip.paste(frame.convert("RGB").crop((left, top, right, bottom)), (0, number * height))
    strip = draw_groups(strip, groups, patch_size=patch_size, grid=(times * rows, columns))
    drawn = [strip.crop((0, number * height, width, (number + 1) * height)) for number in range(times)]
    if box is None:
        return drawn
    whole = [draw_groups(frame, torch.zeros(1), grid=(1, 1), box=(left, top, right, bottom)) for frame in frames]
    for frame, part in zip(whole, drawn, strict=True):
        frame.paste(part, (left, top))
    return whole


def draw_features(maps: Sequence[Tensor], size: tuple[int, int]) -> list[Any]:  # each [C, rows, columns]
    """Return one PIL image of `size` (width, height) per feature map, with three principal components as colours.

    The components are those of the first map, so that colours are comparable. Raises `DataError` for maps of other
    shapes.
    """
    import_pil()
    shape = maps[0].shape
    if len(shape) != 3 or any(features.shape != shape for features in maps):
        raise DataError(f"expected maps of one shape [C, rows, columns]; got {[tuple(m.shape) for m in maps]}.")
    rows = maps[0].flatten(1).T.double()  # [rows * columns, C]
    mean = rows.mean(dim=0)
    basis = torch.linalg.eigh((rows - mean).T @ (rows - mean)).eigenvectors[:, -3:].flip(1)  # [C, 3]
    scores = (rows - mean) @ basis
    low, high = scores.quantile(0.02, dim=0), scores.quantile(0.98, dim=0)
    pictures = []
    for features in maps:
        colours = (((features.flatten(1).T.double() - mean) @ basis - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
        grid = colours.T.view(1, 3, *shape[1:])
        pixels = torch.nn.functional.interpolate(grid, size=size[::-1], mode="bilinear")[0].permute(1, 2, 0)
        pictures.append(_picture((255 * pixels).round().byte()))
    return pictures


def shades_of(groups: Tensor) -> Tensor:  # [N]
    """Return the number of each patch's group, `[N]`: that of the group's first patch."""
    names, index = groups.flatten().unique(return_inverse=True)
    places = torch.arange(index.shape[0])
    return torch.full(names.shape, index.shape[0]).scatter_reduce(0, index, places, "amin")[index]


def with_scale(picture: Any, low: str, high: str, title: str) -> Any:
    """Return a picture with a strip below it that says what the colours of `draw_values` mean."""
    image_module = import_pil()
    from PIL import ImageDraw

    width, height = picture.size
    size = max(11, min(width // 36, 40))
    lines, pen = [""], ImageDraw.Draw(picture)
    for word in title.split():
        longer = f"{lines[-1]} {word}".strip()
        is_full = lines[-1] and pen.textlength(longer, font_size=size) > width - size
        lines = [*lines, word] if is_full else [*lines[:-1], longer]
    page = image_module.new("RGB", (width, height + int((2 + 1.3 * len(lines)) * size)), "white")
    page.paste(picture, (0, 0))
    pen, y = ImageDraw.Draw(page), height + size // 2
    bar = _picture(as_colours(torch.linspace(0, 1, max(2, width // 4))).expand(size, -1, -1))
    left = int(size + pen.textlength(low, font_size=size))
    page.paste(bar, (left, y))
    pen.text((size // 2, y), low, fill="black", font_size=size)
    pen.text((left + bar.width + size // 2, y), high, fill="black", font_size=size)
    pen.text((size // 2, y + int(1.3 * size)), "\n".join(lines), fill="black", font_size=size)
    return page


def sheet(
    rows: Sequence[Sequence[Any]],
    labels: Sequence[str],
    *,
    side: int = 168,
    gap: int = 8,
    captions: Sequence[Sequence[str]] = (),
    font: int = 11,
) -> Any:
    """Return one PIL image: rows of images with a label above each column, and `captions` below each image.

    Images become `side` pixels wide and keep their shape; a caption may have several lines.
    """
    image_module = import_pil()
    from PIL import ImageDraw

    top, line = 24 * font // 11 if any(labels) else 0, font + font // 3
    fitted = [[_fitted(image, side) for image in images] for images in rows]
    below = [line * max((text.count("\n") + 1 for text in texts), default=0) for texts in captions]
    below += [0] * (len(rows) - len(below))
    heights = [max((image.height for image in images), default=side) for images in fitted]
    page = image_module.new(
        "RGB", (len(labels) * (side + gap) + gap, top + sum(heights) + sum(below) + (len(rows) + 1) * gap), "white"
    )
    pen, y = ImageDraw.Draw(page), top + gap
    for column, label in enumerate(labels):
        pen.text((gap + column * (side + gap), (top - font) // 2), label, fill="black", font_size=font)
    for number, (images, height, under) in enumerate(zip(fitted, heights, below, strict=True)):
        for column, image in enumerate(images):
            left = gap + column * (side + gap)
            page.paste(image, (left, y))
            if under:
                pen.text((left, y + height + font // 3), captions[number][column], fill="black", font_size=font)
        y += height + under + gap
    return page


def _fitted(image: Any, side: int) -> Any:
    """Return an image of this width; enlarged, its pixels stay sharp."""
    image_module = import_pil()
    size = (side, max(1, round(image.height * side / image.width)))
    how = image_module.NEAREST if side >= image.width else image_module.LANCZOS
    return image.convert("RGB").resize(size, how)


def _count(line: Tensor, cells: int) -> Tensor:
    return torch.bincount(line[line >= 0], minlength=cells)


def _cells(size: tuple[int, int], grid: tuple[int, int], box: Box | None) -> _Cells:
    """Return the patch of each pixel: the one that its middle lies in."""
    left, top, right, bottom = box or (0.0, 0.0, float(size[0]), float(size[1]))
    lines = []
    for length, start, end, cells in zip(size, (left, top), (right, bottom), grid[::-1], strict=True):
        found = ((torch.arange(length).double() + 0.5 - start) * (cells / (end - start))).floor().long()
        lines.append(found.masked_fill((found < 0) | (found >= cells), -1))
    return _Cells(*lines)


def _edge(size: tuple[int, int], grid: tuple[int, int], box: Box | None) -> int:
    left, top, right, bottom = box or (0, 0, *size)
    return max(1, round(min((right - left) / grid[1], (bottom - top) / grid[0]) / _EDGE))


def _edges(cells: _Cells, index: Tensor, is_merged: Tensor, edge: int) -> Tensor:  # index: [rows, columns]
    """Return the pixels of merged groups next to another group, `[H, W]`."""
    across, down = index[:, 1:] != index[:, :-1], index[1:] != index[:-1]
    pad = torch.nn.functional.pad
    sides = (pad(across, (1, 0)), pad(across, (0, 1)), pad(down, (0, 0, 1, 0)), pad(down, (0, 0, 0, 1)))
    found = torch.zeros(cells.down.shape[0], cells.across.shape[0], dtype=torch.bool)
    for is_other, is_near in zip(sides, cells.near(edge), strict=True):
        found |= cells.spread(is_other & is_merged) & is_near
    return found


def _around(drawn: Tensor, pixels: Tensor, cells: _Cells) -> Tensor:
    """Return the drawing with the pixels that no patch covers in their own pale colours."""
    is_out = (cells.down < 0)[:, None] | (cells.across < 0)
    if is_out.any():
        drawn[is_out] = ((1 - _PALE) * pixels[is_out].float() + 255 * _PALE).round().byte()
    return drawn


def _pixels(image: Any) -> Tensor:  # uint8 [H, W, 3]
    import numpy as np

    return torch.from_numpy(np.array(image.convert("RGB")))


def _picture(pixels: Tensor) -> Any:  # uint8 [H, W, 3]
    return import_pil().fromarray(pixels.contiguous().numpy())


def as_colours(values: Tensor) -> Tensor:
    """Return the colours of values between 0 and 1, uint8 `[..., 3]`, from dark blue to yellow."""
    scale = torch.tensor(_SCALE).float()
    at = values.nan_to_num(0.0).clamp(0, 1) * (len(_SCALE) - 1)
    low = at.floor().long().clamp_max(len(_SCALE) - 2)
    return torch.lerp(scale[low], scale[low + 1], (at - low)[..., None]).round().byte()


def _colours(numbers: Tensor) -> Tensor:
    """Return the colours of numbers, uint8 `[..., 3]`: near numbers have distant hues (steps of the golden ratio).

    Numbers whose hues are near again, 21 apart or 34, differ in how pale they are.
    """
    numbers = numbers.double()
    hue, depth = numbers * 0.6180339887 % 1 * 6, 1 - 0.5 * (numbers * 0.7548776662 % 1)
    k = (hue[..., None] + torch.tensor([5.0, 3.0, 1.0]).double()) % 6
    found: Tensor = (255 * (1 - depth[..., None] * torch.minimum(k, 4 - k).clamp(0, 1))).round().byte()
    return found
