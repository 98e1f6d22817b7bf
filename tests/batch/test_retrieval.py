"""`eval --retrieval`: the searches by a loop in plain Python, the embeddings of `Embedder`, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from helpers import bound_attributes, randomised, tiny_vit
from tokenmerge import Embedder
from tokenmerge.batch import retrieval
from tokenmerge.batch.retrieval import retrieve
from tokenmerge.cli import main
from tokenmerge.data.labelled import Batches
from tokenmerge.errors import DataError, UnsupportedError

Capture = pytest.CaptureFixture[str]
COUNT = 70


def _images(count: int = COUNT) -> Tensor:
    return nn.functional.interpolate(torch.rand(count, 3, 4, 4), size=32)


def _data(images: Tensor, batch: int = 16) -> Batches:
    parts = images.split(batch)
    return Batches([(part, torch.zeros(len(part), dtype=torch.int64)) for part in parts], 3)


def _nearest(query: int, queries: list[list[float]], index: list[list[float]], k: int) -> set[int]:
    scores = {i: sum(a * b for a, b in zip(queries[query], y, strict=True)) for i, y in enumerate(index) if i != query}
    return set(sorted(scores, key=lambda i: -scores[i])[:k])


def test_every_search_by_hand() -> None:
    torch.manual_seed(0)
    model, images = randomised(tiny_vit(num_classes=7)), _images()
    before = bound_attributes(model)
    answers = model(images)
    result = retrieve(model, _data(images), rs=(0, 12))
    assert bound_attributes(model) == before and torch.equal(model(images), answers), "the model was changed"
    vectors = {}
    for name, r in (("unmerged", None), ("merged", 12)):
        found = torch.from_numpy(Embedder(model, r=r, device="cpu")({"pixel_values": images})["embedding"])
        vectors[name] = nn.functional.normalize(found, dim=1).tolist()
    old = vectors["unmerged"]
    first, *rows = result.rows
    assert (first.r, first.search, first.recall_first, first.recall_ten, first.cosine) == (
        "0",
        "unmerged in unmerged",
        1,
        1,
        1,
    )
    assert [row.search for row in rows] == ["merged in unmerged", "unmerged in merged", "merged in merged"]
    for row in rows:
        queries, index = (vectors[name] for name in row.search.split(" in "))
        for k, found in ((1, row.recall_first), (10, row.recall_ten)):
            hits = sum(len(_nearest(i, old, old, k) & _nearest(i, queries, index, k)) for i in range(COUNT))
            assert found == pytest.approx(hits / (k * COUNT), abs=1e-4) and found < 1
        cosine = sum(sum(a * b for a, b in zip(x, y, strict=True)) for x, y in zip(old, vectors["merged"], strict=True))
        assert row.cosine == pytest.approx(cosine / COUNT, abs=2e-5) and row.cosine < 1
        assert row.images_per_second > 0 and row.speed_up > 0
    assert len({row.recall_ten for row in rows}) > 1, "the searches would be one"


def test_only_so_many_images_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "MOST", 55)
    seen: list[tuple[int, int]] = []
    result = retrieve(tiny_vit(), _data(_images()), rs=(4,), progress=lambda *now: seen.append(now))
    assert result.images == 55 and seen[-1] == (55, 55)


def test_what_cannot_be_searched() -> None:
    with pytest.raises(DataError, match="needs at least 50 images, and 20 were read"):
        retrieve(tiny_vit(), _data(_images(20)), rs=(4,))
    images = _images()
    images[3, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="embeddings at r = 0, 4 hold NaN"):
        retrieve(tiny_vit(), _data(images), rs=(4,))

    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.conv(images)

    with pytest.raises(UnsupportedError, match="Pixels has no embedding"):
        retrieve(Pixels(), _data(_images()), rs=(0,))


def test_the_command(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["eval", "reference", "--data", "fashion-mnist", "--limit", "50", "-r", "8", "--retrieval"]
    assert main([*words, "--out", "rows.csv"]) == 0
    out = capsys.readouterr().out
    assert "merged in unmerged" in out and "recall@1 " in out and "cosine" in out and "Of the images nearest" in out
    names, *rows = Path("rows.csv").read_text().splitlines()
    assert len(rows) == 4 and names.startswith("r,search,recall@1,recall@10,cosine,images/s,speed-up")
    for wrong, name in (
        (["--bound"], "--bound"),
        (["--restore", "dense"], "--restore"),
        (["--out", "a.png"], "--out a.png"),
    ):
        assert main([*words, *wrong]) == 2
        assert f"--retrieval goes without {name}" in capsys.readouterr().err
    assert tokenmerge.handle_of(tokenmerge.load("reference"), None) is None
