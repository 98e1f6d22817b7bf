"""Tables in every format parse back, and a path that cannot be written is refused before any work."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tokenmerge.errors import DataError
from tokenmerge.report.progress import Progress
from tokenmerge.report.table import as_csv, as_latex, as_markdown, check_writable, plain, save_rows, show
from tokenmerge.tools.bench import Bench, BenchRow

ROWS: list[dict[str, Any]] = [
    {"r": "0", "images/s": 1234.5678, "speed-up": 1.0, "tokens": 197, "bound": None},
    {"r": "(8, -1.0)", "images/s": 8.12345, "speed-up": 1.25, "tokens": 101, "bound": 2.5},
]
ABOUT = {"device": "a machine, 2 cores", "torch": "2.x"}


def _cells(text: str) -> list[list[str]]:
    lines = text.splitlines()
    assert all(line.startswith("| ") and line.endswith(" |") for line in lines)
    assert len({len(line) for line in lines}) == 1, "the columns are not aligned"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_markdown() -> None:
    text = as_markdown(ROWS)
    names, rule, *lines = _cells(text)
    assert names == list(ROWS[0])
    assert lines == [["0", "1234.6", "1.000", "197", "-"], ["(8, -1.0)", "8.123", "1.250", "101", "2.500"]]
    assert [cell.endswith(":") for cell in rule] == [False, True, True, True, True]
    assert all(set(cell) <= {"-", ":"} for cell in rule)


NAMES = ["a|b`c`", "# x #", "- item", "1. one", "2) two", "*a* ~b~", "_x_ __y__ a_b_c", "&lt; &", "<img>", "[d](e)"]
NAMES += [r"back\slash\*", "+", "tome(metric='x')", "a\nb", "C#"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_read_in_markdown_as_they_are(name: str) -> None:
    parser = pytest.importorskip("markdown_it").MarkdownIt().enable(["table", "strikethrough"])
    page = "\n\n".join([f"# {plain(name)}", as_markdown([{"method": name}]), f"- {plain(name)}", plain(name)])
    text = [token for token in parser.parse(page) if token.type == "inline"]
    shown = ["".join(part.content for part in token.children) for token in text]
    wanted = name.replace("\n", " ")
    assert shown == [wanted, "method", wanted, wanted, wanted]
    assert {part.type for token in text for part in token.children} <= {"text", "text_special"}


def test_latex() -> None:
    rows = [{"top-1 %": 90.5, "method": r"a\b^2~{c}_d&#$<>|"}, {"top-1 %": None, "method": "[25, 25]*"}]
    lines = as_latex(rows).splitlines()
    assert lines[2] == r"top-1 \% & method \\"
    special = r"a\textbackslash{}b\textasciicircum{}2\textasciitilde{}\{c\}\_d\&\#\$\textless{}\textgreater{}\textbar{}"
    assert lines[4] == rf"90.50 & {special} \\"
    # behind the end of a row a bracket or a star would be its option
    assert lines[5] == r"- & {[}25, 25{]}{*} \\"


def test_csv() -> None:
    parsed = list(csv.DictReader(io.StringIO(as_csv(ROWS))))
    assert parsed == [{name: "" if value is None else str(value) for name, value in row.items()} for row in ROWS]


def test_save_json(tmp_path: Path) -> None:
    save_rows(tmp_path / "x.json", ROWS, ABOUT, ["a note"])
    assert json.loads((tmp_path / "x.json").read_text()) == {"environment": ABOUT, "rows": ROWS, "notes": ["a note"]}


def test_save_csv_carries_the_environment_in_every_row(tmp_path: Path) -> None:
    save_rows(tmp_path / "x.csv", ROWS, ABOUT)
    parsed = list(csv.DictReader(io.StringIO((tmp_path / "x.csv").read_text())))
    assert [row["r"] for row in parsed] == ["0", "(8, -1.0)"]
    assert all({name: row[name] for name in ABOUT} == ABOUT for row in parsed)


def test_save_html_and_latex(tmp_path: Path) -> None:
    save_rows(tmp_path / "x.html", ROWS, ABOUT, ["a <b>note</b>"])
    page = (tmp_path / "x.html").read_text()
    assert page.count("<tr>") == 3 and "<p>a &lt;b&gt;note&lt;/b&gt;</p>" in page and "<img" not in page
    assert "<dl><dt>device</dt><dd>a machine, 2 cores</dd><dt>torch</dt><dd>2.x</dd></dl>" in page
    save_rows(tmp_path / "x.tex", ROWS, ABOUT)
    assert (tmp_path / "x.tex").read_text() == as_latex(ROWS)


def test_a_table_saves_itself_with_what_it_says(tmp_path: Path) -> None:
    bench = Bench([BenchRow(row) for row in ROWS], ABOUT, ["r = 8: faster."])
    bench.save(tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "environment": ABOUT,
        "rows": ROWS,
        "notes": ["r = 8: faster."],
    }
    whole = [BenchRow({**row, "batch": 1}) for row in ROWS]
    Bench(whole, ABOUT, bench.verdicts).save(tmp_path / "x.html", "a <title>")
    page = (tmp_path / "x.html").read_text()
    assert (
        "<title>a &lt;title&gt;</title>" in page and page.count("r = 8: faster.") == 1 and '<canvas id="chart"' in page
    )
    each = Bench([BenchRow(row) for row in ROWS], [{"torch": "2.6"}, {"torch": "2.14"}])  # of several runs
    each.save(str(tmp_path / "x.csv"))
    parsed = list(csv.DictReader(io.StringIO((tmp_path / "x.csv").read_text())))
    assert [row["torch"] for row in parsed] == ["2.6", "2.14"]
    with pytest.raises(DataError, match=r"the name must end in \.json"):
        bench.save(tmp_path / "x.txt")
    with pytest.raises(DataError, match="there are no rows to write"):
        Bench([], ABOUT).save(tmp_path / "none.md")


def test_save_markdown(tmp_path: Path) -> None:
    save_rows(tmp_path / "x.md", ROWS, ABOUT, ["a note"])
    table, note, facts = (tmp_path / "x.md").read_text().split("\n\n")
    assert table == as_markdown(ROWS)
    assert (note, facts) == ("a note", "Measured on: device a machine, 2 cores, torch 2.x.\n")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/rows.csv", "No such file or directory"),
        ("missing/rows.html", "No such file or directory"),
        ("folder.json", "Is a directory"),
        ("file/rows.md", "Not a directory"),
        ("rows.txt", r"the name must end in \.json, \.csv, \.md"),
        ("rows", r"the name must end in \.json, \.csv, \.md"),
    ],
)
def test_a_path_that_cannot_be_written(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=rf"cannot write results to .*{name}: {reason}"):
        check_writable(tmp_path / name)


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.md", "a.html", "a.tex"])
def test_a_path_that_can_be_written_is_left_as_it_was(tmp_path: Path, name: str) -> None:
    assert check_writable(str(tmp_path / name)) == tmp_path / name
    assert not (tmp_path / name).exists()
    (tmp_path / name).write_text("kept")
    check_writable(tmp_path / name)
    assert (tmp_path / name).read_text() == "kept"


def test_show_prints_plain_markdown_into_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    show(ROWS, "The title")
    assert capsys.readouterr().out == f"The title\n\n{as_markdown(ROWS)}\n"


@pytest.mark.parametrize("has_rich", [True, False], ids=["rich", "no-rich"])
def test_show_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], has_rich: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    if not has_rich:
        for module in ("rich", "rich.console", "rich.table"):
            monkeypatch.setitem(sys.modules, module, None)
    show(ROWS, "The title")
    out = capsys.readouterr().out
    assert ("| --" in out) is not has_rich
    for text in ("The title", "images/s", "1234.6", "(8, -1.0)", "1.250", "101"):
        assert text in out


def test_progress_is_one_line_per_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("images") as progress:
        for done in range(1, 41):
            progress(done, 40)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["images: 1/40"] + [f"images: {done}/40" for done in range(4, 41, 4)]


def test_progress_on_a_terminal_ends_its_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("images") as progress:
        progress(3, 6)
        assert progress._bar is not None
        (task,) = progress._bar.tasks
        assert (task.completed, task.total, task.description) == (3, 6, "images")
    assert progress._bar.live.is_started is False
    assert "images: 3/6" not in capsys.readouterr().err
