"""The how-tos for engines and indexes, each run as it stands where its library is; and the plan of a billion images."""

from __future__ import annotations

import ast
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import test_jobs
import torch

from tokenmerge import MergeConfig
from tokenmerge.cli import main

JOBS = Path(__file__).parents[2] / "docs" / "jobs"
SECTIONS = {
    part.split("\n")[0]: part
    for part in (JOBS / "engines-and-indexes.md").read_text().split("\n## ")[1:]
    if "```py\n" in part
}
COUNT = 60
MODEL = "hf:facebook/dinov2-small"


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Photographs, a small model, its merge.json, and the rows of `tokenmerge embed`."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("how_tos")
    test_jobs._photos(root / "photos", COUNT)
    test_jobs._dinov2(root / "tiny_dinov2")
    MergeConfig("tome", r=4).save(root / "merge.json")
    before = Path.cwd()
    os.chdir(root)
    words = f"embed {root}/tiny_dinov2 --data photos --out photos-dinov2 -r 4 --workers 1 --shard-rows 32"
    assert main(words.split()) == 0
    yield root
    os.chdir(before)


@pytest.fixture
def here(things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(things, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _block(name: str) -> str:
    (block,) = re.findall(r"```py\n(.*?)```", SECTIONS[name], re.S)
    return block


def _missing(code: str) -> list[str]:
    """The packages that a block imports and that are not here."""
    tree = ast.parse(code)
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    return [name for name in names if find_spec(name.split(".")[0]) is None]


def test_every_how_to_is_run() -> None:
    assert {*SECTIONS} == {"Ray Data", "Daft", "DuckDB", "FAISS", "LanceDB"}
    assert all(len(_block(name).strip().splitlines()) <= 18 for name in SECTIONS), "ten lines and imports"


@pytest.mark.parametrize("name", SECTIONS)
def test_a_how_to_runs(name: str, here: Path) -> None:
    """In a process of its own: what these libraries start and warn of is theirs."""
    code = _block(name).replace(MODEL, str(here / "tiny_dinov2"))
    if missing := _missing(code):
        pytest.skip(f"not installed: pip install {' '.join(missing)}")
    env = {**os.environ, "RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    written = {"Ray Data": "photos-ray", "Daft": "photos-daft"}.get(name)
    if written is not None:
        import pandas as pd

        rows = pd.read_parquet(written)
        # where Ray was imported, its vectors are read as a type of its own
        assert {np.asarray(vector).shape for vector in rows.embedding} == {(32,)}
        assert len(rows) == COUNT and rows.path.is_unique


def test_the_plan_of_a_billion_images_is_what_the_page_prints() -> None:
    page = (JOBS / "billion-images.md").read_text()
    names: dict[str, object] = {}
    with redirect_stdout(io.StringIO()) as printed:
        for block in re.findall(r"```python\n(.*?)```", page, re.S):
            exec(block, names)
    (shown,) = re.findall(r"```text\n(.*?)```", page, re.S)
    assert printed.getvalue() == shown
    plan = names["plan"]
    # by hand: 2 nodes, of which each decodes 4 x 50 and embeds 100 a second, nine tenths of the time
    found = plan(images=1_800_000, nodes=2, loader=50, model=100, cores=4, price=3, width=512)  # type: ignore[operator]
    hours = 1_800_000 / (2 * 0.9 * 100) / 3600
    assert found["days"] == round(hours / 24, 1) and found["cost"] == round(hours * 2 * 3)
    assert found["bound by"] == "the model" and found["cores needed"] == 2
    more = plan(images=1e6, nodes=2, loader=10, model=100, cores=4)  # type: ignore[operator]
    assert more["bound by"] == "decoding" and more == {
        **plan(images=1e6, nodes=2, loader=10, model=40, cores=4),
        "bound by": "decoding",
        "cores needed": 10,
    }  # type: ignore[operator]
