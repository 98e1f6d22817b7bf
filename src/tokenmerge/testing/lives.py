"""What a patched model goes through: checkpoints, copies, threads, compilers."""

from __future__ import annotations

import copy
import inspect
import io
import threading
import warnings
from collections.abc import Callable
from functools import partial
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenmerge.api import patch as patch_model
from tokenmerge.api import unpatch
from tokenmerge.handle import Handle, handle_of
from tokenmerge.testing.comparing import assert_close, assert_equal, expect, traces
from tokenmerge.testing.merging import FamilyCase

__all__ = ["by_position", "checkpointing", "copies", "export", "one_graph", "run_in_threads", "threads"]


def checkpointing(case: FamilyCase) -> None:
    """Blocks that a checkpoint runs again in backward give equal gradients."""
    for reentrant in (False, True):
        model, case = case.fresh().train(), case.differentiable()
        handle, grads = patch_model(model, r=case.r, **case.patch), []
        for is_checkpointed in (False, True):
            model.zero_grad()
            bound = _checkpointed(handle, reentrant) if is_checkpointed else []
            case.loss(model).backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            for block, inner in bound:
                block.__dict__["forward"] = inner
        names = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
        # to rounding: without gradients, as in the first pass of a reentrant one, torch may attend by another kernel
        for name, plain, again in zip(names, *grads, strict=True):
            assert_close(again, plain, what=f"use_reentrant={reentrant}, the gradient of {name}")


def _checkpointed(handle: Handle, reentrant: bool) -> list[tuple[nn.Module, Any]]:
    bound = []
    for runner in handle.runners:
        inner = runner.block.__dict__["forward"]
        runner.block.__dict__["forward"] = by_position(runner.block, _Checkpointed(inner, reentrant))
        bound.append((runner.block, inner))
    return bound


def by_position(block: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward of the block that calls `run` with the tokens first, also where the host gives them by name."""
    name = list(inspect.signature(type(block).forward).parameters)[1]
    return lambda *args, **kwargs: run(*args, **kwargs) if args else run(kwargs.pop(name), **kwargs)


class _Checkpointed:
    def __init__(self, inner: Callable[..., Any], reentrant: bool) -> None:
        self.inner, self.reentrant = inner, reentrant

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(partial(self.inner, **kwargs), x, *args, use_reentrant=self.reentrant)


def copies(case: FamilyCase) -> None:
    """Deep copies and saved models merge by themselves, with a handle of their own."""
    model = case.fresh()
    before, unmerged = traces(model), case.run(model)
    handle = patch_model(model, r=case.r, **case.patch)
    expected, twin = case.run(model), copy.deepcopy(model)
    handle_of(twin).r = 0
    assert_equal(case.run(twin), unmerged, "a deep copy with r = 0")
    assert_equal(case.run(model), expected, "the model after its copy was set to r = 0")
    expect(handle_of(twin).model is twin, "the handle of a deep copy is that of the model")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_equal(case.run(loaded), expected, "a model that was saved and loaded")
    expect(handle_of(loaded).config == handle.config, f"a loaded model has the settings {handle_of(loaded).config}")
    unpatch(loaded)
    assert_equal(case.run(loaded), unmerged, "a loaded model, unpatched")
    left = {path: sorted(set(part[1]) - set(before[path][1])) for path, part in traces(loaded).items()}
    expect(not any(left.values()), f"unpatching a loaded model leaves {[*filter(None, left.values())]}")
    assert_equal(case.run(model), expected, "the model after its copy was unpatched")


def threads(case: FamilyCase) -> None:
    """Four threads with batches of their own get their own answers, sizes and groups."""
    model = case.merging()
    handle, wrong = handle_of(model), []
    cases = [case.taking(partial(_drawn, count=2 + at)) for at in range(4)]

    def seen(case: FamilyCase) -> tuple[Tensor, ...]:
        with torch.no_grad():  # and no seed: it is the same for all threads
            out = case.output(case.call(model)).clone()
        return out, handle.sizes, handle.groups[-1]

    expected = [seen(case) for case in cases]
    start = threading.Barrier(4)

    def work(at: int) -> None:
        start.wait()
        for _ in range(40):
            try:
                is_right = all(torch.equal(a, b) for a, b in zip(seen(cases[at]), expected[at], strict=True))
            except Exception as error:
                wrong.append(f"thread {at}: {type(error).__name__}: {error}")
                return
            if not is_right:
                wrong.append(f"thread {at} got another answer")

    run_in_threads(work, 4)
    expect(not wrong, f"{len(wrong)} of 160 forwards are wrong: {wrong[:1]}")


def _drawn(value: Tensor, count: int) -> Tensor:
    """A batch of `count` like this one."""
    return torch.randn(count, *value.shape[1:]).to(value) if value.is_floating_point() else value[[0] * count]


def run_in_threads(work: Callable[[int], None], count: int) -> None:
    """Call `work(0)` ... `work(count - 1)` at once, each in a thread of its own, and wait for all."""
    running = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def one_graph(case: FamilyCase, is_dynamic: bool = True) -> None:
    """A compiler captures the forward without a break, for any number of inputs."""
    torch._dynamo.reset()
    model = case.shortened()
    handle = patch_model(model, r=case.r, **case.patch)
    expected, sizes = case.run(model), handle.sizes
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    if is_dynamic:
        case.taking(_marked)
    twice = case.taking(lambda value: torch.cat((value, value)))
    assert_close(case.run(compiled), expected, what="compiled")
    assert_close(twice.run(compiled)[len(expected) :], expected, what="compiled, twice as many inputs")
    assert_close(handle.sizes[: len(sizes)], sizes, what="the sizes of a compiled forward")
    if not (is_dynamic and case.patch["track"]):
        handle.r = 1
        changed = case.run(model)
        assert_close(case.run(compiled), changed, what="compiled, another r")


def _marked(value: Tensor) -> Tensor:
    torch._dynamo.mark_dynamic(value, 0)
    return value


def export(case: FamilyCase) -> None:
    """An exported graph holds torch's own operators, answers for any batch, and leaves the model as it was."""
    shapes: Any = ({0: torch.export.Dim("batch", min=2, max=64)},)
    for strict in (False, True):
        model = case.shortened()
        twice = case.taking(lambda value: torch.cat((value, value.flip(0))))
        expect(len(twice.inputs) == 1 and not twice.options, "a model that takes more than one tensor is not exported")
        handle = patch_model(model, r=case.r, **{**case.patch, "track": False})
        expected = twice.run(model)
        with warnings.catch_warnings():
            # strict export warns that the forward writes its sizes to the handle; the graph does not need them
            warnings.filterwarnings("ignore", message="While compiling, we found certain side effects")
            program = torch.export.export(model, twice.inputs, strict=strict, dynamic_shapes=shapes)
        targets: list[Any] = [node.target for node in program.graph.nodes if node.op == "call_function"]
        # the rest: sizes, getitem
        spaces = {target.namespace for target in targets if not isinstance(target, BuiltinFunctionType)}
        what = f"exported, strict={strict}"
        expect(spaces == {"aten"}, f"{what}: the graph holds operators of {spaces}")
        exported: Any = program.module()
        assert_close(twice.run(exported), expected, what=what)
        assert_close(twice.taking(lambda value: value[:3]).run(exported), expected[:3], what=f"{what}, 3 inputs")
        assert_equal(twice.run(model), expected, f"the model after export, strict={strict}")
        sums = handle.sizes.sum(dim=1)
        expect((sums == sums[0]).all() and type(handle.sizes) is Tensor, f"{what}: sizes sum to {sums.tolist()}")
