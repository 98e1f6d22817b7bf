"""Count the multiply-accumulates (MACs) of a forward, with the tokens that remain in each block."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenmerge import adapters, kernels
from tokenmerge.errors import UnsupportedModelError
from tokenmerge.handle import handle_of
from tokenmerge.schedule import R, Schedule

__all__ = ["CostModel", "Count", "count", "flops", "macs"]


class Count(NamedTuple):
    """MACs of one forward: those of the model, and those of the matching on top."""

    model: int
    matching: int


def flops(model: nn.Module, input_size: Sequence[int]) -> int:
    """Return the MACs of one forward on an input of this size, with or without the batch dimension.

    The papers call them FLOPs. Counted are convolutions, linear layers and both products of attention; not norms,
    activations, additions and, as in the papers, the matching (`count` returns that separately). Nothing is computed: a
    copy on the meta device runs with shapes only, so `handle.tokens` does not change.

    >>> import timm
    >>> model = timm.create_model("vit_small_patch16_224", pretrained=False)
    >>> round(flops(model, (3, 224, 224)) / 1e9, 2)
    4.6
    """
    return count(model, input_size).model


macs = flops  # the precise name


def count(model: nn.Module, input_size: Sequence[int]) -> Count:
    """Return the MACs of one forward, with the matching counted separately; see `flops`."""
    return _Twin(model, input_size).count()


class CostModel:
    """The MACs of a patched model at any schedule, for one input size.

    The MACs of a block are a polynomial of the tokens n that enter it and the m that leave it: `c0 + c1 n + c2 n^2 + c3
    m` (attention products: n^2; projections: n; MLP: m). The coefficients of each block are fitted to a few forwards on
    the meta device. Where the fit is not exact (merging inside windows, methods that depend on the values), every
    schedule is counted, and `is_exact` is False.

    Raises `NotPatchedError` for a model that is not patched. Does not change the model.
    """

    def __init__(self, model: nn.Module, input_size: Sequence[int]) -> None:
        handle = handle_of(model)
        self._twin = _Twin(model, input_size)
        depth = len(handle.runners)
        unmerged = self._twin.run([0] * depth)
        self.tokens = unmerged.tokens[0]  # that enter the first block
        self._protected, self._config = handle.protected, handle.config
        few, many = max(1, self.tokens // (2 * depth)), self.tokens
        shapes = [[many] * depth, [few] * depth, [2 * few] * depth, [few, 0] * depth, [0, 3 * few] * depth]
        schedules = [[0] * depth, *(shape[:depth] for shape in [*shapes, [many, 0, few] * depth])]
        runs = [unmerged, *(self._twin.run(r) for r in schedules[1:])]
        self._outside = unmerged.model - sum(unmerged.blocks)
        self._terms: list[Tensor] = []  # [4] float64 a block
        worst = 0.0
        for layer in range(depth):
            seen = torch.stack([_powers(run.tokens[layer], run.tokens[layer + 1]) for run in runs])
            macs = torch.tensor([run.blocks[layer] for run in runs], dtype=torch.float64)
            scale = seen.amax(dim=0)
            # columns may be linearly dependent: n is the same for the first block at every schedule
            terms = torch.linalg.lstsq(seen / scale, macs[:, None], driver="gelsd").solution[:, 0] / scale
            worst = max(worst, (seen @ terms - macs).abs().max().item())
            self._terms.append(terms)
        outside = {run.model - sum(run.blocks) for run in runs}
        is_as_planned = all(self.planned(r) == run.tokens for r, run in zip(schedules, runs, strict=True))
        self.is_exact = worst < 0.5 and len(outside) == 1 and is_as_planned
        self._counted: dict[tuple[Any, ...], int] = {}  # by schedule, where MACs are not exact

    def __call__(self, r: R) -> int:
        """Return the MACs of one forward at `r`, in any form that `patch` takes."""
        if not self.is_exact:
            key = self._schedule(r).amounts
            if key not in self._counted:
                self._counted[key] = self._twin.run(r).model
            return self._counted[key]
        tokens = self.planned(r)
        pairs = zip(self._terms, tokens, tokens[1:], strict=False)
        return self._outside + sum(round((terms @ _powers(n, m)).item()) for terms, n, m in pairs)

    def planned(self, r: R) -> list[int]:
        """Return the tokens that enter the first block and those that leave each block at `r`."""
        return [self.tokens, *self._schedule(r).tokens(self.tokens, self._protected)]

    def _schedule(self, r: R) -> Schedule:
        multiple_of = r.multiple_of if isinstance(r, Schedule) else self._config.multiple_of
        return Schedule.of(r, len(self._terms), multiple_of, self._config.method.largest_r)


def _powers(n: int, m: int) -> Tensor:
    return torch.tensor([1, n, n * n, m], dtype=torch.float64)


class _Run(NamedTuple):
    """The MACs of one forward of the twin, and the tokens that enter each block and leave the last one."""

    model: int
    blocks: list[int]
    tokens: list[int]


class _Twin:
    """A copy of a model on the meta device: shapes without storage."""

    def __init__(self, model: nn.Module, input_size: Sequence[int]) -> None:
        shape = tuple(input_size) if len(input_size) != _rank(model) else (1, *input_size)
        # with meta tensors in the memo, deepcopy does not copy the weights
        memo: dict[int, object] = {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in model.parameters()}
        memo.update({id(b): b.to("meta") for b in model.buffers()})
        self.model = copy.deepcopy(model, memo)
        dtype = next((t.dtype for t in chain(model.parameters(), model.buffers()) if t.is_floating_point()), None)
        self.x = torch.empty(shape, device="meta", dtype=dtype)
        self.handle = handle_of(self.model, None)
        self.blocks: list[_BlockMeter] = []
        for runner in self.handle.runners if self.handle else ():
            runner.method = cast(Any, _Meter(runner.method))
            self.blocks.append(_BlockMeter(runner))
            runner.block.__dict__["forward"] = self.blocks[-1]

    def count(self) -> Count:
        # imported here because it imports triton, which `import tokenmerge` must not do
        from torch.utils.flop_counter import FlopCounterMode

        counter = FlopCounterMode(display=False)
        for meter in self.blocks:
            meter.start(counter)
        # the counter knows the plain products, but not every fused kernel (torch's or ours); a kernel version that the
        # user forced may not run on the meta device
        with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH), kernels.force("reference"):
            self.model(self.x)
        matching = sum(meter.method.seen for meter in self.blocks)
        return Count((counter.get_total_flops() - matching) // 2, matching // 2)

    def run(self, r: R) -> _Run:
        """Return the MACs and tokens of one forward of the patched model at `r`."""
        assert self.handle is not None
        self.handle.r = r
        model = self.count().model
        frame = self.handle._state.last()
        assert frame is not None
        tokens = [shape[1] if shape else 0 for shape in frame.shape]
        blocks = [(meter.seen - meter.method.seen) // 2 for meter in self.blocks]
        return _Run(model, blocks, [self.blocks[0].entered, *tokens[1:]])


def _rank(model: nn.Module) -> int:
    """Return the number of dimensions of one input: as the model's family declares it (clips, spectrograms), else 3."""
    try:
        known = adapters.find(model).layout(model).input_size
    except UnsupportedModelError:
        known = None
    return len(known) if known else 3


class _Meter:
    """Replaces a method and records the MACs counted while it plans."""

    def __init__(self, method: Any) -> None:
        self.method, self.seen = method, 0
        self.counter: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def plan(self, view: Any, r: int) -> Any:
        before = self.counter.get_total_flops()
        plan = self.method.plan(view, r)
        self.seen += self.counter.get_total_flops() - before
        return plan


class _BlockMeter:
    """Replaces the runner of a block and records the MACs counted in it."""

    def __init__(self, runner: Any) -> None:
        self.runner, self.method = runner, runner.method
        self.counter: Any = None
        self.seen = self.entered = 0

    def start(self, counter: Any) -> None:
        self.counter = self.method.counter = counter
        self.seen = self.method.seen = 0

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        before = self.counter.get_total_flops()
        self.entered = x.shape[1 if self.runner.layout.batch_first else 0]
        out = self.runner(x, *args, **kwargs)
        self.seen += self.counter.get_total_flops() - before
        return out
