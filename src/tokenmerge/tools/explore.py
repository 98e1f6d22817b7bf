"""Write the explorer: one HTML file in which people see what merged with what in their photos, and what it bought."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tokenmerge
from tokenmerge import Handle
from tokenmerge.config import Restore
from tokenmerge.data.classes import class_names
from tokenmerge.data.photos import open_photo, photo_name, seen_part
from tokenmerge.data.prepare import find_preprocessing
from tokenmerge.data.preprocessing import Preprocessing
from tokenmerge.errors import DataError, TokenMergeError, UnsupportedError
from tokenmerge.files import write_file
from tokenmerge.handle import require_free
from tokenmerge.measure.counting import count
from tokenmerge.measure.outputs import declared_classes, find_device, run_images, shared_copy
from tokenmerge.measure.timing import environment, interleave
from tokenmerge.measure.trial import BOUND
from tokenmerge.report.explorer import explorer_page, run_data
from tokenmerge.report.table import check_writable, measured_on
from tokenmerge.schedule import R, Schedule
from tokenmerge.tools.models import AUTO, Method, apply_method, own_r, read_method, short_name
from tokenmerge.tools.visualize import grid_of

__all__ = ["RS", "Exploration", "checked_page", "explore"]

RS: tuple[R, ...] = (4, 8, 16)
_SIDE, _PHOTOS = 640, 8  # so many photos of this side stay well below 5 MB
_SMALL = 128 * 128  # pixels up to which a photo is kept without loss
_CELL = 24  # pixels of a token in a sheet
_TOP = 3  # classes that are named


@dataclass
class Exploration:
    """What `explore` wrote: the file, the figures in it, and what is to be known of them."""

    path: Path
    rows: list[dict[str, Any]]  # one per method and r: tokens, MACs, time, images whose class stayed
    notes: list[str] = field(default_factory=list)  # what a reader must know, also on the page
    facts: list[str] = field(default_factory=list)  # how it was made


@dataclass
class _Photo:
    name: str
    x: Tensor  # [1, C, H, W]
    picture: Any
    is_own: bool  # the picture shows the photo's own pixels


@dataclass
class _Way:
    """One method at one r: a patched copy of the model, and what it did to every photo."""

    method: str
    label: str
    model: nn.Module
    runs: list[dict[str, Any]] = field(default_factory=list)
    milliseconds: float = 0.0
    counted: dict[Any, int] = field(default_factory=dict)  # MACs by shape and tokens

    @property
    def handle(self) -> Handle:
        return tokenmerge.handle_of(self.model)


def explore(
    model: nn.Module,
    images: Any,
    path: str | Path = "explore.html",
    *,
    rs: Sequence[R] = RS,
    methods: Sequence[Method] = ("tome",),
    labels: Sequence[str] | str | Path | None = None,
    calibrate: Tensor | None = None,
    preprocessing: Any = None,
    restore: Restore | None = None,
    device: str = "cpu",
    rounds: int = 5,
    label: str = "",
    notes: Sequence[str] = (),
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Exploration:
    """Write one HTML file that shows, block by block, what merges in photos; it needs no network and no server.

    Args:
        model: any model of images that `patch` takes, unpatched; it moves to the device and is not changed otherwise.
        images: files or PIL images, or one of them.
        path: the file to write, a .html.
        rs: what each block removes, in any form that `patch` takes; the unmerged model is always there too.
        methods: anything that `tokenmerge.tools.models.read_method` takes or returns; one saved with an `r` keeps it.
        labels: names of the classes, in order, or a file with one a line; by default as the model says.
        calibrate: a batch of images for the method `"auto"`; by default the photos themselves.
        preprocessing: as in `tokenmerge.data.prepare.find_preprocessing`; by default the model's own.
        restore: as in `patch`, for models that return tokens.
        rounds: timed rounds, of the first photo, all ways in turn.
        label: what the model is called on the page.
        notes: sentences for the top of the page.
        force: replace an existing file.

    Returns the figures. Raises `DataError` for what is no image or cannot be written, before a file is touched, and
    `UnsupportedError` where no method runs, or every block hands on all tokens (merging inside windows).

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = explore(tokenmerge.load("reference"), Image.radial_gradient("L"), f"{folder}/x.html", rs=[8])
    >>> [row["tokens"] for row in found.rows]
    [197, 101]
    """
    path = checked_page(path, force=force)
    if rounds < 1:
        raise DataError(f"times need at least 1 timed round; got {rounds}.")
    where, own = find_device(device), _own_copy(model, device)
    prepared = find_preprocessing(model, given=preprocessing)
    names = class_names(model, declared_classes(model), labels)
    chosen = [read_method(method) if isinstance(method, str) else method for method in _listed(methods)]
    photos = _photos(images, prepared, where, next(own.parameters()).dtype)
    batch = _together(photos) if calibrate is None and AUTO in chosen else calibrate
    plain, ways, refused = _ways(own, chosen, rs, batch, restore)
    every = [plain, *ways]
    for number, photo in enumerate(photos):
        _run(every, photo, own, names)
        if progress is not None:
            progress(number, len(photos))
    _time(every, photos[0], where, rounds)
    if progress is not None:
        progress(len(photos), len(photos))
    name = label or type(model).__qualname__
    title = f"What merges in {photos[0].name if len(photos) == 1 else f'{len(photos)} photos'}: {name}"
    grids = [_grid(plain, number, photo) for number, photo in enumerate(photos)]
    said = [*notes, *_warnings(own, prepared, grids, refused)]
    facts = _facts(ways, photos, prepared, rounds, AUTO in chosen and calibrate is None)
    facts.append(f"{measured_on(environment(where))}.")
    rows = [_row(way, plain) for way in every]
    data = _data(name, every, photos, grids)
    try:
        write_file(path, explorer_page(title, data, rows, said, facts))
    except OSError as error:
        raise DataError(f"cannot write results to {path}: {error.strerror}.") from error
    return Exploration(path, rows, said, facts)


def checked_page(path: str | Path, *, force: bool = False) -> Path:
    """Return the path of a page that may be written; raise `DataError` before any work."""
    path = Path(path)
    if path.exists() and not force:
        raise DataError(f"{path} exists already: give another name (-o), or --force (force=True) to replace it.")
    return check_writable(path, (".html",))


def _own_copy(model: nn.Module, device: str) -> nn.Module:
    require_free(model)
    return shared_copy(model.to(find_device(device))).eval()


def _listed(values: Any) -> list[Any]:
    return list(values) if isinstance(values, (list, tuple)) else [values]


def _photos(images: Any, prepared: Preprocessing, device: torch.device, dtype: torch.dtype) -> list[_Photo]:
    """Open and prepare the photos; raises `DataError`."""
    sources = _listed(images)
    if not sources:
        raise DataError("no images: give the files of one or more photos.")
    side = _SIDE if len(sources) <= _PHOTOS else int(_SIDE * math.sqrt(_PHOTOS / len(sources)))
    found = []
    for number, source in enumerate(sources, 1):
        photo = open_photo(source)
        x = prepared(photo)
        if x.dim() != 3:
            raise DataError(f"the preprocessing makes {tuple(x.shape)} of a photo; expected channels, height, width.")
        picture, is_own = seen_part(photo, x, prepared, side)
        found.append(_Photo(photo_name(source, number), x[None].to(device, dtype), picture, is_own))
    return found


def _together(photos: list[_Photo]) -> Tensor | None:
    """Return the photos as one batch; None if they are of several sizes."""
    return torch.cat([photo.x for photo in photos]) if len({photo.x.shape for photo in photos}) == 1 else None


def _ways(
    model: nn.Module, methods: list[Method], rs: Sequence[R], batch: Tensor | None, restore: Restore | None
) -> tuple[_Way, list[_Way], list[str]]:
    """Return the unmerged model and every method at every r, all patched to be traced, and why some cannot run."""
    rs = [Schedule.check(r) for r in _listed(rs)]
    plain = _Way("", "0", shared_copy(model))
    tokenmerge.patch(plain.model, r=0, track="pairs", restore=restore)
    ways, refused, first = list[_Way](), list[str](), list[TokenMergeError]()
    for method in methods:
        own, name = own_r(method), short_name(method)
        for r in dict.fromkeys(map(_hashable, rs)) if own is None else [own]:
            if r == 0:
                continue
            twin = shared_copy(model)
            try:
                apply_method(twin, method, r=r, calibrate=batch, track="pairs", restore=restore)
            except TokenMergeError as error:
                refused += [f"{name} is left out at r = {r}: {error}"]
                first.append(error)
                continue
            label = "own" if own is not None and not isinstance(own, (int, float)) else str(r)
            alike = sum(way.method == name and way.label.partition(" (#")[0] == label for way in ways)
            ways.append(_Way(name, f"{label} (#{alike + 1})" if alike else label, twin))
    if not ways:
        raise first[0] if first else DataError("nothing to show: give at least one r besides 0.")
    return plain, ways, refused


def _hashable(r: R) -> Any:
    return tuple(r) if isinstance(r, list) else r


def _run(ways: list[_Way], photo: _Photo, model: nn.Module, names: Sequence[str]) -> None:
    """Run every way on a photo and note what it did; the first is the unmerged model.

    Raises `UnsupportedError` for a model that merges but hands on all tokens.
    """
    before: Tensor | None = None
    for way in ways:
        out = run_images(way.model, photo.x).float().cpu()
        before = out if before is None else before
        trace = way.handle.trace()
        tokens = [trace.blocks[0].groups.shape[1], *(block.kept.shape[1] for block in trace.blocks)]
        if way.handle.has_merged and tokens[-1] == tokens[0]:
            raise UnsupportedError(
                f"this {type(model).__qualname__} merges inside windows, for the attention only: every block hands on "
                "all its tokens, and there are no groups to show. `tokenmerge bench` shows what merging saves."
            )
        macs = _macs(way, model, photo, tokens)
        run = {"tokens": tokens, "macs": macs, "blocks": run_data(trace), **_answer(out, before, names)}
        way.runs.append(run)


def _macs(way: _Way, model: nn.Module, photo: _Photo, tokens: list[int]) -> int:
    """Return the MACs of a forward; of a method that depends on the photo, those of dropping as many tokens."""
    key = (tuple(photo.x.shape), tuple(tokens))
    if key not in way.counted:
        twin = way.model
        if way.handle.config.method.is_adaptive and tokens[-1] < tokens[0]:
            twin = shared_copy(model)
            amounts = [n - left for n, left in pairwise(tokens)]
            tokenmerge.patch(twin, BOUND, r=amounts, restore=way.handle.config.restore)
        way.counted[key] = count(twin, photo.x.shape[1:]).model
    return way.counted[key]


def _answer(out: Tensor, before: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Return the first classes with their shares, or how near an answer without classes is to the unmerged one.

    `odd` says instead that it holds what is no number.
    """
    if out.shape != before.shape:
        raise DataError(
            f"merged, the model answers with {tuple(out.shape)}, unmerged with {tuple(before.shape)}: it hands out its "
            "tokens. Have them put back in their places: restore='dense' (--restore dense)."
        )
    if not out.isfinite().all():
        return {"odd": "no number (NaN or infinity)"}
    if names and out.shape == (1, len(names)):
        shares, classes = out[0].softmax(dim=0).topk(min(_TOP, len(names)))
        return {"top": [[names[c], round(s, 5)] for s, c in zip(shares.tolist(), classes.tolist(), strict=True)]}
    cosine = float(torch.cosine_similarity(out.flatten().double(), before.flatten().double(), dim=0))
    return {"cosine": round(cosine, 6) if math.isfinite(cosine) else None}


