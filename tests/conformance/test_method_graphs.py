"""What every method promises of graphs: captured without a break, exported for any batch, the answers of eager mode.

Tracing takes seconds, most of them for the model. So one model has another method in each of its blocks, and all
further examples of a method are captured side by side, without a model.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokenmerge
from helpers import assert_close, randomised, tiny_vit
from tokenmerge.methods import (
    ATM,
    DSM,
    LTMP,
    AViT,
    DiffRate,
    Learned,
    Reduction,
    TokenView,
    ZeroTPrune,
    find,
    list_methods,
)
from tokenmerge.plan import AnyPlan
from tokenmerge.testing import check_method
from tokenmerge.testing.graphs import check_graphs

pytestmark = pytest.mark.hosts
ANY_BATCH = {0: torch.export.Dim("batch", min=1, max=512)}
LEARNED = [name for name in list_methods() if issubclass(find(name), Learned)]
FIXED = [name for name in list_methods() if name not in LEARNED]


# what stands for a method in a model, where that is more than the method as it is
IN_MODEL: dict[str, list[Reduction]] = {
    "atm": [ATM(alpha=-2.0, floor=-2.0)],  # merges all there is, also in eager mode
    "dsm": [DSM(windowed=1)] * 2,  # in windows and then without
    "algm": [find("algm")()] * 2,  # locally and then globally
    "zero_tprune": [ZeroTPrune(iterations=(2, 2, 2))],
}


def _in_model(name: str) -> list[Reduction]:
    return IN_MODEL.get(name) or [find(name)()]


# the examples that are captured by themselves
OTHERS = {name: [example for example in find(name).examples() if example not in _in_model(name)] for name in FIXED}


@pytest.mark.parametrize("name", [name for name, examples in OTHERS.items() if examples])
def test_examples_in_graphs(name: str) -> None:
    check_graphs(OTHERS[name])


class _Relay(Reduction):
    """In every block another method."""

    name = "relay"

    def __init__(self, methods: list[Reduction]) -> None:
        self.methods, self.now = methods, methods[0]

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(method.needs for method in self.methods))

    def plan(self, view: TokenView, r: int) -> AnyPlan:
        self.now = self.methods[view.layer]
        return self.now.plan(view, r)

    def merge(
        self, plan: Any, x: Tensor, size: Tensor | None, branch: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        return self.now.merge(plan, x, size, branch)


FOR_ONE_BATCH = ("mctf", "ppt", "atm", "mame", "greedy", "dsm")


def _relays() -> list[list[Reduction]]:
    chosen = {name: _in_model(name) for name in FIXED}
    relays = [[method for name in FOR_ONE_BATCH for method in chosen.pop(name)]]
    adaptive = [name for name in chosen if find(name).is_adaptive]
    relays.append([method for name in adaptive for method in chosen.pop(name)])
    rest = [method for methods in chosen.values() for method in methods]
    return [*relays, *(rest[at : at + 7] for at in range(0, len(rest), 7))]


@pytest.mark.parametrize("methods", _relays(), ids=lambda methods: "-".join(method.name for method in methods))
def test_a_model_in_graphs(methods: list[Reduction]) -> None:
    counts = tuple(2 * isinstance(method, DiffRate) for method in methods)
    methods = [DiffRate(prune=counts) if isinstance(method, DiffRate) else method for method in methods]
    model, images = tiny_vit(depth=len(methods)), torch.randn(3, 3, 32, 32)
    handle = tokenmerge.patch(model, _Relay(methods), r=3, track=True)
    torch._dynamo.reset()
    with torch.no_grad():
        eager = model(images)
        compiled = torch.compile(model, backend="eager", fullgraph=True)(images)
        assert handle.tokens == [65 - 3 * done for done in range(1, len(methods) + 1)]
        if not any(method.is_adaptive for method in methods):
            assert_close(compiled, eager)
        exported = torch.export.export(model, (images[:2],), dynamic_shapes=(ANY_BATCH,)).module()
        assert_close(exported(images), compiled)
        assert_close(exported(images[:1]), compiled[:1])
        if methods[0].name in FOR_ONE_BATCH:
            assert_close(torch.export.export(model, (images,)).module()(images), compiled)


@pytest.mark.parametrize("name", LEARNED)
def test_what_is_learned_in_graphs(name: str) -> None:
    method = find(name).examples()[0]
    keep = isinstance(method, (AViT, LTMP))
    check_method(method, prepare=(lambda modules: modules) if keep else randomised, only=["graphs"])
