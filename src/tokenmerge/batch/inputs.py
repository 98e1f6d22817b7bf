"""Sources of many images, in a fixed order, as ids and places: nothing is read but names.

A source is a class below and a line in `KINDS`. Bytes are fetched by `Place.read`, in the processes that decode.
"""

from __future__ import annotations

import json
import os
import tarfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenmerge.batch.columns import rows_of
from tokenmerge.batch.places import Place, as_text, beside, import_fsspec, is_there, open_binary, reason_of
from tokenmerge.data.sources import files_below, needed
from tokenmerge.errors import DataError, unknown_name

__all__ = ["KINDS", "Inputs", "Item", "check_unique", "open_inputs"]

_TEXTS = (".txt", ".lst", ".list")
_SPLITS, _STATE = "dataset_dict.json", "state.json"  # of folders that `datasets` saved
_MANY = 5  # names that an error shows


Item = tuple[str, str, Place]  # id, path as shown, and where the bytes are


class Inputs(ABC):
    """The images of a source, in order."""

    name: str  # as it is compared when a job goes on

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Item:
        """Return the id, the path that is shown, and the place of an image."""

    def ids(self) -> Iterator[str]:
        """Yield every id in order."""
        return (self[index][0] for index in range(len(self)))

    def is_there(self) -> bool:
        """Return whether the source can still be reached: where not, its images are not to blame."""
        return True


class Folder(Inputs):
    """Every image below a folder, by its path in it."""

    def __init__(self, path: str, **_: Any) -> None:
        self._root = path.rstrip("/") or "/"
        self.name = str(Path(path).resolve())
        if not Path(path).is_dir():
            raise DataError(f"no folder {path}: give a folder, a text file of paths, *.tar, *.parquet, or a URL.")
        self._paths = [os.path.relpath(found, path) for found in files_below(Path(path), _suffixes())]
        _check_any(self._paths, f"below {path}")

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Item:
        path = f"{self._root}/{self._paths[index]}"
        return as_text(Path(self._paths[index]).as_posix()), as_text(path), Place(path)

    def is_there(self) -> bool:
        return is_there(self._root)


class URL(Inputs):
    """Every image below a URL of fsspec, by its path behind it."""

    def __init__(self, url: str, **_: Any) -> None:
        self.name = self._root = url.rstrip("/")
        try:
            system, root = import_fsspec().core.url_to_fs(url)
            found = sorted(system.find(root))
        except Exception as error:  # every file system has errors of its own: shown as they are, with the URL
            raise DataError(f"cannot list {url}: {reason_of(error)}") from error
        suffixes, start = _suffixes(), len(root.rstrip("/")) + 1
        if found == [root]:
            raise DataError(f"{url} is one file: give the URL of a folder, or a text file of URLs.")
        names = [path[start:] for path in found if path.lower().endswith(suffixes)]
        names = [name for name in names if not name.rpartition("/")[2].startswith(".")]  # as in a folder
        _check_any(names, f"below {url}")
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Item:
        path = f"{self._root}/{self._names[index]}"
        return self._names[index], path, Place(path)

    def is_there(self) -> bool:
        return is_there(self._root)


class Paths(Inputs):
    """A text file with a path or URL on every line; paths are relative to the file."""

    def __init__(self, path: str, **_: Any) -> None:
        self.name = _absolute(path)
        self._path = path
        try:
            with open_binary(path) as file:
                lines = file.read().decode("utf-8", "surrogateescape").removeprefix("\ufeff").split("\n")
        except Exception as error:
            raise DataError(f"cannot read {path}: {reason_of(error)}") from error
        self._lines = [line.strip() for line in lines if line.strip()]
        _check_any(self._lines, f"named in {path}")

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Item:
        line = self._lines[index]
        return as_text(line), as_text(line), beside(line, self._path)

    def is_there(self) -> bool:
        return is_there(self._path)


