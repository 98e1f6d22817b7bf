"""The engine `ray`, on two nodes that are processes of this machine: the rows of the local one, whatever is killed."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from written import assert_same, failures_of, rows_of

from helpers import randomised, tiny_vit
from tokenmerge import Embedder, assets
from tokenmerge.batch import cluster as engine
from tokenmerge.batch import job
from tokenmerge.batch.decoding import Decoder
from tokenmerge.batch.job import embed
from tokenmerge.cli import main
from tokenmerge.errors import DataError

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")
cluster_utils = pytest.importorskip("ray.cluster_utils")
# Ray's own, of which some are about what is killed here
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]

COUNT = 60
OPTIONS: dict[str, Any] = {"batch_size": 2, "shard_rows": 8}
NODE = {"num_cpus": 2, "object_store_memory": 100 * 2**20}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    images, _ = assets.fashion_mnist("test")
    for i in range(COUNT):
        Image.fromarray(images[i].numpy()).save(root / f"{i:03}.png")
    (root / "broken.png").write_text("no image")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "tiny.pt"
    torch.save(randomised(tiny_vit(img_size=28, in_chans=1)), path)
    return str(path)


@pytest.fixture(scope="module")
def embedder(model: str) -> Embedder:
    return Embedder(model, r=4, trust_pickle=True)


@pytest.fixture(scope="module")
def undisturbed(photos: Path, embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("whole") / "out"
    embed(embedder, photos, out, workers=1, **OPTIONS)
    return rows_of(out)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    patched = pytest.MonkeyPatch()
    patched.setenv("RAY_worker_niceness", "0")  # else they wait for every other process of a busy machine
    patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
    made = cluster_utils.Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    ray.init(address=made.address, logging_level=logging.ERROR, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()
    patched.undo()


def workers_of(nodes: Any, kind: str) -> list[int]:
    """The processes of nodes that Ray gave a name with `kind` in it."""
    owners = {node.all_processes["raylet"][0].process.pid for node in nodes}
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent in owners and kind in (path / "cmdline").read_text():
                found.append(int(path.name))
    return found


def at(moments: set[int], kill: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int, str], None]:
    """Progress that kills something when so many images are done."""
    monkeypatch.setattr(job, "_SHOWN", -1.0)

    def progress(done: int, total: int, note: str) -> None:
        while moments and done >= min(moments):
            moments.remove(min(moments))
            kill()

    return progress


def killed_actors(embedder: Embedder, source: Path, out: Path, nodes: Any, kills: int, longest: float) -> int:
    """Run a job while its actors are killed at random moments; return how many were."""
    stop, killed = threading.Event(), 0

    def kill() -> None:
        nonlocal killed
        while killed < kills and not stop.wait(random.uniform(0.0, longest)):
            for pid in workers_of(nodes, "_Model")[:1]:
                os.kill(pid, signal.SIGKILL)
                killed += 1

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        embed(embedder, source, out, engine="ray", **OPTIONS)
    finally:
        stop.set()
        thread.join()
    return killed


def test_a_node_that_is_killed_costs_nothing(
    photos: Path,
    embedder: Embedder,
    undisturbed: dict[str, Any],
    cluster: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    second = cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    seen: list[str] = []
    count = engine.Cluster._count
    monkeypatch.setattr(engine.Cluster, "_count", lambda self, who: (seen.append(who.split()[0]), count(self, who)))
    moment = random.randrange(6, 20)
    progress = at({moment}, lambda: cluster.remove_node(second, allow_graceful=False), monkeypatch)
    done = embed(embedder, photos, tmp_path / "node", engine="ray", progress=progress, **OPTIONS)
    assert (done.rows, done.failures, done.engine) == (COUNT, 1, "ray") and len(cluster.list_all_nodes()) == 1
    assert "cannot identify image file" in failures_of(tmp_path / "node")["broken.png"]
    assert_same(rows_of(tmp_path / "node"), undisturbed)
    assert done.loader > 0 and done.model > 0 and set(seen) <= {node["NodeID"] for node in ray.nodes()}


def test_actors_that_are_killed_cost_nothing(
    photos: Path, embedder: Embedder, undisturbed: dict[str, Any], cluster: Any, tmp_path: Path
) -> None:
    assert killed_actors(embedder, photos, tmp_path / "actors", [cluster.head_node], 2, 1.0) >= 1
    assert_same(rows_of(tmp_path / "actors"), undisturbed)
    assert failures_of(tmp_path / "actors").keys() == {"broken.png"}


_KILLED = """
import os, signal
from tokenmerge import Embedder
from tokenmerge.batch import job

