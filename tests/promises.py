"""What every supported model keeps, as one function: the families' own tests and the sweep over timm call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from helpers import assert_close
from tokenmerge.errors import UnsupportedError

Output = Callable[[Any], Tensor]


class Family(NamedTuple):
    """Where a model stands on the page of what is supported: a heading, and its name there."""

    heading: str
    name: str


class Row(NamedTuple):
    state: str
    adapter: str
    remark: str


# what this run of the tests has found, for the page
FOUND: dict[Family, Row] = {}


def note(family: Family, state: str, remark: str, adapter: str = "-") -> None:
    """Write down a finding for the page of what is supported."""
    FOUND[family] = Row(state, adapter, remark)


def check_promises(
    model: nn.Module,
    *inputs: Any,
    r: int = 3,
    output: Output = lambda out: out,
    tolerance: float = 1e-5,
    is_simulated: bool = True,
    prop_attn: bool | str = True,
    patch: dict[str, Any] | None = None,
    adapter: Any = None,
    family: Family | None = None,
    **options: Any,
) -> list[int]:
    """Check a model in eval mode whose parameters are randomised; returns the tokens after each block.

    r = 0 is the original, as many tokens go as planned, sizes add up to the input's tokens, merging changes the answer,
    the answer and all restored tokens are those of the group-mean simulation (`is_simulated`), and removal is
    bit-exact. `output` picks the tensor to compare out of what the model returns for `inputs` and `options`; `patch`
    are further options of `tokenmerge.patch`, `family` the model's place on the page of what is supported. Use
    float64 models where the tolerance should mean something.
    """
    settings = {"prop_attn": prop_attn, "track": True, **(patch or {})}

    def run() -> Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return output(model(*inputs, **options)).clone()

    unmerged, keys, before = run(), list(model.state_dict()), _attributes(model)
    assert unmerged.isfinite().all()
    handle = tokenmerge.patch(model, r=0, **settings)
    assert list(model.state_dict()) == keys
    assert_close(run(), unmerged, tolerance)
    handle.r = r
    merged = run()
    groups, positions = handle.groups, handle.positions
    n, left = groups[0].shape[1], []
    for _ in groups:
        n -= min(r, (n - handle.prefix) // 2)
        left.append(n)
    assert handle.tokens == left and handle.sizes.shape[1] == left[-1]
    assert left[-1] < groups[0].shape[1], "no token was removed"
    assert (handle.sizes.sum(dim=1) == groups[0].shape[1]).all()
    report = handle.report()
    handle.remove()
    assert torch.equal(run(), unmerged)
    assert _attributes(model) == before
    assert merged.shape != unmerged.shape or (merged - unmerged).abs().max() > 10 * tolerance, "merging changed nothing"
    with tokenmerge.patched(model, r=r, **{**settings, "restore": "dense"}) as handle:
        restored = run()
        for got, expected in zip(handle.groups, groups, strict=True):
            assert torch.equal(got, expected)
    assert restored.shape == unmerged.shape
    if is_simulated:
        simulated = output(tokenmerge.simulate(model, groups, *inputs, positions=positions, adapter=adapter, **options))
        assert_close(restored, simulated, tolerance)
        if merged.shape == simulated.shape:
            assert_close(merged, simulated, tolerance)
    shown = "; ".join(report.limits) if is_simulated else "; ".join(("equivalence not compared", *report.limits))
    note(family or _own_family(model), "supported", shown, report.adapter)
    return left


def _own_family(model: nn.Module) -> Family:
    package = type(model).__module__.partition(".")[0]
    return Family(package, type(model).__qualname__)


def check_intermediates(model: Any, x: Tensor, r: int = 3, tolerance: float = 1e-6) -> None:
    """Check timm's feature maps: refused while tokens are merged, those of the simulation with `restore="dense"`."""
    with tokenmerge.patched(model, r=r, prop_attn=True, track=True) as handle, torch.no_grad():
        model(x)
        groups, positions, prefix = handle.groups, handle.positions, handle.prefix
        for name in ("forward_features", "forward_intermediates"):
            with pytest.raises(UnsupportedError, match=rf"{name}\(\) hands out one token per place"):
                getattr(model, name)(x)
    entered: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, args: entered.append(args[0])) for block in [*model.blocks][1:]]
    tokenmerge.simulate(model, groups, x, positions=positions)
    for hook in hooks:
        hook.remove()
    with tokenmerge.patched(model, r=r, prop_attn=True, restore="dense"), torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
    assert len(maps) == len(entered) + 1
    for got, tokens in zip(maps, entered, strict=False):
        assert_close(got.flatten(2).mT, tokens[:, prefix:], tolerance)


def _attributes(model: nn.Module) -> dict[str, list[str]]:
    hooks = {path: [*module._forward_hooks, *module._forward_pre_hooks] for path, module in model.named_modules()}
    assert not any(hooks.values())
    return {path: sorted(module.__dict__) for path, module in model.named_modules()}
