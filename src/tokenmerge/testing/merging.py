"""One model and its inputs, and the promise that merging means something: it is the group mean, and can be undone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge import adapters
from tokenmerge.adapters.base import Adapter
from tokenmerge.api import patch as patch_model
from tokenmerge.api import patched
from tokenmerge.handle import Handle
from tokenmerge.measure.simulate import simulate
from tokenmerge.report import Report
from tokenmerge.testing.comparing import assert_close, assert_equal, expect, traces

__all__ = ["FamilyCase", "group_mean"]

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class FamilyCase:
    """A model in eval mode, how it is called, and how it is patched; see `check_adapter`."""

    model: nn.Module
    inputs: tuple[Any, ...]
    options: dict[str, Any]
    patch: dict[str, Any]
    r: Any
    output: Callable[[Any], Tensor]
    tolerance: float
    is_simulated: bool
    adapter: Adapter | None
    is_named: bool = False  # the adapter was given, not the model
    entry: str = ""  # path of the part that the inputs enter, of a model that is patched as a whole
    reports: list[Report] = field(default_factory=list)  # of models that merged as they should

    def fresh(self) -> nn.Module:
        """Return a copy of the model, to do anything to."""
        return copy.deepcopy(self.model)

    def merging(self) -> nn.Module:
        """Return a patched copy of the model."""
        model = self.fresh()
        patch_model(model, r=self.r, **self.patch)
        return model

    def call(self, model: nn.Module) -> Any:
        return model.get_submodule(self.entry)(*self.inputs, **self.options)

    def simulated(self, groups: Sequence[Tensor], positions: Sequence[Tensor]) -> Any:
        """Return what the unpatched model makes of the means of groups."""
        part = self.model.get_submodule(self.entry)
        given = {"positions": positions, "adapter": self.described(), **self.options}
        return simulate(part, groups, *self.inputs, **given)

    def run(self, model: nn.Module) -> Tensor:
        """Return the answer to the inputs without gradients, the same random numbers every time."""
        torch.manual_seed(0)
        with torch.no_grad():
            return self.output(self.call(model)).clone()

    def loss(self, model: nn.Module) -> Tensor:
        torch.manual_seed(0)
        loss: Tensor = self.output(self.call(model)).square().sum()
        return loss

    def taking(self, change: Change) -> FamilyCase:
        """Return the case with every input tensor that is a batch changed."""
        lengths = [len(value) for value in self.inputs if isinstance(value, Tensor) and value.dim()]
        expect(max(lengths, default=0) > 1, "no input is a batch of two or more: this was not checked")
        batch = max(lengths)

        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) and value.dim() and len(value) == batch else value

        options = {name: changed(value) for name, value in self.options.items()}
        return replace(self, inputs=tuple(map(changed, self.inputs)), options=options)

    def differentiable(self) -> FamilyCase:
        """Return the case with inputs of its own that ask for gradients."""
        return self.taking(lambda value: value.detach().clone().requires_grad_(value.is_floating_point()))

    def leaves(self) -> list[Tensor]:
        return [value for value in self.inputs if isinstance(value, Tensor) and value.requires_grad]

    def description(self, model: nn.Module) -> Adapter:
        return self.adapter or adapters.find(model)

    def described(self) -> Adapter | None:
        """Return what simulates the model where that is not found by itself."""
        return None if self.is_named else self.adapter

    def resolved(self, model: nn.Module) -> Adapter:
        """Return what describes the part of the model that has tokens."""
        adapter = self.description(model)
        with suppress(Exception):
            adapter = adapter.resolve(model)
        return adapter

    def blocks(self, model: nn.Module) -> list[str]:
        """Return the names of the model's blocks."""
        return [name for name, _ in self.resolved(model).blocks(model)]

    def shortened(self) -> nn.Module:
        """Return a copy with two blocks: one that merges tokens of size 1, one that is handed sizes by another.

        A trace takes time for every block and finds nothing in a third one. A model that does not run with fewer
        blocks keeps all.
        """
        model = self.fresh()
        with suppress(Exception):
            gone = {block for _, block in self.description(model).resolve(model).blocks(model)[2:]}
            for module in list(model.modules()):
                if isinstance(module, (nn.ModuleList, nn.Sequential)):
                    for place in reversed(range(len(module))):
                        if module[place] in gone:
                            del module[place]
            self.run(model)
            return model
        return self.fresh()


