"""What methods with modules of their own share: where their weights come from, and masks to train them with.

Shapes: B batch, N tokens, C channels.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge.errors import ConfigError, UnsupportedError
from tokenmerge.methods.base import ModelShape, Reduction, TokenView
from tokenmerge.plan import Plan

__all__ = [
    "NEW",
    "Learned",
    "MaskedPlan",
    "drawn",
    "floored",
    "latest",
    "module_of",
    "note_left",
    "noted",
    "ratio_loss",
    "restricted",
    "share_of",
    "straight_through",
]

NEW = "new"
_LEAST = 1e-6  # the share of its size that a masked token keeps: its logarithm shall be finite


@dataclass(frozen=True, eq=False)
class MaskedPlan(Plan):
    """Nothing is removed yet: tokens keep only the share `mask` of their size, through which gradients reach it.

    A size near 0 takes a token out of attention (log of the size) and pooling as its removal would.
    """

    mask: Tensor | None = None  # [B, N] in (0, 1]

    @staticmethod
    def of(mask: Tensor) -> MaskedPlan:  # [B, N]
        """Return the plan that keeps all tokens at these shares; 1e-6 and less count as 1e-6, with their gradients."""
        everyone = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape[0], -1)
        return MaskedPlan(everyone, everyone[:, :0], everyone[:, :0], mask.shape[1], floored(mask))


@dataclass(frozen=True)
class Learned(Reduction):
    """A method with small modules of its own, that live in the patched model as `tokenmerge_modules`.

    `weights` is a file that `handle.save` wrote, or `"new"` for fresh modules that are to be trained; in train mode
    tokens are masked (`MaskedPlan`), in eval mode they are really removed. Raises `UnsupportedError` without weights,
    `ConfigError` for weights that do not fit the model.
    """

    weights: str | None = None

    @abstractmethod
    def make(self, shape: ModelShape) -> nn.ModuleDict:
        """Return fresh modules, one per active layer under its number."""

    def loss(self, memory: dict[int, Any]) -> Tensor:
        """Return what the method adds to the training loss, from what its layers noted in the last forward."""
        raise NotImplementedError

    @property
    def adds_loss(self) -> bool:
        """Whether there is a `loss`."""
        return type(self).loss is not Learned.loss

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
    """Return the layer's module; raises `UnsupportedError` where none was made for it."""
    if view.module is None:
        raise UnsupportedError(
            f"{method.name} has no module for block {view.layer}: modules are made for the blocks that r names when "
            "the model is patched. Patch it with an r that removes tokens there."
        )
    return view.module


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Return the values of `hard` with the gradients of `soft`."""
    return hard + (soft - soft.detach())


def floored(mask: Tensor) -> Tensor:
    """Return the mask with 1e-6 for anything less, gradients as they were."""
    return straight_through(mask.detach().clamp_min(_LEAST), mask)


def drawn(logit: Tensor, temperature: float = 1.0) -> Tensor:
    """Draw ones with probability `sigmoid(logit)`, else zeros, straight through: Gumbel-softmax of two classes."""
    noise = torch.rand_like(logit).clamp(1e-6, 1 - 1e-6).logit()
    soft = ((logit + noise) / temperature).sigmoid()
    return straight_through((soft > 0.5).to(soft.dtype), soft)


def share_of(view: TokenView) -> Tensor:
    """Return what masks at layers before left of each unprotected token, `[B, N]`: 1 or 0; prefix and padding 0."""
    B, n, _ = view.stream.shape
    places = torch.arange(n, device=view.stream.device)
    whole = (places >= view.prefix).float().expand(B, -1)
    whole = whole if view.valid is None else whole * view.valid
    share: Tensor = latest(view.memory, view.layer, "share", whole)
    return share


def restricted(view: TokenView, mask: Tensor) -> Tensor:  # [B, N]
    """Return the mask where there is something to mask: 1 for the prefix, and for tokens that are gone already.

    Raises `UnsupportedError` where the attention would not see masks, since it adds no log(size).
    """
    if view.size is not None and view.bias is None:
        raise UnsupportedError(
            "masks reach this attention as log(size), and proportional attention is off: train with prop_attn=True."
        )
    return torch.where(share_of(view) > 0.5, mask, 1.0)


def note_left(view: TokenView, method: Learned, r: int, left: Tensor) -> dict[str, Any]:  # [B, N]
    """Note for the next layer and the loss what is left, and what should be: `r` counts fall from layer to layer.

    While training N stays, so the tokens that `r` leaves are counted here.
    """
    n = left.shape[1] - view.prefix
    before = latest(view.memory, view.layer, "count", n)
    removed = min(r, method.largest_r(before + view.prefix, view.prefix))
    count = before - removed
    note = {"share": left, "count": count, "removed": removed, "ratio": left.sum(dim=1) / n, "target": count / n}
    if view.memory is not None:
        view.memory[view.layer] = note
    return note


def ratio_loss(memory: dict[int, Any]) -> Tensor:
    """Return the mean squared difference of what was left from what should be, over layers and images."""
    pairs = zip(noted(memory, "ratio"), noted(memory, "target"), strict=True)
    return torch.stack([(ratio - target).square().mean() for ratio, target in pairs]).mean()


def latest(memory: dict[int, Any] | None, layer: int, name: str, default: Any) -> Any:
    """Return what the last layer before this one noted under a name; a layer that runs again finds the same."""
    before = [note[name] for at, note in sorted((memory or {}).items()) if at < layer and name in note]
    return before[-1] if before else default


def noted(memory: dict[int, Any], name: str) -> list[Any]:
    """Return what the layers noted under a name, in order; raises `UnsupportedError` where none did."""
    found = [note[name] for _, note in sorted(memory.items()) if name in note]
    if not found:
        raise UnsupportedError(
            "the last forward noted nothing for the loss: it follows a forward in train mode that reduces tokens."
        )
    return found


def _load(modules: nn.ModuleDict, path: Path, name: str) -> None:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UnsupportedError("loading weights needs safetensors: pip install safetensors") from error
    try:
        state = load_file(path)
    except Exception as error:  # the format's own errors derive from Exception alone
        raise ConfigError(f"cannot read the weights of {name} from {path}: {error}.") from error
    expected = {key: tuple(value.shape) for key, value in modules.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    if found != expected:
        different = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        shown = ", ".join(f"{key} {found.get(key)} for {expected.get(key)}" for key in different[:3])
        raise ConfigError(
            f"the weights of {name} in {path} are of another model or r: {len(different)} tensors differ ({shown})."
        )
    modules.load_state_dict(state)
