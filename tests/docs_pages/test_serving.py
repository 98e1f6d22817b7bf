"""The examples of servers: their answers are the model's, a broken image costs itself, and the page shows the files."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import randomised, tiny_vit
from tokenmerge import Embedder, assets
from tokenmerge.tools.export import export

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import serving

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/jobs/serve.md").read_text()
COUNT = 12
Post = Callable[[bytes], Any]


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    found = []
    for pixels in assets.fashion_mnist("test")[0][:COUNT]:
        file = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(file, "png")
        found.append(file.getvalue())
    return found


def _answers(post: Post, images: list[bytes]) -> list[Any]:
    """What all of them are answered, sent at once; the reason for those that are refused."""

    def one(image: bytes) -> Any:
        try:
            return post(image)
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(len(images)) as pool:
        return list(pool.map(one, images))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["litserve", "ray"])
def test_a_server_answers_with_the_embeddings_of_the_model(way: str, images: list[bytes]) -> None:
    pytest.importorskip("ray.serve" if way == "ray" else "litserve", exc_type=ImportError)
    pytest.importorskip("multipart" if way == "litserve" else "starlette", exc_type=ImportError)
    expected = Embedder("reference", r=8, device="cpu")({"image": images})["embedding"]
    path = Path("reference")
    with (serving.in_ray if way == "ray" else serving.in_litserve)(None, path, 8, path) as post:
        *found, broken = _answers(post, [*images, b"no image"])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(expected[0] - expected[1]).max() > 0.1, "all answers are alike"
    assert broken.startswith("400: ") and "cannot identify image file" in broken


@pytest.mark.slow
def test_the_exported_model_is_served_without_torch(images: list[bytes], tmp_path: Path) -> None:
    for name in ("litserve", "multipart", "onnxruntime", "onnx", "onnxscript"):
        pytest.importorskip(name)
    torch.manual_seed(0)
    model = randomised(tiny_vit(img_size=28, patch_size=7, depth=2, in_chans=1, num_classes=5))
    model.pretrained_cfg = {"input_size": (1, 28, 28), "crop_pct": 1.0, "mean": (0.25,), "std": (0.5,)}
    embed = Embedder(model, r=3, output="logits", device="cpu")
    export(model, tmp_path / "merged.onnx", r=3, to="onnx")
    words = (str(tmp_path / "merged.onnx"), "--mean", "0.25", "--std", "0.5")
    with (
        serving.started("serve_onnx.py", "/predict", *words) as port,
        serving.poster(port, "/predict", is_form=True) as post,
    ):
        *found, broken = _answers(post, [*images, b"no image"])
    np.testing.assert_allclose(found, embed({"image": images})["logits"], atol=1e-3)
    assert broken.startswith("400: ")
    assert "import torch" not in (ROOT / "examples/serve_onnx.py").read_text()


@pytest.mark.parametrize("name", ["serve_ray", "serve_litserve"])
def test_the_page_shows_what_is_run(name: str) -> None:
    """The imports and the class, word by word."""
    text = (ROOT / f"examples/{name}.py").read_text()
    shown = next(block for block in re.findall(r"```py\n(.*?)```", PAGE, re.S) if block.split("class")[1] in text)
    assert shown.strip() == text.split('"""', 2)[2].split("if __name__")[0].replace("import argparse\n", "").strip()
    assert f"examples/{name}.py" in PAGE


def test_a_closed_loop_sends_every_request_once() -> None:
    sent: list[bytes] = []
    seconds, whole = serving.closed_loop(sent.append, b"a", clients=3, requests=20)
    assert len(sent) == len(seconds) == 20 and 0 <= max(seconds) <= whole
