"""Throughput and p50/p99 of a merged and an unmerged model behind servers of others: write `results/serving.md`.

A closed loop on this machine: every client sends its next image when the answer to the last one is there, until so many
requests were answered. Clients and servers share the cores; the unmerged and the merged model are asked in turn. An
answer of each is first compared with that of the model in this process.

threads      one patched model, called by the clients' threads with one image each
litserve     examples/serve_litserve.py: batches of up to 8
ray          examples/serve_ray.py: the same
onnxruntime  one session of the exported model, called by threads, prepared by the same code
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tables import write

import tokenmerge
from tokenmerge import Embedder
from tokenmerge.batch.heads import head_of
from tokenmerge.measure.timing import environment
from tokenmerge.tools.export import export
from tokenmerge.tools.models import load_unmerged

EXAMPLES = Path(__file__).parent.parent / "examples"
WAYS = ("threads", "litserve", "ray", "onnxruntime")
NEEDS = {"litserve": "litserve", "ray": "ray", "onnxruntime": "onnxruntime"}
BOUNDARY = "photograph"
ROUNDS = 6  # in which the unmerged and the merged model take turns
START, STOP = 120.0, 20.0  # seconds that a server has to answer first, and to end
Send = Callable[[bytes], "np.ndarray[Any, Any]"]


def main() -> None:
    """Serve each model in each way, unmerged and merged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["reference:8", "vit_small_patch16_224:13"], metavar="MODEL:R")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=200, help="of all clients together (%(default)s)")
    parser.add_argument("--name", default="serving", help="of the results (%(default)s)")
    parser.add_argument("--note", action="append", default=[], help="a line below the table")
    arguments = parser.parse_args()
    notes = [
        f"{arguments.clients} clients in a closed loop on the same cores; one JPEG of 320 x 240 pixels in a request, "
        "decoded by the server. Random weights but for reference: times do not depend on them.",
        *arguments.note,
    ]
    facts = {**environment(torch.device("cpu")), "threads of a forward": os.environ.get("OMP_NUM_THREADS", "all")}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for way in arguments.ways:
            if find_spec(NEEDS.get(way, "torch")) is None:
                print(f"{way}: {NEEDS[way]} is not installed, not measured.", file=sys.stderr)
                continue
            for name, _, r in (one.rpartition(":") for one in arguments.models):
                rows += rows_of(way, name, int(r), Path(folder), arguments.clients, arguments.requests)
                write(arguments.name, "A merging model behind a server", rows, facts, notes)