def group_mean(case: FamilyCase) -> None:
    """Tokens go as planned, sizes add up, merging is the group mean, all tokens can be had back, removal is exact."""
    if case.is_named:
        # rounding is out of the way there
        wide: Change = lambda value: value.double() if value.is_floating_point() else value  # noqa: E731
        case = replace(case.taking(wide), model=case.fresh().double())
    model, tolerance = case.model, case.tolerance
    unmerged, keys, before = case.run(model), list(model.state_dict()), traces(model)
    expect(unmerged.isfinite().all(), "the model's own answer is not finite")
    with patched(model, r=0, **case.patch) as handle:
        expect(list(model.state_dict()) == keys, "the names of the state dict are others while patched")
        assert_close(case.run(model), unmerged, tolerance, "r = 0")
        handle.r = case.r
        merged, groups, positions = case.run(model), handle.groups, handle.positions
        _check_counts(handle, groups, case.r)
        report = handle.report()
    assert_equal(case.run(model), unmerged, "after removal")
    expect(traces(model) == before, "removal leaves traces in the model")
    is_same = merged.shape == unmerged.shape and bool((merged - unmerged).abs().max() <= 10 * tolerance)
    expect(not is_same, "merging changed nothing: the comparison would be empty")
    with patched(model, r=case.r, **{**case.patch, "restore": "dense"}) as handle:
        restored = case.run(model)
        for layer, (got, expected) in enumerate(zip(handle.groups, groups, strict=True)):
            assert_equal(got, expected, f"the groups of block {layer} with restore='dense'")
    expect(
        restored.shape == unmerged.shape, f"restored answers are {tuple(restored.shape)}, not {tuple(unmerged.shape)}"
    )
    case.reports.append(report)
    if not case.is_simulated:
        return
    simulated = case.output(case.simulated(groups, positions))
    try:
        assert_close(restored, simulated, tolerance, "restored and simulated")
        if merged.shape == simulated.shape:
            assert_close(merged, simulated, tolerance, "merged and simulated")
    except AssertionError as error:
        raise AssertionError(f"{error}; {_first_wrong(case, groups, positions)}") from error


def _check_counts(handle: Handle, groups: Sequence[Tensor], r: Any) -> None:
    """Compare what every block left with what was planned."""
    n, left = groups[0].shape[1], []
    if isinstance(r, int):
        for _ in groups:
            n -= min(r, (n - handle.prefix) // 2)
            left.append(n)
        expect(handle.tokens == left, f"blocks leave {handle.tokens} tokens, {left} were planned")
    whole, sizes = groups[0].shape[1], handle.sizes
    expect(sizes.shape[1] == handle.tokens[-1], f"{sizes.shape[1]} sizes for {handle.tokens[-1]} tokens")
    expect(handle.tokens[-1] < whole, f"no token was removed: {handle.tokens} of {whole}")
    sums = sizes.sum(dim=1)
    expect((sums == whole).all(), f"sizes sum to {sums.tolist()}, not to {whole} tokens")


def _first_wrong(case: FamilyCase, groups: Sequence[Tensor], positions: Sequence[Tensor]) -> str:
    """Say which block is the first whose tokens are not those of the simulation."""
    model, names = case.model, case.blocks(case.model)

    def watched(run: Callable[[], Any]) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        hooks = []
        for name in names:

            def note(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
                seen[name] = (out[0] if isinstance(out, tuple) else out).detach().clone()

            hooks.append(model.get_submodule(name).register_forward_hook(note))
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    with patched(model, r=case.r, **{**case.patch, "restore": "dense"}):
        merged = watched(lambda: case.run(model))
    simulated = watched(lambda: case.simulated(groups, positions))
    for name in names:
        one, other = merged[name], simulated[name]
        if one.shape != other.shape:
            return f"block {name} leaves {tuple(one.shape)}, the simulation {tuple(other.shape)}"
        difference = (one - other).abs().max().item()
        if difference > case.tolerance * max(1.0, other.abs().max().item()):
            return f"the first block with wrong tokens is {name}: max |difference| {difference:.3g}"
    return "the tokens of all blocks are right: it is what follows them (pooling, the head), or layout.prefix"
