"""Build the parts that a recipe names: model, reduction, teacher, objective, optimiser and learning-rate schedule."""

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
from tokenmerge.training.models import VIT, build, load_weights, order_classes
from tokenmerge.training.objective import Classify, Objective, Predict
from tokenmerge.training.recipe import Recipe

__all__ = ["MODULES", "Parts", "build_parts", "optimizer_of", "scheduler_of", "set_training"]

MODULES = "tokenmerge_modules."


@dataclass
class Parts:
    """The model of a run and everything that trains it."""

    model: nn.Module  # the module that the objective calls
    core: nn.Module  # the module to export: the model itself, or the encoder inside it
    handle: Handle | None  # None: nothing is merged, as in pre-training
    objective: Objective
    r: Any  # the r of the trained model
    notes: list[str]


def build_parts(
    recipe: Recipe, size: tuple[int, ...], classes: int, device: torch.device, names: Sequence[str] = ()
) -> Parts:
    """Build the parts of a recipe on a device, with the classes in the order of `names`.

    Raises the errors of the parts.
    """
    core = build(recipe.model, size, classes, trust_pickle=True)  # `train` has checked it
    order_classes(core, names)
    notes = [load_weights(core, recipe.model.weights)] if recipe.model.weights else []
    if recipe.model.checkpointing:
        _checkpoint_blocks(core)
    if recipe.task == "mae":
        if recipe.merge.amount != 0:
            raise ConfigError(f"merge.r is {recipe.merge.r!r}: pre-training hides tokens, it merges none. Give 0.")
        model = MaskedAutoencoder(core, recipe.mae).to(device)
        return Parts(model, core, None, Predict(), 0, notes)
    is_trained = recipe.model.weights or (recipe.model.pretrained and recipe.model.name != VIT)
    if recipe.distill.weight and not is_trained:
        raise ConfigError(
            f"distill.weight is {recipe.distill.weight}: the teacher is the model as it starts, which has new weights. "
            "Give model.weights, a pretrained model, or distill.weight = 0."
        )
    teacher = copy.deepcopy(core).to(device).eval().requires_grad_(False) if recipe.distill.weight else None
    method = read_method(recipe.merge.method)
    r = recipe.merge.amount or own_r(method) or 0
    options: dict[str, Any] = {} if isinstance(method, MergeConfig) else {"prop_attn": recipe.merge.prop_attn}
    if recipe.model.only_modules:
        core.requires_grad_(False)
    handle = apply_method(core, method, r=r, **options)
    if recipe.model.only_modules and not any(p.requires_grad for p in core.parameters()):
        handle.remove()
        raise ConfigError(f"model.only_modules leaves nothing to train: {recipe.merge.method} has no modules.")
    core.to(device)
    return Parts(core, core, handle, Classify(recipe, classes, handle, teacher), r, notes)


def _checkpoint_blocks(model: nn.Module) -> None:
    switch = getattr(model, "set_grad_checkpointing", None) or getattr(model, "gradient_checkpointing_enable", None)
    if switch is None:
        raise ConfigError(f"model.checkpointing: {type(model).__name__} cannot recompute its blocks.")
    switch()


def set_training(parts: Parts, recipe: Recipe) -> None:
    """Put the model in train mode, except for parts that the recipe freezes."""
    modules = getattr(parts.core, MODULES[:-1], None)
    # a frozen model keeps its batch-norm statistics too: only the modules of the method go to train mode
    parts.model.train(not recipe.model.only_modules)
    if modules is not None:
        modules.train()
    if recipe.model.freeze_batch_norm:
        for module in parts.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def optimizer_of(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the timm optimiser of this name, without weight decay for 1-d parameters and learned modules."""
    from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay

    chosen = recipe.optimizer
    kept: set[str] = getattr(model, "no_weight_decay", set)()
    if chosen.layer_decay is None:
        groups = param_groups_weight_decay(model, chosen.weight_decay, no_weight_decay_list=kept)
    else:
        groups = param_groups_layer_decay(
            model, chosen.weight_decay, no_weight_decay_list=kept, layer_decay=chosen.layer_decay
        )
    own = {id(p) for name, p in model.named_parameters() if name.startswith(MODULES) and p.requires_grad}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in own]
    if own:
        lr = chosen.lr if chosen.lr_modules is None else chosen.lr_modules
        params = [p for p in model.parameters() if id(p) in own]
        groups.append({"params": params, "lr": lr, "weight_decay": 0.0})
    groups = [group for group in groups if group["params"]]
    try:
        found: torch.optim.Optimizer = create_optimizer_v2(groups, chosen.name, lr=chosen.lr)
    except (AssertionError, ImportError, TypeError, ValueError) as error:  # unknown name, or a missing package or GPU
        raise ConfigError(f"timm builds no optimizer.name {chosen.name!r} here: {error}.") from error
    if getattr(found, "is_second_order", False):
        raise ConfigError(f"optimizer.name is {chosen.name!r}: it needs second derivatives, which are not computed.")
    return found


def scheduler_of(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> Any:
    """Return the timm scheduler of this name, or None for "none"; call `step_update(step)` before each step."""
    from timm.scheduler import create_scheduler_v2

    chosen = recipe.optimizer
    if chosen.schedule == "none":
        # apply the factors of layer decay as timm's schedulers do
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
        return None
    # with one update per epoch, timm's epochs are our steps
    found, _ = create_scheduler_v2(
        optimizer,
        chosen.schedule,
        num_epochs=steps,
        min_lr=chosen.min_lr,
        warmup_epochs=round(chosen.warmup * steps),
        warmup_lr=chosen.min_lr,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return found