def rows_of(way: str, model: str, r: int, folder: Path, clients: int, requests: int) -> list[dict[str, Any]]:
    """Return a row for the unmerged model and one for the merged, which are asked in turn."""
    path, photo = saved(model, folder), photograph()
    seconds: dict[int, list[float]] = {0: [], r: []}
    whole = dict.fromkeys(seconds, 0.0)
    with ExitStack() as servers:
        senders = {amount: servers.enter_context(served(way, path, amount, folder, photo)) for amount in seconds}
        for send in senders.values():
            closed_loop(send, photo, clients, 2 * clients)  # a warm-up
        for turn in range(ROUNDS):
            for amount in sorted(senders, reverse=bool(turn % 2)):
                own, all_of_them = closed_loop(senders[amount], photo, clients, requests // ROUNDS)
                seconds[amount] += own
                whole[amount] += all_of_them
    rows = []
    for amount, own in seconds.items():
        cuts = statistics.quantiles(own, n=100, method="inclusive")
        row = {"model": model, "served by": way, "r": amount, "clients": clients, "requests": len(own)}
        row |= {"requests/s": round(len(own) / whole[amount], 2)}
        row |= {"p50 ms": round(1e3 * cuts[49], 1), "p99 ms": round(1e3 * cuts[98], 1)}
        rows.append({**row, "speed-up": round(whole[0] / whole[amount], 2)})
        print(rows[-1], file=sys.stderr)
    return rows


@contextmanager
def served(way: str, path: Path, r: int, folder: Path, photo: bytes) -> Iterator[Send]:
    """Serve a model until the block ends; its answer is compared with that of the model in this process."""
    embedder = Embedder(load_unmerged(str(path)), r=r or None, device="cpu")
    expected = embedder({"image": [photo]})["embedding"][0]
    with SENDERS[way](embedder, path, r, folder) as send:
        difference = float(np.abs(send(photo) - expected).max() / np.abs(expected).max())
        if difference > 1e-3:
            raise SystemExit(f"{way} answers with something else: {difference:.2g} of the largest number.")
        yield send


def saved(name: str, folder: Path) -> Path:
    """Return a folder of the model, so that every process has the same weights; `reference` is its own name."""
    if name == "reference":
        return Path(name)
    path = folder / name
    if not path.exists():
        torch.manual_seed(0)
        model = load_unmerged(name, pretrained=False)
        with tokenmerge.patched(model, r=0):
            tokenmerge.save_pretrained(model, path)
    return path


def photograph() -> bytes:
    """Return a JPEG of smooth noise."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC).save(content, "jpeg", quality=90)
    return content.getvalue()


def closed_loop(send: Send, photo: bytes, clients: int, requests: int) -> tuple[list[float], float]:
    """Return the seconds of each request, and those of all: `clients` threads, one request after the other in each."""

    def timed(_: int) -> float:
        begun = time.perf_counter()
        send(photo)
        return time.perf_counter() - begun

    with ThreadPoolExecutor(clients) as pool:
        begun = time.perf_counter()
        seconds = list(pool.map(timed, range(requests)))
        return seconds, time.perf_counter() - begun


@contextmanager
def in_threads(embedder: Embedder, path: Path, r: int, folder: Path) -> Iterator[Send]:
    """One model in this process, shared by threads."""
    yield lambda photo: embedder({"image": [photo]})["embedding"][0]


@contextmanager
def in_onnxruntime(embedder: Embedder, path: Path, r: int, folder: Path) -> Iterator[Send]:
    """One session of the exported embedder, shared by threads."""
    import onnxruntime

    model = load_unmerged(str(path))
    head_of(model, "embedding")  # takes the classifier out
    file = folder / f"{path.name}-{r}.onnx"
    export(model, file, r=r, to="onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
    session = onnxruntime.InferenceSession(str(file), options)

    def send(photo: bytes) -> Any:
        return session.run(["answer"], {"images": embedder.read(photo)[None].numpy()})[0][0]

    yield send


@contextmanager
def in_litserve(embedder: Embedder, path: Path, r: int, folder: Path) -> Iterator[Send]:
    """examples/serve_litserve.py, asked by multipart forms."""
    with (
        started("serve_litserve.py", "/predict", *words(path, r)) as port,
        poster(port, "/predict", is_form=True) as send,
    ):
        yield send


@contextmanager
def in_ray(embedder: Embedder, path: Path, r: int, folder: Path) -> Iterator[Send]:
    """examples/serve_ray.py, asked by the bytes of the file."""
    with started("serve_ray.py", "/", *words(path, r)) as port, poster(port, "/") as send:
        yield send


def words(path: Path, r: int) -> list[str]:
    """Return the arguments of an example."""
    return [str(path), *(["-r", str(r)] if r else [])]


SENDERS: dict[str, Any] = {
    "threads": in_threads,
    "litserve": in_litserve,
    "ray": in_ray,
    "onnxruntime": in_onnxruntime,
}


@contextmanager
def poster(port: int, url: str, *, is_form: bool = False) -> Iterator[Send]:
    """Yield a function that posts an image and returns the numbers, over one connection for each thread."""
    own, opened = threading.local(), []
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'.encode()
    tail = f"\r\n--{BOUNDARY}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"} if is_form else {}

    def post(image: bytes) -> Any:
        if not hasattr(own, "connection"):
            own.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            opened.append(own.connection)
        own.connection.request("POST", url, head + image + tail if is_form else image, kind)
        answer = own.connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {content[:200]!r}")
        (found,) = json.loads(content).values()
        return np.array(found, np.float32)

    try:
        yield post
    finally:
        for connection in opened:
            connection.close()


@contextmanager
def started(script: str, url: str, *words: str) -> Iterator[int]:
    """Run an example as a process of its own until the block ends; yields its port once it answers at the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # a cluster of its own, which reports nothing
    env = {**os.environ, "RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(EXAMPLES / script), *words, "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            until = time.monotonic() + START
            while not _answers(port, url):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise RuntimeError(f"{script} did not start: {log.read().decode(errors='replace')[-2000:]}")
                time.sleep(0.2)
            yield port
        finally:
            ended(process)


def ended(process: subprocess.Popen[bytes]) -> None:
    """End a server as Ctrl-C does, and what is left of its processes."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP)
    except subprocess.TimeoutExpired:
        process.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the session is its own: nobody else is in it
    process.wait()


def _answers(port: int, url: str) -> bool:
    """Return whether something answers there, and knows the address."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", url)
        return connection.getresponse().status not in (404, 503)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    main()
