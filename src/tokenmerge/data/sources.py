"""Sources of samples: the table of kinds, and the base classes."""

from __future__ import annotations

import hashlib
import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from tokenmerge.data.settings import Data
from tokenmerge.errors import DataError, UnsupportedError, unknown_name

__all__ = [
    "KINDS",
    "MissingSplitError",
    "Source",
    "Stream",
    "check_classes",
    "class_names",
    "files_below",
    "labelled",
    "limited",
    "needed",
    "open_source",
    "resolve",
    "seed_of",
]

# a PIL image, a clip (uint8 [T, H, W, 3] or [T, H, W]) or a sound (float [samples])
Raw = Any

# a new kind takes one line and one function: (text after the colon, split, settings) -> Source or Stream
KINDS = {
    "fashion-mnist": ("images", "fashion_mnist"),
    "folder:PATH": ("images", "folder"),
    "files:PATH": ("images", "files"),
    "hf:NAME_OR_PATH": ("images", "hf"),
    "hf-stream:NAME_OR_PATH": ("images", "hf_stream"),
    "wds:PATTERN": ("images", "wds"),
    "moving-fashion-mnist": ("clips", "moving_fashion_mnist"),
    "frames:PATH": ("clips", "frames"),
    "videos:PATH": ("clips", "videos"),
    "tones": ("sounds", "tones"),
    "wav:PATH": ("sounds", "wav"),
}
# names of each split in folders and data sets
SPLITS = {"train": ("train",), "valid": ("valid", "val", "validation"), "test": ("test",)}


class MissingSplitError(DataError):
    """The source does not have this split, or the split has no labels."""


class _Samples:
    kind = "image"  # image, clip or sound: selects the transform
    classes: tuple[str, ...] = ()
    size: tuple[int, ...] = ()  # size of a transformed sample if the recipe does not set one
    flippable = True  # whether a mirrored sample keeps its label


