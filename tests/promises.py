"""What every supported model keeps, as one function: the families' own tests and the sweep over timm call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import tokenmerge
from helpers import assert_close

Output = Callable[[Any], Tensor]


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
    **options: Any,
) -> list[int]:
    """Check a model in eval mode whose parameters are randomised; returns the tokens after each block.

    r = 0 is the original, as many tokens go as planned, sizes add up to the input's tokens, merging changes the answer,
    the answer and all restored tokens are those of the group-mean simulation (`is_simulated`), and removal is
    bit-exact. `output` picks the tensor to compare out of what the model returns for `inputs` and `options`; `patch`
    are further options of `tokenmerge.patch`. Use float64 models where the tolerance should mean something.
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
    return left


def _attributes(model: nn.Module) -> dict[str, list[str]]:
    hooks = {path: [*module._forward_hooks, *module._forward_pre_hooks] for path, module in model.named_modules()}
    assert not any(hooks.values())
    return {path: sorted(module.__dict__) for path, module in model.named_modules()}