class Shards(Inputs):
    """WebDataset shards: every image in the .tar files of a pattern, by `SHARD/MEMBER`; headers alone are read."""

    def __init__(self, pattern: str, **_: Any) -> None:
        self.name = _absolute(pattern)
        self._items: list[tuple[str, str, int, int, str]] = []
        self._files = _expanded(pattern, "*.tar")
        for path in self._files:
            shard = path.rpartition("/")[2]
            for name, start, length, lost in _members(path):
                self._items.append((f"{shard}/{name}" if name else shard, path, start, length, lost))
        _check_any(self._items, f"in {pattern}")

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Item:
        name, path, start, length, lost = self._items[index]
        return as_text(name), path, Place(path, start, length, lost=lost)

    def is_there(self) -> bool:
        return all(map(is_there, self._files))


class _Cells(Inputs):
    """Files of tables with a column of images (bytes, or `datasets`' bytes and path) or of paths and URLs.

    `image` names that column, `ids` one of ids; without it an id is `FILE#ROW`.
    """

    def __init__(self, where: str, files: Sequence[tuple[str, str]], image: str | None, ids: str | None) -> None:
        self.name = f"{_absolute(where)}{f', column {image}' if image else ''}{f', ids {ids}' if ids else ''}"
        self._items: list[tuple[str, Place]] = []
        self._files = [path for path, _ in files]
        for path, called in files:
            self._items += rows_of(path, called, image, ids)
        _check_any(self._items, f"in {where}")

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Item:
        name, place = self._items[index]
        return as_text(name), as_text(place.path), place

    def is_there(self) -> bool:
        return all(map(is_there, self._files))


class Parquet(_Cells):
    """Parquet files, by `FILE#ROW` or a column of ids."""

    def __init__(self, pattern: str, image: str | None = None, ids: str | None = None) -> None:
        files = _expanded(pattern, "*.parquet")
        super().__init__(pattern, [(path, path.rpartition("/")[2]) for path in files], image, ids)


class Saved(_Cells):
    """A folder that `save_to_disk` of Hugging Face's `datasets` wrote: a data set, or all splits of several."""

    def __init__(self, folder: str, image: str | None = None, ids: str | None = None) -> None:
        root = folder.rstrip("/")
        try:
            splits = _json(f"{root}/{_SPLITS}")["splits"] if is_there(f"{root}/{_SPLITS}") else [""]
            files = []
            for split in splits:
                below = f"{split}/" if split else ""
                named = [one["filename"] for one in _json(f"{root}/{below}{_STATE}")["_data_files"]]
                files += [(f"{root}/{below}{name}", f"{below}{name}") for name in named]
        except Exception as error:  # of its file system, or of its form
            raise DataError(f"cannot read {folder} as a folder of datasets: {reason_of(error)}") from error
        super().__init__(folder, files, image, ids)