def _time(ways: list[_Way], photo: _Photo, device: torch.device, rounds: int) -> None:
    for way in ways:
        way.handle.track = False
    calls = {str(number): partial(way.model, photo.x) for number, way in enumerate(ways)}
    timings = interleave(calls, device, rounds=rounds, warmup=1)
    for number, way in enumerate(ways):
        way.milliseconds = float(f"{1000 * timings[str(number)].median:.4g}")


def _patches(plain: _Way, number: int) -> int:
    """Return how many tokens of a photo may merge."""
    found: int = plain.runs[number]["tokens"][0]
    return found - plain.handle.protected


def _grid(plain: _Way, number: int, photo: _Photo) -> tuple[int, int] | None:
    """Return rows and columns of the patches of a photo; None if they are unknown."""
    return grid_of(plain.handle, photo.x.shape[2:], _patches(plain, number))


def _data(name: str, ways: list[_Way], photos: list[_Photo], grids: Sequence[tuple[int, int] | None]) -> dict[str, Any]:
    """Return what the page's script reads; the first way is the unmerged model, the first amount of every method."""
    plain = ways[0]
    amounts = [{"label": way.label, "ms": way.milliseconds, "runs": way.runs} for way in ways]
    methods = dict.fromkeys(way.method for way in ways[1:])
    of = {method: [amounts[i] for i, way in enumerate(ways) if way.method in ("", method)] for method in methods}
    return {
        "model": name,
        "depth": len(plain.runs[0]["blocks"]),
        "prefix": plain.handle.prefix,
        "images": [
            _image(photo, grid, _patches(plain, i)) for i, (photo, grid) in enumerate(zip(photos, grids, strict=True))
        ],
        "methods": [{"name": method, "amounts": of[method]} for method in methods],
    }


