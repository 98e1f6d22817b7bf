"""Batches as they come: without any image, or with one that is none beside the good ones."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import pytest
import torch
from test_pairs import _method
from torch import Tensor, nn

import tokenmerge
from helpers import answer, assert_close, randomised, tiny_vit
from tokenmerge.adapters import ADAPTERS
from tokenmerge.adapters.base import Adapter
from tokenmerge.errors import UnsupportedError
from tokenmerge.kernels import force
from tokenmerge.methods import ALGM, ATM, ATS, MPM, PPT, MaMe, Reduction, ToMe, find, list_methods
from tokenmerge.methods.base import batch_count

pytestmark = pytest.mark.hosts
R = 3
BAD = {"nan": float("nan"), "inf": float("inf"), "zero": 0.0, "huge": 1e30}
# with thresholds that some images pass and some do not
MORE: list[Reduction] = [
    ToMe(metric="v"),
    ToMe(metric="x", distance="euclidean"),
    ATS(samples=0.5),
    ATM(alpha=0.3, floor=0.0),
    MaMe(tau=0.3),
    ALGM(threshold=0.0, metric="x"),
    MPM(metric="k"),
    PPT(threshold=1.0),
]
METHODS = [*list_methods(), *map(repr, MORE)]
every_method = pytest.mark.parametrize("name", METHODS)
every_adapter = pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)


def _find(name: str) -> Reduction:
    given = next((method for method in MORE if repr(method) == name), None)
    return given or _method(name, ADAPTERS[0])


def _patched(name: str) -> tuple[nn.Module, tokenmerge.Handle]:
    torch.manual_seed(0)
    model = tiny_vit(img_size=24)  # 36 patches
    return model, tokenmerge.patch(model, _find(name), r=R, track=True)


def _run(model: nn.Module, x: Any) -> Tensor:
    with torch.no_grad():
        return answer(model(x)).clone()


@every_method
def test_no_images(name: str) -> None:
    model, handle = _patched(name)
    for x in (torch.randn(0, 3, 24, 24), torch.randn(2, 3, 24, 24), torch.randn(0, 3, 24, 24)):
        assert _run(model, x).shape == (len(x), 10)
    n, left = 37, handle.tokens[-1]
    assert handle.tokens == [34, 31, 28, 25] or handle.config.method.largest_r(37, 1) < 18
    assert handle.sizes.shape == (0, left) and [groups.shape for groups in handle.groups] == [(0, n)] * 4
    assert handle.dense(torch.randn(0, left, 32)).shape == (0, n, 32)
    with force("reference"):
        assert _run(model, torch.randn(0, 3, 24, 24)).shape == (0, 10)


@cache
def _empty(adapter: Adapter) -> tuple[nn.Module, Tensor, Any]:
    """A family's model, no inputs for it, and what it says of them; None where the host takes no empty batch."""
    model, x = adapter.tiny()
    try:
        expected = _run(randomised(model).eval(), x[:0])
    except (RuntimeError, ValueError):
        return model, x, None
    return model, x, expected


@every_adapter
@pytest.mark.parametrize("name", ["tome", "ppt", "algm", "mpm"])
def test_no_inputs_in_a_family(adapter: Adapter, name: str) -> None:
    model, x, expected = _empty(adapter)
    if expected is None:
        pytest.skip(f"the host of {adapter.name} takes no empty batch")
    for restore in (None, "dense"):
        try:
            with tokenmerge.patched(model, _method(name, adapter), r=2, restore=restore):
                assert _run(model, x[:0]).shape == expected.shape
                assert len(_run(model, x)) == len(x)
        except UnsupportedError as error:
            needs = find(name)().needs
            assert needs and any(word in str(error) for word in ("place", "class token", "windows"))


@every_method
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_image_leaves_the_others_alone(name: str, bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, handle = _patched(name)
    counts: list[int] = []
    module = sys.modules[type(handle.config.method).__module__]

    def counting(*args: Any) -> int:
        counts.append(batch_count(*args))
        return counts[-1]

    monkeypatch.setattr(module, "batch_count", counting, raising=False)
    good = torch.randn(3, 3, 24, 24)
    batch = good.clone()
    batch[1] = BAD[bad]
    beside = _run(model, batch)
    groups = [found[[0, 2]] for found in handle.groups]
    if beside[1].isfinite().all():  # an image that the model can read has its say in how many go, and in nothing else
        monkeypatch.setattr(module, "batch_count", lambda *args: counts.pop(0), raising=False)
    expected = _run(model, good[[0, 2]])
    assert_close(beside[[0, 2]], expected, 1e-5)
    for one, other in zip(groups, handle.groups, strict=True):
        assert torch.equal(one, other)


@every_method
@pytest.mark.parametrize("where", [0, 1, 2])
def test_one_bad_patch_leaves_the_other_images_alone(name: str, where: int) -> None:
    model, handle = _patched(name)
    good = torch.randn(3, 3, 24, 24)
    batch, others = good.clone(), [i for i in range(3) if i != where]
    batch[where, :, 8:12, 4:8] = float("nan")
    with force("reference"):
        beside = _run(model, batch)
        assert_close(beside[others], _run(model, good[others]), 1e-5)
    assert_close(_run(model, batch)[others], _run(model, good[others]), 1e-5)
    assert handle.sizes.shape[0] == 2
