"""Several models at once, each in a process: the rows of one, whatever is killed."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from written import assert_same, failures_of, rows_of

from helpers import randomised, tiny_vit
from tokenmerge import Embedder, assets
from tokenmerge.batch import job, local
from tokenmerge.batch.decoding import Decoder
from tokenmerge.batch.job import embed
from tokenmerge.errors import DataError, UnsupportedError

pytest.importorskip("pyarrow.parquet")
COUNT = 40


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    images, _ = assets.fashion_mnist("test")
    for i in range(COUNT):
        Image.fromarray(images[i].numpy()).save(root / f"{i:03}.png")
    (root / "broken.png").write_text("no image")
    return root


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    torch.manual_seed(0)
    return Embedder(randomised(tiny_vit(img_size=28, in_chans=1)), r=4)


def test_two_models_give_the_rows_of_one_and_a_killed_one_is_replaced(
    photos: Path, embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(embedder, photos, tmp_path / "one", batch_size=2, workers=1)
    monkeypatch.setattr(job, "_SHOWN", -1.0)
    killed: list[int] = []

    def kill(done: int, total: int, note: str) -> None:
        if done >= 6 and not killed:
            process = next(p for p in multiprocessing.active_children() if p.name.startswith("model "))
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)

    done = embed(embedder, photos, tmp_path / "two", batch_size=2, workers=2, models=2, progress=kill)
    assert (done.rows, done.failures, done.images, done.models, done.workers) == (COUNT, 1, COUNT, 2, 2)
    assert killed and done.killed >= 1 and done.loader > 0 and done.model > 0
    assert_same(rows_of(tmp_path / "two"), rows_of(tmp_path / "one"))
    assert failures_of(tmp_path / "two") == failures_of(tmp_path / "one")
    assert not [p for p in multiprocessing.active_children() if p.name.startswith("model ")]


class Small:
    """Preparation that makes what the model does not take."""

    def __call__(self, image: Any) -> torch.Tensor:
        return torch.zeros(1, 20, 20)


def test_an_error_of_a_model_is_raised_and_what_cannot_be_is_refused(
    photos: Path, embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(photos / "000.png", one)
    with monkeypatch.context() as patched:
        patched.setattr(job, "Decoder", lambda prepare, *rest: Decoder(Small(), *rest))
        with pytest.raises(DataError, match="20"):
            embed(embedder, one, tmp_path / "out", models=2)
    assert not [p for p in multiprocessing.active_children() if p.name.startswith("model ")]
    wrong = Embedder(randomised(tiny_vit(img_size=28, in_chans=1)))
    decoder = Decoder(wrong.prepare)
    engine = local.Devices(wrong, decoder, 2, 2, 2)
    assert (engine.models, engine.workers) == (2, 2)
    wrong.device = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UnsupportedError, match=r"2 models \(--models\) need as many GPUs; this machine has 1"):
        local.Devices(wrong, decoder, 2, 2, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    names = [make.args[0]["device"] for make, *_ in local.Devices(wrong, decoder, 5, 2, 2)._arguments]
    assert names == ["cuda:0", "cuda:1"]
    wrong.device = torch.device("mps")
    with pytest.raises(UnsupportedError, match="on GPUs of CUDA or on the CPU, not on mps"):
        local.Devices(wrong, decoder, 2, 2, 2)
    with pytest.raises(DataError, match="models is 0: give 1 or more"):
        embed(embedder, photos, tmp_path / "out", models=0)
