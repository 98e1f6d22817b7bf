"""Draw the groups of a video: a film in which a group keeps its colour, and a strip of its frames.

Shapes: T frames, N patches of a frame or tubelets of a clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge.data.clips import Film, read_film
from tokenmerge.data.photos import given_picture, seen_box
from tokenmerge.data.prepare import find_preprocessing, frames_preprocessing
from tokenmerge.data.preprocessing import Preprocessing
from tokenmerge.errors import DataError, UnsupportedError
from tokenmerge.report.drawing import draw_clip, shades_of, sheet
from tokenmerge.tools.visualize import Seen, look_at
from tokenmerge.tools.viz import Job

__all__ = ["draw_video", "follow", "write_film"]

_LEAST = 20  # ms of a frame of a GIF: browsers show shorter ones for 100
_STRIP, _SIDE = 8, 160  # frames of a strip, and their width


def draw_video(job: Job, path: Path, name: str) -> None:
    """Draw a video into a film and a strip for each block.

    A model of clips groups tubelets, over several frames; a model of images is given each frame by itself, and a
    group goes on with the colour of the one that it has most patches of.
    """
    if set(job.shows) - {"groups"}:
        raise UnsupportedError(
            f"of videos the groups are drawn, not {', '.join(job.shows)}: leave --show out for {path}."
        )
    size = job.handle.input_size or ()
    if len(size) == 4:
        film, pictures, drawn, seconds = _of_clip(job, path, size)
    else:
        film, pictures, drawn, seconds = _of_frames(job, path)
    rate = 1 / max(1e-3, (seconds[-1] - seconds[0]) / (len(seconds) - 1)) if len(seconds) > 1 else 1.0
    chosen = range(0, len(pictures), max(1, -(-len(pictures) // _STRIP)))
    labels = [f"{seconds[place]:.2f} s" if film.rate else f"frame {film.places[place] + 1}" for place in chosen]
    for block, frames in zip(job.blocks, drawn, strict=True):
        write_film(job.path(job.name(name, "groups", block, job.video)), frames, rate)
        strip = [[one[place] for place in chosen] for one in (pictures, frames)]
        sheet(strip, labels, side=_SIDE).save(job.path(job.name(name, "strip", block)))


def _of_frames(job: Job, path: Path) -> tuple[Film, list[Any], list[list[Any]], list[float]]:
    """Draw the frames of a video, each as a photo: the frames, those drawn for each block, and when they are."""
    film = read_film(path, job.frames)
    prepared = find_preprocessing(job.handle.model, **job.changes)
    pictures = _pictures(film.frames)
    tower = next(job.handle.model.parameters())
    seen: list[Seen] = []
    for picture in pictures:
        x = prepared(picture)
        box = seen_box(picture, x, prepared)
        shown = given_picture(x, prepared) if box is None else picture
        seen.append(look_at(job.handle, x[None].to(tower), shown, box, path.name, is_own=box is not None))
    job.row(path.name, seen[-1])
    if not all(one.is_own for one in seen):
        job.note_unknown_part(path.name)
    _said(job, prepared, f"{path.name}: {len(pictures)} frames, each given to the model by itself")
    drawn = []
    for block in job.blocks:
        shades = follow([one.groups[block] for one in seen])
        drawn.append([one.draw(block, cut=job.cut, shades=own) for one, own in zip(seen, shades, strict=True)])
    return film, [one.photo(cut=job.cut) for one in seen], drawn, _seconds(film, 1)


def _of_clip(job: Job, path: Path, size: Sequence[int]) -> tuple[Film, list[Any], list[list[Any]], list[float]]:
    """Draw the frames of a clip, one for each step in time: the same as `_of_frames`."""
    is_channels_first = size[0] in (1, 3)  # else time comes first, as in transformers
    times = size[1] if is_channels_first else size[0]
    channels = size[0] if is_channels_first else size[1]
    film = read_film(path, times)
    if film.frames.shape[0] < times:
        raise DataError(f"{path} has {film.frames.shape[0]} frames, and the model takes clips of {times}.")
    prepared = frames_preprocessing(job.handle.model, (channels, *size[2:]), **job.changes)
    pictures = _pictures(film.frames)
    x = torch.stack([prepared(picture) for picture in pictures], dim=1 if is_channels_first else 0)
    tower = next(job.handle.model.parameters())
    tubelet = _tubelet(job.handle.model)
    grid = (times // tubelet[0], size[2] // tubelet[1], size[3] // tubelet[2])
    given = x.unbind(1 if is_channels_first else 0)
    box = seen_box(pictures[0], given[0], prepared)
    if box is None:
        job.note_unknown_part(path.name)
        pictures = [given_picture(one, prepared) for one in given]
    firsts = pictures[:: tubelet[0]]
    strip = _stacked(firsts)
    seen = look_at(job.handle, x[None].to(tower), strip, None, path.name, grid=(grid[0] * grid[1], grid[2]))
    if seen.groups[0].shape[0] != grid[0] * grid[1] * grid[2]:
        raise UnsupportedError(
            f"{seen.groups[0].shape[0]} tokens are not {grid[0]} x {grid[1]} x {grid[2]} tubelets (time, rows, "
            "columns): where this model's tokens lie in a clip is not known."
        )
    job.row(path.name, seen)
    _said(job, prepared, f"{path.name}: {times} frames, tubelets of {tubelet[0]}; one frame of each is drawn")
    drawn = [draw_clip(firsts, seen.groups[block], grid=grid, box=box) for block in job.blocks]
    return film, firsts, drawn, _seconds(film, tubelet[0])


def follow(groups: Sequence[Tensor]) -> list[Tensor]:
    """Return numbers of colours for the groups of each frame, `[N]` each, so that what goes on keeps its number.

    A group takes the number of the group before that it shares most patches with, the largest shares first; no number
    is taken twice in a frame.
    """
    found = [shades_of(groups[0])]
    fresh = int(groups[0].shape[0])
    for now in groups[1:]:
        names, index = now.unique(return_inverse=True)
        before, old = found[-1].unique(return_inverse=True)
        shared, counts = (old * names.shape[0] + index).unique(return_counts=True)
        order = counts.argsort(descending=True, stable=True)
        numbers: dict[int, int] = {}
        taken = set[int]()
        for pair in shared[order].tolist():
            one, other = pair % names.shape[0], int(before[pair // names.shape[0]])
            if one not in numbers and other not in taken:
                numbers[one] = other
                taken.add(other)
        for one in range(names.shape[0]):
            if one not in numbers:
                numbers[one], fresh = fresh, fresh + 1
        found.append(torch.tensor([numbers[one] for one in range(names.shape[0])])[index])
    return found


def write_film(path: Path, frames: Sequence[Any], rate: float) -> None:
    """Write PIL images of one size as a film, .mp4 (H.264) or .gif, so many a second."""
    if path.suffix == ".gif":
        first, *rest = [frame.quantize(256) for frame in frames]
        first.save(path, save_all=True, append_images=rest, duration=max(_LEAST, round(1000 / rate)), loop=0)
        return
    try:
        import av
    except ImportError as error:
        raise UnsupportedError("an mp4 needs PyAV: pip install av; or write a gif (--video gif)") from error
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1000))
        # H.264 in the form that every player takes has even sides
        stream.width, stream.height = (side + side % 2 for side in frames[0].size)
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "18"}
        for frame in frames:
            pixels = np.asarray(frame.convert("RGB"))
            pixels = np.pad(pixels, ((0, frame.height % 2), (0, frame.width % 2), (0, 0)), mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def _said(job: Job, prepared: Preprocessing, fact: str) -> None:
    job.fact(f"{fact}.")
    job.fact(f"Preprocessing: {prepared}.")
    job.note(prepared.warning())


def _seconds(film: Film, step: int) -> list[float]:
    return [place / (film.rate or 1.0) for place in film.places[::step]]


def _pictures(frames: Tensor) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(frame.numpy()) for frame in frames]


def _stacked(frames: list[Any]) -> Any:
    from PIL import Image

    width, height = frames[0].size
    strip = Image.new("RGB", (width, height * len(frames)))
    for number, frame in enumerate(frames):
        strip.paste(frame, (0, number * height))
    return strip


def _tubelet(model: nn.Module) -> tuple[int, int, int]:
    """Return frames, rows and columns of a token of a clip, as the model cuts them out."""
    found = next((module for module in model.modules() if isinstance(module, nn.Conv3d)), None)
    if found is None:
        raise UnsupportedError(
            f"{type(model).__qualname__} cuts no tubelets out of clips: where its tokens lie is unknown."
        )
    times, rows, columns = found.kernel_size
    return times, rows, columns
