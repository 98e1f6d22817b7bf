"""The page of a job: what it says of one call and of several, of failures, and how it opens in a browser."""

from __future__ import annotations

import csv
import html
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from written import rows_of

from browsing import Browsing
from helpers import randomised, tiny_vit
from tokenmerge import Embedder
from tokenmerge.batch import page, rates
from tokenmerge.batch.folder import JobFolder
from tokenmerge.batch.job import embed
from tokenmerge.batch.summary import Summary
from tokenmerge.cli import main
from tokenmerge.errors import DataError

COUNT = 24
EVIL = "<img src=x onerror=hacked=1>&'.png"
HEAD = "started,seconds,images,loader,model,gpu\n"


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder(randomised(tiny_vit(img_size=28, in_chans=1)), r=4)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    root.mkdir()
    for i in range(COUNT):
        Image.new("L", (28, 28), 10 * i).save(root / f"{i:02}.png")
    for name in (EVIL, "x.png", "y.png"):
        (root / name).write_text("no image")
    (root / "z.png").write_bytes((root / "00.png").read_bytes()[:50])
    return root


def data_of(path: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())
    assert found is not None
    return json.loads(found[1])  # type: ignore[no-any-return]


def tables_of(path: Path) -> dict[str, list[dict[str, str]]]:
    """The tables of a page by their titles."""
    names = re.findall(r'<h2 id="rows-\d+">(.*?)</h2>', path.read_text())
    tables = [[*csv.DictReader(io.StringIO(one["csv"]))] for one in data_of(path)["tables"]]
    return dict(zip(names, tables, strict=True))


def written(folder: Path, lines: str, **changes: Any) -> Path:
    """A page of a job with these lines of rates."""
    (folder / "rates.csv").write_text(HEAD + lines)
    job = JobFolder(folder, {"model": "m", "merging": "none"}, "embedding")
    plain = dict.fromkeys(("rows", "failures", "done_before", "images", "killed"), 0)
    plain |= dict.fromkeys(("seconds", "loader", "model", "waited"), 1.0)
    said = {"out": str(folder), "workers": 2, "merging": "", "preprocessing": "", **plain, **changes}
    page.write_page(job, Summary(**said), torch.device("cpu"), 4)
    return folder / "report.html"


def test_a_job_writes_its_page(photos: Path, embedder: Embedder, tmp_path: Path) -> None:
    done = embed(embedder, photos, tmp_path / "out", batch_size=4, workers=1)
    text, tables = (tmp_path / "out/report.html").read_text(), tables_of(tmp_path / "out/report.html")
    lead = [html.unescape(line) for line in re.findall("<p>(.*?)</p>", text)]
    assert lead[0] == done.bound and lead[1] == done.counts and lead[2] == done.pace
    assert f"{COUNT} rows in " in lead[1] and "4 images failed" in lead[1] and done.lines()[-1] == lead[0]
    (run,) = tables["Runs"]
    assert run["images"] == str(COUNT + 4) and float(run["seconds"]) > 0
    assert {row["rate of"] for row in tables["Rows"]} == {"loader", "model", "whole job"}
    assert "GPU %" not in tables["Rows"][0] and all(float(row["images/s"]) > 0 for row in tables["Rows"])
    reasons = [(row["images"], row["reason"], row["for example"]) for row in tables["Failures"]]
    assert reasons[0] == ("3", "cannot identify image file", EVIL) and reasons[1][::2] == ("1", "z.png")
    settings = {row["setting"]: row["value"] for row in tables["Settings"]}
    assert settings["engine"] == "local" and settings["workers"] == "1" and settings["batch size"] == "4"
    assert settings["merging"] == embedder.merging and settings["source"] == str(photos)
    assert settings["preprocessing"] == str(embedder.prepare)
    assert f"<dd>{torch.__version__}</dd>" in text
    assert len(rows_of(tmp_path / "out")) == COUNT, "the page is taken for a shard"