def kill(done, total, note):
    if done >= {moment}:
        os.kill(os.getpid(), signal.SIGKILL)

job._SHOWN = -1.0
embedder = Embedder({model!r}, r=4, trust_pickle=True)
job.embed(embedder, {photos!r}, {out!r}, engine="ray", batch_size=2, shard_rows=4, progress=kill)
"""


def test_a_driver_that_is_killed_goes_on_with_either_engine(
    photos: Path, model: str, undisturbed: dict[str, Any], cluster: Any, tmp_path: Path
) -> None:
    out, moment = tmp_path / "out", random.randrange(10, 50)
    code = _KILLED.format(model=model, photos=str(photos), out=str(out), moment=moment)
    process = subprocess.run([sys.executable, "-c", code], env={**os.environ, "RAY_ADDRESS": cluster.address})
    assert process.returncode == -signal.SIGKILL
    assert 0 < len(rows_of(out)) <= moment + 2
    words = ["embed", model, "--trust-pickle", "--data", str(photos), "--out", str(out), "-r", "4", "--batch-size", "2"]
    assert main([*words, "--workers", "1"]) == 0
    assert_same(rows_of(out), undisturbed)
    assert failures_of(out).keys() == {"broken.png"}


class Poison:
    """Preparation that ends its process where an image is all white."""

    def __init__(self, prepare: Callable[[Any], torch.Tensor]) -> None:
        self.prepare = prepare

    def __call__(self, image: Any) -> torch.Tensor:
        if image.getextrema() == (255, 255):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.prepare(image)


def test_an_image_that_ends_its_process_costs_only_itself_and_local_rows_are_gone_on_with(
    photos: Path,
    embedder: Embedder,
    undisturbed: dict[str, Any],
    cluster: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, out = tmp_path / "photos", tmp_path / "out"
    root.mkdir()
    for name in ("000.png", "001.png", "002.png", "003.png"):
        shutil.copy(photos / name, root / name)
    embed(embedder, root, out, workers=1, **OPTIONS)
    for name in ("004.png", "005.png", "006.png"):
        shutil.copy(photos / name, root / name)
    Image.new("L", (28, 28), 255).save(root / "white.png")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(job, "Decoder", lambda prepare, *rest: Decoder(Poison(prepare), *rest))
    done = embed(embedder, root, out, engine="ray", **OPTIONS)
    assert (done.rows, done.images, done.failures) == (7, 3, 1)
    assert failures_of(out) == {"white.png": engine._LOST}
    expected = {name: {**row, "path": f"{root}/{name}"} for name, row in undisturbed.items() if name < "007.png"}
    assert_same(rows_of(out), expected)


def test_the_embedder_in_map_batches(photos: Path, model: str, undisturbed: dict[str, Any], cluster: Any) -> None:
    images = ray.data.read_images([str(photos / f"{i:03}.png") for i in range(8)], include_paths=True)
    table = images.map_batches(
        Embedder,
        fn_constructor_args=(model,),
        fn_constructor_kwargs={"r": 4, "trust_pickle": True},
        batch_size=4,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=2),
    )
    rows = table.take_all()
    assert len(rows) == 8
    for row in rows:
        np.testing.assert_allclose(row["embedding"], undisturbed[Path(row["path"]).name]["embedding"], atol=1e-5)


def test_another_model_on_a_node_is_refused(photos: Path, cluster: Any, model: str, tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    shutil.copy(model, other)
    embedder = Embedder(str(other), r=4, trust_pickle=True)
    torch.manual_seed(1)
    torch.save(randomised(tiny_vit(img_size=28, in_chans=1)), other)
    with pytest.raises(DataError, match=r"the model that a node .* is another one: weights: .* there, .* here"):
        embed(embedder, photos, tmp_path / "out", engine="ray", **OPTIONS)
    assert rows_of(tmp_path / "out") == {} and failures_of(tmp_path / "out") == {}
