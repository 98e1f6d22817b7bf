"""The explorer in a real browser: sliders, hovering, clicking, keys, links, saved pictures; nothing of names runs."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageSequence

import tokenmerge
from browsing import Browsing
from helpers import tiny_vit
from tokenmerge.data.prepare import find_preprocessing

EVIL = "<svg onload=hacked=1>"
NAMES = [f"</script><script>hacked=1</script>{EVIL}{number}" for number in range(10)]
METHODS, RS = ["tome", "attention"], [3, 8]


def _photo(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (7, 9, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(small.numpy()).resize((300, 260), Image.BICUBIC)


def _model() -> Any:
    torch.manual_seed(0)
    return tiny_vit()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("explore")
    photos = [folder / f"{EVIL}{number}.png" for number in range(2)]
    for number, path in enumerate(photos):
        _photo(number).save(path)
    options: Any = {"rs": RS, "methods": METHODS, "labels": NAMES, "rounds": 1, "label": EVIL, "notes": [EVIL]}
    return tokenmerge.explore(_model(), photos, folder / "x.html", **options).path, photos


class Visit(Browsing):
    """A visit of the explorer."""

    def state(self) -> Any:
        return self.page.evaluate("JSON.parse(JSON.stringify(explorer.state))")

    def set(self, where: str, value: Any) -> None:
        """Move a slider as a person does: the browser sends what it sends then."""
        self.page.locator(where).fill(str(value))

    def point(self, side: str, place: int, click: bool = False) -> None:
        canvas = self.page.locator(f"#{side}-picture")
        box, patch = canvas.bounding_box(), place - 1
        at = {"x": (patch % 8 + 0.5) * box["width"] / 8, "y": (patch // 8 + 0.5) * box["height"] / 8}
        (canvas.click if click else canvas.hover)(position=at)

    def saved(self, button: str) -> Any:
        return Image.open(io.BytesIO(self.downloaded(button)))


@pytest.fixture(params=[390, 1440])
def visit(request: pytest.FixtureRequest, browser: Any, written: tuple[Path, list[Path]]) -> Iterator[Visit]:
    opened = Visit(browser, written[0], request.param)
    yield opened
    assert opened.complaints == [] and opened.page.evaluate("typeof hacked") == "undefined"
    opened.context.close()


def _trace(photo: Path, method: str, r: int) -> tuple[Any, list[Any]]:
    """The trace and the groups of a forward of its own."""
    model = _model()
    x = find_preprocessing(model)(Image.open(photo))[None]
    with tokenmerge.patched(model, method, r=r, track="pairs") as handle, torch.no_grad():
        model(x)
        return handle.trace(), handle.groups


def test_every_view_can_be_reached_and_has_a_link(visit: Visit, browser: Any, written: tuple[Path, list[Path]]) -> None:
    assert visit.state()["block"] == 4 and visit.state()["right"] == [1, 1]  # two methods, side by side
    visit.set("#block", 2)
    visit.set("#left-r", 2)
    assert visit.text("#block-said") == "2 of 4" and "Tokens\n49 of 65, 33 in the end" in visit.text("#left dl")
    visit.page.locator("#left-method").select_option("attention")
    visit.page.locator("#right-method").select_option("tome")
    visit.set("#right-r", 0)
    visit.page.locator("#look").select_option("photo")
    visit.page.locator("#images button").nth(1).click()
    visit.point("left", 20, click=True)
    state = visit.state()
    assert state == {"image": 1, "block": 2, "left": [1, 2], "right": [0, 0], "look": "photo", "token": 20}
    link = visit.page.url
    assert "left=attention%408" in link and "token=20" in link
    other = Visit(browser, written[0], 800, "#" + link.partition("#")[2])
    assert other.state() == state and other.text("#left dl") == visit.text("#left dl") and other.complaints == []
    other.context.close()
    visit.page.reload()
    visit.page.wait_for_selector("html[data-ready]")
    assert visit.state() == state
    visit.page.evaluate("location.hash = '#image=1&block=3&left=tome%403'")
    visit.page.wait_for_function("explorer.state.block === 3")
    assert visit.state() == {"image": 0, "block": 3, "left": [0, 1], "right": None, "look": "groups", "token": None}
    visit.page.evaluate("location.hash = '#image=99&block=-1&left=%3Cb%3E&look=x&token=7000'")
    visit.page.wait_for_function("explorer.state.block === 4")
    assert visit.state()["image"] == 0 and visit.state()["token"] is None
    visit.page.locator("#both").check()
    assert visit.state()["right"] is not None and visit.page.locator("#right").is_visible()


def test_a_token_lights_up_its_group_and_tells_its_genealogy(visit: Visit, written: tuple[Path, list[Path]]) -> None:
    visit.page.evaluate("location.hash = '#image=1&block=4&left=tome%408'")
    trace, groups = _trace(written[1][0], "tome", 8)
    _, counts = groups[-1][0].unique(return_counts=True)
    place = next(place for place in range(1, 65) if counts[groups[-1][0, place]] > 2)
    visit.page.wait_for_function("explorer.state.right === null")
    before = _pixels(visit, "left")
    visit.point("left", place)
    patch = f"row {(place - 1) // 8 + 1}, column {(place - 1) % 8 + 1}"
    said = f"tome, r = 8: {patch} is one of {counts[groups[-1][0, place]]} patches in a group"
    assert visit.text("#said") == said and _pixels(visit, "left") != before
    visit.point("left", place, click=True)
    merges = visit.page.evaluate(f"explorer.genealogy(explorer.runOf('left'), {place})")
    expected = trace.genealogy(place)
    assert [(m["block"] - 1, m["gone"], m["into"]) for m in merges] == [step[:3] for step in expected]
    assert all(abs(m["similarity"] - step.similarity) < 1e-3 for m, step in zip(merges, expected, strict=True))
    lines = visit.text("#family ol").splitlines()
    assert len(lines) == len(expected) == counts[groups[-1][0, place]] - 1
    first = expected[0]
    where = [f"row {(at - 1) // 8 + 1}, column {(at - 1) % 8 + 1}" for at in (first.gone, first.into)]
    assert lines[0] == f"Block {first.block + 1}: {where[0]} went into {where[1]}, similarity {first.similarity:.2f}"
    visit.set("#block", first.block)  # before anything of it merged
    assert visit.page.locator("#family ol.now").count() == 0
    visit.set("#block", first.block + 1)
    together = {at for at in range(65) if groups[first.block][0, at] == groups[first.block][0, place]}
    now = [step for step in expected if step.block <= first.block and step.gone in together]
    assert visit.page.locator("#family ol.now li").count() == len(now)
    assert visit.page.locator("#family ol.later li").count() == len(expected) - len(now)
    visit.page.keyboard.press("Escape")
    assert visit.state()["token"] is None and visit.page.locator("#family ol").count() == 0
    visit.page.evaluate("location.hash = '#image=1&block=4&left=attention%408'")
    dropped = int((_trace(written[1][0], "attention", 8)[1][-1][0] < 0).nonzero()[0])
    visit.page.wait_for_function("explorer.state.left[0] === 1")
    visit.point("left", dropped, click=True)
    assert visit.text("#family li").endswith("was dropped")


def test_keys_do_what_the_pointer_does(visit: Visit) -> None:
    visit.page.keyboard.press("ArrowLeft")
    visit.page.keyboard.press("ArrowUp")
    assert visit.state()["block"] == 3 and visit.state()["left"] == [0, 2]
    visit.page.locator("#left-picture").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "Enter"):
        visit.page.keyboard.press(key)
    assert visit.state()["token"] == 1 + 9 and visit.state()["block"] == 3  # the first key puts the cursor there
    assert visit.page.locator("#family h2").first.inner_text().endswith("who merged with row 2, column 2")
    visit.page.keyboard.press("Escape")
    assert visit.state()["token"] is None


def test_every_patch_is_in_the_group_that_the_handle_says(browser: Any, written: tuple[Path, list[Path]]) -> None:
    visit = Visit(browser, written[0], 1440)
    for number, photo in enumerate(written[1]):
        for method, name in enumerate(METHODS):
            for amount, r in enumerate([0, *RS]):
                trace, groups = _trace(photo, name, r)
                for block, (step, expected) in enumerate(zip(trace.blocks, groups, strict=True), 1):
                    run = f"explorer.DATA.methods[{method}].amounts[{amount}].runs[{number}]"
                    found = visit.page.evaluate(f"[...explorer.leads({run}, {block})]")
                    named = step.kept[0][expected[0].clamp_min(0)].masked_fill(expected[0] < 0, -1)
                    assert found == named.tolist()
    visit.context.close()


def _pixels(visit: Visit, side: str) -> list[list[int]]:
    """The pixels in the middle of every patch."""
    found: list[list[int]] = visit.page.evaluate(
        """(side) => {
          const canvas = document.getElementById(`${side}-picture`);
          const pen = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
          pen.drawImage(canvas, 0, 0);
          const at = (i, size) => Math.floor(((i + 0.5) * size) / 8);
          return Array.from({ length: 64 }, (_, p) =>
            [...pen.getImageData(at(p % 8, canvas.width), at(Math.floor(p / 8), canvas.height), 1, 1).data]);
        }""",
        side,
    )
    return found


def test_groups_are_flat_in_their_mean_colour_and_r_0_is_the_photo(
    browser: Any, written: tuple[Path, list[Path]]
) -> None:
    visit = Visit(browser, written[0], 1440, "#image=2&block=4&left=tome%408&right=tome%400")
    merged, plain = _pixels(visit, "left"), _pixels(visit, "right")
    is_photo = visit.page.evaluate(
        """() => {
          const canvas = document.getElementById("right-picture"), { width, height } = canvas;
          const other = new OffscreenCanvas(width, height), pen = other.getContext("2d");
          pen.drawImage(explorer.DATA.images[1].picture, 0, 0, width, height);
          const [a, b] = [canvas.getContext("2d"), pen].map((one) => one.getImageData(0, 0, width, height).data);
          return a.length > 1000 && a.every((value, i) => value === b[i]);
        }"""
    )
    assert is_photo, "r = 0 is not the photo"
    _, groups = _trace(written[1][1], "tome", 8)
    means = visit.page.evaluate("explorer.DATA.images[1].colours")
    for group in groups[-1][0, 1:].unique():
        members = (groups[-1][0, 1:] == group).nonzero().flatten().tolist()
        if len(members) == 1:
            assert merged[members[0]] == plain[members[0]]
            continue
        mean = torch.tensor([means[patch] for patch in members]).mean(dim=0)
        for patch in members:
            assert (torch.tensor(merged[patch][:3]) - mean).abs().max() <= 1.0
    assert merged != plain
    visit.context.close()


def test_the_view_is_saved_as_png_and_gif(browser: Any, written: tuple[Path, list[Path]]) -> None:
    visit = Visit(browser, written[0], 1440)
    png = visit.saved("#png")
    assert png.format == "PNG" and visit.name == "_svg_onload_hacked_1_0.png"
    visit.page.locator("#both").uncheck()
    single = visit.saved("#png")
    assert single.width < png.width and single.height == png.height > 400
    gif = visit.saved("#gif")
    frames = [frame.convert("RGB").copy() for frame in ImageSequence.Iterator(gif)]
    assert gif.format == "GIF" and len(frames) == 5 and gif.info["loop"] == 0 and gif.size == single.size
    difference = (_tensor(frames[-1]) - _tensor(single)).abs()
    assert difference.mean() < 6, "the last frame is not the view"
    assert all((_tensor(a) - _tensor(b)).abs().mean() > 0.05 for a, b in pairwise(frames))
    assert visit.page.locator("#gif").inner_text() == "Save GIF" and visit.complaints == []
    visit.context.close()


def _tensor(image: Any) -> torch.Tensor:
    image = image.convert("RGB")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float()


def test_names_are_shown_and_do_nothing(visit: Visit) -> None:
    assert visit.page.title().endswith(EVIL) and EVIL in visit.text("h1") and visit.text(".note >> nth=0") == EVIL
    assert visit.text("#left .answer").startswith("</script><script>hacked=1</script><svg")
    assert visit.page.locator("#images img").first.get_attribute("alt") == f"{EVIL}0.png"
    assert visit.page.locator("svg").count() == 0
    blocked = visit.page.evaluate(
        "async () => { const s = document.createElement('script'); s.textContent = 'hacked = 1';"
        "document.body.append(s);"
        "try { await fetch('https://example.com/'); return 'loaded' } catch { return typeof hacked } }"
    )
    assert blocked == "undefined" and visit.complaints and all("Content Security Policy" in c for c in visit.complaints)
    visit.complaints.clear()


def test_it_fits_a_phone(visit: Visit) -> None:
    assert visit.spills() <= 0, "the page scrolls sideways"
    boxes = [visit.page.locator(f"#{side}").bounding_box() for side in ("left", "right")]
    is_phone = visit.page.viewport_size["width"] == 390
    assert (boxes[0]["y"] < boxes[1]["y"]) == is_phone and boxes[0]["width"] > 300


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_axe_finds_nothing(browser: Any, written: tuple[Path, list[Path]], width: int, scheme: str) -> None:
    link = "#image=1&block=4&left=tome%408&right=attention%403&token=20"
    visit = Visit(browser, written[0], width, link, color_scheme=scheme, bypass_csp=True)
    visit.page.locator("summary").click()
    assert visit.violations() == []
    visit.context.close()


@pytest.mark.parametrize("where", ["merged", "unmerged", "both"])
@pytest.mark.parametrize("classes", [10, 0])
def test_answers_that_are_no_numbers_are_said(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int, where: str
) -> None:
    from tokenmerge.tools import explore as tool

    run = tool.run_images

    def broken(model: Any, x: torch.Tensor) -> torch.Tensor:
        out = run(model, x)
        is_odd = where == "both" or (where == "unmerged") == (tokenmerge.handle_of(model).r == 0)
        return out * torch.nan if is_odd and bool(x.mean() > 0) else out  # of one of two photos

    monkeypatch.setattr(tool, "run_images", broken)
    torch.manual_seed(0)
    photos = [Image.new("RGB", (40, 40), shade) for shade in ("black", "white")]
    options: Any = {"labels": [f"kind {i}" for i in range(10)]} if classes else {}
    found = tool.explore(tiny_vit(num_classes=classes), photos, tmp_path / "x.html", rs=[8], rounds=1, **options)
    if classes:
        assert [row["same class"] for row in found.rows] == ["1 of 2" if where != "merged" else "2 of 2", "1 of 2"]
    else:
        assert found.rows[1]["cosine"] == pytest.approx(1, abs=0.1)
    visit = Visit(browser, tmp_path / "x.html", 1440, "#image=2&left=tome%408")
    odd = "The answer holds no number (NaN or infinity)"
    assert (odd in visit.text("#left .answer")) is (where != "unmerged")
    change = {"merged": "The unmerged one is finite", "both": "So does the unmerged one"}
    assert change.get(where, "no number (NaN or infinity)") in visit.text("#left figcaption")
    visit.set("#left-r", 0)
    assert (odd in visit.text("#left .answer")) is (where != "merged")
    assert visit.complaints == []
    visit.context.close()


def test_a_similarity_that_is_no_number_is_left_out(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenmerge.tools import explore as tool

    data_of = tool.run_data

    def unknown(trace: Any) -> Any:
        return [{**block, "similarity": [None] * len(block["gone"])} for block in data_of(trace)]

    monkeypatch.setattr(tool, "run_data", unknown)
    file = tool.explore(_model(), _photo(0), tmp_path / "x.html", rs=[8], rounds=1).path
    trace, _ = _trace_of(_photo(0))
    merge = next(step for step in trace.genealogy(int(trace.blocks[0].into[0, 0])) if step.into > 0)
    visit = Visit(browser, file, 1440, f"#left=tome%408&token={merge.into}")
    said = visit.text("#family li >> nth=0")
    assert re.fullmatch(r"Block 1: row \d+, column \d+ went into row \d+, column \d+", said)
    assert visit.complaints == []
    visit.context.close()


def test_without_a_grid_cells_are_drawn(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenmerge.tools import explore as tool

    monkeypatch.setattr(tool, "_grid", lambda *_: None)
    file = tool.explore(_model(), _photo(0), tmp_path / "x.html", rs=[8], rounds=1).path
    visit = Visit(browser, file, 1440, "#block=4&left=tome%408")
    colours = _pixels(visit, "left")
    _, groups = _trace_of(_photo(0))
    for group in groups[-1][0, 1:].unique():
        members = (groups[-1][0, 1:] == group).nonzero().flatten().tolist()
        assert len({tuple(colours[patch]) for patch in members}) == 1
    assert len({tuple(colour) for colour in colours}) > 3 and visit.complaints == []
    assert "no grid" in str(visit.page.locator("#left-picture").get_attribute("aria-label"))
    visit.context.close()


def _trace_of(photo: Any) -> tuple[Any, list[Any]]:
    model = _model()
    with tokenmerge.patched(model, r=8, track="pairs") as handle, torch.no_grad():
        model(find_preprocessing(model)(photo)[None])
        return handle.trace(), handle.groups
