"""A journal of rows in a JSON file that is complete at any time, so that interrupted work can resume."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tokenmerge.errors import DataError
from tokenmerge.files import write_file

__all__ = ["Journal"]


class Journal:
    """Rows of one piece of work, each saved when finished; a later run with the same settings resumes from them.

    `settings` are common to all rows: a journal with other settings is refused, and the error names the differences and
    ends with `hint`, which says what to do.
    `facts` are saved beside the rows, each time a row is written. With `fresh` the old file stays until the first row
    replaces it; it is then kept as NAME.old. Raises `DataError` for a folder that cannot be written, or a file with
    other content.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        settings: Mapping[str, Any],
        *,
        version: int,
        columns: Collection[str],
        hint: str,
        facts: Mapping[str, Any] | None = None,
        fresh: bool = False,
    ) -> None:
        self.path, self.settings, self.fresh = path, dict(settings), fresh
        self._kind, self._version, self._columns, self._hint = kind, version, {*columns}, hint
        self.facts: dict[str, Any] = dict(facts or {})
        self.rows: dict[str, dict[str, Any]] = {}
        self._lines: dict[str, str] = {}  # rows as they are written: encoded once, not with each row that follows
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot write to {path.parent}: {error.strerror}.") from error
        if path.exists() and not fresh:
            self._read()

    def _read(self) -> None:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            seen = dict(content["settings"])
            facts = {name: type(plain)(content[name]) for name, plain in self.facts.items()}
            rows = {row["key"]: row for row in content["rows"]}
            is_whole = all({*row} >= self._columns for row in rows.values())
            reason = "" if content["version"] == self._version and is_whole else "its version or its columns are others"
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            raise DataError(f"{self.path} cannot be read as a {self._kind}: {reason}. {self._hint}")
        names = [name for name in {**self.settings, **seen} if self.settings.get(name) != seen.get(name)]
        if names:
            different = "; ".join(f"{name}: asked {self.settings.get(name)}, there {seen.get(name)}" for name in names)
            raise DataError(f"{self.path} holds a {self._kind} with other settings ({different}). {self._hint}")
        self.facts, self.rows = facts, rows
        self._lines = {key: json.dumps(row) for key, row in rows.items()}

    def broken(self, key: str, reason: str) -> DataError:
        """Return the error of a row that does not hold what it must."""
        place = [*self.rows].index(key) + 1
        shown = key if len(key) <= 60 else f"{key[:57]}..."
        return DataError(f"{self.path} cannot be used: row {place} ({shown}) {reason}. {self._hint}")

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Write a row; it replaces a row with the same key."""
        self.rows[key] = {"key": key, **row}
        self._lines[key] = json.dumps(self.rows[key])
        if self.fresh and self.path.exists():
            self.path.replace(self.path.with_name(f"{self.path.name}.old"))
        self.fresh = False
        head = json.dumps({"version": self._version, "settings": self.settings, **self.facts}, indent=2)
        rows = ",\n".join(self._lines.values())
        write_file(self.path, head[: -len("\n}")] + f',\n"rows": [\n{rows}\n]}}\n')
