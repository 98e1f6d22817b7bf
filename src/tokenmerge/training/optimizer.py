"""One optimiser step: learning rate, accumulated gradients, loss scaling, clipping, update and running average."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from tokenmerge.errors import ConfigError
from tokenmerge.methods import learned
from tokenmerge.training.build import Network
from tokenmerge.training.distributed import World
from tokenmerge.training.recipe import Recipe

__all__ = ["Optimization", "optimizer_of", "scheduler_of", "set_training"]

_LEAST_SCALE = 1e-6  # of the fp16 loss scale: no real loss needs a smaller one
_MODULES = f"{learned.MODULES}."
# keyed by parameter name, so that a run with another number of processes can load it
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Optimization:
    """What trains a network in one process of a run, by timm's optimisers and learning-rate schedules."""

    def __init__(self, network: Network, recipe: Recipe, steps: int, world: World) -> None:
        self.network, self.recipe, self.world = network, recipe, world
        self.ema = _average(network.model, recipe, world)
        has_modules = hasattr(network.core, learned.MODULES)
        net = world.wrap(network.model, network.objective.net, recipe.parallel, find_unused=has_modules)
        self.net = torch.compile(net) if recipe.model.compile else net
        self.optimizer = optimizer_of(network.model, recipe)
        self.scheduler = scheduler_of(self.optimizer, recipe, steps)
        self.learns = False  # whether the last gradient is one: at r = 0 the modules of a method get none
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.precision == "fp16")

    @property
    def model(self) -> nn.Module:
        """The model to evaluate and to export: the running average, where there is one."""
        average: nn.Module = self.network.model if self.ema is None else self.ema.module
        return average

    @property
    def lr(self) -> float:
        """The learning rate now, of the first group of parameters."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def scale(self) -> float | None:
        """The factor of the loss in fp16; None in other precisions."""
        return self.scaler.get_scale() if self.scaler.is_enabled() else None

    @property
    def overflows(self) -> bool:
        """Whether every gradient overflows: the scaler halves its factor each time."""
        return self.scale is not None and self.scale < _LEAST_SCALE

    def backward(self, step: int, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradient of this process's share of a batch, clipped; return the loss and its norm, both `[]`."""
        network, pieces = self.network, self.recipe.accumulate
        set_training(network, self.recipe)
        if self.scheduler is not None:
            self.scheduler.step_update(step)
        inputs, targets = network.objective.targets(inputs, labels)
        parts = list(zip(inputs.chunk(pieces), targets.chunk(pieces), strict=True))
        total = torch.zeros((), device=inputs.device)
        for number, (some, wanted) in enumerate(parts):
            with self._synchronised(number == len(parts) - 1):
                with self.world.autocast(self.recipe.precision):
                    loss = network.objective.loss(self.net, some, wanted) * (len(some) / len(inputs))
                # with `only_modules` and r = 0 no parameter gets a gradient
                self.learns = loss.requires_grad
                if self.learns:
                    self.scaler.scale(loss).backward()
            total += loss.detach()
        return total, self._clip() if self.learns else torch.zeros_like(total)

    def update(self, step: int) -> None:
        """Apply the gradient to the weights, and these to their running average."""
        if self.learns:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.network.model, step=step)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all processes together, on the CPU: every process must call it."""
        model, optimizer = get_state_dict(self.network.model, self.optimizer, options=_WHOLE)
        average = None if self.ema is None else get_model_state_dict(self.ema.module, options=_WHOLE)
        return {"model": model, "optimizer": optimizer, "scaler": self.scaler.state_dict(), "ema": average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned; raise `KeyError`, `RuntimeError` or `ValueError` if it does not fit."""
        options = StateDictOptions(full_state_dict=True)
        # a missing key would silently keep its initial value
        strange = sorted(self.network.model.state_dict().keys() ^ state["model"].keys())
        if strange:
            raise ValueError(f"only one of them has {', '.join(strange[:3])}")
        model, optimizer = state["model"], state["optimizer"]
        set_state_dict(
            self.network.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=options
        )
        if self.ema is not None:
            set_model_state_dict(self.ema.module, state["ema"], options=options)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])

    def weights(self) -> dict[str, Tensor]:
        """Return the weights to export, by their names in `network.core`: every process must call it."""
        state: dict[str, Any] = get_model_state_dict(self.model, options=_WHOLE)
        prefix = "" if self.network.core is self.network.model else "encoder."
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

    def _clip(self) -> Tensor:
        """Clip the gradient and return its norm before."""
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if self.recipe.clip is None else self.recipe.clip
        norm = nn.utils.clip_grad_norm_(self.network.model.parameters(), limit)
        whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        whole = whole.detach()
        # a scaled gradient may overflow: the scaler skips that step
        return torch.where(whole.isfinite(), whole, 0) if self.scaler.is_enabled() else whole

    @contextmanager
    def _synchronised(self, is_last: bool) -> Iterator[None]:
        """Synchronise gradients between processes only in the last part of an accumulated batch."""
        # with `only_modules` a forward at r = 0 has no gradient: no forward under `no_sync` may follow it
        waits = not is_last and not self.recipe.model.only_modules
        if waits and isinstance(self.net, nn.parallel.DistributedDataParallel):
            with self.net.no_sync():
                yield
        else:
            yield


def set_training(network: Network, recipe: Recipe) -> None:
    """Put the model in train mode, except for parts that the recipe freezes."""
    modules = getattr(network.core, learned.MODULES, None)
    # a frozen model keeps its batch-norm statistics too: only the modules of the method go to train mode
    network.model.train(not recipe.model.only_modules)
    if modules is not None:
        modules.train()
    if recipe.model.freeze_batch_norm:
        for module in network.model.modules():
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
    own = {id(p) for name, p in model.named_parameters() if name.startswith(_MODULES) and p.requires_grad}
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


def _average(model: nn.Module, recipe: Recipe, world: World) -> Any:
    if not recipe.ema:
        return None
    from timm.utils import ModelEmaV3

    is_sharded = recipe.parallel == "fsdp"
    # sharded tensors have no foreach operations
    average = ModelEmaV3(model, decay=recipe.ema, use_warmup=True, foreach=not is_sharded)
    if is_sharded:
        world.shard(average.module)
    return average
