"""What every method promises of graphs: captured without a break, exported for any batch, the answers of eager mode.

Tracing takes seconds, most of them for the model. So one model has another method in each of its blocks, and all
further examples of a method are captured side by side, without a model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from helpers import assert_close, randomised, tiny_vit, view_of
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

pytestmark = pytest.mark.hosts
ANY_BATCH = {0: torch.export.Dim("batch", min=1, max=512)}
PARTS = ("stream", "x_pre", "q", "k", "v", "size", "branch")
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


class _Reductions(nn.Module):
    """Methods that each reduce the same tokens, side by side in one graph."""

    def __init__(self, methods: list[Reduction], view: TokenView, r: int) -> None:
        super().__init__()
        self.methods, self.view, self.r = methods, view, r

    def forward(self, *parts: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        view, reduced = replace(self.view, **dict(zip(PARTS, parts, strict=True))), []
        for method in self.methods:
            plan = method.plan(replace(view, memory={}), self.r)
            reduced.append(method.merge(plan, view.stream, view.size, view.branch))
        return reduced


@pytest.mark.parametrize("name", [name for name, examples in OTHERS.items() if examples])
def test_examples_in_graphs(name: str) -> None:
    # in the third of four blocks ZeroTPrune takes few steps, which are unrolled
    examples, view = OTHERS[name], view_of(layer=2)
    view = replace(view, branch=torch.randn_like(view.stream))
    parts, reductions = [getattr(view, part) for part in PARTS], _Reductions(examples, view, 5)
    torch._dynamo.reset()
    with torch.no_grad():
        eager = reductions(*parts)
        compiled = torch.compile(reductions, backend="eager", fullgraph=True)(*parts)
        exported = torch.export.export(reductions, tuple(parts), dynamic_shapes=((ANY_BATCH,) * len(parts),)).module()
        whole, single = exported(*parts), exported(*(part[:1] for part in parts))
    for at, method in enumerate(examples):
        for in_eager, in_graph, for_any, for_one in zip(eager[at], compiled[at], whole[at], single[at], strict=True):
            assert in_graph.shape[1] == 21 and in_graph.isfinite().all(), method
            # an adaptive method may remove fewer in eager mode
            if in_eager.shape == in_graph.shape:
                assert_close(in_graph, in_eager)
            assert method.is_adaptive or in_eager.shape == in_graph.shape
            assert_close(for_any, in_graph)
            assert_close(for_one, in_graph[:1])


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
    """Two blocks: what a layer notes, the next one reads."""
    method, model, images = find(name).examples()[0], tiny_vit(depth=2), torch.randn(2, 3, 32, 32)
    handle = tokenmerge.patch(model, method, r=[5, 7])
    if not isinstance(method, (AViT, LTMP)):
        randomised(model.tokenmerge_modules)
    torch._dynamo.reset()
    with torch.no_grad():
        eager = model(images)
        compiled = torch.compile(model, backend="eager", fullgraph=True)(images)
        assert handle.tokens == [60, 53] and compiled.isfinite().all()
        if not method.is_adaptive:
            assert_close(compiled, eager)
        assert_close(torch.export.export(model, (images,)).module()(images), compiled)
