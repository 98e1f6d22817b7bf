"""Every method in every family: r = 0 is the original, tokens add up, removal is exact, or a refusal says why."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from helpers import answer, assert_close, bound_attributes, randomised, replayed
from tokenmerge.adapters import ADAPTERS
from tokenmerge.adapters.base import Adapter, BlockSpec, WindowSpec
from tokenmerge.errors import UnsupportedError
from tokenmerge.methods import NEW, Learned, Reduction, find, list_methods

R = 3


@cache
def _family(adapter: Adapter) -> tuple[nn.Module, Tensor, Tensor]:
    """A randomised model of the family, an input of two images, and the model's own answer."""
    torch.manual_seed(0)
    model, x = adapter.tiny()
    model, x = randomised(model).eval(), torch.randn(2, *x.shape[1:])
    return model, x, _run(model, x)


def _run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return answer(model(x)).clone()


def _method(name: str, adapter: Adapter) -> Reduction:
    kind = find(name)
    if not issubclass(kind, Learned):
        return kind()
    return kind(weights=NEW, heads=1) if name == "spvit" else kind(weights=NEW)


def _may_refuse(method: Reduction, adapter: Adapter, model: nn.Module) -> bool:
    """Whether this family lacks something that the method says it needs."""
    specs = [adapter.spec(block) for _, block in adapter.blocks(model)]
    layout = adapter.layout(model)
    is_windowed = any(isinstance(spec, WindowSpec) for spec in specs)
    is_composed = all(isinstance(spec, BlockSpec) and spec.mlp for spec in specs)
    return (
        ("class" in method.needs and (is_windowed or not layout.leads_with_class))
        or ("places" in method.needs and (is_windowed or layout.grid is None))
        or (method.follows_mlp and not is_composed)
        or (method.name == "tokenlearner" and (layout.tokens is None or is_windowed))
        or (is_windowed and isinstance(method, Learned))
    )


@pytest.mark.parametrize("name", list_methods())
@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_a_method_in_a_family(adapter: Adapter, name: str) -> None:
    model, x, expected = _family(adapter)
    resolved = adapter.resolve(model)
    method, before = _method(name, adapter), bound_attributes(model)
    try:
        with tokenmerge.patched(model, method, r=R, track="pairs") as handle:
            merged = _run(model, x)
            _check_tokens(handle, method)
            assert all(map(torch.equal, *replayed(handle.trace())))
            handle.r = 0
            assert_close(_run(model, x), expected, 1e-5)
            assert merged.isfinite().all() and merged.shape[0] == expected.shape[0]
            if handle.tokens and not method.is_adaptive:
                assert not torch.equal(merged, expected), "nothing was reduced"
    except UnsupportedError as error:
        assert _may_refuse(method, resolved, model), f"{name} refused {adapter.name} without need: {error}"
        assert method.name in str(error) or "this method" in str(error)
    assert torch.equal(_run(model, x), expected) and bound_attributes(model) == before


def _check_tokens(handle: tokenmerge.Handle, method: Reduction) -> None:
    groups, sizes = handle.groups[-1], handle.sizes
    whole, left = groups.shape[1], handle.tokens
    sides = [getattr(runner.block, "window_size", None) for runner in handle.runners]
    # inside windows every block merges anew what its attention sees, and ends with all
    is_windowed = "windows" in str(handle.report())
    entered = [side**2 or whole for side in sides] if is_windowed else [whole, *left[:-1]]
    planned = [before - after for before, after in zip(entered, left, strict=True)]
    assert all(0 <= gone <= R for gone in planned)
    if not method.is_adaptive:
        assert planned == [min(R, method.largest_r(n, handle.prefix)) for n in entered]
    assert not is_windowed or handle.has_merged == (sum(planned) > 0)
    assert sizes.shape == (groups.shape[0], whole if is_windowed else left[-1]) and (sizes >= 0).all()
    assert (sizes.sum(dim=1) <= whole + 1e-3).all(), "more tokens than came in"
    front = torch.arange(handle.prefix).expand(groups.shape[0], -1)
    assert torch.equal(groups[:, : handle.prefix], front) and (sizes[:, : handle.prefix] == 1).all()
