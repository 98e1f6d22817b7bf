"""Files are written whole or not at all, under their own name, and never through a link."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tokenmerge.errors import DataError
from tokenmerge.files import filling, is_dir, is_file, is_part, replacing, write_file
from tokenmerge.report.table import as_markdown, check_writable


def test_what_is_there_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for content in ("first", b"second", "\udce9"):  # the last: a file name that is no text
        write_file(path, content)
    assert path.read_text() == r"\udce9" and [one.name for one in tmp_path.iterdir()] == ["rows.json"]
    with pytest.raises(ZeroDivisionError), replacing(path) as part:
        assert part.suffix == ".json" and is_part(part) and not is_part(path)
        part.write_text("half")
        1 / 0  # noqa: B018
    assert path.read_text() == r"\udce9" and [one.name for one in tmp_path.iterdir()] == ["rows.json"]


@pytest.mark.parametrize("name", ["index.html", "index.html.part"])
def test_a_planted_link_is_not_followed(tmp_path: Path, name: str) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "out"
    victim.write_text("mine")
    folder.mkdir()
    (folder / name).symlink_to(victim)
    write_file(folder / "index.html", "page")
    assert victim.read_text() == "mine"
    assert (folder / "index.html").read_text() == "page" and not (folder / "index.html").is_symlink()


@pytest.mark.parametrize(
    ("make", "says"),
    [(os.mkfifo, "it is a pipe or a device, no file"), (os.mkdir, "Is a directory")],
    ids=["pipe", "folder"],
)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, make: Any, says: str) -> None:
    path = tmp_path / "rows.json"
    make(path)
    with pytest.raises(DataError, match=f"cannot write results to .*: {says}"):
        check_writable(path)
    with pytest.raises(OSError, match=says):
        write_file(path, "rows")
    assert [one.name for one in tmp_path.iterdir()] == ["rows.json"]
    with pytest.raises(OSError, match="it is a pipe or a device"):
        write_file("/dev/null", "nothing")


def test_a_folder_that_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot write results to .*: No such file or directory"):
        check_writable(tmp_path / "missing" / "rows.json")


@pytest.mark.parametrize("name", ["x" * 5000, "\0", "", "missing"])
def test_texts_that_can_be_no_name(name: str) -> None:
    assert not is_file(name) and (not is_dir(name) or name == "")


def test_markdown_shows_names_as_they_are() -> None:
    row = {"method": "a|b`c`<img src=x>\n[d](e)", "r": 8}
    line = as_markdown([row]).splitlines()[2]
    assert line == r"| a\|b\`c\`\<img src=x\> \[d\](e) |  8 |"


def test_a_folder_is_filled_where_only_it_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine"
    for is_open, home in ((True, tmp_path), (False, folder)):
        folder.mkdir(exist_ok=True)
        (folder / "old.txt").write_text("old")
        monkeypatch.setattr(os, "access", lambda path, mode, is_open=is_open: is_open or Path(path) == folder)
        with filling(folder, last="last.json") as part:
            assert part.parent == home and is_part(part)
            (part / "last.json").write_text("{}")
        assert sorted(path.name for path in folder.iterdir()) == ["last.json", "old.txt"]
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]
