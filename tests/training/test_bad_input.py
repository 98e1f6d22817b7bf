"""Bad input to `tokenmerge train`: what was asked, what was seen and what to do is said, and nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import TINY, assert_equal, lines, tiny, weights

from tokenmerge.cli import main
from tokenmerge.errors import ConfigError, DataError, TokenMergeError
from tokenmerge.training.checkpoint import Checkpoints
from tokenmerge.training.loop import train
from tokenmerge.training.models import build_model
from tokenmerge.training.recipe import Model, from_dict, read_recipe
from tokenmerge.training.run_folder import alone_in


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def pictures(folder: Path) -> dict[str, Any]:
    return {"data__source": f"folder:{folder}", "data__size": [1, 28, 28], "data__limit": None, "data__held": None}


def test_a_class_without_pictures_is_named(tmp_path: Path, picture_folder: Path) -> None:
    for path in (picture_folder / "train" / "3").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"pictures/train has no sample of 1 of 10 classes: 3"):
        train(tiny(**pictures(picture_folder)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_unreadable_pictures_are_named_and_counted(
    tmp_path: Path, picture_folder: Path, capsys: pytest.CaptureFixture[str], mixup: float
) -> None:
    broken = [picture_folder / "train" / "2" / "1.png", picture_folder / "train" / "7" / "4.png"]
    broken[0].write_bytes(b"no picture")
    broken[1].write_bytes(broken[1].read_bytes()[:100])
    # 60 pictures: three epochs see each of the two more than once
    train(tiny(steps=20, augment__mixup=mixup, **pictures(picture_folder)), tmp_path / "run")
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert [line.split(":")[0] for line in said] == ["left out, 1 so far", "left out, 2 so far"]
    assert all(sum(str(path) in line for line in said) == 1 for path in broken)
    assert len(lines(tmp_path / "run")) == 4


def test_a_checkpoint_of_another_r_is_refused(tmp_path: Path) -> None:
    train(tiny(steps=4), tmp_path / "one")
    train(tiny(steps=4, merge__r=2), tmp_path / "two")
    (tmp_path / "two" / "model.safetensors").unlink()
    for path in (tmp_path / "one" / "checkpoints").iterdir():
        path.replace(tmp_path / "two" / "checkpoints" / path.name)
    before = contents(tmp_path / "two")
    with pytest.raises(ConfigError, match=r"another recipe; nothing was changed there.*\n  merge.r: 4 before, 2 now\n"):
        train(tiny(steps=4, merge__r=2), tmp_path / "two")
    assert contents(tmp_path / "two") == before


@pytest.mark.parametrize("what", ["shape", "missing"])
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, what: str) -> None:
    train(tiny(steps=4), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    kept = Checkpoints(tmp_path / "checkpoints", 2)
    content = kept.load()
    assert content is not None
    if what == "shape":
        content["model"]["head.weight"] = torch.zeros(3, 16)
    else:
        del content["model"]["head.weight"]
    kept.save(4, content)
    before = contents(tmp_path)
    with pytest.raises(DataError, match=r"step-00000004.pt is of another model, or the data has other classes.*--out"):
        train(tiny(steps=4), tmp_path)
    assert contents(tmp_path) == before


def test_a_finished_run_without_its_checkpoints_is_left_alone(tmp_path: Path) -> None:
    rows = train(tiny(steps=4), tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        path.unlink()
    before = contents(tmp_path)
    assert train(tiny(steps=4), tmp_path) == rows
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["recipe.json", "metrics.jsonl", "metrics.csv", "model.json", "model.safetensors"])
def test_a_full_disk_anywhere_is_said_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from tokenmerge.training import log, run_folder

    def full(path: Path, content: str | bytes) -> None:
        if path.name == name:
            raise OSError(28, "No space left on device")
        before(path, content)

    before = log.write_file
    folder = tmp_path / "run"
    monkeypatch.setattr(log, "write_file", full)
    monkeypatch.setattr(run_folder, "write_file", full)
    with pytest.raises(DataError, match=r"cannot write to .*run: .*What was saved before is whole"):
        train(tiny(steps=5), folder)
    assert not (folder / "model.safetensors").exists()
    monkeypatch.undo()
    if name == "recipe.json":
        assert [path.name for path in folder.iterdir()] == [".lock"]


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tokenmerge.training.run_folder import alone_in\n"
        "with alone_in(Path(sys.argv[1])): pass"
    )
    with alone_in(tmp_path / "run"):
        second = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True)
    assert second.returncode == 1 and "another run is writing to" in second.stderr
    # what it leaves is an empty folder to the next
    train(tiny(steps=1), tmp_path / "run")


def test_a_diverging_run_saves_no_bad_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TokenMergeError, match=r"is no number at step \d+ .* A lower optimizer.lr"):
        train(tiny(optimizer__lr=1e25, optimizer__warmup=0.0, optimizer__name="sgd", clip=None), tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_modules_that_are_not_asked_learn_nothing(tmp_path: Path) -> None:
    """With r = 0 the loss does not depend on what is trained."""
    frozen = {"model__only_modules": True, "merge__method": "dtem(weights='new')"}
    train(tiny(merge__warmup=0.5, steps=6, save__log=1, **frozen), tmp_path)
    assert [row["gradient"] > 0 for row in lines(tmp_path)] == [row["r"] > 0 for row in lines(tmp_path)]
    assert lines(tmp_path)[0]["r"] == 0


def test_odd_batches_are_mixed(tmp_path: Path) -> None:
    train(tiny(steps=2, batch_size=7, augment__mixup=0.5), tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_none_is_a_word_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('steps = 1\nclip = "none"\n')
    recipe = read_recipe(tmp_path / "own.toml", ["augment.crop=none", "optimizer.schedule=none", "data.limit=None"])
    assert recipe.clip is None and recipe.data.limit is None
    assert (recipe.augment.crop, recipe.optimizer.schedule) == ("none", "none")


def test_pairs_and_lists_are_the_same_setting(tmp_path: Path) -> None:
    recipe = from_dict({**TINY, "steps": 1, "model": {"name": "vit", "options": {"patch_size": (7, 7), "depth": 1}}})
    train(recipe, tmp_path)
    assert train(recipe, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["merge.r.x=3"], "'merge.r.x=3': r is 4, no table of settings"),
        (["steps=none"], "the other is none"),
        (["optimizer.schedule=plateau"], "allowed: cosine, tanh, poly, none"),
        (["optimizer.name=adamww"], "timm builds no optimizer.name 'adamww' here"),
        (["optimizer.name=adahessian"], "needs second derivatives"),
        (["optimizer.lr=nan"], "optimizer.lr is nan; it takes float, and NaN is no number"),
        (["clip=0"], "clip is 0.0; it must be more than 0"),
        (["distill.temperature=0"], "distill.temperature is 0.0; it must be more than 0"),
        (["augment.smoothing=3"], "augment.smoothing is 3.0; it is a share, from 0 to 1"),
        (["augment.scale=[0.5]"], "augment.scale is [0.5]; give two shares"),
        (["data.valid=folder:/typo"], "no folder /typo/valid"),
        (["model.weights=/typo"], "cannot read the weights /typo"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings_that_no_run_can_have(tmp_path: Path, capsys: Any, changes: list[str], message: str) -> None:
    (tmp_path / "own.json").write_text(json.dumps(TINY))
    assert main(["train", str(tmp_path / "own.json"), "--out", str(tmp_path / "run"), "--set", *changes]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_of_a_pretrained_model_is_loaded_without_those_weights(tmp_path: Path) -> None:
    train(tiny(steps=1, model__name="reference", model__options={}, batch_size=2), tmp_path)
    kept = Checkpoints(tmp_path / "checkpoints", 2).load()
    assert kept is not None
    found = weights(tmp_path)
    assert found
    assert_equal(found, {key: kept["model"][key] for key in found})


def test_a_pickle_is_refused_first_also_in_a_finished_run(tmp_path: Path) -> None:
    torch.save(build_model(Model(**TINY["model"]), (1, 28, 28), 10), tmp_path / "net.pt")
    pickled = {
        "model__name": str(tmp_path / "net.pt"),
        "model__options": {},
        "merge__r": 2,
        "steps": 1,
        "batch_size": 2,
    }
    train(tiny(**pickled), tmp_path / "run", trust_pickle=True)
    for changes, folder in (({}, "run"), ({"data__source": "folder:/nowhere"}, "other")):
        with pytest.raises(DataError, match="is loaded as a pickle, which runs whatever code it holds"):
            train(tiny(**pickled, **changes), tmp_path / folder)
    assert not (tmp_path / "other").exists()
