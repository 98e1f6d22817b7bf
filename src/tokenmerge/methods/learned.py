"""What methods with modules of their own share: where their weights come from, and masks to train them with."""

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

__all__ = ["NEW", "Learned", "MaskedPlan", "module_of"]

NEW = "new"


@dataclass(frozen=True, eq=False)
class MaskedPlan(Plan):
    """Nothing is removed yet: tokens keep only the share `mask` of their size, through which gradients reach it.

    A size near 0 takes a token out of attention (log of the size) and pooling as its removal would.
    """

    mask: Tensor | None = None  # [B, N] in (0, 1]

    @staticmethod
    def of(mask: Tensor) -> MaskedPlan:  # [B, N]
        """Return the plan that keeps all tokens at these shares; 1e-6 and less count as 1e-6."""
        everyone = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape[0], -1)
        return MaskedPlan(everyone, everyone[:, :0], everyone[:, :0], mask.shape[1], mask.clamp_min(1e-6))


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
        raise UnsupportedError(f"{self.name} adds nothing to the loss.")

    def build(self, shape: ModelShape) -> nn.ModuleDict:
        if self.weights is None:
            raise UnsupportedError(
                f"{self.name} is learned and has no weights. Give the file that handle.save wrote, "
                f"{type(self).__name__}(weights='merge.safetensors'), or weights='new' and train it (recipes/learned)."
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
