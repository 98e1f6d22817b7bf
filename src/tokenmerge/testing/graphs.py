"""Methods where they run: in a small model, and in graphs that a compiler captures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge.api import patched
from tokenmerge.methods import Learned, Reduction, TokenView
from tokenmerge.testing.comparing import assert_close, expect
from tokenmerge.testing.models.drawn import tiny_vit
from tokenmerge.testing.views import Case, view_of

__all__ = ["check_graphs", "graphs", "model"]

_PARTS = ("stream", "x_pre", "q", "k", "v", "size", "branch")


_MODELS: dict[torch.dtype, nn.Module] = {}


def _model(dtype: torch.dtype) -> nn.Module:
    """A model that all methods are tried on, in turn."""
    if dtype not in _MODELS:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            _MODELS[dtype] = tiny_vit(depth=3).to(dtype)
    return _MODELS[dtype]


def model(case: Case) -> None:
    """In a model as many tokens go as planned at each block, and sizes and groups agree."""
    for dtype in (torch.float32, torch.bfloat16):
        images = torch.randn(3, 3, 32, 32, dtype=dtype)
        with torch.no_grad(), patched(_model(dtype), case.method, r=[0, 5, 7], track=True) as handle:
            out = _model(dtype)(images)
            groups, sizes, tokens = handle.groups[-1], handle.sizes, handle.tokens
        expect(out.shape == (3, 10) and out.dtype == dtype, f"{dtype}: the answer is {out.dtype} {tuple(out.shape)}")
        expect(out.isfinite().all(), f"{dtype}: {int((~out.isfinite()).sum())} values of the answer are not finite")
        assert_close(sizes.sum(dim=1), (groups >= 0).sum(dim=1).float(), what=f"{dtype}: the sum of the sizes")
        planned = [65, 60, 53]
        kept = (
            all(a >= b for a, b in zip(tokens, planned, strict=True)) if case.method.is_adaptive else tokens == planned
        )
        expect(kept and sizes.shape[1] == tokens[-1], f"{dtype}: blocks leave {tokens} tokens, {planned} were planned")


def graphs(case: Case) -> None:
    """A compiler captures it without a break, and an exported graph gives the same for any batch."""
    if not isinstance(case.method, Learned):  # these are captured in a model: their modules are its own
        check_graphs([case.method])
        return
    network, images = tiny_vit(depth=2), torch.randn(2, 3, 32, 32)
    with patched(network, case.method, r=[5, 7]) as handle:
        modules = network.get_submodule("tokenmerge_modules")
        case.prepare(modules)
        torch._dynamo.reset()
        with torch.no_grad():
            eager = network(images)
            compiled = torch.compile(network, backend="eager", fullgraph=True)(images)
            expect(handle.tokens == [60, 53], f"the graph leaves {handle.tokens} tokens, [60, 53] were planned")
            expect(compiled.isfinite().all(), "the graph's answer is not finite")
            if not case.method.is_adaptive:
                assert_close(compiled, eager, what="compiled and eager")
            exported = torch.export.export(network, (images,)).module()(images)
            assert_close(exported, compiled, what="exported and compiled")


def check_graphs(examples: list[Reduction]) -> None:
    """Capture methods side by side in one graph, without a model, and compare with eager mode: see `graphs`.

    A trace takes time, and hardly more for many methods than for one.
    """
    # in the third of four blocks ZeroTPrune takes few steps, which are unrolled
    view = view_of(layer=2)
    view = replace(view, branch=torch.randn_like(view.stream))
    parts, reductions = [getattr(view, part) for part in _PARTS], _Reductions(examples, view, 5)
    any_batch = {0: torch.export.Dim("batch", min=1, max=512)}
    torch._dynamo.reset()
    with torch.no_grad():
        eager = reductions(*parts)
        compiled = torch.compile(reductions, backend="eager", fullgraph=True)(*parts)
        shapes = ((any_batch,) * len(parts),)
        exported = torch.export.export(reductions, tuple(parts), dynamic_shapes=shapes).module()
        whole, one = exported(*parts), exported(*(part[:1] for part in parts))
    for at, method in enumerate(examples):
        for in_eager, in_graph, for_any, for_one in zip(eager[at], compiled[at], whole[at], one[at], strict=True):
            expect(in_graph.shape[1] == 21, f"{method} in a graph leaves {in_graph.shape[1]} of 26 tokens with r=5")
            expect(in_graph.isfinite().all(), f"{method} in a graph: not finite")
            # an adaptive method may remove fewer in eager mode
            if in_eager.shape == in_graph.shape or not method.is_adaptive:
                assert_close(in_graph, in_eager, what=f"{method}, compiled and eager")
            assert_close(for_any, in_graph, what=f"{method}, exported and compiled")
            assert_close(for_one, in_graph[:1], what=f"{method}, exported for one image and compiled")


class _Reductions(nn.Module):
    """Methods that each reduce the same tokens, side by side in one graph."""

    def __init__(self, examples: list[Reduction], view: TokenView, r: int) -> None:
        super().__init__()
        self.examples, self.view, self.r = examples, view, r

    def forward(self, *parts: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        named: dict[str, Any] = dict(zip(_PARTS, parts, strict=True))
        view, reduced = replace(self.view, **named), []
        for method in self.examples:
            plan = method.plan(replace(view, memory={}), self.r)
            reduced.append(method.merge(plan, view.stream, view.size, view.branch))
        return reduced
