"""Plots of accuracy over speed and MACs, with error bars; PNG, SVG or PDF by the file name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenmerge.errors import UnsupportedError
from tokenmerge.files import replacing

__all__ = [
    "import_pil",
    "import_pyplot",
    "plain_text",
    "plot_front",
    "plot_pareto",
    "plot_speed",
    "plot_tradeoff",
    "require_viz",
    "save_figure",
]

Row = Mapping[str, Any]
_ERROR = "top-1 ±"


def plot_tradeoff(paths: Path | Sequence[Path], rows: Sequence[Row], title: str) -> None:
    """Save a plot of accuracy over throughput, one point per `r`, with the free bound if the rows have it.

    Error bars are the standard error of the accuracy.
    """
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    name, label = _quality(rows)
    speeds, heights = [row["images/s"] for row in rows], [row[name] for row in rows]
    _error_bars(axes, speeds, rows, name, "C0")
    axes.plot(speeds, heights, "o-", label="merged")
    bound = [row for row in rows if row.get("bound images/s")]
    for row in bound:
        axes.plot([row["images/s"], row["bound images/s"]], [row[name]] * 2, ":", color="gray", linewidth=1)
    if bound:
        fastest = [row["bound images/s"] for row in bound], [row[name] for row in bound]
        axes.plot(*fastest, "|", color="gray", markersize=14, label="free bound: speed if merging cost nothing")
    # at least two points high: at a larger scale noise would look like a trend
    least = 0.01 if name == "cosine" else 1.0
    low, high = axes.get_ylim()
    half = 1.15 * max(least, (high - low) / 2)
    middle = (low + high) / 2
    axes.set_ylim(middle - half, middle + half)
    axes.margins(x=0.12)
    axes.set(xlabel="images per second", ylabel=label, title=_wrapped(title))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    figure.canvas.draw()
    spots = [(row["images/s"], row[name]) for row in rows]
    marks = spots + [(row["bound images/s"], row[name]) for row in bound]
    _name_points(axes, [(f"r = {row['r']}", spot) for row, spot in zip(rows, spots, strict=True)], _pixels(axes, marks))
    save_figure(figure, paths)


def plot_pareto(paths: Path | Sequence[Path], rows: Sequence[Row], title: str) -> None:
    """Save a plot of accuracy over the share of MACs and over images per second, a colour and marker per method.

    The first row is the unmerged model. Its images per second times each row's speed-up is drawn, because the speed of
    the machine varies between rows. Error bars are standard errors of the accuracy. Rows on the Pareto front are joined
    and named. If the lowest fifth of the rows would take half of the height, those rows are drawn as arrows at the
    lower edge, with their values. Without accuracies the cosine similarity to the unmerged outputs is drawn.
    """
    pyplot = import_pyplot()
    name, label = _quality(rows)
    speed = rows[0]["images/s"]
    rows = [{**row, "images/s": row["speed-up"] * speed} for row in rows]
    least, top = _heights(rows, name)
    inside, below = ([row for row in rows if (row[name] >= least) is is_in] for is_in in (True, False))
    names = list(dict.fromkeys(row["method"] for row in rows[1:]))
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 7.5), sharey=True, layout="constrained")
    columns = (("MACs share", -1), ("images/s", 1))
    drawn = [_draw_points(axes, inside, names, name, *of) for axes, of in zip(panels, columns, strict=True)]
    panels[0].invert_xaxis()
    span = top - least or (0.01 if name == "cosine" else 2.0)
    panels[0].set_ylim(least - (0.13 if below else 0.05) * span, top + 0.05 * span)
    panels[0].set(xlabel="share of the unmerged MACs (less is better)", ylabel=label)
    panels[1].set(xlabel="images per second: the unmerged model's times the speed-up (more is better)")
    figure.suptitle(_wrapped(title))
    notes = ["Points that would cover each other are moved sideways."]
    notes += [f"Arrows: rows below {least:.4g}, at their values."] if below else []
    _legend(figure, names, " ".join(notes))
    figure.canvas.draw()
    for axes, points, (column, sign) in zip(panels, drawn, columns, strict=True):
        front = [row for row in _front(inside, name, column, sign) if row is not rows[0]]
        placed = _move_apart(axes, points, [inside.index(row) for row in front])
        for point, row in zip(points, inside, strict=True):
            _error_bars(axes, point.get_xdata(), [row], name, point.get_color())
        placed += _draw_below(axes, below, names, name, column, least - 0.03 * span)
        labels = [(f"{row['method']} {row['asked']}", (row[column], row[name])) for row in front]
        _name_points(axes, labels, placed)
    save_figure(figure, paths)


def plot_speed(paths: Path | Sequence[Path], rows: Sequence[Row], title: str) -> None:
    """Save a plot of the speed-up over `r`, a line per batch size, with the free bound; error bars are the noise."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    amounts = list(dict.fromkeys(row["r"] for row in rows))
    for i, batch in enumerate(dict.fromkeys(row["batch"] for row in rows)):
        own = [row for row in rows if row["batch"] == batch]
        places, gains = [amounts.index(row["r"]) for row in own], [row["speed-up"] for row in own]
        noise = [row["speed-up"] * (row["noise %"] or 0.0) / 100 for row in own]
        style = {"color": f"C{i % 10}", "capsize": 2, "elinewidth": 1}
        axes.errorbar(places, gains, yerr=noise, fmt="o-", label=f"batch {batch}", **style)
        bound = [row["speed-up"] * row["over bound"] for row in own]
        axes.plot(places, bound, "_", color=f"C{i % 10}", markersize=14)
    axes.plot([], [], "_", color="gray", markersize=14, label="free bound: speed if merging cost nothing")
    axes.axhline(1, color="black", linestyle="--", linewidth=0.8)
    axes.set_xticks(range(len(amounts)), [plain_text(str(r)) for r in amounts])
    axes.set(xlabel="r", ylabel="times as fast as the unmerged model", title=_wrapped(title))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    save_figure(figure, paths)


