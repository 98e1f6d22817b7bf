"""Build the network that a recipe names: the model with its weights and method, and what it learns."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tokenmerge import Handle, MergeConfig
from tokenmerge.errors import ConfigError
from tokenmerge.tools.models import apply_method, own_r, read_method
from tokenmerge.training.mae import MaskedAutoencoder
from tokenmerge.training.models import VIT, build_model, load_weights, order_classes
from tokenmerge.training.objective import Classify, Objective, Predict
from tokenmerge.training.recipe import Recipe

__all__ = ["Network", "build_network"]


@dataclass(frozen=True)
class Network:
    """The model of a run and what it learns."""

    model: nn.Module  # the module that the objective calls
    core: nn.Module  # the module to export: the model itself, or the encoder inside it
    handle: Handle | None  # None: nothing is merged, as in pre-training
    objective: Objective
    notes: list[str]


def build_network(
    recipe: Recipe,
    size: tuple[int, ...],
    classes: Sequence[str],
    device: torch.device,
) -> Network:
    """Build the network of a recipe on a device, for inputs of `size`, with one output per class in their order.

    The handle has the recipe's r, or the r of a saved method. Call `check_trust` first: a model that is a pickle is
    loaded. Raises the errors of the parts.
    """
    core = build_model(recipe.model, size, len(classes), trust_pickle=True)
    order_classes(core, classes)
    notes = [load_weights(core, recipe.model.weights)] if recipe.model.weights else []
    if recipe.model.checkpointing:
        _checkpoint_blocks(core)
    if recipe.task == "mae":
        if recipe.merge.amount != 0:
            raise ConfigError(f"merge.r is {recipe.merge.r!r}: pre-training hides tokens, it merges none. Give 0.")
        return Network(MaskedAutoencoder(core, recipe.mae).to(device), core, None, Predict(), notes)
    is_trained = recipe.model.weights or (recipe.model.pretrained and recipe.model.name != VIT)
    if recipe.distill.weight and not is_trained:
        raise ConfigError(
            f"distill.weight is {recipe.distill.weight}: the teacher is the model as it starts, which has new weights. "
            "Give model.weights, a pretrained model, or distill.weight = 0."
        )
    teacher = copy.deepcopy(core).to(device).eval().requires_grad_(False) if recipe.distill.weight else None
    handle = _merge(core, recipe)
    core.to(device)
    return Network(core, core, handle, Classify(recipe, len(classes), handle, teacher), notes)


def _merge(core: nn.Module, recipe: Recipe) -> Handle:
    """Patch a model with the method of a recipe; with `only_modules` nothing else learns."""
    method = read_method(recipe.merge.method)
    options: dict[str, Any] = {} if isinstance(method, MergeConfig) else {"prop_attn": recipe.merge.prop_attn}
    if recipe.model.only_modules:
        core.requires_grad_(False)
    handle = apply_method(core, method, r=recipe.merge.amount or own_r(method) or 0, **options)
    if recipe.model.only_modules and not any(p.requires_grad for p in core.parameters()):
        handle.remove()
        raise ConfigError(f"model.only_modules leaves nothing to train: {recipe.merge.method} has no modules.")
    return handle


def _checkpoint_blocks(model: nn.Module) -> None:
    switch = getattr(model, "set_grad_checkpointing", None) or getattr(model, "gradient_checkpointing_enable", None)
    if switch is None:
        raise ConfigError(f"model.checkpointing: {type(model).__name__} cannot recompute its blocks.")
    switch()
