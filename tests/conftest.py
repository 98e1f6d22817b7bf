"""Settings of every test: one thread, a fixed seed."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support", metavar="PATH", help="write the page of supported models from this run's results")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path = session.config.getoption("--support")
    if not path:
        return
    from promises import FOUND
    from support_page import page

    if hasattr(session.config, "workeroutput"):  # a process of several: the first one writes the page
        session.config.workeroutput["found"] = [(*family, *row) for family, row in FOUND.items()]
    elif exitstatus == 0:
        Path(path).write_text(page())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    from promises import Family, note

    for heading, name, state, adapter, remark in getattr(node, "workeroutput", {}).get("found", ()):
        note(Family(heading, name), state, remark, adapter)


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 10, 10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    from browsing import chromium

    with chromium() as opened:
        yield opened


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every generator that a test or a library draws from without a word."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    """Forget what was compiled: the compiler skips code for good that it once could not take into a graph."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["frames"]:
        dynamo.reset()


@lru_cache
def _test_images(read: Callable[[str], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return read("test")


@pytest.fixture
def bundled_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled images stand for the training images, which are not bundled, and are read once."""
    from tokenmerge import assets

    found = _test_images(assets.fashion_mnist)

    def bundled(split: str = "test") -> tuple[Tensor, Tensor]:
        images, labels = found
        return images.clone(), labels.clone()

    monkeypatch.setattr(assets, "fashion_mnist", bundled)


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill memory that nobody has written yet with values that no test expects."""
    from tokenmerge.testing.kernels import poisoned_memory

    with poisoned_memory():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
