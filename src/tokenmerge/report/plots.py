"""Plots of accuracy over speed and MACs, with error bars; PNG, SVG or PDF by the file name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenmerge.errors import UnsupportedError
from tokenmerge.files import replacing
from tokenmerge.report.axes import COLOURS, QUALITY, axis_of, error_of, free_bound, front, limits

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
_BOUND = "free bound: speed if merging cost nothing"
_STAR: dict[str, Any] = {"color": "black", "marker": "*", "markersize": 14, "linestyle": ""}


def plot_tradeoff(paths: Path | Sequence[Path], rows: Sequence[Row], title: str) -> None:
    """Save a plot of accuracy over throughput, one point per `r`, with the free bound if the rows have it.

    The row with `r = 0` is the unmerged model. Error bars are the standard error of the accuracy.
    """
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    name = _quality(rows)
    spots = [(row["images/s"], row[name]) for row in rows]
    _error_bars(axes, [x for x, _ in spots], rows, name, COLOURS[0])
    axes.plot(*zip(*spots, strict=True), "o-", color=COLOURS[0], label="merged")
    unmerged = [spot for row, spot in zip(rows, spots, strict=True) if row["r"] == "0"]
    if unmerged:
        axes.plot(*zip(*unmerged, strict=True), label="unmerged model", **_STAR)
    marks = spots + _draw_bounds(axes, rows, "images/s", name)
    _set_limits(axes, name, [(row[name], error_of(row, name)) for row in rows])
    axes.set_xlim(*limits("images/s", [x for x, _ in marks]))
    axes.set(xlabel=axis_of("images/s").text, ylabel=_wrapped(axis_of(name).text, 45), title=_wrapped(title))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    figure.canvas.draw()
    _name_points(axes, [(f"r = {row['r']}", spot) for row, spot in zip(rows, spots, strict=True)], _pixels(axes, marks))
    save_figure(figure, paths)


def plot_pareto(paths: Path | Sequence[Path], rows: Sequence[Row], title: str) -> None:
    """Save a plot of accuracy over the share of MACs and over images per second, a colour and marker per method.

    The first row is the unmerged model. Its images per second times each row's speed-up is drawn, because the speed of
    the machine varies between rows. Error bars are standard errors of the accuracy. Rows on the Pareto front are joined
    and named, and have their free bounds beside them. If the lowest fifth of the rows would take half of the height,
    those rows are drawn as arrows at the lower edge, with their values. Without accuracies the agreement or the cosine
    similarity to the unmerged outputs is drawn.
    """
    pyplot = import_pyplot()
    name = _quality(rows)
    speed = rows[0]["images/s"]
    rows = [{**row, "images/s": row["speed-up"] * speed} for row in rows]
    least = _lowest_drawn(rows, name)
    inside, below = ([row for row in rows if (row[name] >= least) is is_in] for is_in in (True, False))
    names = list(dict.fromkeys(row["method"] for row in rows[1:]))
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 7.5), sharey=True, layout="constrained")
    columns = ("MACs share", "images/s")
    drawn = [_draw_points(axes, inside, names, name, column) for axes, column in zip(panels, columns, strict=True)]
    panels[0].invert_xaxis()
    low, high = _set_limits(panels[0], name, [(row[name], error_of(row, name)) for row in inside], bool(below))
    for axes, column in zip(panels, columns, strict=True):
        axes.set_xlabel(axis_of(column).text)
    panels[0].set_ylabel(_wrapped(axis_of(name).text, 60))
    figure.suptitle(_wrapped(title))
    notes = ["Points that would cover each other are moved sideways; gray: images per second of the free bound."]
    notes += [f"Arrows: rows below {least:.4g}, at their values."] if below else []
    _legend(figure, names, " ".join(notes))
    figure.canvas.draw()
    for axes, points, column in zip(panels, drawn, columns, strict=True):
        best = [row for row in front(inside, name, column) if row is not rows[0]]
        placed = _move_apart(axes, points, [inside.index(row) for row in best])
        for point, row in zip(points, inside, strict=True):
            _error_bars(axes, point.get_xdata(), [row], name, point.get_color())
        placed += _draw_below(axes, below, names, name, column, low + 0.08 * (high - low))
        labels = [(f"{row['method']} {row['asked']}", (row[column], row[name])) for row in best]
        _name_points(axes, labels, placed)
    save_figure(figure, paths)


def plot_speed(paths: Path | Sequence[Path], rows: Sequence[Row], title: str) -> None:
    """Save a plot of the speed-up over `r`, a line per batch size, with the free bound; error bars are the noise."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    amounts = list(dict.fromkeys(row["r"] for row in rows))
    spots = [(float(amounts.index(row["r"])), row["speed-up"]) for row in rows]
    for i, batch in enumerate(dict.fromkeys(row["batch"] for row in rows)):
        own = [(row, spot) for row, spot in zip(rows, spots, strict=True) if row["batch"] == batch]
        noise = [error_of(row, "speed-up") or 0.0 for row, _ in own]
        look = {"capsize": 2, "elinewidth": 1, "label": f"batch {batch}", **_look(i)}
        axes.errorbar(*zip(*(spot for _, spot in own), strict=True), yerr=noise, linestyle="-", **look)
    found = [(x, free_bound(row, "speed-up")) for row, (x, _) in zip(rows, spots, strict=True)]
    bounds = [(x, bound) for x, bound in found if bound is not None]
    if bounds:
        axes.plot(*zip(*bounds, strict=True), "_", color="gray", markersize=14, label=_BOUND)
    axes.axhline(1, color="black", linestyle="--", linewidth=0.8, label="unmerged model")
    axes.set_xticks(range(len(amounts)), [plain_text(str(r)) for r in amounts])
    axes.set_xlim(-0.4, len(amounts) - 0.6)
    axes.set(xlabel=axis_of("r").text, ylabel=_wrapped(axis_of("speed-up").text, 45), title=_wrapped(title))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    figure.canvas.draw()
    labels = [(f"{row['speed-up']:.2f}", spot) for row, spot in zip(rows, spots, strict=True)]
    _name_points(axes, labels, _pixels(axes, [*spots, *bounds]))
    save_figure(figure, paths)


