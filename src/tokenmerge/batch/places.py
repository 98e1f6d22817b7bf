"""Where the bytes of one image are, and how they are fetched: a file, a URL, a part of a .tar, a cell of a table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tokenmerge.data.sources import needed

__all__ = ["Place", "as_text", "beside", "import_fsspec", "is_there", "open_binary", "open_table", "reason_of"]


@dataclass(frozen=True)
class Place:
    """Where the bytes of an image are: a file or URL, a part of it, a cell of a table, or nowhere, with the reason."""

    path: str
    start: int = 0  # first byte
    length: int | None = None  # bytes; None: the whole file
    row: tuple[int, int] | None = None  # row group and row in it, of the column
    column: str = ""
    lost: str = ""

    def read(self) -> bytes:
        """Return the bytes; raises `OSError` with the path and the reason."""
        try:
            if self.lost:
                raise OSError(self.lost)
            return self._bytes() if self.row is None else self._cell(*self.row)
        except Exception as error:  # every file system of fsspec has errors of its own
            raise OSError(f"{self.path}: {reason_of(error)}") from error

    def _bytes(self) -> bytes:
        with open_binary(self.path) as file:
            if self.start:
                file.seek(self.start)
            content = file.read() if self.length is None else file.read(self.length)
        if self.length is not None and len(content) < self.length:
            raise OSError(f"it ends after {len(content)} of the {self.length} bytes of this image")
        return content

    def _cell(self, group: int, row: int) -> bytes:
        key = (self.path, group, self.column)
        if not _kept or _kept[0] != key:
            _kept[:] = [key, _column(*key)]
        cell = _kept[1][row].as_py()
        if isinstance(cell, dict):
            if cell.get("bytes") is None and cell.get("path"):
                return beside(cell["path"], self.path).read()
            cell = cell.get("bytes")
        if not cell:
            raise OSError(f"there is no image in row {row} of row group {group}")
        return bytes(cell)


_kept: list[Any] = []  # key and cells of the row group that was read last: rows come in order


def _column(path: str, group: int, name: str) -> Any:
    with open_table(path) as (_, _, read):
        return read(group, [name])[name]


@contextmanager
def open_table(path: str) -> Iterator[tuple[Any, list[int], Callable[[int, list[str]], Any]]]:
    """Give schema, rows of each group, and a function that reads columns of a group, of a file of Parquet or Arrow.

    A file `*.arrow` (a stream) is one group. Raises what the libraries raise.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Arrow's own files on a disk: a thread of Arrow may give back bytes of Python's when this process has ended, and
    # aborts it then
    is_far, name = "://" in path, os.fsencode(path)
    if path.endswith(".arrow"):
        with open_binary(path) if is_far else pa.memory_map(name) as opened:
            table = pa.ipc.open_stream(opened).read_all()
            yield table.schema, [table.num_rows], lambda group, columns: table.select(columns)
    else:
        with open_binary(path) if is_far else pa.OSFile(name) as opened, pq.ParquetFile(opened) as file:
            counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            yield file.schema_arrow, counts, lambda group, columns: file.read_row_group(group, columns=columns)


def beside(name: str | None, table: str) -> Place:
    """Return the place of a path or URL that a table or list holds: relative to that."""
    if not name:
        return Place(table, lost="there is no path in this row")
    is_whole = "://" in name or Path(name).is_absolute()
    return Place(name if is_whole else f"{table.rpartition('/')[0] or '.'}/{name}")


def open_binary(path: str) -> IO[bytes]:
    """Open a local file or a URL of fsspec; raises `OSError` or the library's own error."""
    if "://" not in path:
        return Path(path).open("rb")
    opened: IO[bytes] = import_fsspec().open(path, "rb").open()
    return opened


def is_there(path: str) -> bool:
    """Return whether a file, a folder or a URL can be reached."""
    if "://" not in path:
        return Path(path).exists()
    try:
        system, name = import_fsspec().core.url_to_fs(path)
        system.invalidate_cache()
        return bool(system.exists(name))
    except Exception:  # every file system has errors of its own
        return False


def import_fsspec() -> Any:
    """Return the module fsspec; raise `UnsupportedError` with the install command if it is missing."""
    with needed("a URL", "embed"):
        import fsspec
    return fsspec


def as_text(name: str) -> str:
    """Return a name as text for a table: bytes of it that are no UTF-8 are escaped."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def reason_of(error: Exception) -> str:
    """Return what an error says, in one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:300]