def _image(photo: _Photo, grid: tuple[int, int] | None, patches: int) -> dict[str, Any]:
    """Return a photo as the page holds it; without a grid, a sheet of cells stands for it."""
    picture, buffer = photo.picture, io.BytesIO()
    is_small = picture.width * picture.height <= _SMALL
    picture.save(buffer, "PNG" if is_small else "JPEG", quality=85)
    kind = "png" if is_small else "jpeg"
    columns = math.ceil(math.sqrt(patches))
    rows, columns = grid or (math.ceil(patches / columns), columns)
    size = picture.size if grid else (_CELL * columns, _CELL * rows)
    return {
        "name": photo.name,
        "width": size[0],
        "height": size[1],
        "source": f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "grid": (rows, columns),
        "patches": patches,
        "onPhoto": grid is not None,
    }


def _row(way: _Way, plain: _Way) -> dict[str, Any]:
    count = len(way.runs)
    left = sum(run["tokens"][-1] for run in way.runs) / count
    row: dict[str, Any] = {"method": way.method or "unmerged", "r": way.label}
    row |= {"tokens": int(left) if left.is_integer() else round(left, 1)}
    row |= {"GMACs": round(sum(run["macs"] for run in way.runs) / count / 1e9, 4), "ms": way.milliseconds}
    row |= {"speed-up": round(plain.milliseconds / way.milliseconds, 3)}
    pairs = [(a, b) for a, b in zip(way.runs, plain.runs, strict=True) if "odd" not in a and "odd" not in b]
    if any("top" in run for run in plain.runs):
        same = sum(a["top"][0][0] == b["top"][0][0] for a, b in pairs)
        return {**row, "same class": f"{same} of {count}"}
    return {**row, "cosine": round(sum(a["cosine"] for a, _ in pairs) / len(pairs), 5) if pairs else None}


