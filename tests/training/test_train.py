"""`tokenmerge train`: what a recipe trains, that nothing is lost, and what is said where something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from tokenmerge.cli import main
from tokenmerge.errors import ConfigError, DataError
from tokenmerge.training.checkpoint import Checkpoints
from tokenmerge.training.loop import DivergedError, StoppedError, train
from tokenmerge.training.recipe import Recipe, from_dict, list_recipes, read_recipe
from tokenmerge.training.run_folder import load

# 16 patches, so that a step takes milliseconds; 30 steps pass the end of an epoch
TINY: dict[str, Any] = {
    "steps": 30,
    "batch_size": 8,
    "model": {"name": "vit", "options": {"patch_size": 7, "embed_dim": 16, "depth": 2, "num_heads": 2}},
    "data": {"limit": 100, "held": 20},
    "merge": {"r": 4},
    "save": {"every": 4, "log": 5},
}


def tiny(**changes: Any) -> Recipe:
    """The tiny recipe with settings changed by their dotted keys, dots written as two underscores."""
    content = json.loads(json.dumps(TINY))
    for key, value in changes.items():
        *parents, last = key.split("__")
        part = content
        for parent in parents:
            part = part.setdefault(parent, {})
        part[last] = value
    return from_dict(content)


def weights(folder: Path) -> dict[str, Tensor]:
    return load(folder, merged=False).state_dict()


def lines(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = ("images_per_second", "peak_memory_mb", "seconds")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}")


def test_a_run_leaves_a_model_that_merges(tmp_path: Path) -> None:
    rows = train(tiny(), tmp_path)
    model = load(tmp_path)
    handle = tokenmerge.handle_of(model)
    assert handle.r == 4 and handle.tokens == [13, 9]
    assert [(row["split"], row["r"]) for row in rows] == [("valid", 4), ("test", 4), ("test", 0)]
    assert [row["step"] for row in lines(tmp_path)] == [5, 10, 15, 20, 25, 30]
    # of the network as it started nothing is left
    assert not any(torch.equal(value, torch.zeros_like(value)) for value in weights(tmp_path).values())
    with torch.inference_mode():
        assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_configuration_of_a_run_says_which_model_it_is_for(tmp_path: Path, ema: float) -> None:
    train(tiny(ema=ema), tmp_path)
    config = tokenmerge.MergeConfig.load(tmp_path / "merge.json")
    model = load(tmp_path)
    own = tokenmerge.handle_of(model).remarks
    assert config.fingerprint is not None and config.fingerprint.depth == 2 and own == []
    other = load(tmp_path, merged=False)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert "other weights" in tokenmerge.patch(other, config).remarks[0]


def test_the_trained_folder_is_a_model_and_a_method_for_other_commands(tmp_path: Path, capsys: Any) -> None:
    train(tiny(), tmp_path / "run")
    found = load(tmp_path / "run", merged=False)
    images = torch.randn(4, 1, 28, 28)
    tokenmerge.patch(found, tokenmerge.MergeConfig.load(tmp_path / "run" / "merge.json"))
    with torch.inference_mode():
        assert torch.equal(found(images), load(tmp_path / "run")(images))
    assert (
        main(["eval", str(tmp_path / "run"), "--data", "fashion-mnist", "--limit", "64", "-r", "0", "4", "--json"]) == 0
    )
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["r"] for row in rows] == ["0", "4"] or [row["r"] for row in rows] == [0, 4]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema": 0.9},
        {"accumulate": 2, "merge__warmup": 0.5, "merge__draw": True, "merge__off": 0.2},
        {
            "augment__mixup": 0.8,
            "augment__auto": "rand-m5",
            "model__options": {**TINY["model"]["options"], "drop_path_rate": 0.2},
        },
        {"precision": "bf16", "model__checkpointing": True},
    ],
    ids=["plain", "ema", "schedule", "random", "bf16"],
)
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = tiny(**changes)
    train(recipe, tmp_path / "whole")
    cut = _Cut(at=18)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "cut", progress=cut)
    train(recipe, tmp_path / "cut")
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    for split in ("train", "valid", "test"):
        assert without_times(lines(tmp_path / "whole", split)) == without_times(lines(tmp_path / "cut", split))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [{}, {"precision": "bf16"}, {"precision": "fp16", "ema": 0.9}, {"precision": "bf16", "model__compile": True}],
    ids=["fp32", "bf16", "fp16", "compiled"],
)
def test_a_gpu_takes_the_same_steps(tmp_path: Path, changes: dict[str, Any]) -> None:
    train(tiny(), tmp_path / "cpu", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train(tiny(**changes), tmp_path / "gpu", device="cuda", progress=_Cut(at=18))
    train(tiny(**changes), tmp_path / "gpu", device="cuda")
    there, here = (torch.tensor([row["loss"] for row in lines(tmp_path / name)]) for name in ("gpu", "cpu"))
    # fp16 leaves out its first steps, until the scale of the loss fits
    torch.testing.assert_close(there, here, rtol=0, atol=0.1)
    assert all(value.isfinite().all() for value in weights(tmp_path / "gpu").values())


class _Cut:
    """A user who presses Ctrl-C after a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, done: int, total: int) -> None:
        if done == self.at:
            raise KeyboardInterrupt