def plot_front(path: Path | Sequence[Path], rows: Sequence[Row], title: str) -> None:
    """Save a plot of the damage over the share of the MACs: what was tuned, and constant schedules beside it."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    plain = [row for row in rows if "constant" in row["note"]]
    tuned = [row for row in rows if row not in plain and row["damage"] > 0]
    for name, line, style in (("tuned", tuned, "o-"), ("constant r of tome", plain, "s--")):
        points = [(row["MACs share"], 100 * row["damage"]) for row in line if row["damage"] > 0]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name)
    for row in tuned:
        if row["note"] == "chosen":
            axes.plot(row["MACs share"], 100 * row["damage"], "*", markersize=16, color="C3", label="chosen")
    axes.set_yscale("log")
    axes.invert_xaxis()
    axes.set(xlabel="share of the unmerged MACs (less is better)", ylabel="damage: squared distance of the answers (%)")
    axes.set_title(_wrapped(title), fontsize=10)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def _legend(figure: Any, names: Sequence[str], note: str) -> None:
    """Draw the legend of colours and markers below the panels, in as many columns as fit."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linestyle="", marker="*", color="black", markersize=12)]
    handles += [Line2D([], [], linestyle="", markersize=8, **_look(i)) for i in range(len(names))]
    shown = ["unmerged", *(plain_text(text) for text in names)]
    columns = max(1, min(len(shown), 150 // (max(map(len, shown)) + 6)))
    options = {"loc": "outside lower center", "ncols": columns, "fontsize": 8, "title_fontsize": 8, "title": note}
    figure.legend(handles, shown, **options)


def import_pyplot() -> Any:
    """Return matplotlib's pyplot, which opens no window; raises `UnsupportedError` as `require_viz` does."""
    require_viz()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, paths: Path | Sequence[Path]) -> None:
    """Write a figure into files by their suffix, and close it."""
    from matplotlib import pyplot

    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        with replacing(Path(path)) as part:
            figure.savefig(part, dpi=120, format=Path(path).suffix[1:])
    pyplot.close(figure)


def _quality(rows: Sequence[Row]) -> tuple[str, str]:
    """Return the vertical figure and its label."""
    if rows[0].get("top-1 %") is not None:
        return "top-1 %", "top-1 accuracy (%), with its standard error" if _ERROR in rows[0] else "top-1 accuracy (%)"
    if rows[0].get("agreement %") is not None:
        return "agreement %", "images with the unmerged model's answer (%)"
    return "cosine", "cosine similarity to the unmerged answers"


def _heights(rows: Sequence[Row], name: str) -> tuple[float, float]:
    """Return the vertical limits of the panels; rows within them are drawn in place."""
    low = _lowest_drawn(rows, name)
    inside = [row for row in rows if row[name] >= low]
    errors = [row.get(_ERROR) or 0.0 if name == "top-1 %" else 0.0 for row in inside]
    ends = [(row[name] - error, row[name] + error) for row, error in zip(inside, errors, strict=True)]
    return min(low for low, _ in ends), max(high for _, high in ends)


def _lowest_drawn(rows: Sequence[Row], name: str) -> float:
    """Return the height above which rows are drawn in place."""
    heights = sorted(row[name] for row in rows)
    top, low, fifth = heights[-1], heights[0], heights[len(heights) // 5]
    # a difference within the noise does not make a row an outlier
    chance = 4 * (rows[0].get(_ERROR) or 0.0)
    found: float = low if top - low <= 2 * (top - fifth) + chance else min(fifth, rows[0][name])
    return found


def _error_bars(axes: Any, places: Sequence[float], rows: Sequence[Row], name: str, color: str) -> None:
    errors = [row.get(_ERROR) if name == "top-1 %" else None for row in rows]
    if any(error is not None for error in errors):
        style = {"fmt": "none", "ecolor": color, "alpha": 0.35, "elinewidth": 1, "capsize": 2, "zorder": 1}
        axes.errorbar(places, [row[name] for row in rows], yerr=[error or 0.0 for error in errors], **style)


def _look(i: int) -> dict[str, Any]:
    return {"color": f"C{i % 10}", "marker": "osD^<>PXph"[i // 10 % 10], "markeredgecolor": "white"}


def _draw_points(axes: Any, rows: Sequence[Row], names: list[str], name: str, column: str, sign: int) -> list[Any]:
    """Draw each row as a point, and the front; return the points."""
    unmerged = rows[0]
    points = list(axes.plot(unmerged[column], unmerged[name], "k*", markersize=14, zorder=4))
    for row in rows[1:]:
        look = _look(names.index(row["method"]))
        points += axes.plot(row[column], row[name], linestyle="", markersize=8, clip_on=False, zorder=3, **look)
    front = _front(rows, name, column, sign)
    axes.plot([row[column] for row in front], [row[name] for row in front], "-", color="gray", zorder=1)
    axes.axhline(unmerged[name], color="black", linestyle="--", linewidth=0.8)
    axes.margins(x=0.12)
    axes.grid(alpha=0.3)
    return points


def _draw_below(
    axes: Any, rows: Sequence[Row], names: list[str], name: str, column: str, height: float
) -> list[tuple[float, float]]:
    """Draw lower rows as arrows with their values; return the pixels they cover."""
    panel, taken = axes.get_window_extent(), list[tuple[float, float]]()
    for row in sorted(rows, key=lambda row: row[column]):
        x, y = axes.transData.transform((row[column], height))
        # side by side while there is room
        steps = [side * 13 * step for step in range(30) for side in (1, -1)]
        free = (s for s in steps if panel.x0 + 6 < x + s < panel.x1 - 6 and all(abs(x + s - a) > 12 for a, _ in taken))
        x += next(free, 0)
        taken.append((x, y))
        place = axes.transData.inverted().transform((x, y))
        color = _look(names.index(row["method"]))["color"]
        axes.plot(*place, linestyle="", marker="v", markersize=8, color=color, clip_on=False, zorder=3)
        style = {"textcoords": "offset points", "ha": "center", "va": "top", "fontsize": 7, "rotation": 90}
        axes.annotate(f"{row[name]:.3g}", place, (0, -6), in_layout=False, **style)
    return taken


def _front(rows: Sequence[Row], name: str, column: str, sign: int) -> list[Row]:
    """Return the Pareto front of quality and one column, where more (sign 1) or less (-1) is better.

    The column is compared to two digits, because rows meant to be equal differ slightly.
    """
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (sign * float(f"{row[column]:.2g}"), row[name]), reverse=True):
        if not front or row[name] > front[-1][name]:
            front.append(row)
    return front


def _move_apart(axes: Any, points: list[Any], fixed: list[int], width: int = 9) -> list[tuple[float, float]]:
    """Move points sideways so that none overlap, except the unmerged model and fixed points; return their pixels.

    If they do not all fit in the panel, the rest keep their places and overlap.
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


def _pixels(axes: Any, spots: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    return [tuple(axes.transData.transform(spot)) for spot in spots]


def _name_points(
    axes: Any, named: Sequence[tuple[str, tuple[float, float]]], spots: Sequence[tuple[float, float]], limit: int = 120
) -> None:
    """Write each name near its point: inside the panel, without covering other names or points."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
    panel = axes.get_window_extent()
    line = {"arrowstyle": "-", "color": "gray", "linewidth": 0.5}
    for name, at in named:
        back = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
        style = {"fontsize": 8, "in_layout": False, "textcoords": "offset points", "arrowprops": line, "bbox": back}
        text = axes.annotate(plain_text(name), at, (0, 0), **style)
        # try the side with more room first, nearest positions first
        sides = ("left", "right") if axes.transData.transform(at)[0] < panel.x0 + panel.width / 2 else ("right", "left")
        places = [(side, sign * lift) for lift in range(5, limit, 5) for sign in (1, -1) for side in sides]
        for side, lift in [*places, (sides[0], 5)]:
            text.set_ha(side)
            text.set_position((6 if side == "left" else -6, lift))
            text.update_positions(axes.figure.canvas.get_renderer())
            box = Text.get_window_extent(text).padded(1)  # the extent of an Annotation would include its line
            fits = panel.x0 <= box.x0 and box.x1 <= panel.x1 and panel.y0 <= box.y0 and box.y1 <= panel.y1
            if fits and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def _wrapped(title: str, width: int = 90) -> str:
    """Wrap a title to the width of the page."""
    from textwrap import fill

    return plain_text(fill(title, width))


def plain_text(text: str) -> str:
    """Escape "$" and undecodable characters of file names, which matplotlib would read as formulas or fail on."""
    return text.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")


def require_viz() -> None:
    """Raise `UnsupportedError` with the install command if the packages for plots and pictures are missing."""
    import_pil()
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UnsupportedError('plots need matplotlib: pip install "tokenmerge[viz]"') from error


def import_pil() -> Any:
    """Return PIL's Image module; raise `UnsupportedError` with the install command if it is missing."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UnsupportedError('pictures need Pillow: pip install "tokenmerge[viz]"') from error
    return Image