def test_a_resumed_job_writes_it_again_and_a_finished_one_keeps_it(
    photos: Path, embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "_SECONDS", 0.0)
    out = tmp_path / "out"

    def stop(done: int, total: int, note: str) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        embed(embedder, photos, out, batch_size=4, workers=1, progress=stop)
    assert not (out / "report.html").exists()
    embed(embedder, photos, out, batch_size=4, workers=1)
    assert [row["images"] for row in tables_of(out / "report.html")["Runs"]] == ["4", "24"]
    assert {row["run"] for row in tables_of(out / "report.html")["Rows"]} == {"1", "2"}
    before = (out / "report.html").read_bytes()
    assert embed(embedder, photos, out, workers=1).bound == "Nothing was left to do."
    assert (out / "report.html").read_bytes() == before, "what bounded it is forgotten"
    Image.new("L", (28, 28), 7).save(photos / "new.png")
    with pytest.raises(InterruptedError):
        embed(embedder, photos, out, workers=1, progress=stop)
    assert not (out / "report.html").exists(), "it says less than the folder holds"
    embed(embedder, photos, out, workers=1)
    assert f"{COUNT + 1} rows in " in (out / "report.html").read_text()


def test_a_page_without_rates(photos: Path, embedder: Embedder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    embed(embedder, photos, out, workers=1)
    for name in ("rates.csv", "report.html"):
        (out / name).unlink()
    embed(embedder, photos, out, workers=1)
    assert tables_of(out / "report.html").keys() == {"Failures", "Settings"}
    assert "Nothing was left to do." in (out / "report.html").read_text()


def test_runs_follow_each_other_and_what_they_wrote_in_the_same_second(tmp_path: Path) -> None:
    lines = "a,1.0,10,100.0,20.0,\na,3.0,30,200.0,,50.0\na,2.0,8,,40.0,\nb,1.0,5,50.0,50.0,\n"
    path = written(tmp_path, lines, engine="ray", models=3)
    tables = tables_of(path)
    assert [(row["run"], row["images"], row["seconds"]) for row in tables["Runs"]] == [
        ("1", "30", "3.0"),
        ("2", "8", "2.0"),
        ("3", "5", "1.0"),
    ]
    rows = [(row["run"], row["seconds"], row["rate of"], row["images/s"]) for row in tables["Rows"]]
    assert rows == [
        ("1", "1.0", "loader", "100.0"),
        ("1", "1.0", "model", "20.0"),
        ("1", "1.0", "whole job", "10.0"),
        ("1", "3.0", "loader", "200.0"),
        ("1", "3.0", "whole job", "10.0"),
        ("2", "5.0", "model", "40.0"),
        ("2", "5.0", "whole job", "4.0"),
        ("3", "6.0", "loader", "50.0"),
        ("3", "6.0", "model", "50.0"),
        ("3", "6.0", "whole job", "5.0"),
    ]
    settings = {row["setting"]: row["value"] for row in tables["Settings"]}
    assert (settings["engine"], settings["models"]) == ("ray", "3")
    text = path.read_text()
    assert "The seconds of 3 runs follow each other." in text and "the machine of the driver" in text


def test_many_lines_are_averaged_over_the_time_that_images_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "_MOST", 2)
    # 10 images at 10/s and 30 at 30/s: two seconds of decoding for 40 images
    lines = "a,1.0,10,10.0,5.0,10.0\na,2.0,40,30.0,5.0,30.0\na,4.0,60,20.0,5.0,90.0\n"
    path = written(tmp_path, lines)
    rows = tables_of(path)["Rows"]
    found = [(row["seconds"], row["rate of"], row["images/s"], row["GPU %"]) for row in rows]
    assert found == [
        ("2.0", "loader", "20.0", ""),
        ("2.0", "model", "5.0", "20.0"),
        ("2.0", "whole job", "20.0", ""),
        ("4.0", "loader", "20.0", ""),
        ("4.0", "model", "5.0", "90.0"),
        ("4.0", "whole job", "10.0", ""),
    ]
    assert [axis["title"] for axis in data_of(path)["chart"]["y"]] == ["images/s", "GPU %"]


