"""The demo: the bundled model on the bundled images writes a table, a plot and pictures that agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tokenmerge
from tokenmerge.data.labelled import FashionMNIST, normalise
from tokenmerge.errors import DataError
from tokenmerge.tools import demo as module
from tokenmerge.tools.demo import demo, pictures
from tokenmerge.tools.models import load_model
from tokenmerge.tools.visualize import draw_groups


def test_demo_writes_files_that_agree(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    result = demo(folder, limit=20, rs=(0, 8))
    pages, pictures = {"report.html", "explore.html"}, {"merged.png", "plot.png", "plot.svg", "plot.pdf"}
    assert {path.name for path in folder.iterdir()} == {*pages, *pictures, "table.json", "table.md", "table.tex"}
    report = (folder / "report.html").read_text()
    assert "<title>Bundled ViT on 20 Fashion-MNIST test images" in report and report.count("<tr>") == 3
    assert f"<dd>{torch.__version__}</dd>" in report and '<canvas id="chart"' in report
    explorer = (folder / "explore.html").read_text()
    assert "the bundled ViT</title>" in explorer and '"name":"T-shirt or top"' in explorer

    content = json.loads((folder / "table.json").read_text())
    assert content["rows"] == result.rows and content["environment"] == result.environment
    assert content["images"] == result.images == 20
    unmerged, merged = content["rows"]
    assert (unmerged["r"], merged["r"]) == ("0", "8")
    assert unmerged["agreement %"] == 100.0 and unmerged["speed-up"] == 1.0 and unmerged["bound images/s"] is None
    assert unmerged["top-1 %"] > 50, "the bundled model does not know the bundled images"
    with tokenmerge.patched(load_model("reference"), r=8) as handle:
        assert merged["tokens"] == handle.tokens[-1] < unmerged["tokens"]
    assert merged["GMACs"] < unmerged["GMACs"]
    assert merged["bound images/s"] > 0 and merged["over bound"] > 0
    for row in content["rows"]:
        assert 0 <= row["top-1 %"] <= row["top-5 %"] <= 100 and 20 * row["top-1 %"] % 100 == 0

    title, table, prepared, facts = (folder / "table.md").read_text().split("\n\n")
    assert prepared.startswith("Preprocessing: not resized, mean 0.286, std 0.353 (as the bundled model takes them")
    assert title == f"# {content['title']}" and "20 Fashion-MNIST test images, batch 32" in title
    assert len(table.splitlines()) == 4
    assert facts.startswith("Measured on: device ") and f"torch {torch.__version__}" in facts

    kinds = len(FashionMNIST(1, 20).labels.unique()[:6])
    with Image.open(folder / "merged.png") as page, Image.open(folder / "plot.png") as plot:
        assert page.size == (2 * 176 + 8, 24 + kinds * 176 + 8)
        assert plot.format == "PNG" and plot.width > 300


def test_pictures_show_the_image_and_then_what_is_left_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[tuple[list[list[Any]], list[str]]] = []
    monkeypatch.setattr(module, "sheet", lambda rows, labels: pages.append((rows, labels)))
    data = FashionMNIST(1, 20)
    model = load_model("reference")
    pictures(model, data, [1, 16])
    ((rows, labels),) = pages
    assert labels[0] == "image" and [label.split(":")[0] for label in labels[1:]] == ["r = 1", "r = 16"]
    assert "_tokenmerge_handle" not in model.__dict__
    assert len(rows) == len(data.labels.unique()[:6])
    for label, (image, few, many) in zip(data.labels.unique(), rows, strict=False):
        first = data.images[int((data.labels == label).nonzero()[0])]
        assert image.resize((28, 28), Image.NEAREST).convert("L").tobytes() == bytes(first.flatten().tolist())
        assert image.size == few.size == many.size
        x = normalise(first[None])
        for r, picture in ((1, few), (16, many)):
            with tokenmerge.patched(model, r=r, track=True) as handle, torch.no_grad():
                model(x)
            # the groups after the last block, without the class token; patches of 2 x 2 pixels, six times as large
            expected = draw_groups(image, handle.groups[-1][0, 1:], patch_size=12)
            assert picture.tobytes() == expected.tobytes() != image.tobytes()


def test_one_image_and_nothing_to_merge(tmp_path: Path) -> None:
    (tmp_path / "explore.html").write_text("of an earlier demo")
    result = demo(tmp_path, limit=1, rs=(0,))
    assert [row["r"] for row in result.rows] == ["0"]
    assert (tmp_path / "report.html").exists() and not (tmp_path / "explore.html").exists()
    with Image.open(tmp_path / "merged.png") as page:
        assert page.size == (176 + 8, 24 + 176 + 8)


def test_a_folder_that_cannot_be_written_comes_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_model", lambda name: pytest.fail("the work began"))
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "table.md").mkdir(parents=True)
    with pytest.raises(DataError, match=r"cannot write to .*file/demo: Not a directory\."):
        demo(tmp_path / "file" / "demo")
    with pytest.raises(DataError, match=r"cannot write to .*file: File exists\."):
        demo(tmp_path / "file")


@pytest.mark.parametrize(
    "options", [{"limit": 0}, {"limit": -5}, {"limit": 4, "batch_size": 0}], ids=["limit-0", "limit-negative", "batch"]
)
def test_amounts_that_make_no_sense(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(DataError, match="batch size and limit must be at least 1"):
        demo(tmp_path, rs=(0,), **options)
