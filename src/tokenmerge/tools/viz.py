"""Draw into a folder what merges in photos, videos and sounds: pictures of groups and of tokens, and sheets of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from tokenmerge import Handle
from tokenmerge.config import Restore
from tokenmerge.data.clips import VIDEOS
from tokenmerge.data.photos import open_photo, photo_name
from tokenmerge.data.prepare import find_preprocessing
from tokenmerge.data.preprocessing import Preprocessing
from tokenmerge.errors import DataError
from tokenmerge.files import filling, new_part
from tokenmerge.measure.outputs import find_device, shared_copy
from tokenmerge.schedule import R
from tokenmerge.tools.explore import is_untrained
from tokenmerge.tools.models import AUTO, Method, apply_method, own_r, read_method
from tokenmerge.tools.visualize import Seen, check_show, look, numbers_of_blocks, sheet, sheet_of_blocks

__all__ = ["RECORD", "Drawn", "viz"]

RECORD = "viz.json"  # what was drawn; the last file that is written
SOUNDS = (".wav",)
_R = 16  # where a method was not saved with one
_ALL = "all"  # what the sheet of all photos is called
_SIDE = 320  # pixels of a photo in the sheet of all


@dataclass
class Drawn:
    """What `viz` wrote, and what is to be known of it."""

    folder: Path
    files: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)  # one per source: patches, tokens after the last block
    notes: list[str] = field(default_factory=list)  # what a reader must know
    facts: list[str] = field(default_factory=list)  # how it was made


@dataclass
class Job:
    """One call of `viz`: a patched model, what is asked of it, and where it goes."""

    handle: Handle
    blocks: list[int]  # from 0
    shows: Sequence[str]
    cut: bool
    changes: dict[str, Any]  # of the preprocessing, as `find_preprocessing` takes them
    frames: int  # of a video that an image model is given
    video: str  # "mp4" or "gif"
    into: Path
    drawn: Drawn

    @staticmethod
    def name(source: str, show: str, block: int | None = None, kind: str = "png") -> str:
        """Return the name of a file; without a block it is of all."""
        return f"{source}-{show}{'' if block is None else f'-{block + 1:02}'}.{kind}"

    def path(self, name: str) -> Path:
        """Return the place of a file, and note it."""
        self.drawn.files.append(name)
        return self.into / name

    def note(self, text: str) -> None:
        """Say something once."""
        if text and text not in self.drawn.notes:
            self.drawn.notes.append(text)

    def note_unknown_part(self, name: str) -> None:
        """Say that a photo or a film is not drawn in its own pixels."""
        self.note(f"{name} is drawn as the model is given it: which part of the photo that is, is not known.")

    def fact(self, text: str) -> None:
        """Say how something was made, once."""
        if text not in self.drawn.facts:
            self.drawn.facts.append(text)

    def row(self, name: str, seen: Seen) -> None:
        """Note the figures of one source after the last block that is drawn."""
        groups = seen.groups[self.blocks[-1]]
        left, counts = groups[groups >= 0].unique(return_counts=True)
        row = {"file": name, "patches": groups.shape[0], "after block": self.blocks[-1] + 1}
        row |= {"groups": left.shape[0], "largest group": int(counts.max()) if counts.shape[0] else 0}
        self.drawn.rows.append({**row, "dropped": int((groups < 0).sum())})


def viz(
    model: nn.Module,
    sources: Any,
    folder: str | Path = "tokenmerge-viz",
    *,
    r: R | None = None,
    method: Method = "tome",
    block: Literal["all"] | int | Sequence[int] = -1,
    shows: Sequence[str] = ("groups",),
    cut: bool = False,
    calibrate: Tensor | None = None,
    preprocessing: Any = None,
    restore: Restore | None = None,
    device: str = "cpu",
    frames: int = 32,
    video: str = "mp4",
    notes: Sequence[str] = (),
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Drawn:
    """Draw what a model merges in photos, videos (.mp4, ...) and sounds (.wav), and write it into a folder.

    A photo gives one PNG for each block and each of `shows`, as `tokenmerge.visualize` draws them, and a sheet of its
    blocks where there are several; several photos give a sheet of all. A video gives a film of its groups and a strip,
    a sound its groups on the spectrogram. `viz.json` has names and figures.

    Args:
        model: any model that `patch` takes, unpatched; it moves to the device and is not changed otherwise.
        sources: files, or PIL images, or one of them.
        folder: where to write; it is made if it is not there.
        r: what each block removes; by default 16, or what the method was saved with.
        method: anything that `tokenmerge.tools.models.read_method` takes or returns.
        block: after which blocks: 0 the first, -1 the last, several, or "all".
        shows: of "groups", "size", "similarity", "attention"; videos and sounds have groups alone.
        cut: leave out what the model was not given of a photo.
        calibrate: a batch of images for the method `"auto"`; by default the first photo.
        preprocessing: as in `tokenmerge.data.prepare.find_preprocessing`; a dict holds arguments of it.
        restore: as in `patch`.
        frames: how many frames of a video a model of images is given; a model of clips takes its own number.
        video: "mp4" or "gif".
        notes: sentences for the record.
        force: replace files that are there.

    Raises `DataError` for what cannot be read or written, and `UnsupportedError` for what the model has not; then no
    file is changed.
    """
    sources = list(sources) if isinstance(sources, (list, tuple)) else [sources]
    if not sources:
        raise DataError("nothing to draw: give the files of photos, videos or sounds.")
    shows = [check_show(show) for show in dict.fromkeys([shows] if isinstance(shows, str) else shows)]
    _check(frames, video)
    folder = checked_folder(folder)
    own = shared_copy(model.to(find_device(device))).eval()
    changes = dict(preprocessing) if isinstance(preprocessing, Mapping) else {"given": preprocessing}
    handle = _patched(
        own, sources, read_method(method) if isinstance(method, str) else method, r, calibrate, restore, changes
    )
    drawn = Drawn(folder, notes=[*notes, *_warnings(own)])
    names, blocks = _stems(sources), numbers_of_blocks(block, len(handle.runners))
    job = Job(handle, blocks, shows, cut, changes, frames, video, folder, drawn)
    _check_free(folder, _planned(job, sources, names), force)
    try:
        with filling(folder, last=RECORD) as job.into:
            _draw(job, sources, names, progress)
            record = {"rows": drawn.rows, "notes": drawn.notes, "facts": drawn.facts, "files": drawn.files}
            job.path(RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error.strerror or error}.") from error
    return drawn


def _draw(job: Job, sources: list[Any], names: list[str], progress: Callable[[int, int], None] | None) -> None:
    seen = list[Seen]()
    for number, (source, name) in enumerate(zip(sources, names, strict=True)):
        kind = kind_of(source)
        if kind == "photo":
            seen.append(_draw_photo(job, source, name, number + 1))
        elif kind == "video":
            from tokenmerge.tools.viz_clip import draw_video

            draw_video(job, Path(source), name)
        else:
            from tokenmerge.tools.viz_sound import draw_sound

            draw_sound(job, Path(source), name)
        if progress is not None:
            progress(number + 1, len(sources))
    if len(seen) > 1:
        _draw_all(job, seen)


def _draw_photo(job: Job, source: Any, name: str, number: int) -> Seen:
    prepared = find_preprocessing(job.handle.model, **job.changes)
    seen = look(job.handle, source, prepared, shows=job.shows, number=number)
    for show in job.shows:
        for block in job.blocks:
            seen.draw(block, show, cut=job.cut).save(job.path(job.name(name, show, block)))
        if len(job.blocks) > 1:
            sheet_of_blocks(seen, job.blocks, show, cut=job.cut).save(job.path(job.name(name, show)))
    job.row(seen.name, seen)
    if not prepared.is_known:
        job.note(prepared.warning())
    job.fact(f"Preprocessing: {prepared}.")
    if seen.grid is None:
        job.note(
            f"This model says no grid of patches for {seen.name}: its tokens are drawn in order, as cells of a sheet "
            "in colours of their own, not over the photo."
        )
    elif not seen.is_own:
        job.note_unknown_part(seen.name)
    if seen.inside:
        job.note(
            "This model merges inside windows, for the attention alone: each block is drawn as its attention saw it, "
            "and hands on all tokens."
        )
    return seen


def _draw_all(job: Job, seen: list[Seen]) -> None:
    """Write a sheet of all photos: each a row, with what is merged after each block."""
    for show in job.shows:
        rows, captions = [], []
        for one in seen:
            rows.append([one.photo(cut=job.cut), *(one.draw(block, show, cut=job.cut) for block in job.blocks)])
            captions.append([one.name, *(f"{one.tokens[block]} tokens" for block in job.blocks)])
        labels = ["photo", *(f"after block {block + 1}" for block in job.blocks)]
        sheet(rows, labels, side=_SIDE, captions=captions, font=14).save(job.path(job.name(_ALL, show)))


def kind_of(source: Any) -> str:
    """Return "photo", "video" or "sound"; what has no name of a file is a photo."""
    suffix = Path(source).suffix.lower() if isinstance(source, (str, Path)) else ""
    return "video" if suffix in VIDEOS else "sound" if suffix in SOUNDS else "photo"


def checked_folder(folder: str | Path) -> Path:
    """Return a folder that can be written; raise `DataError` before any work."""
    folder = Path(folder)
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists() or place.is_symlink())
    try:
        if not there.is_dir():
            raise NotADirectoryError(20, "Not a directory")
        new_part(there / "x").unlink()
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error.strerror}.") from error
    return folder


def _check(frames: int, video: str) -> None:
    if frames < 1:
        raise DataError(f"a video needs at least 1 frame; got {frames} (--frames).")
    if video not in ("mp4", "gif"):
        raise DataError(f"videos are written as mp4 or gif, not as {video} (--video).")


def _check_free(folder: Path, files: Sequence[str], force: bool) -> None:
    """Raise `DataError` where files that will be written are there."""
    there = [folder / name for name in files if (folder / name).exists() or (folder / name).is_symlink()]
    if there and not force:
        raise DataError(f"{there[0]} exists already: give another folder (-o), or --force (force=True) to replace it.")


def _planned(job: Job, sources: Sequence[Any], names: Sequence[str]) -> list[str]:
    """Return the names of the files that will be written."""
    found = [RECORD]
    for source, name in zip(sources, names, strict=True):
        kind = kind_of(source)
        if kind == "photo":
            found += [job.name(name, show, block) for show in job.shows for block in job.blocks]
            found += [job.name(name, show) for show in job.shows if len(job.blocks) > 1]
        else:
            found += [job.name(name, "groups", block, job.video if kind == "video" else "png") for block in job.blocks]
            found += [job.name(name, "strip", block) for block in job.blocks if kind == "video"]
    photos = sum(kind_of(source) == "photo" for source in sources)
    return found + [job.name(_ALL, show) for show in job.shows if photos > 1]


def _stems(sources: Sequence[Any]) -> list[str]:
    """Return a name for each source that neither another nor the sheet of all has."""
    found = [Path(photo_name(source, number)).stem.replace(" ", "-") for number, source in enumerate(sources, 1)]
    taken = Counter([*found, *([_ALL] if len(found) > 1 else [])])
    names = []
    for number, name in enumerate(found, 1):
        own = name
        while taken[own] > (own == name):
            own = f"{own}-{number}"
        taken[own] += own != name
        names.append(own)
    return names


def _patched(
    model: nn.Module,
    sources: list[Any],
    method: Method,
    r: R | None,
    calibrate: Tensor | None,
    restore: Restore | None,
    changes: dict[str, Any],
) -> Handle:
    if method == AUTO and calibrate is None:
        photo = next((source for source in sources if kind_of(source) == "photo"), None)
        if photo is None:
            raise DataError("the method auto needs images to be chosen on: give some (--calibrate).")
        prepared: Preprocessing = find_preprocessing(model, **changes)
        calibrate = prepared(open_photo(photo))[None].to(next(model.parameters()))
    own = own_r(method)
    amount = r if r is not None else _R if own is None else own
    return apply_method(model, method, r=amount, calibrate=calibrate, track=True, restore=restore)


def _warnings(model: nn.Module) -> list[str]:
    if not is_untrained(model):
        return []
    return [
        "This model is untrained: its norms are as they were made. What it merges says nothing about trained models."
    ]