class _Suffixed(Inputs):
    """Inputs whose repeated ids end in #2, #3, ..."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs, self.name = inputs, inputs.name
        self._ids, seen = [*inputs.ids()], Counter[str]()
        taken = set(self._ids)
        for place, name in enumerate(self._ids):
            seen[name] += 1
            if seen[name] > 1:
                while (new := f"{name}#{seen[name]}") in taken:
                    seen[name] += 1
                self._ids[place] = new
                taken.add(new)

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, index: int) -> Item:
        return (self._ids[index], *self._inputs[index][1:])

    def is_there(self) -> bool:
        return self._inputs.is_there()


# by prefix; without one, the form of a name says which
KINDS = {"files": Folder, "list": Paths, "wds": Shards, "parquet": Parquet, "hf": Saved, "url": URL}


def open_inputs(source: str | Path, *, image: str | None = None, ids: str | None = None) -> Inputs:
    """Return the images of a source: a folder, a text file of paths, `*.tar`, `*.parquet`, or a URL of fsspec.

    A prefix says which where the name does not: `files:`, `list:`, `wds:`, `parquet:`, `hf:` (a folder that `datasets`
    saved), `url:`. `image` and `ids` are columns of Parquet or of such a folder. Raises `DataError` for a source that
    is missing, empty or cannot be read, `UnsupportedError` if a library is missing.
    """
    text = str(source)
    prefix, _, rest = text.partition(":")
    kind = KINDS.get(prefix) if rest and not rest.startswith("//") else None
    if kind is None and ":" in text and "://" not in text and prefix.isidentifier() and not Path(text).exists():
        raise unknown_name("source of images", prefix, KINDS)
    name = rest if kind else text
    if not name.strip():
        raise DataError(
            "the name of the source is empty: give a folder, a text file of paths, *.tar, *.parquet, a URL."
        )
    if kind is None:
        lower = name.lower()
        kinds = [(Shards, ".tar"), (Parquet, ".parquet"), *((Paths, suffix) for suffix in _TEXTS)]
        is_saved = any(Path(name, one).is_file() for one in (_SPLITS, _STATE))
        folder = URL if "://" in name else Saved if is_saved else Folder
        kind = next((found for found, suffix in kinds if lower.endswith(suffix)), folder)
        if lower.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
            raise DataError(f"{name} is compressed: an image in it cannot be reached by itself. Give plain .tar files.")
    if (image or ids) and kind not in (Parquet, Saved):
        raise DataError(f"{name} has no columns: --image-column and --id-column go with *.parquet and saved data sets.")
    with needed("embed", "embed"):
        made: Any = kind
        opened: Inputs = made(name, image=image, ids=ids)
    return opened


def check_unique(inputs: Inputs, duplicates: str = "refuse") -> Inputs:
    """Return inputs whose ids are unique: refuse repeated ones with `DataError`, or ("suffix") number them."""
    if duplicates not in ("refuse", "suffix"):
        raise unknown_name("way with repeated ids", duplicates, ("refuse", "suffix"))
    if len(set(inputs.ids())) == len(inputs):
        return inputs
    if duplicates == "suffix":
        return _Suffixed(inputs)
    counts = Counter(inputs.ids())
    found = [name for name, count in counts.items() if count > 1]
    raise DataError(
        f"{len(found)} ids are there more than once: {_some(found)}. A row is found by its id: give ids that are "
        "unique, or --duplicates suffix, which numbers them."
    )


def _suffixes() -> tuple[str, ...]:
    with needed("embed", "embed"):
        from PIL import Image
    Image.init()
    return tuple(Image.registered_extensions())


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).resolve())


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:_MANY], *(["..."] if len(names) > _MANY else [])])


def _check_any(found: Sequence[Any], where: str) -> None:
    if not found:
        raise DataError(f"there is no image {where}.")


def _expanded(pattern: str, below: str) -> list[str]:
    """Return the files of a pattern: `{000..009}`, `*`, or a folder with all in it that are called like `below`."""
    from braceexpand import braceexpand

    found: list[str] = []
    for name in braceexpand(pattern):
        if "://" in name:
            found += _glob(name) if "*" in name else [name]
        elif "*" not in name and not Path(name).is_dir():
            found.append(name)
        else:
            folder, part = (Path(name), below) if Path(name).is_dir() else (Path(name).parent, Path(name).name)
            found += [str(path) for path in sorted(folder.glob(part)) if not path.name.startswith(".")]
    missing = [path for path in found if "://" not in path and not Path(path).is_file()]
    if missing or not found:
        raise DataError(
            f"{len(missing) or 'all'} of the files of {pattern} are not there: {_some(missing) or 'none is'}."
        )
    return found


def _glob(url: str) -> list[str]:
    try:
        system, pattern = import_fsspec().core.url_to_fs(url)
        return [system.unstrip_protocol(path) for path in sorted(system.glob(pattern))]
    except Exception as error:  # every file system has errors of its own: shown as they are, with the URL
        raise DataError(f"cannot list {url}: {reason_of(error)}") from error


def _json(path: str) -> Any:
    with open_binary(path) as file:
        return json.loads(file.read())


def _members(path: str) -> Iterator[tuple[str, int, int, str]]:
    """Yield name, first byte and length of every image in a .tar, and why the rest cannot be reached, if so."""
    suffixes, name = _suffixes(), ""
    try:
        with open_binary(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # a list of all headers would grow with the shard
                name = member.name
                is_hidden = name.rpartition("/")[2].startswith(".")  # as in a folder
                if member.isfile() and name.lower().endswith(suffixes) and not is_hidden:
                    yield name, member.offset_data, member.size, ""
            # tarfile takes a broken header for the end of the archive
            file.seek(tar.offset)
            if file.read(512).strip(b"\0"):
                raise tarfile.ReadError("a broken header")
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        yield "", 0, 0, f"the shard cannot be read after {name or 'its start'}: {reason_of(error)}"