def test_killed_at_any_moment_it_goes_on_to_the_same_bits(tmp_path: Path, picture_folder: Path) -> None:
    data = {"data__source": f"folder:{picture_folder}", "data__size": [3, 28, 28], "data__limit": 50}
    recipe, path = tiny(save__every=1, data__workers=1, **data), tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe.as_dict()))
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "tokenmerge.cli", "train", str(path), "--out", str(folder)]
    # it writes a checkpoint after every step: that is when most kills strike
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while _last(folder) < 5:
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert _last(folder) < 30
    train(recipe, folder)
    train(tiny(save__every=100, **data), tmp_path / "whole")
    assert_equal(weights(tmp_path / "whole"), weights(folder))


def _last(folder: Path) -> int:
    steps = [int(path.stem.rpartition("-")[2]) for path in Checkpoints(folder / "checkpoints", 2).paths()]
    return max(steps, default=0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["sigterm", "ctrl-c"])
def test_a_signal_saves_and_stops(tmp_path: Path, number: signal.Signals) -> None:
    def terminate(done: int, total: int) -> None:
        if done == 7:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    text = rf"stopped by {number.name} after step 7 of 30: saved at step 7, the same command goes on"
    with pytest.raises(StoppedError, match=text):
        train(tiny(), tmp_path, progress=terminate)
    assert _last(tmp_path) == 7
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 7:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path, progress=interrupt)
    assert _last(tmp_path) < 7


