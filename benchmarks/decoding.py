"""How fast JPEGs are decoded and prepared, and what decoding them smaller does to embeddings: write `decoding.md`.

    python benchmarks/decoding.py PHOTOGRAPHS --weights CLIP.safetensors

One thread, files in memory: decode, resize, crop and normalise as a CLIP tower takes images (224 pixels). Seconds are
of the processor: other work changes them less than those of the clock. The photographs are taken as they are, and
enlarged to a camera's size, which says nothing of their finest detail.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from photographs import TOWER, tower
from PIL import Image
from tables import write

from tokenmerge import Embedder
from tokenmerge.batch.decoding import FAST, Decoder, draft_of
from tokenmerge.measure.timing import environment

Read = Callable[[bytes], torch.Tensor]


def main() -> None:
    """Measure every way on both sets of photographs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, help="a folder with JPEGs below it")
    parser.add_argument("--weights", type=Path, help="of the tower; without them embeddings are not compared")
    parser.add_argument("--enlarged", type=int, default=1600, help="pixels of the longer side (%(default)s)")
    parser.add_argument("--many", type=int, default=100, help="photographs that are enlarged (%(default)s)")
    parser.add_argument("--compared", type=int, default=64, help="photographs that are embedded (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", action="append", default=[], help="a line below the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = tower(arguments.weights) if arguments.weights else timm.create_model(TOWER, pretrained=False).eval()
    embedder = Embedder(model, device="cpu")
    files = [path.read_bytes() for path in sorted(arguments.photographs.rglob("*.jpg"))]
    step = max(1, len(files) // arguments.many)
    large = [enlarged(content, arguments.enlarged) for content in files[::step][: arguments.many]]
    rows = []
    for name, contents in (("as they are", files), (f"longer side {arguments.enlarged}", large)):
        compared = contents[:: max(1, len(contents) // arguments.compared)][: arguments.compared]
        rows += rows_of(name, contents, compared if arguments.weights else [], embedder, arguments.rounds)
    notes = [
        f"{len(files)} photographs, shorter side {shorter(files[0])} in the first; the median of "
        f"{arguments.rounds} rounds in turn.",
        "draft N: by the DCT at 1, 1/2, 1/4 or 1/8 of the size, both sides at least N. fast DCT: its fastest transform "
        "and upsampling. cosine: of the embeddings to those of PIL at full size.",
        *arguments.note,
    ]
    write("decoding", "Decoding JPEGs for 224 pixels", rows, environment(torch.device("cpu")), notes)


def rows_of(
    name: str, contents: Sequence[bytes], compared: Sequence[bytes], embedder: Embedder, rounds: int
) -> list[dict[str, Any]]:
    """Return a row for each way to decode these photographs."""
    ways = ways_of(embedder)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, read in ways.items():
            begun = time.process_time()
            for content in contents:
                read(content)
            seconds[way].append(time.process_time() - begun)
    first = statistics.median(seconds["PIL"])
    rows = []
    vectors = Vectors(embedder)
    exact = vectors.of(ways["PIL"], compared)
    for way, read in ways.items():
        median = statistics.median(seconds[way])
        row: dict[str, Any] = {"photographs": name, "count": len(contents), "decoded by": way}
        row |= {"images/CPU s": round(len(contents) / median, 1), "over PIL": round(first / median, 2)}
        if compared:
            alike = torch.cosine_similarity(vectors.of(read, compared), exact)
            row |= {"compared": len(compared), "1 - cosine, mean": f"{max(0.0, 1 - float(alike.mean())):.1e}"}
            row |= {"1 - cosine, most": f"{1 - float(alike.min()):.1e}"}
        rows.append(row)
        print(row)
    return rows


def ways_of(embedder: Embedder) -> dict[str, Read]:
    """Return the ways to make a tensor of a JPEG; a library that is not installed has none."""
    prepare = embedder.prepare
    fast = draft_of(FAST, prepare)
    assert fast is not None
    ways: dict[str, Read] = {"PIL": _with(Decoder(prepare))}
    for draft in (fast, fast // 2):
        ways[f"PIL, draft {draft}"] = _with(Decoder(prepare, draft=draft))
    if find_spec("torchvision") is not None:
        from torchvision.io import ImageReadMode, decode_jpeg

        def by_torchvision(content: bytes) -> torch.Tensor:
            pixels = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
            return prepare(Image.fromarray(pixels.permute(1, 2, 0).numpy()))

        ways["torchvision"] = by_torchvision
    if find_spec("simplejpeg") is not None:
        import simplejpeg

        def by_simplejpeg(least: int, is_fast: bool) -> Read:
            options = {"min_height": least, "min_width": least, "fastdct": is_fast, "fastupsample": is_fast}
            return lambda content: prepare(Image.fromarray(simplejpeg.decode_jpeg(content, strict=False, **options)))

        ways |= {"simplejpeg": by_simplejpeg(0, False), "simplejpeg, fast DCT": by_simplejpeg(0, True)}
        ways[f"simplejpeg, draft {fast}"] = by_simplejpeg(fast, False)
    return ways


def _with(decoder: Decoder) -> Read:
    return lambda content: decoder("a photograph", content)[0]


class Vectors:
    """Embeddings; what two ways decode alike is embedded once."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self.known: dict[bytes, torch.Tensor] = {}

    def of(self, read: Read, contents: Sequence[bytes]) -> torch.Tensor:
        """Return the embeddings `[N, D]`."""
        found = []
        for content in contents:
            x = read(content)
            key = hashlib.sha256(x.numpy().tobytes()).digest()
            if key not in self.known:
                self.known[key] = self.embedder.run(x[None])[0].double()
            found.append(self.known[key])
        return torch.stack(found) if found else torch.empty(0)


def enlarged(content: bytes, side: int) -> bytes:
    """Return a photograph with so many pixels on its longer side."""
    with Image.open(io.BytesIO(content)) as image:
        scale = side / max(image.size)
        size = [round(scale * pixels) for pixels in image.size]
        new = image.convert("RGB").resize((size[0], size[1]), Image.Resampling.LANCZOS)
    found = io.BytesIO()
    new.save(found, "jpeg", quality=92)
    return found.getvalue()


def shorter(content: bytes) -> int:
    """Return the pixels of the shorter side."""
    with Image.open(io.BytesIO(content)) as image:
        return int(np.min(image.size))


if __name__ == "__main__":
    main()
