"""Write files atomically, and never through a link at the target path."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["filling", "is_dir", "is_file", "is_part", "new_part", "replacing", "write_file"]

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
    part = folder.with_name(f"{_PART}{secrets.token_hex(8)}")
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