def test_a_finished_run_says_what_it_came_to_and_changes_nothing(tmp_path: Path) -> None:
    rows = train(tiny(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert train(tiny(), tmp_path) == rows
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_changed_recipe_is_refused_with_what_differs(tmp_path: Path) -> None:
    train(tiny(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        ConfigError, match=r"another recipe.*\n  steps: 30 before, 40 now\n  merge.r: 4 before, 2 now\n"
    ):
        train(tiny(steps=40, merge__r=2, save__log=7), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match=r"not the folder of a run"):
        train(tiny(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(
        DivergedError, match=r"(loss|gradient) is no number at step \d+ \(learning rate .*The last good"
    ):
        train(
            tiny(optimizer__lr=1e20, optimizer__warmup=0.0, optimizer__name="sgd", clip=None, save__every=1), tmp_path
        )
    saved = Checkpoints(tmp_path / "checkpoints", 2).load()
    assert saved is not None and all(value.isfinite().all() for value in saved["model"].values())


def test_a_full_disk_stops_and_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    saved = torch.save
    with pytest.raises(DataError, match=r"the disk is full. The last good checkpoint is .*step-00000008.pt"):
        train(
            tiny(),
            tmp_path,
            progress=lambda done, total: monkeypatch.setattr(torch, "save", full) if done == 9 else None,
        )
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000004.pt",
        "step-00000008.pt",
    ]
    monkeypatch.setattr(torch, "save", saved)
    train(tiny(), tmp_path)
    train(tiny(), tmp_path.with_name("whole"))
    assert_equal(weights(tmp_path.with_name("whole")), weights(tmp_path))


def test_checkpoints_that_cannot_be_read_are_passed_over(tmp_path: Path, capsys: Any) -> None:
    kept = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3, 4):
        kept.save(step, {"step": step})
    assert [path.name for path in kept.paths()] == ["step-00000004.pt", "step-00000003.pt", "step-00000002.pt"]
    whole = kept.paths()[0].read_bytes()
    kept.paths()[0].write_bytes(whole[: len(whole) // 2])
    assert kept.load() == {"step": 3}
    assert "step-00000004.pt" in capsys.readouterr().err
    for path in kept.paths():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of 3 checkpoints"):
        kept.load()


def test_epochs_and_the_r_of_every_step(tmp_path: Path) -> None:
    # 100 samples make 12 batches of 8
    train(tiny(steps=None, epochs=2.5, merge__warmup=0.5, merge__off=0.2, save__log=6), tmp_path)
    assert [(row["step"], row["r"]) for row in lines(tmp_path)] == [(6, 1), (12, 3), (18, 4), (24, 4), (30, 0)]


def test_a_running_average_is_what_is_exported(tmp_path: Path) -> None:
    train(tiny(ema=0.99), tmp_path / "ema")
    train(tiny(), tmp_path / "plain")
    averaged, plain = weights(tmp_path / "ema"), weights(tmp_path / "plain")
    assert any(not torch.equal(averaged[key], plain[key]) for key in plain)
    saved = Checkpoints(tmp_path / "ema" / "checkpoints", 2).load()
    assert saved is not None
    assert_equal({key: saved["model"][key] for key in plain}, plain)


def test_distillation_and_a_learned_method(tmp_path: Path) -> None:
    changes = {"merge__method": "dynamicvit(weights='new')", "merge__r": [0, 6], "distill__weight": 0.5}
    with pytest.raises(ConfigError, match=r"the teacher is the model as it starts, which has new weights"):
        train(tiny(**changes), tmp_path / "untaught")
    train(tiny(merge__r=0, steps=2), tmp_path / "start")
    train(tiny(optimizer__lr_modules=1e-2, model__weights=str(tmp_path / "start"), **changes), tmp_path / "run")
    model = load(tmp_path / "run")
    assert tokenmerge.handle_of(model).config.method.name == "dynamicvit"
    assert (tmp_path / "run" / "merge.safetensors").is_file()
    with torch.inference_mode():
        assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_only_the_modules_of_a_method_are_trained(tmp_path: Path) -> None:
    frozen = {"model__only_modules": True, "merge__method": "dtem(weights='new')"}
    train(tiny(steps=2, **frozen), tmp_path / "short")
    train(tiny(steps=8, **frozen), tmp_path / "long")
    assert_equal(weights(tmp_path / "short"), weights(tmp_path / "long"))
    assert (tmp_path / "short/merge.safetensors").read_bytes() != (tmp_path / "long/merge.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        train(tiny(model__only_modules=True), tmp_path / "nothing")


def test_weights_go_from_pre_training_into_fine_tuning(tmp_path: Path) -> None:
    mae = {"task": "mae", "merge__r": 0, "mae__width": 16, "mae__depth": 1}
    pooled = {**TINY["model"]["options"], "class_token": False, "global_pool": "avg"}
    rows = train(tiny(model__options=pooled, **mae), tmp_path / "mae")
    assert [row["split"] for row in rows] == ["valid", "test"]
    assert not (tmp_path / "mae" / "merge.json").exists()
    start = weights(tmp_path / "mae")
    tuned = tiny(steps=1, model__options=pooled, model__weights=str(tmp_path / "mae"), optimizer__lr=0.0)
    train(tuned, tmp_path / "tuned")
    assert torch.equal(weights(tmp_path / "tuned")["blocks.1.attn.qkv.weight"], start["blocks.1.attn.qkv.weight"])
    with pytest.raises(ConfigError, match="pre-training hides tokens, it merges none"):
        train(tiny(model__options=pooled, **(mae | {"merge__r": 2})), tmp_path / "other")
    with pytest.raises(DataError, match=r"weights in .* are of another model: \d+ tensors differ"):
        train(
            tiny(model__weights=str(tmp_path / "mae"), model__options={**pooled, "embed_dim": 32}), tmp_path / "other"
        )
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["steps=0"], "steps is 0; it must be more than 0"),
        (["epochs=2"], "give steps or epochs, one of them"),
        (["batch_size=200"], "a batch of 200 needs as many samples, there are 100"),
        (["batch_size=9", "accumulate=2"], "cannot be split into 2 equal parts"),
        (["merge.rr=3"], "no setting 'merge.rr'. Did you mean 'merge.r'?"),
        (["merge.r=-1"], "r holds -1"),
        (["merge.r='16,-1,3'"], "tuple of 3"),
        (["merge.warmup=0.7", "merge.off=0.7"], "whose sum is at most 1"),
        (["merge.method=tomee"], "no method 'tomee'. Did you mean 'tome'?"),
        (["data.source=folder:/nowhere"], "/nowhere"),
        (["data.source=folders:x"], "no data source 'folders:x'"),
        (["precision=fp8"], "precision is 'fp8'; allowed: fp32, bf16, fp16"),
        (["optimizer.lr=fast"], "optimizer.lr is 'fast'; it takes float"),
        (["model=big"], "it is a table of settings"),
        (["merge"], "give key=value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_before_anything_is_written(
    tmp_path: Path, capsys: Any, changes: list[str], message: str
) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(TINY))
    assert main(["train", str(path), "--out", str(tmp_path / "run"), "--set", *changes]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_recipes_can_be_read(tmp_path: Path, capsys: Any) -> None:
    from tokenmerge.tools.models import read_method

    for name, about in list_recipes().items():
        recipe = read_recipe(name)
        assert about and recipe.about == about
        read_method(recipe.merge.method)
    assert main(["train", "fintune"]) == 2
    assert "no recipe 'fintune'. Did you mean 'finetune'?" in capsys.readouterr().err
    assert read_recipe("finetune", ["merge.r='16,-1'"]).merge.amount == (16, -1)
    (tmp_path / "broken.toml").write_text("steps = = 3")
    assert main(["train", str(tmp_path / "broken.toml")]) == 2
    assert "cannot read the recipe" in capsys.readouterr().err


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_trains_a_step(tmp_path: Path, picture_folder: Path, name: str) -> None:
    small = ["epochs=none", "steps=1", "batch_size=4", "precision=fp32", "data.limit=16", "data.held=4"]
    small += ["data.workers=0", "save.evaluate=0", "model.weights=none"]
    if name == "deit":
        small += [f"data.source=folder:{picture_folder}", "data.size=[3,64,64]", "model.name=deit_tiny_patch16_224"]
    rows = train(read_recipe(name, small), tmp_path / "run")
    assert all(torch.tensor(row["loss"]).isfinite() for row in rows)
    if read_recipe(name).merge.amount:
        handle = tokenmerge.handle_of(load(tmp_path / "run"))
        assert handle.r == read_recipe(name).merge.amount and handle.tokens[-1] < handle.tokens[0]


def test_tensorboard_shows_the_lines(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny(save__tensorboard=True), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert [step for step, _ in losses] == [5, 10, 15, 20, 25, 30]
    assert losses[0][1] == pytest.approx(lines(tmp_path)[0]["loss"], rel=1e-5)


def test_a_frozen_batch_norm_keeps_its_statistics(tmp_path: Path) -> None:
    changes = {"steps": 2, "model__name": "reference", "model__options": {}, "model__freeze_batch_norm": True}
    train(tiny(**changes), tmp_path)
    from tokenmerge.assets import reference_model

    norms = [module for module in reference_model().modules() if isinstance(module, nn.BatchNorm2d)]
    found = [module for module in load(tmp_path).modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and len(norms) == len(found)
    for before, after in zip(norms, found, strict=True):
        assert torch.equal(before.running_mean, after.running_mean)