def plot_front(path: Path | Sequence[Path], rows: Sequence[Row], title: str) -> None:
    """Save a plot of the damage over the share of the MACs: what was tuned, and constant schedules beside it.

    Points are named by their speed-up, as it was measured or else estimated from what was timed.
    """
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    damaged = [row for row in rows if row["damage"] > 0]
    spots = [(row["MACs share"], row["damage"]) for row in damaged]
    for i, (name, is_plain, style) in enumerate((("tuned", False, "o-"), ("constant r of tome", True, "s--"))):
        points = [spot for row, spot in zip(damaged, spots, strict=True) if ("constant" in row["note"]) is is_plain]
        if points:
            axes.plot(*zip(*points, strict=True), style, color=COLOURS[i], label=name)
    for row in damaged:
        if row["note"] == "chosen":
            axes.plot(row["MACs share"], row["damage"], "D", markersize=11, color=COLOURS[2], label="chosen")
    # a model without damage has no place on a logarithmic axis
    axes.axvline(1, color="black", linestyle="--", linewidth=0.8, label="unmerged model: no damage")
    axes.set_yscale("log")
    axes.set_xlim(*reversed(limits("MACs share", [1.0, *(x for x, _ in spots)])))
    if spots:
        axes.set_ylim(*limits("damage", [y for _, y in spots]))
    axes.set(xlabel=axis_of("MACs share").text, ylabel=_wrapped(axis_of("damage").text, 45))
    axes.set_title(_wrapped(title), fontsize=10)
    axes.grid(True, which="both", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, title="Points: speed-up, measured or estimated")
    figure.canvas.draw()
    speeds = [row["speed-up est."] if row["speed-up"] is None else row["speed-up"] for row in damaged]
    labels = [(f"{speed:.2f}x", spot) for speed, spot in zip(speeds, spots, strict=True)]
    _name_points(axes, labels, _pixels(axes, spots))
    save_figure(figure, path)


