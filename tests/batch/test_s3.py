"""A bucket as a source, on a server of this machine: `make s3` runs this where moto and s3fs are installed."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from written import assert_same, failures_of, rows_of

from helpers import randomised, tiny_vit
from tokenmerge import Embedder, assets
from tokenmerge.batch import job
from tokenmerge.batch.inputs import open_inputs
from tokenmerge.batch.job import embed
from tokenmerge.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
server = pytest.importorskip("moto.server", reason="moto[server] and s3fs: `make s3`")
s3fs = pytest.importorskip("s3fs", reason="moto[server] and s3fs: `make s3`")
pytestmark = pytest.mark.filterwarnings("ignore")
COUNT = 24


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    reset = urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")
    urllib.request.urlopen(reset).close()  # what it holds outlives a server
    s3fs.S3FileSystem.clear_instance_cache()
    yield s3fs.S3FileSystem()
    s3fs.S3FileSystem.clear_instance_cache()
    running.stop()


@pytest.fixture
def photos(tmp_path: Path, s3: Any) -> Path:
    root = tmp_path / "photos"
    images, _ = assets.fashion_mnist("test")
    for i in range(COUNT):
        (root / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i].numpy()).save(root / f"{i % 2}" / f"{i:03}.png")
    s3.mkdir("bucket")
    s3.put(str(root), "bucket/photos", recursive=True)
    return root


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    torch.manual_seed(0)
    return Embedder(randomised(tiny_vit(img_size=28, in_chans=1)), r=4)


def test_a_bucket_gives_the_rows_of_a_folder(photos: Path, s3: Any, embedder: Embedder, tmp_path: Path) -> None:
    embed(embedder, photos, tmp_path / "local", workers=1, batch_size=8)
    expected = rows_of(tmp_path / "local")
    embed(embedder, "s3://bucket/photos", tmp_path / "bucket", workers=2, batch_size=8)
    assert_same(
        rows_of(tmp_path / "bucket"),
        {name: {**row, "path": f"s3://bucket/photos/{name}"} for name, row in expected.items()},
    )
    (tmp_path / "list.txt").write_text("".join(f"s3://bucket/photos/{name}\n" for name in expected))
    assert [place.read() for _, _, place in map(open_inputs(tmp_path / "list.txt").__getitem__, range(2))] == [
        (photos / name).read_bytes() for name in [*expected][:2]
    ]
    table = pa.table({"id": [*expected], "image": [(photos / name).read_bytes() for name in expected]})
    for i in range(2):
        pq.write_table(table.slice(12 * i, 12), tmp_path / f"{i}.parquet")
        s3.put(str(tmp_path / f"{i}.parquet"), f"bucket/tables/{i}.parquet")
    inputs = open_inputs("s3://bucket/tables/*.parquet", ids="id")
    assert [*inputs.ids()] == [*expected] and inputs[13][2].read() == table["image"][13].as_py()
    s3.rm("bucket/tables/1.parquet")
    assert not inputs.is_there()


def test_a_bucket_that_vanishes_is_not_taken_for_broken_images(
    photos: Path, s3: Any, embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_SHOWN", -1.0)

    def vanish(done: int, total: int, note: str) -> None:
        if done == 4:
            s3.rm("bucket/photos", recursive=True)

    with pytest.raises(DataError, match="the source s3://bucket/photos is not there any more"):
        embed(embedder, "s3://bucket/photos", tmp_path / "out", workers=1, batch_size=4, progress=vanish)
    assert 4 <= len(rows_of(tmp_path / "out")) < COUNT and failures_of(tmp_path / "out") == {}
    s3.put(str(photos), "bucket/photos", recursive=True)
    done = embed(embedder, "s3://bucket/photos", tmp_path / "out", workers=1, batch_size=4)
    assert (done.rows, done.failures) == (COUNT, 0)


def test_an_object_that_is_gone_is_a_failure_by_itself(
    photos: Path, s3: Any, embedder: Embedder, tmp_path: Path
) -> None:
    inputs = open_inputs("s3://bucket/photos")
    s3.rm("bucket/photos/1/005.png")
    done = embed(embedder, inputs, tmp_path / "out", workers=1)
    assert (done.rows, [*failures_of(tmp_path / "out")]) == (COUNT - 1, ["1/005.png"])


def test_what_the_library_says_is_shown_with_the_url(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"there is no image below s3://nowhere/x|cannot list s3://nowhere/x: "):
        open_inputs("s3://nowhere/x")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match=r"cannot list s3://bucket/photos: .*[Cc]redentials"):
        open_inputs("s3://bucket/photos")
