"""A journal goes on with what was written, and takes nothing that was measured otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tokenmerge import files
from tokenmerge.errors import DataError
from tokenmerge.report.journal import Journal

SETTINGS = {"model": "a", "images": 3}


def _open(folder: Path, settings: dict[str, Any] = SETTINGS, **options: Any) -> Journal:
    always: dict[str, Any] = {"version": 1, "columns": {"x"}, "facts": {"corrupt": []}, "hint": "Or --fresh."}
    return Journal(folder / "rows.json", "search", settings, **always, **options)


def test_the_next_one_goes_on(tmp_path: Path) -> None:
    first = _open(tmp_path / "new" / "folder")
    first.facts["corrupt"] = ["b.png: broken"]
    first.add("one", {"x": 1})
    first.add("two", {"x": 2})
    first.add("one", {"x": 3})
    second = _open(tmp_path / "new" / "folder")
    assert second.rows == {"one": {"key": "one", "x": 3}, "two": {"key": "two", "x": 2}}
    assert second.facts == {"corrupt": ["b.png: broken"]}


def test_other_settings_are_named(tmp_path: Path) -> None:
    _open(tmp_path).add("one", {"x": 1})
    before = (tmp_path / "rows.json").read_bytes()
    with pytest.raises(
        DataError, match=r"holds a search with other settings \(images: asked 4, there 3; dtype: .*Or --fresh"
    ):
        _open(tmp_path, {"model": "a", "images": 4, "dtype": "f"})
    assert (tmp_path / "rows.json").read_bytes() == before


def test_starting_over_keeps_the_old_rows_until_there_is_a_new_one(tmp_path: Path) -> None:
    _open(tmp_path).add("one", {"x": 1})
    fresh = _open(tmp_path, {"model": "b"}, fresh=True)
    assert fresh.rows == {} and len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 1
    fresh.add("two", {"x": 2})
    assert json.loads((tmp_path / "rows.json").read_text())["settings"] == {"model": "b"}
    assert json.loads((tmp_path / "rows.json.old").read_text())["settings"] == SETTINGS
    fresh.add("three", {"x": 3})
    assert json.loads((tmp_path / "rows.json.old").read_text())["settings"] == SETTINGS


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", "null", '{"version": 1, "settings": {"model": "a", "images": 3}, "corrupt": []}'],
    ids=["cut", "list", "empty", "null", "no-rows"],
)
def test_a_file_that_holds_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(DataError, match=r"cannot be read as a search: .*--fresh"):
        _open(tmp_path)
    assert (tmp_path / "rows.json").read_text() == content


@pytest.mark.parametrize("change", [{"version": 2}, {"rows": [{"key": "one"}]}], ids=["version", "columns"])
def test_another_version_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    _open(tmp_path).add("one", {"x": 1})
    content = json.loads((tmp_path / "rows.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps(content | change))
    with pytest.raises(DataError, match="its version or its columns are others"):
        _open(tmp_path)


def test_a_process_that_dies_while_it_writes_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = _open(tmp_path)
    journal.add("one", {"x": 1})

    def die(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.Path, "write_bytes", die)
        with pytest.raises(KeyboardInterrupt):
            journal.add("two", {"x": 2})
    assert [*_open(tmp_path).rows] == ["one"] and [path.name for path in tmp_path.iterdir()] == ["rows.json"]