def test_what_was_left_at_the_end_is_no_mark_of_its_own(tmp_path: Path) -> None:
    rows = tables_of(written(tmp_path, "a,1.0,10,10.0,,\na,2.0,20,10.0,,\na,2.1,22,90.0,,\n"))["Rows"]
    loader = [(row["seconds"], row["images/s"]) for row in rows if row["rate of"] == "loader"]
    assert loader == [("1.0", "10.0"), ("2.1", "11.7")]


def test_a_long_job_has_few_marks(tmp_path: Path) -> None:
    lines = "".join(f"a,{i}.0,{i},10.0,5.0,\n" for i in range(1, 2000))
    rows = tables_of(written(tmp_path, lines))["Rows"]
    assert 300 < len(rows) <= 450 and rows[-1]["seconds"] == "1999.0"


def test_reasons_are_counted_and_the_rest_is_one_row(tmp_path: Path) -> None:
    failures = [{"id": f"{i}", "path": "", "reason": f"reason {i % 60}"} for i in range(70)]
    rows = page._reasons(failures)
    assert [rows[0], rows[10], rows[-1]] == [
        {"images": 2, "reason": "reason 0", "for example": "0"},
        {"images": 1, "reason": "reason 10", "for example": "10"},
        {"images": 10, "reason": "10 other reasons", "for example": None},
    ]
    assert sum(row["images"] for row in rows) == 70 and page._reasons([]) == []


@pytest.mark.parametrize("text", ["nonsense", "a,b\n1,2\n", f"{HEAD}a,x,1,,,\n", f"{HEAD}a,1\n", f"{HEAD}a,,1,,,\n"])
def test_a_file_that_holds_no_rates_is_refused_before_anything_is_read(
    photos: Path, embedder: Embedder, tmp_path: Path, text: str
) -> None:
    out = tmp_path / "out"
    embed(embedder, photos, out, workers=1)
    (out / "rates.csv").write_text(f"{text.strip()}\n")
    with pytest.raises(DataError, match=r"rates.csv does not hold the rates of a job: .* Take it away"):
        embed(embedder, photos, out, workers=1, retry=True)
    assert (out / "rates.csv").read_text() == f"{text.strip()}\n"


def test_the_command_names_its_page(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(tiny_vit(img_size=28, in_chans=1), "tiny.pt")
    words = ["embed", "tiny.pt", "--trust-pickle", "--data", str(photos), "--out", "out", "--workers", "1"]
    assert main(words) == 0
    assert "\nOver time: out/report.html\n" in capsys.readouterr().out
    assert "<title>tokenmerge embed tiny.pt</title>" in Path("out/report.html").read_text()


@pytest.mark.parametrize("width", [390, 1440])
def test_it_opens_in_a_browser(
    browser: Any, photos: Path, embedder: Embedder, tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "_SECONDS", 0.0)
    out = tmp_path / "out"
    embed(embedder, photos, out, batch_size=4, workers=1)
    visit = Browsing(browser, out / "report.html", width)
    assert EVIL in visit.text("body") and visit.page.locator("img").count() == 0
    assert visit.spills() <= 0, "the page scrolls sideways"
    spots = visit.page.evaluate("results.spots()")
    assert len(spots) == len(tables_of(out / "report.html")["Rows"]) > 10
    assert visit.page.evaluate("results.placed.length") == 0, "names of many marks"
    names = [line.inner_text() for line in visit.page.locator("#legend button").all()]
    assert names == ["loader", "model", "whole job"]
    visit.page.locator("#chart").focus()
    visit.page.keyboard.press("End")
    assert re.fullmatch(r"(loader|model|whole job), \d+ s", visit.text("#row h3"))
    assert visit.page.evaluate("results.placed.length") <= 1
    visit.page.locator("#legend button").first.click()
    assert len(visit.page.evaluate("results.spots()")) < len(spots)
    assert visit.complaints == [] and visit.page.evaluate("typeof hacked") == "undefined"
    visit.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_axe_finds_nothing(
    browser: Any, photos: Path, embedder: Embedder, tmp_path: Path, width: int, scheme: str
) -> None:
    embed(embedder, photos, tmp_path / "out", workers=1)
    visit = Browsing(browser, tmp_path / "out/report.html", width, color_scheme=scheme, bypass_csp=True)
    assert visit.violations() == []
    visit.context.close()
