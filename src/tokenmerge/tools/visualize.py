"""Draw the groups of merged tokens: each in its mean colour, with a border in a colour of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenmerge._moved import moved_names
from tokenmerge.errors import DataError
from tokenmerge.report.plots import import_pil

__all__ = ["draw_clip", "draw_features", "draw_groups", "sheet"]


def draw_groups(image: Any, groups: Tensor, *, patch_size: int = 16, grid: tuple[int, int] | None = None) -> Any:
    """Return a PIL image of the same size, in which groups of patches are flat areas with a border.

    `groups` `[N]` holds the group of each patch, row by row over `grid` (rows, columns; by default from the image
    size). A group of one patch keeps its pixels, dropped patches (-1) are black. Raises `DataError` if patches and
    image do not fit.
    """
    image_module = import_pil()
    rows, columns = grid or (image.height // patch_size, image.width // patch_size)
    if groups.numel() != rows * columns:
        raise DataError(f"{groups.numel()} patches do not fit an image of {rows} x {columns} patches of {patch_size}.")
    canvas = image.convert("RGB").resize((columns * patch_size, rows * patch_size))
    pixels = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(rows * patch_size, -1, 3)
    label = groups.cpu().view(rows, columns).repeat_interleave(patch_size, 0).repeat_interleave(patch_size, 1)
    _, index, counts = label.unique(return_inverse=True, return_counts=True)
    is_merged = counts[index] > patch_size**2  # [height, width]
    flat = torch.zeros(len(counts), 3).index_add_(0, index.flatten(), pixels.view(-1, 3).float())
    drawn = torch.where(is_merged[..., None], (flat / counts[:, None])[index], pixels.float())
    colours = _colours(len(counts))[index]
    drawn = torch.where((_border(index) & is_merged)[..., None], colours, drawn)
    drawn[label < 0] = 0
    picture = image_module.frombytes("RGB", canvas.size, bytes(drawn.round().to(torch.uint8).flatten().tolist()))
    return picture.resize(image.size)


def draw_clip(frames: Sequence[Any], groups: Tensor, *, grid: tuple[int, int, int], patch_size: int = 16) -> list[Any]:
    """Draw the frames of a clip like `draw_groups`; a group has the same colour in all frames.

    `grid` is (time, rows, columns) in tubelets. `frames` holds one PIL image per step in time, all of one size;
    `groups` `[N]` runs over them frame by frame. Raises `DataError` if they do not fit.
    """
    times, rows, columns = grid
    if len(frames) != times:
        raise DataError(f"{len(frames)} frames do not fit tubelets of {times} times; give one frame for each.")
    width, height = frames[0].size
    # stack the frames into one tall image, so that a group extends over time
    strip = import_pil().new("RGB", (width, times * height))
    for number, frame in enumerate(frames):
        strip.paste(frame.convert("RGB"), (0, number * height))
    drawn = draw_groups(strip, groups, patch_size=patch_size, grid=(times * rows, columns))
    return [drawn.crop((0, number * height, width, (number + 1) * height)) for number in range(times)]


def draw_features(maps: Sequence[Tensor], size: tuple[int, int]) -> list[Any]:  # each [C, rows, columns]
    """Return one PIL image of `size` (width, height) per feature map, with three principal components as colours.

    The components are those of the first map, so that colours are comparable. Raises `DataError` for maps of other
    shapes.
    """
    image_module = import_pil()
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
        data = (255 * pixels).round().to(torch.uint8)
        pictures.append(image_module.frombytes("RGB", size, bytes(data.flatten().tolist())))
    return pictures


def sheet(rows: Sequence[Sequence[Any]], labels: Sequence[str], *, side: int = 168, gap: int = 8) -> Any:
    """Return one PIL image: rows of images of equal size, with a label above each column."""
    image_module = import_pil()
    from PIL import ImageDraw

    top = 24
    width = len(labels) * (side + gap) + gap
    page = image_module.new("RGB", (width, top + len(rows) * (side + gap) + gap), "white")
    pen = ImageDraw.Draw(page)
    for column, label in enumerate(labels):
        pen.text((gap + column * (side + gap), 7), label, fill="black")
    for line, images in enumerate(rows):
        for column, image in enumerate(images):
            spot = (gap + column * (side + gap), top + gap + line * (side + gap))
            page.paste(image.resize((side, side), image_module.NEAREST), spot)
    return page


def _border(index: Tensor) -> Tensor:  # [height, width] -> bool [height, width]
    """Return the pixels next to a pixel of another group."""
    border = torch.zeros_like(index, dtype=torch.bool)
    across, down = index[:, 1:] != index[:, :-1], index[1:] != index[:-1]
    border[:, 1:] |= across
    border[:, :-1] |= across
    border[1:] |= down
    border[:-1] |= down
    return border


def _colours(count: int) -> Tensor:
    """Return `count` colours with distant hues, `[count, 3]`: steps of the golden ratio around the colour circle."""
    hue = (torch.arange(count) * 0.618034) % 1 * 6
    offsets = torch.tensor([5.0, 3.0, 1.0])
    k = (hue[:, None] + offsets) % 6
    return 255 * (1 - 0.85 * torch.minimum(k, 4 - k).clamp(0, 1))


if not TYPE_CHECKING:
    __getattr__ = moved_names(__name__)
