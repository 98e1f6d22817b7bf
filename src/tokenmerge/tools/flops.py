"""Count the multiply-accumulates of a forward, with the tokens that are really there."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenmerge import adapters, kernels
from tokenmerge.errors import UnsupportedModelError
from tokenmerge.handle import handle_of

__all__ = ["Count", "count", "flops", "macs"]


class Count(NamedTuple):
    """Multiply-accumulates of one forward: the model's own, and what choosing the tokens costs on top."""

    model: int
    matching: int


def flops(model: nn.Module, input_size: Sequence[int]) -> int:
    """Return the MACs of one forward on an input of this size, with or without a batch in front.

    MACs, which the papers call FLOPs: convolutions, linear layers and both products of attention; norms, activations,
    additions and, as in the papers, the matching itself are not counted (`count` gives that beside it). Nothing is
    computed: shapes run through a copy without storage, so a model on the meta device works as well and
    `handle.tokens` stays as it was.

    >>> import timm
    >>> model = timm.create_model("vit_small_patch16_224", pretrained=False)
    >>> round(flops(model, (3, 224, 224)) / 1e9, 2)
    4.6
    """
    return count(model, input_size).model


macs = flops  # by the name of what is counted


def count(model: nn.Module, input_size: Sequence[int]) -> Count:
    """Return the MACs of one forward, those of the matching apart; see `flops`."""
    # imports triton where that is installed, which `import tokenmerge` must not
    from torch.utils.flop_counter import FlopCounterMode

    shape = tuple(input_size) if len(input_size) != _rank(model) else (1, *input_size)
    # handing deepcopy the replaced tensors keeps it from copying the weights
    memo: dict[int, object] = {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in model.parameters()}
    memo.update({id(b): b.to("meta") for b in model.buffers()})
    twin = copy.deepcopy(model, memo)
    dtype = next((t.dtype for t in chain(model.parameters(), model.buffers()) if t.is_floating_point()), None)
    counter = FlopCounterMode(display=False)
    meters: list[Any] = []
    handle = handle_of(twin, None)
    for runner in handle.runners if handle else ():
        meters.append(_Meter(runner.method, counter))
        runner.method = meters[-1]
    # the fused kernels of some devices are not in the counter's table; the plain products always are, also of ours,
    # and a version that is forced for the model's device has none for this one
    with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH), kernels.force("reference"):
        twin(torch.empty(shape, device="meta", dtype=dtype))
    matching = sum(meter.seen for meter in meters)
    return Count((counter.get_total_flops() - matching) // 2, matching // 2)


def _rank(model: nn.Module) -> int:
    """Return how many dimensions one input has: those its family knows (a clip, a spectrogram), else an image's."""
    try:
        known = adapters.find(model).layout(model).input_size
    except UnsupportedModelError:
        known = None
    return len(known) if known else 3


class _Meter:
    """Stands in for a method and notes what the counter counts while it plans."""

    def __init__(self, method: Any, counter: Any) -> None:
        self.method, self.counter, self.seen = method, counter, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def plan(self, view: Any, r: int) -> Any:
        before = self.counter.get_total_flops()
        plan = self.method.plan(view, r)
        self.seen += self.counter.get_total_flops() - before
        return plan