def _legend(figure: Any, names: Sequence[str], note: str) -> None:
    """Draw the legend of colours and markers below the panels, in as many columns as fit."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **_STAR)]
    handles += [Line2D([], [], linestyle="", markersize=8, **_look(i)) for i in range(len(names))]
    shown = ["unmerged model", *(plain_text(text) for text in names)]
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


def _quality(rows: Sequence[Row]) -> str:
    """Return the vertical figure: the first that the rows have."""
    return next((name for name in QUALITY if rows[0].get(name) is not None), "cosine")


def _set_limits(
    axes: Any, name: str, values: Sequence[tuple[float, float | None]], has_arrows: bool = False
) -> tuple[float, float]:
    """Set the ends of the vertical axis by the values and their errors; arrows need room below."""
    low, high = limits(name, [value + sign * (error or 0.0) for value, error in values for sign in (1, -1)])
    low -= 0.13 * (high - low) if has_arrows else 0.0
    axes.set_ylim(low, high)
    return low, high


def _draw_bounds(axes: Any, rows: Sequence[Row], column: str, name: str) -> list[tuple[float, float]]:
    """Draw the free bound of each row that has one, a dotted line away; return the places."""
    found = [(row, bound) for row in rows if (bound := free_bound(row, column)) is not None]
    for row, bound in found:
        axes.plot([row[column], bound], [row[name]] * 2, ":", color="gray", linewidth=1, zorder=1)
    spots = [(bound, row[name]) for row, bound in found]
    if spots:
        axes.plot(*zip(*spots, strict=True), "|", color="gray", markersize=14, label=_BOUND, zorder=1)
    return spots


def _lowest_drawn(rows: Sequence[Row], name: str) -> float:
    """Return the height above which rows are drawn in place."""
    heights = sorted(row[name] for row in rows)
    top, low, fifth = heights[-1], heights[0], heights[len(heights) // 5]
    # a difference within the noise does not make a row an outlier
    chance = 4 * (error_of(rows[0], name) or 0.0)
    found: float = low if top - low <= 2 * (top - fifth) + chance else min(fifth, rows[0][name])
    # what the axis spans anyway, or error bars reach to, is drawn in place
    inside = [row for row in rows if row[name] >= min(found, top - axis_of(name).least)]
    return float(min(row[name] - (error_of(row, name) or 0.0) for row in inside))


def _error_bars(axes: Any, places: Sequence[float], rows: Sequence[Row], name: str, color: str) -> None:
    errors = [error_of(row, name) for row in rows]
    if any(error is not None for error in errors):
        style = {"fmt": "none", "ecolor": color, "alpha": 0.35, "elinewidth": 1, "capsize": 2, "zorder": 1}
        axes.errorbar(places, [row[name] for row in rows], yerr=[error or 0.0 for error in errors], **style)


def _look(i: int) -> dict[str, Any]:
    # as many markers as have no divisor with the colours: the pair repeats after 70
    return {"color": COLOURS[i % len(COLOURS)], "marker": "osD^<>PXph"[i % 10], "markeredgecolor": "white"}


def _draw_points(axes: Any, rows: Sequence[Row], names: list[str], name: str, column: str) -> list[Any]:
    """Draw each row as a point, the front, and the free bounds of its rows; return the points."""
    unmerged = rows[0]
    points = list(axes.plot(unmerged[column], unmerged[name], zorder=4, **_STAR))
    for row in rows[1:]:
        look = _look(names.index(row["method"]))
        points += axes.plot(row[column], row[name], linestyle="", markersize=8, clip_on=False, zorder=3, **look)
    best = front(rows, name, column)
    axes.plot([row[column] for row in best], [row[name] for row in best], "-", color="gray", zorder=1)
    _draw_bounds(axes, best, column, name)
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
    """Wrap a text to a width in characters, by default that of the page."""
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
