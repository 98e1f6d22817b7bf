"""The folder of a job: a manifest, shards of rows, and the images that failed; whole at any time.

A shard counts from when the manifest names it. What a job that was killed left behind besides is removed.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenmerge.data.sources import needed
from tokenmerge.errors import ConfigError, DataError
from tokenmerge.files import is_part, write_file
from tokenmerge.training.run_folder import alone_in

__all__ = ["FAILURES", "MANIFEST", "REPORT", "JobFolder", "check_folder", "needs_parquet"]

MANIFEST = "manifest.json"
FAILURES = "failures.parquet"
REPORT = "report.html"
_LOCK = ".lock"
_VERSION = 1


def check_folder(folder: str | Path) -> None:
    """Raise `DataError` for a folder that holds something else than a job of `embed`; writes nothing."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(folder)):
        raise DataError(
            f"{folder} is a URL: give a folder on a disk of this machine (--out), where rows appear whole or not at "
            "all, and copy it when the job is done."
        )
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file: give a folder (--out).")
    if not folder.is_dir() or (folder / MANIFEST).is_file():
        return
    others = [path.name for path in folder.iterdir() if path.name != _LOCK and not is_part(path)]
    if others:
        raise DataError(
            f"{folder} holds something else ({', '.join(sorted(others)[:3])}) and no {MANIFEST}: give another folder, "
            "or an empty one (--out). Nothing was changed there."
        )


class JobFolder:
    """The rows of one job; `open` locks it, refuses another job's, and removes what does not count."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], kind: str) -> None:
        self.folder, self.settings, self.kind = folder, dict(settings), kind
        self.shards: dict[str, int] = {}  # rows of each
        self.failures: dict[str, dict[str, str]] = {}  # by id
        self._next = 0

    @classmethod
    @contextmanager
    def open(cls, folder: str | Path, settings: Mapping[str, Any], kind: str) -> Iterator[JobFolder]:
        """Lock a folder, created if need be, and read what is done.

        Raises `ConfigError` with the differences for a job with other settings, and `DataError` for a folder that
        another process writes to, that holds something else, or that cannot be read or written.
        """
        check_folder(folder)
        job = cls(Path(folder), settings, kind)
        if (job.folder / MANIFEST).is_file():
            job._read()  # refused before anything is written
        with alone_in(job.folder):
            if (job.folder / MANIFEST).is_file():
                job._read()
            job._tidy()
            job._write_manifest()
            yield job

    @property
    def rows(self) -> int:
        """How many rows the shards hold."""
        return sum(self.shards.values())

    def done(self) -> set[str]:
        """Return the ids of all rows and failures."""
        import pyarrow.parquet as pq

        found = set(self.failures)
        for name in self.shards:
            with _opened(self.folder / self.kind / name) as file:
                found.update(pq.read_table(file, columns=["id"])["id"].to_pylist())
        return found

    def add(self, table: Any, failures: Sequence[Mapping[str, str]]) -> None:
        """Write a shard and what failed beside it: whole, or (a full disk) not at all, with `OSError`."""
        name = f"part-{self._next:05}.parquet"
        if table.num_rows:
            self._write(Path(self.kind) / name, table)
        both = {**self.failures, **{one["id"]: dict(one) for one in failures}}
        if failures:
            self._write_failures(both)
        shards = {**self.shards, **({name: table.num_rows} if table.num_rows else {})}
        before, self.shards, self.failures = (self.shards, self.failures), shards, both
        try:
            self._write_manifest()
        except OSError:
            self.shards, self.failures = before
            raise
        self._next += 1

    def forget_failures(self) -> None:
        """Forget what failed, so that it is read again."""
        self.failures = {}
        self._write_failures({})

    def _write_failures(self, failures: Mapping[str, Mapping[str, str]]) -> None:
        import pyarrow as pa

        schema = pa.schema([("id", pa.string()), ("path", pa.string()), ("reason", pa.string())])
        self._write(Path(FAILURES), pa.Table.from_pylist([*failures.values()], schema=schema))

    def _write(self, name: Path, table: Any) -> None:
        import pyarrow.parquet as pq

        content = io.BytesIO()
        pq.write_table(table, content)
        write_file(self.folder / name, content.getvalue())

    def _write_manifest(self) -> None:
        shards = {f"{self.kind}/{name}": rows for name, rows in self.shards.items()}
        content = {
            "version": _VERSION,
            "settings": self.settings,
            "rows": self.rows,
            "failures": len(self.failures),
            "shards": shards,
        }
        write_file(self.folder / MANIFEST, json.dumps(content, indent=2) + "\n")

    def _read(self) -> None:
        path = self.folder / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version, before = content["version"], dict(content["settings"])
            shards = {str(name).rpartition("/")[2]: int(rows) for name, rows in content["shards"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} cannot be read as a job's: {error}. Give another folder (--out).") from error
        if version != _VERSION:
            raise DataError(
                f"{path} has version {version}, this release reads {_VERSION}. Give another folder (--out)."
            )
        names = [name for name in {**before, **self.settings} if before.get(name) != self.settings.get(name)]
        if names:
            changed = [f"{name}: {before.get(name)} there, {self.settings.get(name)} asked for" for name in names]
            raise ConfigError(
                f"{self.folder} holds another job; nothing was changed there. What differs: {'; '.join(changed)}. Go "
                "on as it was begun, or give another folder (--out)."
            )
        self.shards = shards
        self._check_shards()
        self.failures = self._read_failures()

    def _check_shards(self) -> None:
        import pyarrow.parquet as pq

        for name, rows in self.shards.items():
            path = self.folder / self.kind / name
            try:
                with _opened(path) as file:
                    found = pq.read_metadata(file).num_rows
            except (OSError, ValueError) as error:
                raise DataError(f"{path}, which {MANIFEST} names, cannot be read: {error}.") from error
            if found != rows:
                raise DataError(f"{path} has {found} rows, and {MANIFEST} says {rows}: it was changed.")

    def _read_failures(self) -> dict[str, dict[str, str]]:
        import pyarrow.parquet as pq

        path = self.folder / FAILURES
        try:
            if not path.is_file():
                return {}
            with _opened(path) as file:
                return {row["id"]: row for row in pq.read_table(file).to_pylist()}
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} cannot be read: {error}.") from error

    def _tidy(self) -> None:
        """Remove what does not count: shards without an entry, and files that were being written."""
        rows = self.folder / self.kind
        rows.mkdir(exist_ok=True)
        for path in (*rows.iterdir(), *self.folder.iterdir()):
            is_stray = path.parent == rows and path.match("part-*.parquet") and path.name not in self.shards
            if is_part(path) or is_stray:
                path.unlink()
        numbers = [int(name.removeprefix("part-").removesuffix(".parquet")) for name in self.shards]
        self._next = max(numbers, default=-1) + 1


def _opened(path: Path) -> Any:
    """Open a file by Arrow, which takes names that are no text as bytes alone."""
    import pyarrow as pa

    return pa.OSFile(os.fsencode(path))


def needs_parquet() -> None:
    """Raise `UnsupportedError` with the install command if Parquet cannot be written here."""
    with needed("embed", "embed"):
        import pyarrow.parquet  # noqa: F401
