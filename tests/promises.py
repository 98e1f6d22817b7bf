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
from tokenmerge.testing import check_adapter

Output = Callable[[Any], Tensor]


class Family(NamedTuple):
    """Where a model stands on the page of what is supported: a heading, and its name there."""

    heading: str
    name: str


class Row(NamedTuple):
    state: str
    adapter: str
    remark: str


# the heading of transformers' registry
MODEL_TYPES = "transformers by model type"
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
    entry: str = "",
    **options: Any,
) -> list[int]:
    """Check the promise of merging on a model in eval mode whose parameters are randomised, and note it for the page.

    Returns the tokens after each block. The arguments are those of `check_adapter`; `options` are the model's, `family`
    is the model's place on the page of what is supported, `entry` the part that the inputs are for. Use float64 models
    where the tolerance should mean something.
    """
    report = check_adapter(
        model,
        *inputs,
        r=r,
        output=output,
        options=options,
        patch={"prop_attn": prop_attn, **(patch or {})},
        described_by=adapter,
        tolerance=tolerance,
        is_simulated=is_simulated,
        entry=entry,
        only=["group_mean"],
    )
    assert report is not None
    shown = "; ".join(report.limits) if is_simulated else "; ".join(("equivalence not compared", *report.limits))
    note(family or _own_family(model), "supported", shown, report.adapter)
    return report.tokens


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
