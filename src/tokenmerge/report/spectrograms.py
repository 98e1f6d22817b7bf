"""Plot a spectrogram and the groups of its tokens, with axes in seconds and hertz. M mel bands, F frames."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tokenmerge.report.drawing import as_colours, draw_groups
from tokenmerge.report.plots import import_pil, import_pyplot, plain_text, save_figure

__all__ = ["plot_groups"]

_TICKS = (100, 200, 500, 1000, 2000, 4000, 8000, 16000)  # hertz
_PATCH = 8  # pixels that a patch is wide and high at least
_SIZE = (480, 1600)  # pixels, about, that a spectrogram is high and wide


def plot_groups(
    path: Path,
    level: Tensor,  # [M, F], the lowest frequency first
    groups: Tensor,  # [N], row by row over `grid`, the lowest frequency first
    grid: tuple[int, int],
    *,
    start: float,
    seconds: float,
    hertz: Tensor,  # [M]
    end: float | None = None,
    title: str,
) -> None:
    """Save a spectrogram and, below it, the groups of its tokens in their mean colour.

    `start` is the time of its first frame in the sound, `seconds` how long it is, `hertz` the middle of each band.
    What comes after `end` is not shown.
    """
    low, high = float(level.min()), float(level.max())
    colours = as_colours((level - low) / ((high - low) or 1.0)).flip(0)  # high frequencies at the top
    sides = zip(level.shape, grid, _SIZE, strict=True)
    tall, wide = (max(-(-_PATCH * cells // length), size // length) for length, cells, size in sides)
    whole = colours.repeat_interleave(tall, 0).repeat_interleave(wide, 1).contiguous()
    picture = import_pil().fromarray(whole.numpy())
    drawn = draw_groups(picture, groups.view(grid).flip(0).flatten(), grid=grid)
    figure, panels = import_pyplot().subplots(2, 1, figsize=(10, 6), sharex=True, layout="constrained")
    extent = (start, start + seconds, 0, level.shape[0])
    places = torch.arange(level.shape[0]).double() + 0.5
    ticks = [tick for tick in _TICKS if float(hertz[0]) <= tick <= float(hertz[-1])]
    at = [float(_between(tick, hertz.double(), places)) for tick in ticks]
    names = ("spectrogram", f"groups: {title}")
    for axes, shown, name in zip(panels, (picture, drawn), names, strict=True):
        axes.imshow(shown, extent=extent, aspect="auto", interpolation="antialiased")
        axes.set_yticks(at, [f"{tick:,}" for tick in ticks])
        axes.set(ylabel="frequency (Hz)")
        axes.set_title(plain_text(name), fontsize=10)
    panels[1].set(xlabel="time (s)", xlim=(start, min(start + seconds, end or start + seconds)))
    save_figure(figure, path)


def _between(value: float, xs: Tensor, ys: Tensor) -> Tensor:
    """Return the value between points, along straight lines."""
    right = int(torch.searchsorted(xs, torch.tensor(value).double()).clamp(1, xs.shape[0] - 1))
    share = (value - xs[right - 1]) / (xs[right] - xs[right - 1])
    return torch.lerp(ys[right - 1], ys[right], share)
