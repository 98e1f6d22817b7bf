"""Two processes (gloo, on the CPU) train a patched model as one does: DistributedDataParallel and fully_shard."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import tokenmerge
from helpers import assert_close, randomised, tiny_vit
from tokenmerge import errors as e
from tokenmerge.methods import DTEM, NEW, Reduction

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch was built without torch.distributed")

Case = tuple[dict[str, Any], Reduction | str, Any]  # the model's options, the method, how much merges: more each step
CASES: dict[str, Case] = {
    "class": ({}, "tome", [5, 3, 7]),
    "mean": ({"global_pool": "avg", "class_token": False}, "tome", [(6, 0.0), 0, 5]),
    "learned": ({}, DTEM(weights=NEW), [5, 5, 5]),
}
# which comes first, and the way of sharing
ORDERS = ("patch-ddp", "ddp-patch", "patch-fsdp")
RUNS = [(case, order) for case in CASES for order in ORDERS if (case, order) != ("learned", "ddp-patch")]
X, LABELS = torch.randn(3, 4, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.arange(4)


def _model(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return tiny_vit(init_values=0.5, depth=2, **options).train()


def _shard(model: Any) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def _train(case: str, order: str = "patch", part: slice = slice(None)) -> dict[str, Tensor]:
    """Train three steps; return the parameters, the last gradients, and the answer once the reduction is out."""
    options, method, amounts = CASES[case]
    model = _model(**options)
    called: Callable[[Tensor], Tensor] = model
    handle: Any = None
    for action in order.split("-"):
        if action == "patch":
            handle = tokenmerge.patch(model, method, r=amounts[0])
        else:
            called = DistributedDataParallel(model) if action == "ddp" else _shard(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step, amount in enumerate(amounts):
        handle.r = amount
        optimizer.zero_grad()
        F.cross_entropy(called(X[step, part]), LABELS[part]).backward()
        optimizer.step()
    found = {name: _whole(parameter) for name, parameter in model.named_parameters()}
    found |= {f"{name} gradient": _whole(parameter.grad) for name, parameter in model.named_parameters()}
    handle.remove()
    model.eval()
    with torch.no_grad():
        found["unpatched answer"] = model(X[0])
    return found


def _refusal(model: nn.Module, method: Reduction | str = "tome") -> str:
    """Return what `patch` says, having changed nothing."""
    before = sorted(model.__dict__), list(model.state_dict())
    try:
        tokenmerge.patch(model, method, r=2)
    except e.TokenMergeError as error:
        assert (sorted(model.__dict__), list(model.state_dict())) == before
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def _refusals() -> list[str]:
    model = _model()
    wrapper = DistributedDataParallel(model)
    said = [_refusal(wrapper), _refusal(model, DTEM(weights=NEW)), _refusal(_shard(_model()))]
    # a wrapper that is gone is no hindrance
    del wrapper
    return [*said, _refusal(model, DTEM(weights=NEW))]


def _work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    part = slice(rank, None, 2)
    found: dict[str, Any] = {f"{case} {order}": _train(case, order, part) for case, order in RUNS}
    found["refusals"] = _refusals()
    torch.save(found, Path(folder, f"{rank}.pt"))
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("parallel")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_work, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(("case", "order"), RUNS)
def test_two_processes_train_as_one(case: str, order: str, both: list[dict[str, Any]]) -> None:
    alone = _train(case)
    assert any("tokenmerge_modules" in name for name in alone) is (case == "learned")
    for found in both:
        assert found[f"{case} {order}"].keys() == alone.keys()
        for name, value in found[f"{case} {order}"].items():
            assert_close(value, alone[name], 1e-5)


def test_merging_has_a_part_in_what_is_trained() -> None:
    options, method, _ = CASES["class"]
    merged, model = _train("class"), _model(**options)
    tokenmerge.patch(model, method, r=0)
    F.cross_entropy(model(X[2]), LABELS).backward()
    name, parameter = next(iter(model.named_parameters()))
    assert (merged[f"{name} gradient"] - _whole(parameter.grad)).abs().max() > 1e-3


def test_a_model_with_separate_biases_is_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.models.beit import Beit

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    model: Any = randomised(
        Beit(img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=10, use_rel_pos_bias=True)
    ).eval()
    tokenmerge.patch(model, r=5)
    found = []
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for called in (model, _shard(copy.deepcopy(model))):
            out = called(X[0])
            F.cross_entropy(out, LABELS).backward()
            found.append([out, *(_whole(called.get_parameter(name).grad) for name, _ in model.named_parameters())])
    finally:
        distributed.destroy_process_group()
    for alone, sharded in zip(*found, strict=True):
        assert_close(sharded, alone, 1e-5)
    assert model.blocks[0].attn.q_bias.grad.abs().max() > 0


def test_orders_that_would_go_wrong_are_refused(both: list[dict[str, Any]]) -> None:
    for found in both:
        wrapped, learned, sharded, unwrapped = found["refusals"]
        assert wrapped.startswith(
            "UnsupportedModelError: DistributedDataParallel wraps a VisionTransformer: patch that"
        )
        assert learned.startswith("UnsupportedError: this VisionTransformer is in a DistributedDataParallel already")
        assert sharded.startswith("UnsupportedError: the parameters of this FSDPVisionTransformer are sharded already")
        assert unwrapped == "nothing was raised"
