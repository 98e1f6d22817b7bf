"""A whole source into a folder: every image once and right, whatever is killed, broken, gone or asked wrongly."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from written import assert_same, failures_of, rows_of

import tokenmerge
from helpers import randomised, tiny_vit
from tokenmerge import Embedder, assets
from tokenmerge.batch import decoding, folder, job, local, page, pool, rates
from tokenmerge.batch.engine import finish
from tokenmerge.batch.inputs import open_inputs
from tokenmerge.batch.job import Summary, embed
from tokenmerge.cli import main
from tokenmerge.errors import ConfigError, DataError, UnknownNameError, UnsupportedError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

COUNT = 120
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    images, _ = assets.fashion_mnist("test")
    for i in range(COUNT):
        (root / f"{i % 3}").mkdir(exist_ok=True)
        Image.fromarray(images[i].numpy()).save(root / f"{i % 3}" / f"{i:03}.png")
    return root


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    torch.manual_seed(0)
    return Embedder(randomised(tiny_vit(img_size=28, in_chans=1)), r=4)


def plain(embedder: Embedder, root: Path, ids: list[str]) -> np.ndarray[Any, Any]:
    """Embeddings of a loop that knows nothing of the library's: one image after the other."""
    found = []
    for name in ids:
        with Image.open(root / name) as image, torch.inference_mode():
            found.append(embedder.model(embedder.prepare(image)[None])[0])
    return torch.stack(found).numpy()


