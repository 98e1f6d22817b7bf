"""Several processes: the same numbers as one, and a clear end where one of them is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import lines, tiny, weights

from tokenmerge.cli import main
from tokenmerge.errors import UnsupportedError
from tokenmerge.training.distributed import World
from tokenmerge.training.loop import train
from tokenmerge.training.recipe import Recipe

pytestmark = pytest.mark.slow


def command(recipe: Recipe, folder: Path, *options: str) -> list[str]:
    path = folder.with_suffix(".json")
    path.write_text(json.dumps(recipe.as_dict()))
    return [sys.executable, "-m", "tokenmerge.cli", "train", str(path), "--out", str(folder), *options]


def start(recipe: Recipe, folder: Path, *options: str) -> subprocess.Popen[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(recipe, folder, *options), env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("parallel,ema", [("ddp", 0.0), ("fsdp", 0.0), ("fsdp", 0.9)], ids=["ddp", "fsdp", "fsdp-ema"])
def test_two_processes_compute_what_one_does(tmp_path: Path, picture_folder: Path, parallel: str, ema: float) -> None:
    """The loss of each of 20 steps, and the weights after them, with the same batch of both together."""
    data = {"data__source": f"folder:{picture_folder}", "data__size": [3, 28, 28], "data__limit": 50}
    recipe = tiny(steps=20, save__log=1, save__every=20, parallel=parallel, ema=ema, **data)
    two = start(recipe, tmp_path / "two", "--processes", "2", "--device", "cpu")
    train(recipe, tmp_path / "one")
    _, errors = two.communicate()
    assert two.returncode == 0, errors
    one, other = (torch.tensor([row["loss"] for row in lines(tmp_path / name)]) for name in ("one", "two"))
    assert len(one) == 20 and one.std() > 0.01
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    for key, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(value, weights(tmp_path / "two")[key], rtol=0, atol=1e-4)
    for split in ("valid",):
        (alone,), (shared,) = (lines(tmp_path / name, split) for name in ("one", "two"))
        assert alone["accuracy"] == pytest.approx(shared["accuracy"], abs=0.051)


def test_two_processes_train_a_learned_method(tmp_path: Path, picture_folder: Path) -> None:
    """Its modules are used in the loss alone, or, while r is 0, not at all; what is drawn differs by process."""
    data = {"data__source": f"folder:{picture_folder}", "data__size": [3, 28, 28], "data__limit": 50}
    learned = {"merge__method": "dynamicvit(weights='new')", "merge__warmup": 0.3}
    recipe = tiny(steps=10, save__log=1, save__every=10, **learned, **data)
    two = start(recipe, tmp_path / "two", "--processes", "2", "--device", "cpu")
    train(recipe, tmp_path / "one")
    _, errors = two.communicate()
    assert two.returncode == 0, errors
    one, other = (torch.tensor([row["loss"] for row in lines(tmp_path / name)]) for name in ("one", "two"))
    assert len(other) == 10 and abs(one[0] - other[0]) < 1e-4
    torch.testing.assert_close(one, other, rtol=0, atol=0.3)


def test_single_numbers_are_not_sharded() -> None:
    world, model = World("cpu"), torch.nn.Linear(2, 2)
    model.gamma = torch.nn.Parameter(torch.ones(()))
    world.size = 2
    with pytest.raises(UnsupportedError, match=r"single numbers \(gamma\) cannot be spread"):
        world.shard(model)


@pytest.mark.parametrize("error", [None, ValueError("no such file")], ids=["done", "failed"])
def test_the_heartbeat_has_ended_when_a_run_is_left(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that is still within the store when Python ends aborts a process whose work is done."""
    within = threading.Event()

    class Slow:
        def set(self, key: str, value: str) -> None:
            if key.startswith("beat"):
                within.set()
                time.sleep(0.3)

    monkeypatch.setattr("tokenmerge.training.distributed.distributed.destroy_process_group", lambda: None)
    world, before = World("cpu"), set(threading.enumerate())
    world.size, world._store = 2, Slow()
    world._start(world._store)
    assert within.wait(10)
    world.__exit__(type(error) if error else None, error, None)
    assert set(threading.enumerate()) <= before


def test_a_lost_process_is_named_and_the_same_command_goes_on(tmp_path: Path, picture_folder: Path) -> None:
    data = {"data__source": f"folder:{picture_folder}", "data__size": [3, 28, 28], "data__limit": 50}
    recipe = tiny(steps=400, save__every=5, save__keep=400, **data)
    folder = tmp_path / "run"
    process = start(recipe, folder, "--processes", "2", "--device", "cpu")
    while len(list(folder.glob("checkpoints/step-*.pt"))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(_worker(process.pid, rank=1), signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode != 0
    assert "rank 1 is gone: nothing heard of it for 3 seconds. Rank 0 stops too." in errors
    assert "rank 1 of 2 failed first (SIGKILL)" in errors
    saved = sorted(folder.glob("checkpoints/step-*.pt"))
    last = int(saved[-1].stem.rpartition("-")[2])
    assert 10 <= last < 400
    rows = len(lines(folder))
    # one process goes on with what two have begun
    train(recipe, folder)
    found = lines(folder)
    assert [row["step"] for row in found] == list(range(5, 401, 5)) and rows < len(found)


def test_a_stopped_launch_says_so_and_has_saved(tmp_path: Path, picture_folder: Path) -> None:
    data = {"data__source": f"folder:{picture_folder}", "data__size": [3, 28, 28], "data__limit": 50}
    process = start(tiny(steps=40_000, **data), tmp_path / "run", "--processes", "2", "--device", "cpu")
    while not list((tmp_path / "run").glob("checkpoints/step-*.pt")):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "all processes were stopped by SIGTERM; the last checkpoint is kept" in errors
    assert "stopped by SIGTERM after step" in errors and "torchrun(" not in errors


def _worker(parent: int, rank: int) -> int:
    """Return the process that torchrun started for a rank."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            status = (path / "stat").read_text().rpartition(")")[2].split()
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(status[1]) == parent and f"RANK={rank}".encode() in environment:
            return int(path.name)
    raise AssertionError(f"process {parent} has no child of rank {rank}")


def test_a_port_in_use_is_said_before_anything_is_written(tmp_path: Path, capsys: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        given = command(tiny(), tmp_path / "run", "--processes", "2", "--port", str(port))
        assert main(given[3:]) == 2
    assert f"port {port} cannot be used: Address already in use" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path, capsys: Any) -> None:
    assert main(command(tiny(), tmp_path / "run", "--processes", "0")[3:]) == 2
    assert "processes" in capsys.readouterr().err
