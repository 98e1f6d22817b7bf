"""Write files atomically, and never through a link at the target path; read weights."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenmerge.errors import DataError, UnsupportedError

__all__ = [
    "describe_differences",
    "filling",
    "is_dir",
    "is_file",
    "is_part",
    "new_part",
    "read_tensors",
    "replacing",
    "write_file",
]

_PART = ".part-"


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write a file atomically: if interrupted, the old file stays intact. Raises `OSError`.

    A link at `path` is replaced, not followed; a pipe or a device is rejected. Text is UTF-8; characters that UTF-8
    cannot encode, from file names that are no valid text, are escaped.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    with replacing(path) as part:
        part.write_bytes(data)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a new, empty file beside `path` with an unpredictable name, for writers that take a file name.

    It has the same suffix. At the end of the `with` it replaces `path`; if that fails it is deleted.
    """
    part = new_part(path)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def new_part(path: str | Path) -> Path:
    """Create the file that `replacing` yields; raises `OSError` if `path` cannot be written."""
    path = Path(path)
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        kind = stat.S_IFREG
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not (stat.S_ISREG(kind) or stat.S_ISLNK(kind)):
        raise OSError(errno.EINVAL, "it is a pipe or a device, no file", str(path))
    if stat.S_ISREG(kind) and path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    part = path.with_name(f"{_PART}{secrets.token_hex(8)}{path.suffix}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    os.close(os.open(part, flags, 0o666))
    return part


@contextmanager
def filling(folder: str | Path, *, last: str, replaces: Sequence[str] = ()) -> Iterator[Path]:
    """Give a new, empty folder beside `folder`, whose files take their places in it when the `with` is over.

    A folder that does not exist appears at once, with all of them. In one that does, files of the patterns `replaces`
    give way, and the file `last` goes first and comes last: without it the folder is seen to be unfinished. Where the
    `with` fails, nothing has changed. Raises `OSError`.
    """
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # beside it, unless only the folder itself can be written
    home = folder if folder.is_dir() and not os.access(folder.parent, os.W_OK) else folder.parent
    part = home / f"{_PART}{secrets.token_hex(8)}"
    part.mkdir()
    try:
        yield part
        if not os.path.lexists(folder):
            part.rename(folder)
            return
        (folder / last).unlink(missing_ok=True)
        for old in [path for pattern in replaces for path in folder.glob(pattern)]:
            old.unlink()
        for path in sorted(part.iterdir(), key=lambda path: path.name == last):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def is_part(path: Path) -> bool:
    """Return whether a file was left by `replacing` in a process that was killed."""
    return path.name.startswith(_PART)


def is_file(name: str | Path) -> bool:
    """Return whether `name` is a file; False for text that cannot be a file name."""
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # e.g. too long
        return False


def is_dir(name: str | Path) -> bool:
    """Return whether `name` is a folder; False for text that cannot be a file name."""
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):
        return False


def read_tensors(path: str | Path) -> dict[str, Any]:
    """Return the tensors of a .safetensors file by name, on the CPU.

    Raises `DataError` for a file that cannot be read, `UnsupportedError` without safetensors.
    """
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UnsupportedError("loading weights needs safetensors: pip install safetensors") from error
    try:
        tensors: dict[str, Any] = load_file(path)
    except Exception as error:  # safetensors errors derive directly from Exception
        raise DataError(f"cannot read the weights {path}: {error}.") from error
    return tensors


def describe_differences(given: Mapping[str, Any], own: Mapping[str, Any], free: tuple[str, ...] = ()) -> str:
    """Return how many tensors differ in name or shape, with the first three: shapes given and shapes expected.

    Names that start with one of `free` may differ. Returns "" if no others do.
    """
    found, expected = ({key: tuple(value.shape) for key, value in part.items()} for part in (given, own))
    names = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
    names = [name for name in names if not name.startswith(free)]
    shown = ", ".join(f"{name} {found.get(name)} for {expected.get(name)}" for name in names[:3])
    return f"{len(names)} tensors differ ({shown})" if names else ""