class Source(_Samples, ABC):
    """Samples by index."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> tuple[Raw, int]:
        """Return a sample and its label; raise OSError or ValueError with the file name if it cannot be read."""


class Stream(_Samples, ABC):
    """Samples in the order of the stream, decoded on request."""

    @abstractmethod
    def samples(self, epoch: int, seed: int) -> Iterator[tuple[Callable[[], Raw], int]]:
        """Yield the samples of an epoch, shuffled by (seed, epoch): a function that decodes one, and its label."""


def resolve(name: str) -> tuple[str, str]:
    """Return the kind in `KINDS` that a source name starts with, and the text after the colon; a bare path is a folder.

    Raises `UnknownNameError` for another kind, `DataError` if the text after the colon is missing.
    """
    kind, _, rest = name.partition(":")
    form = {known.partition(":")[0]: known for known in KINDS}.get(kind)
    if (form is None or (not rest and ":" in form)) and Path(name).is_dir():
        return "folder:PATH", name
    if form is None:
        raise unknown_name("data source", name, KINDS)
    if (":" in form) != bool(rest):
        raise DataError(f"data source {name!r}: give {form}.")
    return form, rest


def open_source(name: str, split: str, data: Data) -> Source | Stream:
    """Open the "train", "valid" or "test" split of a source named as in `KINDS`.

    Keeps `data.limit` samples of the training split and `data.held` of the others, spread evenly. Raises
    `UnknownNameError` for a kind or split that does not exist, `DataError` for data that are missing or cannot be
    trained on, `UnsupportedError` if a library is missing.
    """
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    form, rest = resolve(name)
    module, function = KINDS[form]
    with needed(f"data source {form.partition(':')[0]}"):
        opened = getattr(importlib.import_module(f"tokenmerge.data.{module}"), function)(rest, split, data)
    source: Source | Stream = opened
    limit = data.limit if split == "train" else data.held
    if limit is None:
        return source
    if isinstance(source, Stream):
        key = "limit" if split == "train" else "held"
        raise DataError(f"data.{key} is {limit}: a stream has no samples to choose from; give fewer shards instead.")
    return limited(source, limit)


def limited(source: Source | Stream, limit: int | None) -> Source | Stream:
    """Return a source with at most `limit` samples, spread evenly; the first ones of a stream."""
    if limit is None:
        return source
    if isinstance(source, Stream):
        return _First(source, limit)
    return _Limited(source, limit) if limit < len(source) else source


class _First(Stream):
    """The first `limit` samples of a stream."""

    def __init__(self, source: Stream, limit: int) -> None:
        self.source, self.limit = source, limit
        self.kind, self.classes, self.size, self.flippable = source.kind, source.classes, source.size, source.flippable

    def samples(self, epoch: int, seed: int) -> Iterator[tuple[Callable[[], Raw], int]]:
        return islice(self.source.samples(epoch, seed), self.limit)


class _Limited(Source):
    """`limit` samples at equal distances, so also spread over the classes of a source that is sorted by class."""

    def __init__(self, source: Source, limit: int) -> None:
        self.source, self.limit = source, limit
        self.kind, self.classes, self.size, self.flippable = source.kind, source.classes, source.size, source.flippable

    def __len__(self) -> int:
        return self.limit

    def read(self, index: int) -> tuple[Raw, int]:
        return self.source.read(index * len(self.source) // self.limit)


@contextmanager
def needed(by: str, extra: str = "train") -> Iterator[None]:
    """Raise `UnsupportedError` with the install command if the body fails to import a library."""
    try:
        yield
    except ImportError as error:
        raise UnsupportedError(f'{by} needs {error.name}: pip install "tokenmerge[{extra}]"') from error


def check_classes(labels: Sequence[int], classes: Sequence[str], where: str, *, all_there: bool = True) -> None:
    """Raise `DataError` if there are no samples, a label has no class, or (`all_there`) a class has no sample."""
    if not len(labels):
        raise DataError(f"{where} has no samples.")
    low, high = min(labels), max(labels)
    if high < 0 and not all_there:
        raise MissingSplitError(f"{where} has no labels.")
    if low < 0 or high >= len(classes):
        raise DataError(f"{where} has labels from {low} to {high} and {len(classes)} classes: 0 to {len(classes) - 1}.")
    seen = set(labels)
    empty = [name for label, name in enumerate(classes) if label not in seen]
    if all_there and empty:
        names = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise DataError(f"{where} has no sample of {len(empty)} of {len(classes)} classes: {names}.")


def labelled(
    root: str, split: str, suffixes: Sequence[str], data: Data
) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    """Return the samples (path, label) of ROOT/SPLIT/CLASS in order, and the classes of the training split.

    If ROOT has no split folders (ROOT/CLASS), all samples belong to every split, except that data to train on
    (`data.source`) are not used for evaluation. Samples are files with one of the suffixes, at any depth; without
    suffixes, the sub-folders of a class. Classes named 0 to n - 1 are numbered by name, others in the order of their
    names. Raises `DataError` for folders that are missing or empty, or with classes that the training split lacks.
    """
    found = _splits(Path(root))
    is_whole = not found and Path(root).is_dir()
    if is_whole and (split == "train" or root not in (data.source, data.source.partition(":")[2])):
        found = {split: Path(root)}
    if split not in found:
        wanted = " or ".join(f"{root}/{name}" for name in SPLITS[split])
        raise MissingSplitError(f"no folder {wanted} for the {split} split, with one sub-folder per class.")
    folder = found[split]
    expected = f"{folder} holds no labelled images: expected {folder}/CLASS/IMAGE. " if is_whole else ""
    classes, own = class_names(found.get("train", folder)), class_names(folder)
    if not own or set(own) - set(classes):
        strange = ", ".join(sorted(set(own) - set(classes))[:5])
        raise DataError(
            f"{folder} has classes that {found['train']} has not: {strange}."
            if own
            else f"{expected}{folder} has no sub-folders."
        )
    numbers = {name: label for label, name in enumerate(classes)}
    samples = [
        (path, numbers[name])
        for name in sorted(own, key=numbers.__getitem__)
        for path in files_below(folder / name, tuple(suffixes))
    ]
    where = expected + str(folder)
    check_classes([label for _, label in samples], classes, where, all_there=is_whole or split == "train")
    return samples, classes


def _splits(root: Path) -> dict[str, Path]:
    """Return the split folders in ROOT; {} if folders with these names ("train", ...) are classes."""
    found = {name: path for name, there in SPLITS.items() for path in (root / n for n in there) if path.is_dir()}
    is_split = any(class_names(path) for path in found.values()) or len(found) == len(
        class_names(root) if found else ()
    )
    return found if is_split else {}


def class_names(folder: Path) -> tuple[str, ...]:
    """Return the names of the sub-folders in order: 0 to n - 1 by number, others by name."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if all(name.isdecimal() for name in names) and {int(name) for name in names} == set(range(len(names))):
        names.sort(key=int)
    return tuple(names)


def files_below(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Return the files with one of the suffixes at any depth, in order; without suffixes, the sub-folders."""
    if not suffixes:
        return sorted(str(entry) for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return sorted(
        os.path.join(parent, name)  # noqa: PTH118 - faster than pathlib, for millions of files
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(suffixes) and not name.startswith(".")
    )


def seed_of(*key: int) -> int:
    """Return a seed, 0 to 2^63 - 1, that depends on every number."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1
