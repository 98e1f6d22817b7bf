"""Axes: a small difference looks small, and what is marked beside a row is what was measured."""

from __future__ import annotations

from typing import Any

import pytest

from tokenmerge.report.axes import (
    COLOURS,
    Chart,
    axis_of,
    error_of,
    free_bound,
    front,
    limits,
    unmerged_level,
)
from tokenmerge.report.results import results_page


@pytest.mark.parametrize(
    ("title", "values"),
    [
        ("top-1 %", [90.0, 92.0]),
        ("agreement %", [98.0, 100.0]),
        ("top-1 %", [0.0, 2.0]),
        ("cosine", [0.98, 1.0]),
        ("images/s", [300.0, 310.0]),
        ("speed-up", [1.0, 1.02]),
        ("ms", [0.0, 0.0]),
        ("MACs share", [0.9, 1.0]),
        ("not a column", [5.0, 5.1]),
    ],
)
def test_two_points_are_no_cliff(title: str, values: list[float]) -> None:
    low, high = limits(title, values)
    assert low < min(values) and max(values) < high
    assert max(values) - min(values) <= 0.21 * (high - low), "a small difference is drawn large"
    most = axis_of(title).most
    assert most is None or high <= most + 0.06 * (high - low)
    assert low >= -0.06 * (high - low)


def test_what_differs_fills_the_axis() -> None:
    low, high = limits("top-1 %", [10.0, 90.0])
    assert 80 < high - low < 90 and low < 10 and high > 90
    low, high = limits("damage", [0.001, 0.1])
    assert low < 0.001 and 0.1 < high < 0.2
    low, high = limits("damage", [0.01, 0.011])
    assert high / low >= 9.9, "a factor of 1.1 is drawn large"
    assert limits("error %", [0.0, 0.0])[0] < 0


def test_the_free_bound_is_the_one_measured_or_follows_from_the_ratio() -> None:
    row = {"images/s": 100.0, "speed-up": 1.5, "ms": 20.0, "over bound": 1.1, "GMACs": 3.0}
    assert [free_bound(row, name) for name in ("images/s", "speed-up", "ms", "GMACs", "r")] == [
        pytest.approx(110.0),
        pytest.approx(1.65),
        pytest.approx(20 / 1.1),
        None,
        None,
    ]
    assert free_bound({**row, "bound images/s": 109.0}, "images/s") == 109.0
    assert free_bound({**row, "over bound": None}, "images/s") is None
    assert free_bound({"bound ms": 3.0}, "ms") == 3.0 and free_bound({**row, "ms": float("nan")}, "ms") is None


def test_the_unmerged_model_and_errors() -> None:
    row = {"batch": 8, "unmerged ms": 40.0, "unmerged peak MB": 9.0, "speed-up": 1.5, "noise %": 10.0, "top-1 ±": 0.7}
    levels = [unmerged_level(row, name) for name in ("speed-up", "images/s", "ms", "peak MB", "GMACs")]
    assert levels == [1.0, 200.0, 40.0, 9.0, None]
    assert error_of(row, "speed-up") == pytest.approx(0.15) and error_of(row, "top-1 %") == 0.7
    assert error_of({"speed-up": 1.5, "noise %": None}, "speed-up") is None and error_of(row, "ms") is None


def test_the_front_goes_by_which_end_is_better() -> None:
    rows = [
        {"name": n, "cosine": q, "error %": e, "ms": t}
        for n, q, e, t in (("a", 0.9, 5.0, 10.0), ("b", 0.8, 9.0, 5.0), ("c", 0.7, 9.5, 7.0))
    ]
    assert [row["name"] for row in front(rows, "cosine", "ms")] == ["b", "a"]
    assert [row["name"] for row in front(rows, "error %", "ms")] == ["b", "a"]


def test_every_axis_has_its_unit() -> None:
    units = {"top-1 %": "%", "images/s": "per second", "ms": "milliseconds", "GMACs": "multiply-adds", "peak MB": "MiB"}
    assert all(unit in axis_of(title).text for title, unit in units.items())
    assert "less is better" in axis_of("ms").text and "more is better" in axis_of("cosine").text
    assert axis_of("mine").text == "mine" and len(set(COLOURS)) == 7


def test_rows_without_figures_make_a_page_without_a_plot() -> None:
    chart = Chart(x=("ms",), y=("top-1 %",), label=lambda row: str(row["r"]))
    rows: list[dict[str, Any]] = [
        {"r": "8", "ms": None, "top-1 %": 3.0},
        {"r": "9", "ms": None, "top-1 %": float("nan")},
    ]
    page = results_page("t", rows, environment={"torch": "2"}, chart=chart)
    assert "<canvas" not in page and "Chart.js" not in page and page.count("<tr>") == 3
    assert len(page) < 30_000
