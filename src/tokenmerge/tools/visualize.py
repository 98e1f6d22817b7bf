"""Draw what was merged: each group of patches in its mean colour, with a border of its own colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenmerge.errors import DataError, UnsupportedError
from tokenmerge.files import replacing

__all__ = ["draw_clip", "draw_features", "draw_groups", "plot_pareto", "plot_tradeoff", "require_viz", "sheet"]


def draw_groups(image: Any, groups: Tensor, *, patch_size: int = 16, grid: tuple[int, int] | None = None) -> Any:
    """Return a PIL image of the same size whose groups of patches are flat areas with a border.

    `groups` `[N]` holds the group of each patch, row by row over `grid` (rows, columns; taken from the image's size if
    not given). A group of one patch keeps its pixels,
    dropped patches (-1) are black. Raises `DataError` where patches and image do not fit.
    """
    image_module = _pil()
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
    """Return the frames of a clip drawn as `draw_groups` draws one image: a group has one colour in all of them.

    `grid` counts the tubelets in time, rows and columns; `frames` has one PIL image, all of one size, for each of the
    first, and `groups` `[N]` runs over them frame by frame. Raises `DataError` where they do not fit.
    """
    times, rows, columns = grid
    if len(frames) != times:
        raise DataError(f"{len(frames)} frames do not fit tubelets of {times} times; give one frame for each.")
    width, height = frames[0].size
    # one tall image: what is one group there is one over time
    strip = _pil().new("RGB", (width, times * height))
    for number, frame in enumerate(frames):
        strip.paste(frame.convert("RGB"), (0, number * height))
    drawn = draw_groups(strip, groups, patch_size=patch_size, grid=(times * rows, columns))
    return [drawn.crop((0, number * height, width, (number + 1) * height)) for number in range(times)]


def draw_features(maps: Sequence[Tensor], size: tuple[int, int]) -> list[Any]:  # each [C, rows, columns]
    """Return a PIL image of `size` (width, height) per feature map: the first three principal components as colours.

    The components are those of the first map, so that colours compare. Raises `DataError` for maps of other shapes.
    """
    image_module = _pil()
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
    image_module = _pil()
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


def plot_tradeoff(path: Any, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Save a PNG of accuracy over throughput, one point per `r`; the free bound beside it where the rows have it."""
    require_viz()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot([row["images/s"] for row in rows], [row["top-1 %"] for row in rows], "o-", label="merged")
    for row in rows:
        at = (row["images/s"], row["top-1 %"])
        axes.annotate(f"r = {row['r']}", at, xytext=(4, 6), textcoords="offset points", fontsize=9)
    bound = [row for row in rows if row.get("bound images/s")]
    if bound:
        speeds, hits = [row["bound images/s"] for row in bound], [row["top-1 %"] for row in bound]
        for row in bound:
            height = row["top-1 %"]
            axes.plot([row["images/s"], row["bound images/s"]], [height, height], ":", color="gray", linewidth=1)
        axes.plot(speeds, hits, "|", color="gray", markersize=14, label="free bound: speed if merging cost nothing")
    # at least two points high: zoomed in further, chance would look like a trend
    middle = (max(row["top-1 %"] for row in rows) + min(row["top-1 %"] for row in rows)) / 2
    low, high = axes.get_ylim()
    half = max(1.0, (high - low) / 2)
    axes.set_ylim(middle - half, middle + half)
    axes.set(xlabel="images per second", ylabel="top-1 accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    with replacing(path) as part:
        figure.savefig(part, dpi=120)
    pyplot.close(figure)


def plot_pareto(path: Any, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Save a PNG of top-1 accuracy over the share of MACs and over images per second, a colour and marker per method.

    The first row is the unmerged model; its images per second times the speed-up of each row are drawn, since how fast
    the machine is differs from row to row. The rows that no other beats in both are joined and named. Where the lowest
    fifth would take half of the height, those rows are drawn at the lower edge.
    """
    require_viz()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = sorted(row["top-1 %"] for row in rows)
    top, low, fifth = heights[-1], heights[0], heights[len(heights) // 5]
    low = low if top - low <= 2 * (top - fifth) else min(fifth, rows[0]["top-1 %"])
    hidden = sum(height < low for height in heights)
    speed = rows[0]["images/s"]
    rows = [{**row, "top-1 %": max(low, row["top-1 %"]), "images/s": row["speed-up"] * speed} for row in rows]
    names = list(dict.fromkeys(row["method"] for row in rows[1:]))
    figure, panels = pyplot.subplots(1, 2, figsize=(15, 8), sharey=True, layout="constrained")
    columns = (("MACs share", -1), ("images/s", 1))
    drawn = [_draw_points(axes, rows, names, *of) for axes, of in zip(panels, columns, strict=True)]
    panels[0].invert_xaxis()
    margin = 0.06 * (top - low) or 1.0
    panels[0].set_ylim(low - margin, top + 2 * margin)
    below = f"; {hidden} rows below {low:.1f} % lie on the lower edge" if hidden else ""
    panels[0].set(xlabel="share of the unmerged MACs (less is better)", ylabel="top-1 accuracy (%)")
    panels[1].set(xlabel="images per second: the unmerged model's times the speed-up (more is better)")
    figure.supxlabel(f"Points that would cover each other are moved sideways{below}.", fontsize=9)
    figure.suptitle(_plain(title))
    handles = [*(drawn[0][1 + next(i for i, row in enumerate(rows[1:]) if row["method"] == name)] for name in names)]
    figure.legend([*handles, drawn[0][0]], [*map(_plain, names), "unmerged"], loc="outside right upper", fontsize=8)
    figure.canvas.draw()
    for axes, points, (column, sign) in zip(panels, drawn, columns, strict=True):
        front = [row for row in _front(rows, column, sign) if row is not rows[0]]
        _name_points(axes, front, column, _move_apart(axes, points, [rows.index(row) for row in front]))
    with replacing(path) as part:
        figure.savefig(part, dpi=110)
    pyplot.close(figure)


def _draw_points(axes: Any, rows: Sequence[dict[str, Any]], names: list[str], column: str, sign: int) -> list[Any]:
    """Draw each row as a point, and the front; returns the points."""
    unmerged = rows[0]
    points = list(axes.plot(unmerged[column], unmerged["top-1 %"], "k*", markersize=14, zorder=4))
    for row in rows[1:]:
        i = names.index(row["method"])
        style = {
            "color": f"C{i % 10}",
            "marker": "osD^v<>PX*"[i // 10 % 10],
            "markeredgecolor": "white",
            "clip_on": False,
        }
        points += axes.plot(row[column], row["top-1 %"], linestyle="", markersize=8, **style)
    front = _front(rows, column, sign)
    axes.plot([row[column] for row in front], [row["top-1 %"] for row in front], "-", color="gray", zorder=1)
    axes.axhline(unmerged["top-1 %"], color="black", linestyle="--", linewidth=0.8)
    axes.margins(x=0.1)
    axes.grid(alpha=0.3)
    return points


def _front(rows: Sequence[dict[str, Any]], column: str, sign: int) -> list[dict[str, Any]]:
    """Return the rows that no other beats in accuracy and in a column, where more (sign 1) or less (-1) is better.

    Two digits of the column count: rows that were meant to be equal differ a little.
    """
    front: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (sign * float(f"{row[column]:.2g}"), row["top-1 %"]), reverse=True):
        if not front or row["top-1 %"] > front[-1]["top-1 %"]:
            front.append(row)
    return front


def _move_apart(axes: Any, points: list[Any], fixed: list[int], width: int = 9) -> list[tuple[float, float]]:
    """Move points sideways until none covers another, the unmerged model and the fixed ones not; returns their pixels.

    Where there are too many for the panel the rest stay in their place, on each other.
    """
    panel = axes.get_window_extent()
    placed: list[tuple[float, float]] = []
    for i in sorted(range(len(points)), key=lambda i: i not in (0, *fixed)):
        x, y = axes.transData.transform(points[i].get_xydata()[0])
        shifts = [0] if i in (0, *fixed) else [side * step * width for step in range(9) for side in (1, -1)]
        inside = [s for s in shifts if panel.x0 <= x + s <= panel.x1]
        free = (s for s in inside if all(abs(x + s - a) >= width or abs(y - b) >= width for a, b in placed))
        x += next(free, 0)
        placed.append((x, y))
        points[i].set_data(*axes.transData.inverted().transform([(x, y)]).T)
    return placed


def _name_points(
    axes: Any, named: Sequence[dict[str, Any]], column: str, spots: Sequence[tuple[float, float]], limit: int = 90
) -> None:
    """Write the method beside each named point, moved up until it covers no other name and none of the points."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
    panel = axes.get_window_extent()
    for row in named:
        at = (row[column], row["top-1 %"])
        # to the side where there is room
        is_left = axes.transData.transform(at)[0] < panel.x0 + panel.width / 2
        style = {"ha": "left" if is_left else "right", "fontsize": 8, "in_layout": False}
        line = {"arrowstyle": "-", "color": "gray", "linewidth": 0.5}
        text = axes.annotate(
            _plain(f"{row['method']} {row['asked']}"), at, (0, 0), textcoords="offset points", arrowprops=line, **style
        )
        for lift in (*range(5, limit, 5), 5):
            text.set_position((6 if is_left else -6, lift))
            text.update_positions(axes.figure.canvas.get_renderer())
            box = Text.get_window_extent(text).padded(1)  # an annotation's own would hold the line
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def _plain(text: str) -> str:
    """Keep matplotlib from reading a formula, and from failing at names of files that are no text."""
    return text.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")


def require_viz() -> None:
    """Raise `UnsupportedError` with the command that installs what plots and pictures need."""
    _pil()
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UnsupportedError('plots need matplotlib: pip install "tokenmerge[viz]"') from error


def _border(index: Tensor) -> Tensor:  # [height, width] -> bool [height, width]
    """Pixels whose right or lower, left or upper neighbour is of another group."""
    border = torch.zeros_like(index, dtype=torch.bool)
    across, down = index[:, 1:] != index[:, :-1], index[1:] != index[:-1]
    border[:, 1:] |= across
    border[:, :-1] |= across
    border[1:] |= down
    border[:-1] |= down
    return border


def _colours(count: int) -> Tensor:
    """`count` colours far apart in hue, `[count, 3]`: steps of the golden ratio around the colour circle."""
    hue = (torch.arange(count) * 0.618034) % 1 * 6
    offsets = torch.tensor([5.0, 3.0, 1.0])
    k = (hue[:, None] + offsets) % 6
    return 255 * (1 - 0.85 * torch.minimum(k, 4 - k).clamp(0, 1))


def _pil() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise UnsupportedError('pictures need Pillow: pip install "tokenmerge[viz]"') from error
    return Image