def _warnings(
    model: nn.Module, prepared: Preprocessing, grids: Sequence[tuple[int, int] | None], refused: Sequence[str]
) -> list[str]:
    found = []
    if is_untrained(model):
        found.append(
            "This model is untrained: its norms are as they were made. What it merges and answers says nothing about "
            "trained models."
        )
    if not prepared.is_known:
        found.append(prepared.warning())
    if None in grids:
        found.append(
            "This model says no grid of patches: its tokens are drawn in order, as cells of a sheet in colours of "
            "their own, not over the photo."
        )
    return [*found, *refused]


def is_untrained(model: nn.Module) -> bool:
    """Return whether all norms of a model are as they are made: weights of 1, and biases of 0."""
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    pairs = [(getattr(norm, "weight", None), getattr(norm, "bias", None)) for norm in norms]
    ours = [(weight, bias) for weight, bias in pairs if isinstance(weight, Tensor)]
    return bool(ours) and all(
        bool((weight == 1).all()) and (not isinstance(bias, Tensor) or bool((bias == 0).all())) for weight, bias in ours
    )


def _facts(
    ways: Sequence[_Way], photos: Sequence[_Photo], prepared: Preprocessing, rounds: int, is_own_batch: bool
) -> list[str]:
    facts = [f"Preprocessing: {prepared}."]
    copies = [photo.name for photo in photos if not photo.is_own]
    if copies:
        facts.append(f"Shown as the model is given them, at its resolution: {', '.join(copies)}.")
    facts += [f"auto, r = {way.label}: {choice}" for way in ways if (choice := way.handle.report().choice)]
    if is_own_batch:
        facts.append("auto was chosen on the photos of this page.")
    return [
        *facts,
        "Similarity is the cosine of two tokens by what the method compares, in the block that merged them.",
        f"Times are medians of {rounds} interleaved rounds, one photo at a time. MACs are of one photo, without "
        "those of choosing the tokens.",
    ]
