"""`tokenmerge tune`: what it writes, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import tokenmerge
from tokenmerge.cli import main
from tokenmerge.errors import DataError
from tokenmerge.testing import tiny_vit
from tokenmerge.tuning.clock import Clock, Timed


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Clock, "_time", lambda self, config: Timed(1.5, 0.01, 0.015, 0.0))
    torch.manual_seed(0)
    model = tiny_vit()
    model.pretrained_cfg = {
        "input_size": (3, 32, 32),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "interpolation": "bicubic",
    }
    torch.save(model, "model.pt")
    # no sub-folders and no labels
    (tmp_path / "photographs").mkdir()
    for i in range(64):
        noise = torch.randint(0, 255, (8, 8, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).resize((32, 32)).save(tmp_path / "photographs" / f"{i}.png")
    return tmp_path


def _run(*more: str) -> int:
    quick = ["--budget", "1", "--methods", "tome", "--workers", "0", "-b", "64"]
    return main(["tune", "model.pt", "--trust-pickle", "--data", "photographs", *quick, *more])


def test_it_writes_what_patch_and_people_take(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert _run("--target", "macs=0.6") == 0
    out, err = capsys.readouterr()
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert max(map(len, table)) <= 80 and "MACs share" in table[0] and "note" in table[0]
    assert any("chosen" in line for line in table) and "top-1" not in out  # without labels
    assert "60 % of the MACs" in out and "Chosen: " in out and "This will take about" in err
    names = {path.name for path in here.glob("merge*")}
    assert names >= {"merge.json", "merge.html", "merge.csv", "merge-tried.csv", "merge.journal.json"}
    with tokenmerge.patched(torch.load("model.pt", weights_only=False), "merge.json") as handle:
        assert handle.remarks == []
    assert _run("--target", "macs=0.6") == 2
    assert "merge.json exists already" in capsys.readouterr().err
    (here / "other.html").write_text("mine")
    assert _run("--target", "macs=0.6", "-o", "other.json") == 2
    assert "other.html exists already" in capsys.readouterr().err and not (here / "other.json").exists()
    assert (here / "other.html").read_text() == "mine"
    assert _run("--target", "macs=0.6", "--force", "--json") == 0
    out, err = capsys.readouterr()
    content = json.loads(out)
    assert content["reached"] and content["figures"]["MACs share"] <= 0.6 and "merge.json" in content["files"]
    assert "images: 64" not in err  # all of it was in the journal


def test_a_loss_reads_as_many_images_as_it_needs(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def stopped(source: str, model: nn.Module, *, limit: int, **options: Any) -> None:
        asked.append(limit)
        raise DataError("stopped here")

    monkeypatch.setattr("tokenmerge.data.labelled.sample_data", stopped)
    for more in (["macs=0.5"], ["drop=0.5"], ["2x", "agreement=99.9"], ["drop=0"], ["drop=0.5", "--limit", "70"]):
        assert _run("--target", *more) == 2
    assert asked == [512, 1240, 6200, 512, 70]
    assert _run("--target", "macs=0.5", "--limit", "0") == 2


def test_a_target_that_is_missed_ends_with_1_and_the_nearest(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert _run("--target", "macs=0.01") == 1
    assert "NOT REACHED: macs=0.01. The nearest: " in capsys.readouterr().out
    assert (here / "merge.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--target", "fast"], "'fast' is no target"),
        (["--target", "drop=1"], "needs labels"),
        (["--limit", "63"], "there are 63"),
        (["-o", "merge.txt"], "must end in .json"),
        (["--data", "nowhere"], "no folder nowhere"),
        (["--methods", "tomee"], "no method 'tomee'"),
    ],
)
def test_mistakes_are_one_sentence(
    more: list[str], message: str, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    assert _run(*more) == 2
    assert message in capsys.readouterr().err and not list(here.glob("merge*"))
