"""Results are typed records: attributes and keys say the same, and every renderer knows the same columns."""

from __future__ import annotations

import json
import pickle
import sys
from typing import Any

import pytest

from helpers import tiny_vit
from tokenmerge.data.labelled import FashionMNIST
from tokenmerge.errors import UnsupportedError
from tokenmerge.report import columns
from tokenmerge.report.columns import Column, Record, find_column
from tokenmerge.report.table import fitting
from tokenmerge.tools.bench import Bench, BenchRow, bench
from tokenmerge.tools.compare import FIGURES, ComparisonRow
from tokenmerge.tools.doctor import Diagnosis, Finding
from tokenmerge.tools.evaluate import Evaluation, EvaluationRow, evaluate

ROWS: list[type[Record]] = [BenchRow, EvaluationRow, ComparisonRow]


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return evaluate(tiny_vit(img_size=28, in_chans=1, depth=2), FashionMNIST(8, 8), rs=[4])


@pytest.mark.parametrize("row", ROWS)
def test_every_column_is_said_once_and_documented(row: type[Record]) -> None:
    titles = row.titles()
    assert len(set(titles)) == len(titles) > 10
    for name, column in row.columns().items():
        assert getattr(row, name) is column and name.isidentifier() and not hasattr(dict, name)
        assert column.meaning and f"    {name}: {column.meaning}" in (row.__doc__ or "")
        assert find_column(column.title).title == column.title and find_column(column.title).meaning
    assert "ms: median time of a merged forward, in milliseconds." in (BenchRow.__doc__ or "")


def test_a_measured_row_has_the_columns_of_its_record(evaluation: Evaluation) -> None:
    result = bench(tiny_vit(depth=2), rs=[4], batches=[1], rounds=1, compare=True, training=True)
    assert [list(row) for row in result.rows] == [BenchRow.titles()]
    seen = [name for name in EvaluationRow.titles() if name in evaluation.rows[0]]
    assert [list(row) for row in evaluation.rows] == [seen] * 2 and len(seen) > 8


def test_attributes_read_what_keys_read(evaluation: Evaluation) -> None:
    row = evaluation.rows[1]
    for name, column in row.columns().items():
        assert getattr(row, name) == row.get(column.title)
    assert (row.r, row.top1, row.images_per_second) == ("4", row["top-1 %"], row["images/s"])
    assert row.cosine is row.over_bound is None and "cosine" not in row
    assert row.tokens == 42 and evaluation.rows[0].tokens == 50
    with pytest.raises(AttributeError, match=r"set by its key: row\['tokens'\]"):
        row.tokens = 3  # type: ignore[assignment]


def test_a_row_is_the_dict_it_was(evaluation: Evaluation) -> None:
    row = evaluation.rows[1]
    assert json.loads(json.dumps(row)) == dict(row) == {**row} == row and isinstance(row, dict)
    assert pickle.loads(pickle.dumps(row)) == row and type(pickle.loads(pickle.dumps(row))) is EvaluationRow
    row = EvaluationRow(row)
    row["mine"] = 1
    assert row["mine"] == 1 and "'mine': 1" in repr(row)


def test_results_print_themselves(evaluation: Evaluation) -> None:
    text = str(evaluation)
    assert repr(evaluation) == text
    head, _, unmerged, merged, *rest = text.splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == list(evaluation.rows[0])
    assert unmerged.startswith("| 0 ") and merged.startswith("| 4 ") and rest[-1].startswith("Measured on: device ")
    page = evaluation._repr_html_()
    assert page.startswith('<table>\n<tr><th>r</th><th class="number">top-1 %</th>') and page.count("<tr>") == 3
    assert str(Bench([], {"torch": "2"})) == "no rows\nMeasured on: torch 2"
    assert str(Diagnosis([Finding("adapter", False, "none")], {})) == "FAIL adapter            none"


def test_pandas_gets_the_names_that_files_have(evaluation: Evaluation) -> None:
    pytest.importorskip("pandas")
    frame = evaluation.to_pandas()
    assert list(frame.columns) == list(evaluation.rows[0]) and list(frame["tokens"]) == [50, 42]
    assert frame["top-1 %"].dtype == float and len(Evaluation([], {}, 0).to_pandas()) == 0


def test_without_pandas_its_name_is_said(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UnsupportedError, match=r"needs pandas: pip install pandas"):
        evaluation.to_pandas()


def test_the_most_important_columns_are_kept() -> None:
    row = dict.fromkeys(("model", "asked", "mine", "over bound", "speed-up", "r", "method"), 1.0)
    (kept,) = fitting([row], 45)
    assert list(kept) == ["over bound", "speed-up", "r", "method"]


def test_figures_are_the_measured_columns() -> None:
    assert (FIGURES[0], FIGURES[-1], len(FIGURES)) == ("top-1 %", "tokens", 13)


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        (columns.TOP1_ERROR, 0.25, "0.2"),
        (Column("x"), 0.0, "0.000"),
        (Column("x"), 12.3456, "12.35"),
        (Column("x"), 7, "7"),
    ],
)
def test_the_format_is_the_column_s(column: Column[Any], value: Any, text: str) -> None:
    assert column.text(value) == text


def test_a_folder_holds_the_columns_it_held() -> None:
    from tokenmerge.tools.compare import _VERSION

    assert _VERSION == 2 and ComparisonRow.titles() == [
        *(
            "method",
            "asked",
            "r",
            "top-1 %",
            "top-1 ±",
            "agreement %",
            "KL",
            "error %",
            "cosine",
            "GMACs",
            "MACs share",
        ),
        *("matching GMACs", "images/s", "speed-up", "over bound", "tokens", "note"),
    ]
