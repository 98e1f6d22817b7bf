"""Sources of many images, in a fixed order, as ids and places: nothing is read but names.

A source is a class below and a line in `KINDS`. Bytes are fetched by `Place.read`, in the processes that decode.
"""

from __future__ import annotations

import os
import tarfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenmerge.batch.places import Place, as_text, beside, import_fsspec, open_binary, reason_of
from tokenmerge.data.sources import files_below, needed
from tokenmerge.errors import DataError, unknown_name

__all__ = ["KINDS", "Inputs", "Item", "check_unique", "open_inputs"]

_TEXTS = (".txt", ".lst", ".list")
_COLUMNS = ("image", "path", "file", "filename", "file_name", "url")
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
        return Path(self._root).is_dir()


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
        names = [path[start:] for path in found if path.lower().endswith(suffixes)]
        names = [name for name in names if not name.rpartition("/")[2].startswith(".")]  # as in a folder
        _check_any(names, f"below {url}")
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Item:
        path = f"{self._root}/{self._names[index]}"
        return self._names[index], path, Place(path)


class Paths(Inputs):
    """A text file with a path or URL on every line; paths are relative to the file."""

    def __init__(self, path: str, **_: Any) -> None:
        self.name = _absolute(path)
        self._path = path
        try:
            with open_binary(path) as file:
                lines = file.read().decode("utf-8", "surrogateescape").splitlines()
        except Exception as error:
            raise DataError(f"cannot read {path}: {reason_of(error)}") from error
        self._lines = [line.strip() for line in lines if line.strip()]
        _check_any(self._lines, f"named in {path}")

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Item:
        line = self._lines[index]
        return as_text(line), as_text(line), beside(line, self._path)


class Shards(Inputs):
    """WebDataset shards: every image in the .tar files of a pattern, by `SHARD/MEMBER`; headers alone are read."""

    def __init__(self, pattern: str, **_: Any) -> None:
        self.name = _absolute(pattern)
        self._items: list[tuple[str, str, int, int, str]] = []
        self._files = _expanded(pattern)
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
        return _are_there(self._files)


class Parquet(Inputs):
    """Parquet files with a column of images (bytes, or `datasets`' bytes and path) or of paths and URLs.

    `image` names that column, `ids` one of ids; without it an id is `FILE#ROW`.
    """

    def __init__(self, pattern: str, image: str | None = None, ids: str | None = None) -> None:
        self.name = f"{_absolute(pattern)}{f', column {image}' if image else ''}{f', ids {ids}' if ids else ''}"
        self._items: list[tuple[str, Place]] = []
        self._files = _expanded(pattern)
        for path in self._files:
            self._items += _rows(path, image, ids)
        _check_any(self._items, f"in {pattern}")

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Item:
        name, place = self._items[index]
        return as_text(name), as_text(place.path), place

    def is_there(self) -> bool:
        return _are_there(self._files)


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
KINDS = {"files": Folder, "list": Paths, "wds": Shards, "parquet": Parquet, "url": URL}


def open_inputs(source: str | Path, *, image: str | None = None, ids: str | None = None) -> Inputs:
    """Return the images of a source: a folder, a text file of paths, `*.tar`, `*.parquet`, or a URL of fsspec.

    A prefix says which where the name does not: `files:`, `list:`, `wds:`, `parquet:`, `url:`. `image` and `ids` are
    columns of Parquet. Raises `DataError` for a source that is missing, empty or cannot be read, `UnsupportedError` if
    a library is missing.
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
        kind = next((found for found, suffix in kinds if lower.endswith(suffix)), URL if "://" in name else Folder)
        if lower.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
            raise DataError(f"{name} is compressed: an image in it cannot be reached by itself. Give plain .tar files.")
    if (image or ids) and kind is not Parquet:
        raise DataError(f"{name} has no columns: --image-column and --id-column go with *.parquet.")
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


def _expanded(pattern: str) -> list[str]:
    """Return the files of a pattern: `{000..009}`, `*`, or a folder with all that is in it."""
    from braceexpand import braceexpand

    found = []
    for name in braceexpand(pattern):
        if "://" in name or not ("*" in name or Path(name).is_dir()):
            found.append(name)
        else:
            folder, part = (Path(name), "*.parquet") if Path(name).is_dir() else (Path(name).parent, Path(name).name)
            found += [str(path) for path in sorted(folder.glob(part)) if not path.name.startswith(".")]
    missing = [path for path in found if "://" not in path and not Path(path).is_file()]
    if missing or not found:
        raise DataError(
            f"{len(missing) or 'all'} of the files of {pattern} are not there: {_some(missing) or 'none is'}."
        )
    return found


def _are_there(files: Sequence[str]) -> bool:
    return all("://" in path or Path(path).is_file() for path in files)


def _members(path: str) -> Iterator[tuple[str, int, int, str]]:
    """Yield name, first byte and length of every image in a .tar, and why the rest cannot be reached, if so."""
    suffixes, name = _suffixes(), ""
    try:
        with open_binary(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # a list of all headers would grow with the shard
                name = member.name
                if member.isfile() and name.lower().endswith(suffixes):
                    yield name, member.offset_data, member.size, ""
            # tarfile takes a broken header for the end of the archive
            file.seek(tar.offset)
            if file.read(512).strip(b"\0"):
                raise tarfile.ReadError("a broken header")
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        yield "", 0, 0, f"the shard cannot be read after {name or 'its start'}: {reason_of(error)}"


def _rows(path: str, image: str | None, ids: str | None) -> Iterator[tuple[str, Place]]:
    import pyarrow.parquet as pq

    try:
        with open_binary(path) as opened, pq.ParquetFile(opened) as file:
            column = _column(file.schema_arrow, image, path)
            if ids is not None and ids not in file.schema_arrow.names:
                raise unknown_name(f"column of {path}", ids, file.schema_arrow.names)
            is_text = _holds_paths(file.schema_arrow.field(column).type)
            wanted = [*([column] if is_text else []), *([ids] if ids else [])]
            shard, count = path.rpartition("/")[2], 0
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=wanted) if wanted else None
                names = table[ids].to_pylist() if table is not None and ids else None
                paths = table[column].to_pylist() if table is not None and is_text else None
                for row in range(file.metadata.row_group(group).num_rows):
                    name = f"{shard}#{count}" if names is None else str(names[row])
                    count += 1
                    yield (
                        name,
                        Place(path, row=(group, row), column=column) if paths is None else beside(paths[row], path),
                    )
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise DataError(f"cannot read {path}: {reason_of(error)}") from error


def _holds_paths(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(kind.field(i).name in ("bytes", "path") for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _column(schema: Any, image: str | None, path: str) -> str:
    """Return the column of images: the one named, else the only one of bytes, else one with a usual name."""
    if image is not None and image not in schema.names:
        raise unknown_name(f"column of {path}", image, schema.names)
    fitting = [field.name for field in schema if _holds_images(field.type)]
    named = [name for name in _COLUMNS if name in schema.names and _holds_paths(schema.field(name).type)]
    chosen = image or (fitting[0] if len(fitting) == 1 else named[0] if not fitting and named else None)
    if chosen is None or not (_holds_images(schema.field(chosen).type) or _holds_paths(schema.field(chosen).type)):
        raise DataError(
            f"which column of {path} are the images? It has {', '.join(f'{one.name} ({one.type})' for one in schema)}: "
            "give one of bytes, or of paths, by --image-column."
        )
    return chosen
