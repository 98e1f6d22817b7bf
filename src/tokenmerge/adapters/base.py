"""What a model family is: where its blocks are, how one is composed, where keys come from, how it pools."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tokenmerge.adapters.heads import Sizes
from tokenmerge.adapters.taps import AttentionTap
from tokenmerge.errors import AdapterMismatchError

__all__ = ["Adapter", "BlockSpec", "Replacement", "Sizes", "TokenLayout", "check_parity", "class_names"]


@dataclass(frozen=True)
class BlockSpec:
    """A residual block as data: `x + chain(attention)`, then `x + chain(mlp)`, each chain the children in call order.

    `attn` is the child of the first chain that the tap stands in for.
    """

    attention: tuple[str, ...]
    attn: str
    mlp: tuple[str, ...]


@dataclass(frozen=True)
class TokenLayout:
    """Where tokens lie: `prefix` protected ones in front, `grid` rows and columns of patches, `tokens` in all."""

    prefix: int
    grid: tuple[int, int] | None
    tokens: int
    input_size: tuple[int, int, int]  # channels, height, width
    batch_first: bool = True


class Replacement(NamedTuple):
    """An attribute of a module that is replaced on the instance while the model is patched."""

    owner: nn.Module
    attribute: str
    value: Any


class Adapter(ABC):
    """One model family. Adapters recognise a model by its structure and import their host inside functions only."""

    name: ClassVar[str]
    families: ClassVar[str]  # what `tokenmerge list` shows
    landmarks: ClassVar[tuple[str, ...]]  # names of children that this family has; an error compares them

    @abstractmethod
    def matches(self, model: nn.Module) -> bool:
        """Say whether this adapter describes the model."""

    @abstractmethod
    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Return the blocks in order, with their names in the model."""

    @abstractmethod
    def spec(self, block: nn.Module) -> BlockSpec:
        """Describe one block; raises `UnsupportedModelError` where it is not of this family."""

    @abstractmethod
    def layout(self, model: nn.Module) -> TokenLayout:
        """Return where the tokens lie, for the input size the model was built with."""

    @abstractmethod
    def tap(self, block: nn.Module) -> AttentionTap:
        """Build the tap of the block's attention, not attached yet."""

    def head(self, model: nn.Module, sizes: Sizes) -> tuple[list[Replacement], list[str]]:
        """Return what makes pooling weigh tokens by size, and what could not be done. Default: nothing."""
        return [], []

    def trained_without_merging(self, model: nn.Module) -> tuple[bool, str | None]:
        """Say whether this is an MAE model never trained with merging (then no proportional attention); any doubt."""
        return False, None

    @abstractmethod
    def tiny(self) -> tuple[nn.Module, Tensor]:
        """Return a small random model of the family in eval mode and an input for it."""


def class_names(module: nn.Module) -> list[str]:
    """Return the module's class names, most derived first, each as `package.module.Class`."""
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__]


def check_parity(
    block: nn.Module,
    composed: Callable[[Tensor], Any],
    original: Callable[[Tensor], Any],
    layout: TokenLayout,
    label: str,
) -> float:
    """Compare a block with its description on random tokens, nothing merged, in eval and train mode.

    Returns the largest absolute difference; raises `AdapterMismatchError` where it is more than rounding. The
    model's random state, buffers and mode are left as they were.
    """
    parameter = next((p for p in block.parameters() if p.is_floating_point()), None)
    if parameter is None or parameter.is_meta:
        return 0.0
    worst = 0.0
    buffers = [buffer.detach().clone() for buffer in block.buffers()]
    modes = [(module, module.training) for module in block.modules()]
    devices = [parameter.device] if parameter.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        width = parameter.shape[-1]  # norm weight [C] or projection [3C, C]
        x = torch.randn(2, layout.prefix + 5, width, device=parameter.device, dtype=parameter.dtype)
        x = x if layout.batch_first else x.transpose(0, 1)
        try:
            for training in (False, True):
                block.train(training)
                results = []
                for forward in (original, composed):
                    torch.manual_seed(0)
                    results.append(forward(x))
                worst = max(worst, _difference(results[0], results[1], label))
        finally:
            for module, mode in modes:
                module.training = mode
            for buffer, saved in zip(block.buffers(), buffers, strict=True):
                buffer.copy_(saved)
    return worst


def _difference(original: Any, composed: Any, label: str) -> float:
    if not isinstance(original, Tensor):
        raise AdapterMismatchError(
            f"{label} returns {type(original).__name__}, not a tensor; no adapter describes that."
        )
    difference = (original - composed).abs().max().item()
    tolerance = 1e-5 if original.dtype in (torch.float32, torch.float64) else 4e-2
    if not difference <= tolerance * max(1.0, original.abs().max().item()):  # NaN fails too
        raise AdapterMismatchError(
            f"{label} does not behave as its adapter describes: max |difference| {difference:.2g} with nothing merged. "
            "The host library's block has probably changed, or a subclass adds a step of its own; the model was left "
            "as it was. Describe the block in an adapter of its own (CONTRIBUTING.md, 'a new family')."
        )
    return float(difference)
