"""Base class and helpers of learned methods: loading their weights, and the masks used in training.

Shapes: B batch, N tokens, C channels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenmerge._moved import moved_names
from tokenmerge.errors import ConfigError, DataError, UnsupportedError
from tokenmerge.files import describe_differences, read_tensors
from tokenmerge.methods.base import ModelShape, Note, Reduction, TokenView
from tokenmerge.plan import Plan

__all__ = [
    "MODULES",
    "NEW",
    "BudgetNote",
    "Learned",
    "MaskNote",
    "MaskedPlan",
    "alive_share",
    "budget",
    "clamp_keep_grad",
    "gumbel_sigmoid",
    "mask_alive",
    "module_of",
    "notes_of",
    "ratio_loss",
    "straight_through",
]

NEW = "new"
MODULES = "tokenmerge_modules"  # the child of a patched model that holds a method's learned modules
_LEAST = 1e-6  # the share of its size that a masked token keeps: its logarithm shall be finite


@dataclass(frozen=True, eq=False)
class MaskedPlan(Plan):
    """A training plan that removes nothing: it multiplies each token's size by a differentiable `mask`.

    A size near 0 removes a token's effect on attention (through log(size)) and pooling, as dropping it would.
    """

    mask: Tensor | None = None  # [B, N] in (0, 1]

    @staticmethod
    def of(mask: Tensor) -> MaskedPlan:  # [B, N]
        """Return the plan for these masks, clamped to at least 1e-6 with their gradients unchanged."""
        everyone = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape[0], -1)
        return MaskedPlan(everyone, everyone[:, :0], everyone[:, :0], mask.shape[1], clamp_keep_grad(mask))


@dataclass(frozen=True, eq=False)
class MaskNote:
    """The note of a masking layer for later layers."""

    share: Tensor  # [B, N] 1 for each unprotected token that is left, else 0; prefix and padding 0


@dataclass(frozen=True, eq=False)
class BudgetNote(MaskNote):
    """The tokens that a layer kept in training, and those that `r` plans; see `budget`."""

    count: int  # unprotected tokens that `r` leaves
    removed: int  # tokens that `r` removes at this layer
    ratio: Tensor  # [B] share of the unprotected tokens that is left
    target: float  # share that `r` leaves


@dataclass(frozen=True)
class Learned(Reduction):
    """A method with learned modules, stored in the patched model as `tokenmerge_modules`.

    `weights` is a file that `handle.save` wrote, or `"new"` for fresh modules to be trained. Most methods mask tokens
    in train mode (`MaskedPlan`) and remove them in eval mode. `build` raises `UnsupportedError` without weights and
    `ConfigError` for weights that do not fit the model.
    """

    weights: str | None = None

    @abstractmethod
    def make(self, shape: ModelShape) -> nn.ModuleDict:
        """Return fresh modules keyed by layer number, for the active layers."""

    def loss(self, memory: dict[int, Any]) -> Tensor:
        """Return the method's part of the training loss, from the notes of the last forward."""
        raise NotImplementedError

    @property
    def adds_loss(self) -> bool:
        """Whether the method defines a `loss`."""
        return type(self).loss is not Learned.loss

    @classmethod
    def examples(cls) -> list[Reduction]:
        return [cls(**{"weights": NEW, **options}) for options in cls.variants]

    def build(self, shape: ModelShape) -> nn.ModuleDict:
        if self.weights is None:
            raise UnsupportedError(
                f"{self.name} is learned and has no weights. Give the file that handle.save wrote, "
                f"{type(self).__name__}(weights='merge.safetensors'), or weights='new' and `tokenmerge train` it."
            )
        modules = self.make(shape)
        if self.weights != NEW:
            _load(modules, Path(self.weights), self.name)
        return modules

    def merge(
        self, plan: Any, x: Tensor, size: Tensor | None, branch: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(plan, MaskedPlan) or plan.mask is None:
            return super().merge(plan, x, size, branch)
        return x if branch is None else x + branch, plan.mask if size is None else size * plan.mask


def module_of(view: TokenView, method: Learned) -> nn.Module:
    """Return the layer's module; raises `UnsupportedError` if it has none."""
    if view.module is None:
        raise UnsupportedError(
            f"{method.name} has no module for block {view.layer}: modules are made for the blocks that r names when "
            "the model is patched. Patch it with an r that removes tokens there."
        )
    return view.module


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Return the values of `hard` with the gradients of `soft`."""
    return hard + (soft - soft.detach())


def clamp_keep_grad(mask: Tensor) -> Tensor:
    """Return the mask clamped to at least 1e-6, with its gradients unchanged."""
    return straight_through(mask.detach().clamp_min(_LEAST), mask)


def gumbel_sigmoid(logit: Tensor, temperature: float = 1.0) -> Tensor:
    """Sample 1 with probability `sigmoid(logit)`, else 0, with straight-through gradients (a Gumbel-softmax)."""
    noise = torch.rand_like(logit).clamp(1e-6, 1 - 1e-6).logit()
    soft = ((logit + noise) / temperature).sigmoid()
    return straight_through((soft > 0.5).to(soft.dtype), soft)


def alive_share(view: TokenView) -> Tensor:
    """Return 1 for each unprotected token that earlier masks kept, else 0, `[B, N]`; prefix and padding are 0."""
    before = view.last_note(MaskNote)
    if before is not None:
        return before.share
    B, n, _ = view.stream.shape
    places = torch.arange(n, device=view.stream.device)
    whole = (places >= view.prefix).float().expand(B, -1)
    return whole if view.valid is None else whole * view.valid


def mask_alive(view: TokenView, mask: Tensor) -> Tensor:  # [B, N]
    """Return the mask, with 1 for the prefix, padding and tokens that earlier layers masked.

    Raises `UnsupportedError` if the attention adds no log(size), through which it would see the mask.
    """
    if view.size is not None and view.bias is None:
        raise UnsupportedError(
            "masks reach this attention as log(size), and proportional attention is off: train with prop_attn=True."
        )
    return torch.where(alive_share(view) > 0.5, mask, 1.0)


def budget(view: TokenView, method: Learned, r: int, left: Tensor) -> BudgetNote:  # [B, N]
    """Return a layer's note: the share that it keeps (`left`), and the share that `r` plans.

    N does not change in training, so the number of tokens that `r` would leave is counted here, layer by layer.
    """
    n, before = left.shape[1] - view.prefix, view.last_note(BudgetNote)
    entered = n if before is None else before.count
    removed = min(r, method.largest_r(entered + view.prefix, view.prefix))
    count = entered - removed
    return BudgetNote(share=left, count=count, removed=removed, ratio=left.sum(dim=1) / n, target=count / n)


def ratio_loss(memory: Mapping[int, Any]) -> Tensor:
    """Return `mean((ratio - target)^2)` over layers and images."""
    return torch.stack([(note.ratio - note.target).square().mean() for note in notes_of(memory, BudgetNote)]).mean()


def notes_of(memory: Mapping[int, Any], kind: type[Note]) -> list[Note]:
    """Return the layers' notes of one type, in order; raises `UnsupportedError` if there are none."""
    notes = [note for _, note in sorted(memory.items()) if isinstance(note, kind)]
    if not notes:
        raise UnsupportedError(
            "the last forward noted nothing for the loss: it follows a forward in train mode that reduces tokens."
        )
    return notes


def _load(modules: nn.ModuleDict, path: Path, name: str) -> None:
    try:
        state = read_tensors(path)
    except DataError as error:
        raise ConfigError(f"the weights of {name}: {error}") from error
    different = describe_differences(state, modules.state_dict())
    if different:
        raise ConfigError(f"the weights of {name} in {path} are of another model or r: {different}.")
    modules.load_state_dict(state)


if not TYPE_CHECKING:
    __getattr__ = moved_names(__name__)
