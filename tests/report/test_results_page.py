"""The page of results in a real browser: points, tables, CSV, both widths, light and dark; nothing of names runs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from browsing import Browsing
from tokenmerge import MergeConfig
from tokenmerge.report.axes import Chart
from tokenmerge.report.formats import as_csv, with_environment
from tokenmerge.report.results import results_page
from tokenmerge.tools.bench import Bench, BenchRow
from tokenmerge.tools.compare import Comparison, ComparisonRow
from tokenmerge.tools.evaluate import Evaluation, EvaluationRow
from tokenmerge.tuning.result import Front, FrontRow, Tried, TriedRow, Tuning

EVIL = "</script><svg onload=hacked=1>"
ABOUT = {"device": f"{EVIL}, 2 cores", "threads": "2", "torch": "2.15"}


def compared(number: int = 9) -> Comparison:
    """Methods at two amounts; one row could not be measured."""
    rows = [{"method": "unmerged", "asked": "-", "r": "0", "top-1 %": 91.3, "MACs share": 1.0, "speed-up": 1.0}]
    for i in range(number):
        for r in (8, 16):
            figures = {"top-1 %": 91.2 - 0.02 * i * r, "MACs share": 1 - r / 32, "speed-up": 1 + r / (18 + i)}
            rows.append({"method": EVIL if i == 0 else f"method {i}", "asked": f"r {r}", "r": str(r), **figures})
    rows = [{**row, "top-1 ±": 0.6, "over bound": 1.08, "GMACs": 2 * row["MACs share"]} for row in rows]
    rows[0]["over bound"] = None
    rows.append({"method": "broken", "asked": "r 8", "r": "-", "note": EVIL})
    whole = [ComparisonRow({**dict.fromkeys(ComparisonRow.titles()), "note": "", **row}) for row in rows]
    return Comparison(f"a model {EVIL}", whole, [ABOUT] * len(rows), 500, 64, about=["WARNING: constants assumed."])


def evaluated() -> Evaluation:
    figures = ((0, 330.0, None, 91.4), (4, 331.0, 350.0, 91.4), (8, 400.0, 420.0, 91.0), (16, 640.0, 700.0, 89.8))
    rows = [
        {
            "r": str(r),
            "top-1 %": top,
            "top-1 ±": 0.4,
            "images/s": speed,
            "speed-up": speed / 330,
            "bound images/s": bound,
        }
        for r, speed, bound, top in figures
    ]
    return Evaluation([EvaluationRow(row) for row in rows], ABOUT, 500, notes=["Preprocessing: none."])


def benched() -> Bench:
    rows = [
        {
            "model": EVIL,
            "r": str(r),
            "batch": batch,
            "ms": 40 / gain,
            "images/s": batch * gain / 0.04,
            "unmerged ms": 40.0,
            "speed-up": gain,
            "noise %": 4.0,
            "over bound": 1.05,
            "GMACs": 4 / gain,
            "tokens": 197 - 12 * r,
        }
        for batch in (1, 8)
        for r, gain in ((0, 1.0), (8, 1.25 + batch / 50), (16, 1.7 + batch / 50))
    ]
    return Bench([BenchRow(row) for row in rows], ABOUT, ["r = 8: faster at every batch size measured."])


def tuned() -> Tuning:
    rows = [("unmerged", 1.0, 0.0, 100.0), ("", 0.75, 0.002, 99.4), ("constant r of tome", 0.75, 0.004, 99.1)]
    rows += [("chosen", 0.5, 0.01, 98.0), ("constant r of tome", 0.5, 0.03, 96.0), ("", 0.4, 0.06, 94.0)]
    front = [
        FrontRow(
            {
                "method": "tome",
                "r": "[8, 8]",
                "MACs share": share,
                "damage": damage,
                "agreement %": same,
                "top-1 %": None,
                "speed-up": 1.9 if note == "chosen" else None,
                "speed-up est.": 1 / share,
                "tokens": 9,
                "note": note,
            }
        )
        for note, share, damage, same in rows
    ]
    tried = [
        TriedRow({"split": "search", "method": EVIL, "r": "8", "MACs share": i / 40, "damage": 0.1}) for i in range(40)
    ]
    report = f"1.90x faster {EVIL}"
    return Tuning(MergeConfig("tome", r=8), Front(front, ABOUT), Tried(tried, ABOUT), True, report, {})


PAGES: dict[str, Callable[[], str]] = {
    "compare": lambda: compared().page("compared"),
    "eval": lambda: evaluated().page(EVIL),
    "bench": lambda: benched().page("benched"),
    "tune": lambda: tuned()._page("tuned"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for name, page in PAGES.items():
        (folder / f"{name}.html").write_text(page())
    return {name: folder / f"{name}.html" for name in PAGES}


class Visit(Browsing):
    """A visit of a page of results."""

    def spots(self) -> dict[int, tuple[float, float]]:
        """Where the rows are drawn, in pixels of the plot."""
        return {one["i"]: (one["x"], one["y"]) for one in self.page.evaluate("results.spots()")}

    def point(self, row: int) -> None:
        x, y = self.spots()[row]
        self.page.locator("#chart").hover(position={"x": x, "y": y})

    def column(self, number: int, table: int = 0) -> list[str]:
        rows = self.page.locator(".rows").nth(table).locator("tbody tr:visible")
        return [str(row.locator("td").nth(number).inner_text()) for row in rows.all()]

    def filter(self, text: str, table: int = 0) -> None:
        self.page.locator("input[type=search]").nth(table).fill(text)


@pytest.fixture(params=[390, 1440])
def visits(request: pytest.FixtureRequest, browser: Any, files: dict[str, Path]) -> Iterator[Callable[[str], Visit]]:
    opened: list[Visit] = []

    def visit(name: str) -> Visit:
        opened.append(Visit(browser, files[name], request.param))
        return opened[-1]

    yield visit
    for one in opened:
        assert one.complaints == [] and one.page.evaluate("typeof hacked") == "undefined"
        one.context.close()


def test_a_point_says_its_row(visits: Callable[[str], Visit]) -> None:
    visit = visits("compare")
    row = compared().rows[4]
    assert "No mark is chosen" in visit.text("#row")
    visit.point(4)
    assert visit.text("#row h3") == f"{row['method']} {row['asked']}"
    names = [name.inner_text() for name in visit.page.locator("#row dt").all()]
    said = dict(zip(names, [value.inner_text() for value in visit.page.locator("#row dd").all()], strict=True))
    assert said["method"] == row["method"] and said["top-1 %"] == f"{row['top-1 %']:.2f}" and said["GMACs"] == "1.000"
    assert visit.page.locator("tr.active").count() == 1 and row["method"] in visit.text("tr.active")
    assert 19 not in visit.spots() and len(visit.spots()) == 19, "the row without figures is drawn"


def test_keys_go_from_mark_to_mark(visits: Callable[[str], Visit]) -> None:
    visit = visits("eval")
    visit.page.locator("#chart").focus()
    said = []
    for key in ("ArrowRight", "ArrowRight", "End", "ArrowLeft", "Home"):
        visit.page.keyboard.press(key)
        said.append(visit.text("#row h3"))
    assert said == ["r = 0", "r = 4", "r = 16", "r = 8", "r = 0"]
    assert visit.text("#said").startswith("r = 0: r 0, top-1 % 91.40")
    visit.page.keyboard.press("Escape")
    assert visit.page.locator("#row h3").count() == 0 and visit.page.locator("tr.active").count() == 0


@pytest.mark.parametrize(("key", "first"), [("Home", 0), ("End", 3), ("ArrowRight", 0), ("ArrowLeft", 3)])
def test_the_first_key_chooses_the_first_or_the_last_mark(visits: Callable[[str], Visit], key: str, first: int) -> None:
    visit = visits("eval")
    visit.page.locator("#chart").focus()
    visit.page.keyboard.press(key)
    assert visit.text("#row h3") == f"r = {evaluated().rows[first]['r']}"


def test_a_row_without_a_name_is_no_place_of_an_axis(browser: Any, tmp_path: Path) -> None:
    rows = [{"r": r, "top-1 %": top} for r, top in (("0", 90.0), (None, None), ("[8, 8]", 88.0))]
    chart = Chart(x=("r",), y=("top-1 %",), label=lambda row: f"r = {row['r']}")
    (tmp_path / "x.html").write_text(results_page("x", rows, environment=ABOUT, chart=chart))
    visit = Visit(browser, tmp_path / "x.html", 1440)
    assert visit.page.evaluate("DATA.chart.x[0].ticks") == ["0", "[8, 8]"] and set(visit.spots()) == {0, 2}
    visit.filter("[8, 8]")
    assert visit.text(".rows output") == "1 of 3 rows" and visit.complaints == []
    visit.context.close()


def test_one_row_is_one_row(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "x.html").write_text(results_page("x", [{"r": "0"}], environment=ABOUT))
    visit = Visit(browser, tmp_path / "x.html", 390)
    assert visit.text(".rows output") == "1 row"
    visit.context.close()


def test_axes_are_chosen_and_say_their_units(visits: Callable[[str], Visit]) -> None:
    visit = visits("bench")
    assert "speed-up: times as fast as the unmerged model" in str(
        visit.page.locator("#chart").get_attribute("aria-label")
    )
    before = visit.spots()
    visit.page.locator("#y").select_option(label="milliseconds of a forward (less is better)")
    visit.page.locator("#x").select_option(label="tokens left after the last block")
    after = visit.spots()
    assert after != before and len(after) == 6
    # r = 16 leaves fewer tokens than r = 0, and takes less time
    assert after[2][0] < after[0][0] and after[2][1] > after[0][1]
    assert [line.inner_text() for line in visit.page.locator("#legend button").all()] == [
        "batch 1",
        "batch 8",
        "unmerged model",
        "free bound: drops as many tokens, at no cost",
    ]
    visit.page.locator("#legend button").first.click()
    assert set(visit.spots()) == {3, 4, 5}
    assert visit.page.locator("#legend button").first.get_attribute("aria-pressed") == "false"


@pytest.mark.parametrize("name", PAGES)
def test_names_cover_no_mark_and_no_other_name(visits: Callable[[str], Visit], name: str) -> None:
    visit = visits(name)
    for axis in range(visit.page.locator("#y option").count()):
        visit.page.locator("#y").select_option(index=axis)
        boxes, spots = visit.page.evaluate("results.placed"), visit.spots()
        assert len(boxes) >= (2 if visit.page.viewport_size["width"] > 1000 else 1)  # a phone has less room
        for i, a in enumerate(boxes):
            assert not any(
                a["left"] < b["right"] and b["left"] < a["right"] and a["top"] < b["bottom"] and b["top"] < a["bottom"]
                for b in boxes[:i]
            )
            inside = [row for row, (x, y) in spots.items() if a["left"] < x < a["right"] and a["top"] < y < a["bottom"]]
            assert inside == []
            own = spots[a["i"]]
            rivals = [at for at in spots.values() if math.dist(at, own) > 12]
            assert all(_away(a, own) <= _away(a, at) for at in rivals), "a name stands beside another mark"


def _away(box: Any, spot: tuple[float, float]) -> float:
    x, y = spot
    return float(max(box["left"] - x, 0, x - box["right"]) ** 2 + max(box["top"] - y, 0, y - box["bottom"]) ** 2)


def test_two_points_are_no_cliff_on_the_page(visits: Callable[[str], Visit]) -> None:
    visit = visits("eval")
    box = visit.page.locator("#chart").bounding_box()
    heights = [y for _, y in visit.spots().values()]
    assert max(heights) - min(heights) < 0.2 * box["height"], "1.6 points of accuracy fill the plot"


def test_tables_sort_and_filter(visits: Callable[[str], Visit]) -> None:
    visit = visits("compare")
    rows = compared()._shown()
    names = list(rows[0])
    top = names.index("top-1 %")
    head = visit.page.locator(".rows th").nth(top)
    head.locator("button").click()
    values = sorted(row["top-1 %"] for row in rows if row["top-1 %"] is not None)
    assert visit.column(top) == [*(f"{value:.2f}" for value in values), "-"]
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").press("Enter")
    assert visit.column(top) == [*(f"{value:.2f}" for value in reversed(values)), "-"]
    assert head.get_attribute("aria-sort") == "descending"
    visit.filter("METHOD 3")
    assert visit.column(0) == ["method 3"] * 2 and visit.text(".rows output") == "2 of 20 rows"
    assert set(visit.spots()) == {7, 8}, "the plot shows other rows than the table"
    visit.filter("nothing like it")
    assert visit.column(0) == [] and visit.spots() == {}
    visit.filter("")
    assert len(visit.column(0)) == 20 and visit.text(".rows output") == "20 rows"


def test_numbers_are_sorted_as_numbers(visits: Callable[[str], Visit]) -> None:
    visit = visits("bench")
    r = list(benched().rows[0]).index("r")
    visit.page.locator(".rows th button").nth(r).click()
    assert visit.column(r) == ["0", "0", "8", "8", "16", "16"]


def test_a_second_table_has_its_own_filter(visits: Callable[[str], Visit]) -> None:
    visit = visits("tune")
    visit.filter("0.5", table=1)
    assert 0 < len(visit.column(3, table=1)) < 40 and len(visit.column(0)) == 6 and len(visit.spots()) == 6
    saved = visit.downloaded(".csv >> nth=1").decode()
    assert saved == as_csv(tuned().tried.rows)


@pytest.mark.parametrize(
    ("name", "result"),
    [("compare", compared), ("eval", evaluated), ("bench", benched), ("tune", lambda: tuned().front)],
)
def test_the_csv_is_the_rows(visits: Callable[[str], Visit], name: str, result: Callable[[], Any]) -> None:
    visit, found = visits(name), result()
    visit.filter("8")  # the file has all rows
    text = visit.downloaded(".csv >> nth=0").decode()
    assert text == as_csv(with_environment(found.rows, found.environment)) and visit.name.endswith(".csv")
    parsed = list(csv.DictReader(io.StringIO(text)))
    assert [row["r"] for row in parsed] == [row["r"] for row in found.rows] and parsed[0]["device"] == ABOUT["device"]
    assert "/" not in visit.name and "<" not in visit.name


def test_names_are_shown_and_do_nothing(visits: Callable[[str], Visit]) -> None:
    for name in PAGES:
        visit = visits(name)
        assert EVIL in visit.text("body") and visit.page.locator("svg").count() == 0
        assert EVIL in visit.text("dl >> nth=-1"), "the environment is not shown"
    visit = visits("compare")
    assert visit.text(".note") == "WARNING: constants assumed."
    blocked = visit.page.evaluate(
        "async () => { const s = document.createElement('script'); s.textContent = 'hacked = 1';"
        "document.body.append(s);"
        "try { await fetch('https://example.com/'); return 'loaded' } catch { return typeof hacked } }"
    )
    assert blocked == "undefined" and visit.complaints and all("Content Security Policy" in c for c in visit.complaints)
    visit.complaints.clear()


@pytest.mark.parametrize("name", PAGES)
def test_it_fits_and_is_small(visits: Callable[[str], Visit], files: dict[str, Path], name: str) -> None:
    visit = visits(name)
    assert visit.spills() <= 0, "the page scrolls sideways"
    assert files[name].stat().st_size < 350_000
    box = visit.page.locator("#chart").bounding_box()
    assert box["width"] > 340 and box["height"] > 300
    visit.page.set_viewport_size({"width": 700, "height": 800})
    visit.until("document.getElementById('chart').clientWidth > 600 && results.placed.length > 0")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing(browser: Any, files: dict[str, Path], name: str, width: int, scheme: str) -> None:
    visit = Visit(browser, files[name], width, color_scheme=scheme, bypass_csp=True)
    visit.point(1)
    assert visit.violations() == []
    visit.context.close()


def test_pages_of_results_that_are_not_drawn(browser: Any, tmp_path: Path) -> None:
    found = compared()
    found.rows = [row for row in found.rows if row["method"] == "broken"]
    found.environment = found.environment[:1]
    (tmp_path / "x.html").write_text(found.page("broken"))
    visit = Visit(browser, tmp_path / "x.html", 390)
    assert visit.page.locator("canvas").count() == 0 and visit.column(0) == ["broken"] and visit.complaints == []
    visit.context.close()