@pytest.fixture(scope="module")
def undisturbed(
    photos: Path, embedder: Embedder, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("whole") / "out"
    done = embed(embedder, photos, out, batch_size=16, workers=2, shard_rows=32)
    assert (done.rows, done.failures, done.images, done.done_before) == (COUNT, 0, COUNT, 0)
    assert done.loader > 0 and done.model > 0 and done.seconds > 0
    return rows_of(out)


def test_every_image_once_as_a_plain_loop_embeds_it(
    photos: Path, embedder: Embedder, undisturbed: dict[str, dict[str, Any]]
) -> None:
    ids = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    assert sorted(undisturbed) == ids and len(ids) == COUNT
    found = np.array([undisturbed[name]["embedding"] for name in ids])
    np.testing.assert_allclose(found, plain(embedder, photos, ids), atol=1e-5)
    row = undisturbed[ids[5]]
    assert (row["width"], row["height"], row["path"]) == (28, 28, f"{photos}/{ids[5]}")


def test_what_waits_for_its_shard_holds_nothing_else(photos: Path, embedder: Embedder) -> None:
    decoder, place = decoding.Decoder(embedder.prepare), open_inputs(photos)[0][2]
    piece = decoding.Piece(0, [0], [place])
    read = decoding.read_piece(decoder, piece, torch.empty(0), torch.zeros(1, dtype=torch.int64), 0)
    tensors = read.tensors(torch.empty(0))
    whole = embedder.run_all([tensor for tensor in tensors if tensor is not None])
    found = finish(embedder, piece, read, tensors).found
    assert whole.untyped_storage().nbytes() > whole.nbytes, "a view of all tokens"
    assert torch.equal(found, whole) and found.untyped_storage().nbytes() == found.nbytes


def test_the_types_of_the_table(photos: Path, embedder: Embedder, tmp_path: Path) -> None:
    embed(embedder, photos, tmp_path / "out", workers=1)
    (path,) = (tmp_path / "out/embedding").iterdir()
    schema = pq.read_schema(path)
    assert [(field.name, str(field.type)) for field in schema] == [
        ("id", "string"),
        ("path", "string"),
        ("embedding", "fixed_size_list<element: float>[32]"),
        ("width", "int32"),
        ("height", "int32"),
    ]
    assert b"tome" in schema.metadata[b"tokenmerge.merging"].lower()


def test_a_finished_folder_is_gone_on_with_and_new_images_are_added(
    photos: Path, embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(photos, root)
    embed(embedder, root, out, shard_rows=50, workers=1)
    before = {path: path.stat().st_mtime_ns for path in out.glob("embedding/*")}
    with monkeypatch.context() as patched:
        patched.setattr(local, "Pool", lambda *args: pytest.fail("it decodes again"))
        done = embed(embedder, root, out, shard_rows=50, workers=1)
    assert (done.rows, done.images, done.bound) == (COUNT, 0, "Nothing was left to do.")
    Image.new("L", (28, 28), 7).save(root / "new.png")
    (root / "0" / "000.png").unlink()
    done = embed(embedder, root, out, workers=1)
    assert (done.rows, done.images) == (COUNT + 1, 1) and "new.png" in rows_of(out)
    assert done.notes[0] == "1 rows are of images that the source has no more."
    assert {path: path.stat().st_mtime_ns for path in before} == before


def _run(embedder: Embedder, source: Path, out: Path, pids: Any = None) -> None:
    if pids is not None:
        hired = pool.Pool._hired

        def tell(self: pool.Pool, row: int) -> Any:
            worker = hired(self, row)
            pids[row] = worker.process.pid
            return worker

        pool.Pool._hired = tell  # type: ignore[method-assign]
    run_all = embedder.run_all

    def slowly(images: Any) -> torch.Tensor:
        time.sleep(0.05)  # so that there is time to kill something
        return run_all(images)

    embedder.run_all = slowly  # type: ignore[method-assign]
    embed(embedder, source, out, batch_size=8, workers=2, shard_rows=16)


def _child(*args: Any) -> Any:
    process = multiprocessing.get_context("fork").Process(target=_run, args=args)
    process.start()
    return process


def killed_drivers(embedder: Embedder, source: Path, out: Path, kills: int, longest: float) -> int:
    """Start a job and kill it at random moments; return how many were killed before they were done."""
    killed = 0
    for _ in range(kills):
        process = _child(embedder, source, out)
        process.join(random.uniform(0.0, longest))
        killed += process.is_alive()
        process.kill()
        process.join()
    return killed


def killed_workers(embedder: Embedder, source: Path, out: Path, kills: int, longest: float) -> int:
    """Start a job and kill its workers at random moments; return how many kills met one. The job ends by itself."""
    pids = multiprocessing.get_context("fork").Array("i", 2)
    process, killed = _child(embedder, source, out, pids), 0
    while killed < kills and process.is_alive():
        time.sleep(random.uniform(0.0, longest))
        pid = random.choice(list(pids))
        if pid and process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed += 1
    process.join()
    assert process.exitcode == 0
    return killed


def test_a_driver_killed_at_random_moments_loses_nothing(
    photos: Path, embedder: Embedder, undisturbed: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert killed_drivers(embedder, photos, out, 5, 0.4) >= 1
    done = embed(embedder, photos, out, batch_size=8, workers=2, shard_rows=16)
    assert done.rows == COUNT and failures_of(out) == {}
    assert_same(rows_of(out), undisturbed)
    assert not [path for path in out.rglob("*") if path.name.startswith(".part-")]


def test_workers_killed_at_random_moments_lose_nothing(
    photos: Path, embedder: Embedder, undisturbed: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    assert killed_workers(embedder, photos, tmp_path / "out", 4, 0.1) >= 1
    assert failures_of(tmp_path / "out") == {}
    assert_same(rows_of(tmp_path / "out"), undisturbed)


def test_workers_do_not_outlive_a_driver_that_is_killed(photos: Path, embedder: Embedder, tmp_path: Path) -> None:
    pids = multiprocessing.get_context("fork").Array("i", 2)
    process = _child(embedder, photos, tmp_path / "out", pids)
    end = time.monotonic() + 30
    while not all(pids) and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    process.join()
    while any(_lives(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert all(pids) and not any(_lives(pid) for pid in pids)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class _Poison:
    """Preparation that kills its process where an image is all white."""

    def __init__(self, prepare: Callable[[Any], torch.Tensor]) -> None:
        self.prepare = prepare

    def __call__(self, image: Any) -> torch.Tensor:
        if image.getextrema() == (255, 255):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.prepare(image)


def test_an_image_that_kills_its_worker_costs_only_itself(
    photos: Path, embedder: Embedder, undisturbed: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    for name in ("1/white.png", "2/white.png"):
        Image.new("L", (28, 28), 255).save(tmp_path / "photos" / name)
    decoder = decoding.Decoder(_Poison(embedder.prepare))
    inputs = open_inputs(tmp_path / "photos")
    pieces = [
        decoding.Piece(
            i, [*range(i, min(i + 16, len(inputs)))], [inputs[n][2] for n in range(i, min(i + 16, len(inputs)))]
        )
        for i in range(0, len(inputs), 16)
    ]
    seen, lost = set[int](), dict[str, str]()
    with pool.Pool(decoder, 2, 16, (1, 28, 28)) as team:
        for piece, read, tensors in team.run(iter(pieces)):
            assert not seen & {*piece.images}
            seen |= {*piece.images}
            lost |= {inputs[n][0]: why for n, why in zip(piece.images, read.reasons, strict=True) if why}
            assert [tensor is None for tensor in tensors] == [bool(why) for why in read.reasons]
    assert seen == set(range(len(inputs))) and team.killed == 6
    said = "decoding it ended 3 processes (SIGKILL): it takes too much memory, or breaks the decoder"
    assert lost == dict.fromkeys(("1/white.png", "2/white.png"), said)


def test_decoders_that_cannot_start_are_given_up(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "work", lambda *args: os._exit(3))
    piece = decoding.Piece(0, [0], [open_inputs(Path(__file__).parents[2] / "docs")[0][2]])
    with (
        pytest.raises(DataError, match=r"end without having read an image \(exit code 3\)"),
        pool.Pool(decoding.Decoder(embedder.prepare), 1, 1, (1, 28, 28)) as team,
    ):
        next(team.run(iter([piece])))


def test_what_does_not_fit_into_shared_memory_comes_through_the_pipe(
    photos: Path,
    embedder: Embedder,
    undisturbed: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "_has_room", lambda size: False)
    embed(embedder, photos, tmp_path / "out", batch_size=16, workers=1)
    assert_same(rows_of(tmp_path / "out"), undisturbed)


def _spoil(root: Path) -> dict[str, str]:
    """Six files that cannot be embedded, and a part of what must be said of each."""
    (root / "text.png").write_text("no image")
    (root / "empty.jpg").touch()
    whole = (root / "0" / "000.png").read_bytes()
    (root / "cut.png").write_bytes(whole[: len(whole) // 2])
    head = whole[:16] + (50_000).to_bytes(4, "big") * 2 + whole[24:29]
    (root / "bomb.png").write_bytes(head + zlib.crc32(head[12:]).to_bytes(4, "big") + whole[33:])
    (root / "gone.png").symlink_to(root / "nowhere.png")
    (root / "deep.tiff").write_bytes(b"")
    Image.fromarray(np.full((4, 4), 1e6, np.float32)).save(root / "deep.tiff")
    return {
        "text.png": "cannot identify image file",
        "empty.jpg": "cannot identify image file",
        "cut.png": "truncated",
        "bomb.png": "50000 x 50000 are 2,500,000,000 pixels, more than the limit of 178,956,970 (--max-pixels)",
        "gone.png": "No such file or directory",
        "deep.tiff": "save it with 8 or 16 bits",
    }


def test_broken_images_are_named_with_the_reason_and_cost_only_themselves(
    photos: Path, embedder: Embedder, undisturbed: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    root, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(photos, root)
    reasons = _spoil(root)
    done = embed(embedder, root, out, batch_size=16, workers=2)
    found = failures_of(out)
    assert found.keys() == reasons.keys() and done.failures == 6 and done.rows == COUNT
    for name, reason in reasons.items():
        assert reason in found[name] and "BytesIO" not in found[name] and str(root) not in found[name]
    expected = {name: {**row, "path": f"{root}/{name}"} for name, row in undisturbed.items()}
    assert_same(rows_of(out), expected)
    # they are not read again, unless that is asked for
    assert embed(embedder, root, out, workers=1).images == 0
    shutil.copy(root / "1" / "001.png", root / "text.png")
    done = embed(embedder, root, out, workers=1, retry=True)
    assert (done.images, done.failures, done.rows) == (1, 5, COUNT + 1) and failures_of(
        out
    ).keys() == reasons.keys() - {"text.png"}


def test_the_limit_of_pixels_is_the_callers(photos: Path, embedder: Embedder, tmp_path: Path) -> None:
    done = embed(embedder, photos, tmp_path / "out", workers=1, max_pixels=28 * 28 - 1)
    assert (done.rows, done.failures) == (0, COUNT)
    assert {*failures_of(tmp_path / "out").values()} == {
        "28 x 28 are 784 pixels, more than the limit of 783 (--max-pixels); it was not decoded"
    }


def test_a_draft_decodes_a_jpeg_smaller_and_says_its_whole_size() -> None:
    image = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[:, None], (1, 96)))
    files = {"jpeg": io.BytesIO(), "png": io.BytesIO()}
    for kind, file in files.items():
        image.save(file, kind)

    def as_it_is(opened: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(opened))[None].float()

    for kind, draft, shape in (
        ("jpeg", 16, (16, 24)),
        ("jpeg", 20, (32, 48)),
        ("jpeg", None, (64, 96)),
        ("png", 16, (64, 96)),
    ):
        tensor, size = decoding.Decoder(as_it_is, draft=draft)("a", files[kind].getvalue())
        assert tensor.shape == (1, *shape) and size == (96, 64)


def test_an_output_that_is_not_finite_is_a_failure(photos: Path, tmp_path: Path) -> None:
    model = tiny_vit(img_size=28, in_chans=1)
    with torch.no_grad():
        model.norm.bias[3] = float("nan")
    done = embed(Embedder(model), photos, tmp_path / "out", workers=1)
    assert (done.rows, done.failures) == (0, COUNT)
    assert {*failures_of(tmp_path / "out").values()} == {"the model's embedding of it is not finite"}


def test_a_folder_whose_name_is_no_text_is_gone_on_with(photos: Path, embedder: Embedder, tmp_path: Path) -> None:
    root, out = tmp_path / "photos", tmp_path / os.fsdecode(b"out-\xff")
    shutil.copytree(photos / "0", root)
    (root / "broken.png").write_text("no image")
    embed(embedder, root, out, workers=1)
    shutil.copy(root / "000.png", root / "new.png")
    done = embed(embedder, root, out, workers=1)
    assert (done.rows, done.failures, done.images) == (COUNT // 3 + 1, 1, 1) and (out / "report.html").exists()


def test_an_interruption_between_two_writes_writes_nothing_twice(
    photos: Path,
    embedder: Embedder,
    undisturbed: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, add = tmp_path / "out", folder.JobFolder.add

    def interrupted(self: folder.JobFolder, *args: Any) -> None:
        add(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(folder.JobFolder, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            embed(embedder, photos, out, batch_size=16, workers=1, shard_rows=32)
    assert len(rows_of(out)) == 32
    embed(embedder, photos, out, batch_size=16, workers=1, shard_rows=32)
    assert_same(rows_of(out), undisturbed)


def test_a_shard_with_a_broken_member_and_a_broken_header(
    photos: Path, embedder: Embedder, undisturbed: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    names, shard = sorted(undisturbed)[:40], tmp_path / "s.tar"
    with tarfile.open(shard, "w") as tar:
        for i, name in enumerate(names):
            content = b"no image" if i == 7 else (photos / name).read_bytes()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with tarfile.open(shard) as tar:
        start = tar.getmember(names[30]).offset
    broken = bytearray(shard.read_bytes())
    broken[start + 10] ^= 1
    shard.write_bytes(broken)
    embed(embedder, str(shard), tmp_path / "out", batch_size=8, workers=1)
    reasons = failures_of(tmp_path / "out")
    assert reasons.keys() == {f"s.tar/{names[7]}", "s.tar"}
    assert reasons["s.tar"].startswith(f"the shard cannot be read after {names[29]}: ")
    assert rows_of(tmp_path / "out").keys() == {f"s.tar/{name}" for i, name in enumerate(names[:30]) if i != 7}


def test_both_rates_over_time_stand_beside_the_manifest(
    photos: Path, embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(rates, "_SECONDS", 0.0)
    monkeypatch.setattr(job, "_SHOWN", -1.0)

    def stop(done: int, total: int, note: str) -> None:
        if done >= 32:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        embed(embedder, photos, out, batch_size=8, workers=1, progress=stop)
    first = rates.read_rates(out)
    assert [row["images"] for row in first] == [8, 16, 24, 32]
    with (out / "rates.csv").open("a") as file:
        file.write("2000-01-01T00:00")  # a line that was being written
    embed(embedder, photos, out, batch_size=8, workers=1)
    rows = rates.read_rates(out)
    assert rows[: len(first)] == first and rows[-1]["images"] == COUNT - 32 and "2000" not in str(rows)
    for row in rows:
        assert row["loader"] > 0 and row["model"] > 0 and row["gpu"] is None and row["seconds"] >= 0


def test_a_source_that_vanishes_is_not_taken_for_broken_images(
    photos: Path, embedder: Embedder, undisturbed: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    root, out, away = tmp_path / "photos", tmp_path / "out", tmp_path / "away"
    shutil.copytree(photos, root)

    def vanish(done: int, total: int, note: str) -> None:
        if root.exists():
            root.rename(away)

    with pytest.raises(
        DataError, match=r"is not there any more. What was read before is kept, and the same command goes"
    ):
        embed(embedder, root, out, batch_size=8, workers=1, progress=vanish)
    assert 8 <= len(rows_of(out)) < COUNT and failures_of(out) == {}
    away.rename(root)
    embed(embedder, root, out, batch_size=8, workers=1)
    assert_same(rows_of(out), {name: {**row, "path": f"{root}/{name}"} for name, row in undisturbed.items()})


@pytest.mark.parametrize(
    "name", ["part-00001.parquet", "failures.parquet", "manifest.json", "rates.csv", "report.html"]
)
def test_a_full_disk_keeps_what_was_written(
    name: str,
    photos: Path,
    embedder: Embedder,
    undisturbed: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, out, write, opened = tmp_path / "photos", tmp_path / "out", folder.write_file, Path.open
    monkeypatch.setattr(rates, "_SECONDS", 1e9)
    shutil.copytree(photos, root)
    for i in range(4):
        (root / "2" / f"{i}.png").write_text("no image")  # among the last
    files = {"seen": 0}

    def check(path: Path) -> None:
        files["seen"] += path.name == name
        if path.name == name and files["seen"] > (name == "manifest.json"):  # the first is of an empty folder
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def full(path: Path, content: Any) -> None:
        check(path)
        write(path, content)

    def full_open(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == "rates.csv" and "a" in args:
            check(path)
        return opened(path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(folder, "write_file", full)
        patched.setattr(page, "write_file", full)
        patched.setattr(Path, "open", full_open)
        with pytest.raises(OSError, match="No space left on device"):
            embed(embedder, root, out, batch_size=16, workers=1, shard_rows=32)
    rows = {"part-00001.parquet": 32, "failures.parquet": 64, "manifest.json": 0}.get(name, COUNT)
    assert json.loads((out / "manifest.json").read_text())["rows"] == rows and not (out / "report.html").exists()
    embed(embedder, root, out, batch_size=16, workers=1, shard_rows=32)
    expected = {row["id"]: {**row, "path": f"{root}/{row['id']}"} for row in undisturbed.values()}
    assert_same(rows_of(out), expected)
    assert failures_of(out).keys() == {f"2/{i}.png" for i in range(4)} and (out / "report.html").exists()


def test_another_job_in_the_same_folder_is_refused_with_the_differences(
    photos: Path, embedder: Embedder, tmp_path: Path
) -> None:
    out, model = tmp_path / "out", embedder._given["model"]
    embed(embedder, photos, out, workers=1)
    before = (out / "manifest.json").read_bytes()
    torch.manual_seed(1)
    other = randomised(tiny_vit(img_size=28, in_chans=1))
    cases = {
        r"weights: float32:\w+ there, float32:\w+ asked for": Embedder(other, r=4),
        r"merging: .*r=4.* there, .*r=8.* asked for": Embedder(model, r=8),
        r"merging: .*r=4.* there, none asked for": Embedder(model),
        r"preprocessing: .*mean 0.* there, .*mean 0.25.* asked for": Embedder(model, r=4, preprocessing={"mean": 0.25}),
        r"dtype: float32 there, bfloat16 asked for": Embedder(model, r=4, dtype="bfloat16"),
        r"output: embedding there, logits asked for": Embedder(model, r=4, output="logits"),
    }
    for text, another in cases.items():
        with pytest.raises(ConfigError, match=f"holds another job; nothing was changed there. What differs: {text}"):
            embed(another, photos, out, workers=1)
    with pytest.raises(ConfigError, match=r"source: .*photos.* there, .*/0 asked for"):
        embed(embedder, photos / "0", out, workers=1)
    with pytest.raises(ConfigError, match="draft: none there, 28 asked for"):
        embed(embedder, photos, out, workers=1, draft=28)
    assert (out / "manifest.json").read_bytes() == before and [*out.glob("*/*")] == [
        out / "embedding/part-00000.parquet"
    ]


def test_a_folder_that_cannot_be_gone_on_with_is_refused(photos: Path, embedder: Embedder, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").touch()
    with pytest.raises(
        DataError, match=r"holds something else \(thesis.tex\) and no manifest.json: give another folder"
    ):
        embed(embedder, photos, tmp_path / "other")
    with pytest.raises(DataError, match="is a file: give a folder"):
        embed(embedder, photos, tmp_path / "other/thesis.tex")
    for url in ("s3://bucket/out", Path("s3://bucket/out")):
        with pytest.raises(DataError, match=r"s3:/+bucket/out is a URL: give a folder on a disk of this machine"):
            embed(embedder, photos, url)
    out = tmp_path / "out"
    embed(embedder, photos, out, workers=1)
    with folder.JobFolder.open(out, json.loads((out / "manifest.json").read_text())["settings"], "embedding"):
        process = _child(embedder, photos, out)
        process.join()
        assert process.exitcode == 1  # another run is writing
    part = out / "embedding/part-00000.parquet"
    pq.write_table(pq.read_table(part).slice(1), part)
    with pytest.raises(DataError, match=r"part-00000.parquet has 119 rows, and manifest.json says 120: it was changed"):
        embed(embedder, photos, out)
    part.write_text("no parquet")
    with pytest.raises(DataError, match=r"part-00000.parquet, which manifest.json names, cannot be read"):
        embed(embedder, photos, out)
    (out / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"manifest.json cannot be read as a job's"):
        embed(embedder, photos, out)


@pytest.mark.parametrize("name", ["batch_size", "workers", "shard_rows", "max_pixels", "draft"])
def test_amounts_below_one_are_refused(photos: Path, embedder: Embedder, tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {name: 0}
    with pytest.raises(DataError, match=f"{name} is 0: give 1 or more"):
        embed(embedder, photos, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["list", "tar", "parquet", "parquet of paths", "url"])
def test_every_source_gives_the_same_rows(
    photos: Path, embedder: Embedder, undisturbed: dict[str, dict[str, Any]], tmp_path: Path, kind: str
) -> None:
    names = sorted(undisturbed)
    (tmp_path / "list.txt").write_text("".join(f"{photos}/{name}\n\n" for name in names))
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name in names:
            tar.add(photos / name, name)
            tar.add(__file__, f"{name}.txt")
    images = [(photos / name).read_bytes() for name in names]
    pq.write_table(pa.table({"id": names, "image": images}), tmp_path / "images.parquet", row_group_size=50)
    pq.write_table(pa.table({"id": names, "path": [f"{photos}/{name}" for name in names]}), tmp_path / "paths.parquet")
    source = {
        "list": tmp_path / "list.txt",
        "tar": f"{tmp_path}/s*d.tar",
        "parquet": open_inputs(tmp_path / "images.parquet", ids="id"),
        "parquet of paths": open_inputs(tmp_path / "paths.parquet", ids="id"),
        "url": f"file://{photos}",
    }[kind]
    embed(embedder, source, tmp_path / "out", batch_size=16, workers=2)
    strip = {"list": f"{photos}/", "tar": "shard.tar/"}.get(kind, "")
    found = {
        name.removeprefix(strip): {**row, "id": row["id"].removeprefix(strip)}
        for name, row in rows_of(tmp_path / "out").items()
    }
    assert found.keys() == undisturbed.keys()
    assert_same(
        {n: {**row, "path": ""} for n, row in found.items()}, {n: {**row, "path": ""} for n, row in undisturbed.items()}
    )


def test_labels_with_scores_and_dense_features(photos: Path, tmp_path: Path) -> None:
    model = randomised(tiny_vit(img_size=28, in_chans=1))
    logits = Embedder(model, r=2, output="logits")
    embed(logits, photos, tmp_path / "labels", workers=1, batch_size=16)
    (path,) = (tmp_path / "labels/logits").iterdir()
    row = pq.read_table(path).to_pylist()[7]
    with Image.open(photos / row["id"]) as image:
        answer = logits.model(logits.prepare(image)[None])[0].softmax(0)
    best = answer.topk(5)
    assert row["labels"] == list(map(str, best.indices.tolist()))
    np.testing.assert_allclose(row["scores"], best.values.detach().numpy(), atol=1e-5)
    embed(Embedder(model, r=2, output="dense"), photos, tmp_path / "dense", workers=1)
    (path,) = (tmp_path / "dense/dense").iterdir()
    assert str(pq.read_schema(path).field("dense").type) == "list<element: fixed_size_list<element: float>[32]>"
    assert np.array(pq.read_table(path)["dense"][0].as_py()).shape == (49, 32)


def test_what_bounds_a_job_is_said() -> None:
    said: dict[str, Any] = {
        "out": "out",
        "rows": 1,
        "failures": 0,
        "done_before": 0,
        "killed": 0,
        "merging": "",
        "preprocessing": "",
    }
    slow = Summary(**said, images=4100, seconds=10.0, loader=410.0, model=1950.0, waited=8.0, workers=2)
    assert slow.bound == (
        "Bound by decoding: 410 images/s by 2 workers; the model could do 1,950/s. Merging cannot help before "
        "--workers 10."
    )
    fast = Summary(**said, images=400, seconds=10.0, loader=800.0, model=41.0, waited=0.2, workers=1)
    assert fast.bound.startswith("Bound by the model: 41 images/s; decoding could do 800 images/s by 1 worker. Merging")
    short = Summary(**said, images=96, seconds=70.0, loader=2500.0, model=97.0, waited=69.0, workers=2, engine="ray")
    assert short.bound.startswith("Bound by neither: the model waited 69 of 70 s for processes to start or images to")
    many = Summary(**said, images=1, seconds=10.0, loader=410.0, model=1950.0, waited=8.0, workers=2, models=3)
    assert "workers; 3 models could do 1,950/s. Merging cannot help before --workers 10." in many.bound
    many.engine = "ray"
    assert many.bound.endswith("Merging cannot help before 10 CPUs of the cluster decode.")
    assert slow.rate == 410 and "none failed" in slow.lines()[0]


def test_the_command(photos: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_vit(img_size=28, in_chans=1)
    torch.save(model, "tiny.pt")
    words = ["embed", "tiny.pt", "--trust-pickle", "--data", str(photos), "--out", "out", "-r", "4", "--workers", "1"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out.startswith("120 rows in out; none failed.\n") and "\nBound by " in out
    assert "\nMerging: tome, r = 4\nPreprocessing: " in out and "loader " in err and "images: 120/120" in err
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["images"], found["bound"]) == (COUNT, 0, "Nothing was left to do.")
    assert main([*words[:-4], "-r", "2"]) == 2
    assert "holds another job; nothing was changed there. What differs: merging: " in capsys.readouterr().err


def test_a_configuration_of_another_model_is_told_at_the_end(
    photos: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with tokenmerge.patch(tiny_vit(img_size=28, in_chans=1, embed_dim=64), r=4) as handle:
        handle.save("merge.json")
    torch.save(tiny_vit(img_size=28, in_chans=1), "tiny.pt")
    words = ["embed", "tiny.pt", "--trust-pickle", "--data", str(photos), "--out", "out", "--config", "merge.json"]
    assert main([*words, "--workers", "1"]) == 0  # a warning would be an error here
    assert "\nWARNING: the configuration was made for another model (" in capsys.readouterr().out
    assert "WARNING: the configuration was made for another model (" in Path("out/report.html").read_text()


def test_mistakes_of_the_command(
    photos: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(tiny_vit(img_size=28, in_chans=1), "tiny.pt")
    Path("empty").mkdir()
    Path("bad").mkdir()
    Path("bad/a.png").write_text("no image")
    words = ["embed", "tiny.pt", "--trust-pickle", "--workers", "1", "--out", "out", "--data"]
    for source, text in {
        "empty": "there is no image below empty",
        "nowhere": "no folder nowhere: give a folder, a text file of paths, *.tar, *.parquet, or a URL",
        "fil:x": "no source of images 'fil'",
        "nowhere.tar": "1 of the files of nowhere.tar are not there: nowhere.tar",
        "s4://bucket/photos": "cannot list s4://bucket/photos: Protocol not known: s4",
    }.items():
        assert main([*words, source]) == 2
        assert text in capsys.readouterr().err and not Path("out").exists()
    assert main([*words, "bad"]) == 1
    assert "none of 1 images could be read" in capsys.readouterr().err
    assert failures_of(Path("out")) == {"a.png": "cannot identify image file"}


def test_the_engine_is_checked_before_anything_is_read(
    photos: Path, tmp_path: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnknownNameError, match=r"no engine 'rey'. Did you mean 'ray'\?"):
        embed(embedder, photos, tmp_path / "out", engine="rey")
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UnsupportedError, match=r'--engine ray needs ray: pip install "tokenmerge\[ray\]"'):
        embed(embedder, photos, tmp_path / "out", engine="ray")
    assert main(["embed", "none.pt", "--data", str(photos), "--out", str(tmp_path / "out"), "--engine", "ray"]) == 2
    assert not (tmp_path / "out").exists()


def test_parquet_that_cannot_be_written_here(
    photos: Path, tmp_path: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(UnsupportedError, match=r'embed needs pyarrow.parquet: pip install "tokenmerge\[embed\]"'):
        embed(embedder, photos, tmp_path / "out")
