"""What `embed` makes of many images: write `results/embed-*.md`.

small    Fashion-MNIST as PNG files and the bundled model: images/s of loader, model and job, by both engines
clip     the same with a CLIP tower (a file of weights for timm) on the photographs of a folder
memory   the memory of the driver and of its workers over many synthetic rows, with a graph
killed   driver, worker and Ray actor, each killed at random moments: every id once, as undisturbed
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from photographs import tower
from PIL import Image
from tables import RESULTS, write

from tokenmerge import Embedder, assets
from tokenmerge.batch.inputs import open_inputs
from tokenmerge.batch.job import embed
from tokenmerge.batch.rates import read_rates
from tokenmerge.measure.timing import environment
from tokenmerge.report.table import as_csv


def main() -> None:
    """Run one of the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=tuple(_PARTS))
    parser.add_argument("--images", type=int, default=10_000, help="small, killed: images (%(default)s)")
    parser.add_argument("--rows", type=int, default=100_000, help="memory: synthetic rows (%(default)s)")
    parser.add_argument("--kills", type=int, default=20, help="killed: of each kind (%(default)s)")
    parser.add_argument("--kinds", nargs="+", default=["driver", "worker", "actor"], help="killed: which (%(default)s)")
    parser.add_argument("--engines", nargs="+", default=["local", "ray"], help="small, clip (%(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="decoding processes (%(default)s)")
    parser.add_argument("-b", "--batch-size", type=int, default=32)
    parser.add_argument("--check", type=int, default=256, help="images compared with a plain loop (%(default)s)")
    parser.add_argument("--weights", type=Path, help="clip: the tower's weights, .safetensors")
    parser.add_argument("--photographs", type=Path, help="clip: a folder of photographs")
    parser.add_argument("--work", type=Path, help="a folder to work in: what stands there is not done again")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # memory: the process that is measured
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments.work = arguments.work or Path(folder)
        arguments.work.mkdir(parents=True, exist_ok=True)
        _PARTS[arguments.part](arguments)


def small(arguments: argparse.Namespace) -> None:
    """Embed Fashion-MNIST from files."""
    source = _fashion(arguments)
    rows = _rates(arguments, "small", source, lambda r: Embedder("reference", r=r, device="cpu"))
    _publish("embed-small", f"Embedding {arguments.images:,} PNG files of 28 pixels with the bundled model", rows)


def clip(arguments: argparse.Namespace) -> None:
    """Embed photographs with a CLIP tower."""
    model = tower(arguments.weights)
    source = arguments.photographs
    rows = _rates(arguments, "clip", source, lambda r: Embedder(model, r=r, device="cpu"))
    _publish("embed-clip", f"Embedding {len(open_inputs(source)):,} photographs with a CLIP ViT-B/16", rows)


def _publish(name: str, title: str, rows: list[dict[str, Any]]) -> None:
    notes = [
        "loader and model: images/s of each while nothing holds it up, measured in the job, where both share the "
        "cores. job: all images over all seconds; steady: without the seconds until the first images, in which "
        "processes and actors start. error: the largest difference from a loop that embeds one image after the other."
    ]
    write(name, title, rows, environment(torch.device("cpu")), notes)


def _rates(
    arguments: argparse.Namespace, name: str, source: Path, made: Callable[[int | None], Embedder]
) -> list[dict[str, Any]]:
    """Return a row for every engine, r and number of workers; those that stand in a journal are not measured again."""
    journal = arguments.work / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(journal.read_text()) if journal.exists() else []
    for engine in arguments.engines:
        for r in (None, 13):
            for workers in arguments.workers:
                key = {"engine": engine, "r": r or 0, "workers asked for": workers}
                if any(key.items() <= row.items() for row in rows):
                    continue
                rows.append({**key, **_measured(arguments, source, made(r), engine, workers)})
                journal.write_text(json.dumps(rows))
                print(rows[-1], flush=True)
    return rows


def _measured(
    arguments: argparse.Namespace, source: Path, embedder: Embedder, engine: str, workers: int
) -> dict[str, Any]:
    out = arguments.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    done = embed(embedder, source, out, engine=engine, workers=workers, batch_size=arguments.batch_size)
    rates = read_rates(out)
    first, last = rates[0], rates[-1]
    seconds = last["seconds"] - first["seconds"]
    steady = (last["images"] - first["images"]) / seconds if seconds else done.rate
    slower = min(done.loader, done.model)
    return {
        "rows": done.rows,
        "failures": done.failures,
        "models": done.models,
        "loader": round(done.loader, 1),
        "model": round(done.model, 1),
        "job": round(done.rate, 1),
        "steady": round(steady, 1),
        "job / slower": round(done.rate / slower, 3),
        "steady / slower": round(steady / slower, 3),
        "error": f"{_error(arguments, source, embedder, out):.1e}",
        "bound by": done.bound.removeprefix("Bound by ").removeprefix("the ").split()[0].strip(":"),
    }


@torch.inference_mode()
def _error(arguments: argparse.Namespace, source: Path, embedder: Embedder, out: Path) -> float:
    """Return the largest difference of rows, spread over the source, from a loop without the library."""
    rows = _rows(out)
    assert len(rows) == len(open_inputs(source)) - json.loads((out / "manifest.json").read_text())["failures"]
    names = sorted(rows)[:: max(1, len(rows) // arguments.check)]
    worst = 0.0
    for name in names:
        with Image.open(source / name) as image:
            found = embedder.model(embedder.prepare(image)[None])[0]
        worst = max(worst, (found - torch.tensor(rows[name]["embedding"])).abs().max().item())
    return worst


def _rows(out: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a job by id; each must be there once."""
    found = [row for path in sorted(out.glob("*/part-*.parquet")) for row in pq.read_table(path).to_pylist()]
    rows = {row["id"]: row for row in found}
    assert len(rows) == len(found), "a row is there twice"
    return rows


def _fashion(arguments: argparse.Namespace) -> Path:
    """Return a folder of so many PNG files."""
    source: Path = arguments.work / "fashion"
    images = torch.cat([assets.fashion_mnist("test")[0]] * (1 + (arguments.images - 1) // 10_000))
    for i in range(arguments.images):
        path = source / f"{i // 1000:03}" / f"{i:06}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i].numpy()).save(path)
    if len(open_inputs(source)) != arguments.images:
        raise SystemExit(f"{source} holds other images: give another --work.")
    return source


def memory(arguments: argparse.Namespace) -> None:
    """Sample the memory of a job in a fresh process, for every number of workers."""
    if arguments.one:
        embed(Embedder("reference", r=13, device="cpu"), _noise(arguments), arguments.one, workers=arguments.workers[0])
        return
    _noise(arguments)
    rows, samples = [], []
    for workers in arguments.workers:
        journal = arguments.work / f"memory-{arguments.rows}-{workers}.json"
        if not journal.exists():
            journal.write_text(json.dumps(_sampled(arguments, workers)))
        own = json.loads(journal.read_text())
        samples += own
        late = [row for row in own if row["images"] >= arguments.rows / 5]
        first, last = (
            np.mean([row["driver MiB"] + row["workers MiB"] for row in part]) for part in np.array_split(late, 2)
        )
        rows.append(
            {
                "workers": workers,
                "rows": arguments.rows,
                "seconds": round(own[-1]["seconds"]),
                "driver MiB, peak": round(max(row["driver MiB"] for row in own)),
                "workers MiB, peak": round(max(row["workers MiB"] for row in own)),
                "both, first half MiB": round(first),
                "both, second half MiB": round(last),
            }
        )
        print(rows[-1], flush=True)
    notes = [
        "driver: resident memory; workers: the sum of what each has of its own and its share of what is shared (PSS). "
        "The halves are means over the time after the first fifth of the rows. [Graph](embed-memory.png), "
        "[samples](embed-memory-samples.csv)."
    ]
    write("embed-memory", "Memory of a job", rows, environment(torch.device("cpu")), notes)
    (RESULTS / "embed-memory-samples.csv").write_text(as_csv(samples))
    _plot(samples)


def _noise(arguments: argparse.Namespace) -> Path:
    """Return a file of Parquet with so many small PNG images of noise."""
    path: Path = arguments.work / f"noise-{arguments.rows}.parquet"
    if not path.exists():
        draw = np.random.default_rng(0)
        schema = pa.schema([("id", pa.string()), ("image", pa.binary())])
        with pq.ParquetWriter(path.with_suffix(".part"), schema) as file:
            for start in range(0, arguments.rows, 1000):
                ids, images = [], []
                for i in range(start, min(start + 1000, arguments.rows)):
                    content = io.BytesIO()
                    Image.fromarray(draw.integers(0, 256, (28, 28), np.uint8)).save(content, "png")
                    ids.append(f"{i:08}")
                    images.append(content.getvalue())
                file.write_table(pa.table({"id": ids, "image": images}, schema=schema))
        path.with_suffix(".part").rename(path)
    return path


def _sampled(arguments: argparse.Namespace, workers: int) -> list[dict[str, Any]]:
    out = arguments.work / f"memory-out-{workers}"
    shutil.rmtree(out, ignore_errors=True)
    words = ["memory", "--one", str(out), "--work", str(arguments.work), "--rows", str(arguments.rows)]
    command = [sys.executable, __file__, *words, "--workers", str(workers)]
    samples: list[dict[str, Any]] = []
    with subprocess.Popen(command) as process:
        begun = time.monotonic()
        while process.poll() is None:
            time.sleep(max(0.5, 0.005 * (time.monotonic() - begun)))
            with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):  # there is none yet, or no more
                images = read_rates(out)[-1]["images"]
                shares = [_memory(pid, "smaps_rollup", "Pss:") for pid in _children(process.pid)]
                sample = {"workers": workers, "seconds": round(time.monotonic() - begun, 1), "images": images}
                own = _memory(process.pid, "status", "VmRSS:")
                samples.append({**sample, "driver MiB": round(own, 1), "workers MiB": round(sum(shares), 1)})
    if process.returncode or len(samples) < 4:
        raise SystemExit(f"the job ended with {process.returncode} after {len(samples)} samples: give more --rows.")
    return samples


def _memory(pid: int, file: str, name: str) -> float:
    """Return MiB of a process."""
    line = next(line for line in Path(f"/proc/{pid}/{file}").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def _children(pid: int) -> list[int]:
    """Return the child processes of one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def _plot(samples: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for i, workers in enumerate(dict.fromkeys(row["workers"] for row in samples)):
        own = [row for row in samples if row["workers"] == workers]
        for name, style in (("driver MiB", "-"), ("workers MiB", "--")):
            label = f"{name.removesuffix(' MiB')}, {workers} worker{'s' if workers > 1 else ''}"
            axes.plot([row["images"] for row in own], [row[name] for row in own], style, color=f"C{i}", label=label)
    axes.set(xlabel="images done", ylabel="MiB", title="Memory of a job of embed")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(RESULTS / "embed-memory.png", dpi=120)


def killed(arguments: argparse.Namespace) -> None:
    """Kill at random moments, go on, and compare with a job that was left alone."""
    torch.set_num_threads(1)  # what is forked has no other threads
    source, embedder = _fashion(arguments), Embedder("reference", r=13, device="cpu")
    whole, begun = arguments.work / "undisturbed", time.monotonic()
    shutil.rmtree(whole, ignore_errors=True)
    embed(embedder, source, whole, workers=2)
    seconds, expected = time.monotonic() - begun, _rows(whole)
    rows = []
    for kind in arguments.kinds:
        jobs = kills = 0
        error, draw = 0.0, random.Random(0)
        while kills < arguments.kills:
            out = arguments.work / f"killed-{kind}"
            shutil.rmtree(out, ignore_errors=True)
            done = _KILLS[kind](embedder, source, out, arguments.kills - kills, seconds, draw)
            jobs, kills = jobs + 1, kills + done
            found = _rows(out)
            assert found.keys() == expected.keys(), f"{len(found)} of {len(expected)} rows"
            pairs = [(found[name]["embedding"], expected[name]["embedding"]) for name in expected]
            error = max(error, float(np.abs(np.subtract(*map(np.array, zip(*pairs, strict=True)))).max()))
            print(f"{kind}: {kills} kills, {jobs} jobs, error {error:.1e}", flush=True)
        rows.append({"killed": kind, "kills": kills, "jobs": jobs})
        rows[-1] |= {"images": len(expected), "ids once": True, "error": f"{error:.1e}"}
    notes = ["After the kills the same command was given again. error: the largest difference from a job left alone."]
    write("embed-killed", "Jobs that are killed", rows, environment(torch.device("cpu")), notes)


def _quietly(*args: Any) -> None:
    embed(*args, workers=2, shard_rows=500)


def _kill_driver(embedder: Embedder, source: Path, out: Path, kills: int, seconds: float, draw: random.Random) -> int:
    process = multiprocessing.get_context("fork").Process(target=_quietly, args=(embedder, source, out))
    process.start()
    process.join(draw.uniform(0, seconds))
    was_alive = process.is_alive()
    process.kill()
    process.join()
    _quietly(embedder, source, out)
    return int(was_alive)  # else the job was done before


def _kill_worker(embedder: Embedder, source: Path, out: Path, kills: int, seconds: float, draw: random.Random) -> int:
    process = multiprocessing.get_context("fork").Process(target=_quietly, args=(embedder, source, out))
    process.start()
    met = 0
    while process.is_alive() and met < kills:
        process.join(draw.uniform(0, seconds / 4))
        team = _children(process.pid or 0)
        if team:
            os.kill(draw.choice(team), signal.SIGKILL)
            met += 1
    process.join()
    assert process.exitcode == 0
    return met


def _kill_actor(embedder: Embedder, source: Path, out: Path, kills: int, seconds: float, draw: random.Random) -> int:
    import ray

    if not ray.is_initialized():
        ray.init("local", log_to_driver=False, num_cpus=4)
    stop, met = threading.Event(), 0

    def kill() -> None:
        nonlocal met
        while met < kills and not stop.wait(draw.uniform(0, seconds / 2)):
            for pid in _actors():
                os.kill(pid, signal.SIGKILL)
                met += 1

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        embed(embedder, source, out, engine="ray", shard_rows=500)
    finally:
        stop.set()
        thread.join()
    return met


def _actors() -> list[int]:
    """Return a process of this one's Ray that holds a model, if there is one."""
    found = []
    for raylet in _children(os.getpid()):
        for pid in _children(raylet):
            with contextlib.suppress(OSError):
                if "_Model" in Path(f"/proc/{pid}/cmdline").read_text():
                    found.append(pid)
    return found[:1]


_KILLS = {"driver": _kill_driver, "worker": _kill_worker, "actor": _kill_actor}
_PARTS = {"small": small, "clip": clip, "memory": memory, "killed": killed}

if __name__ == "__main__":
    main()
