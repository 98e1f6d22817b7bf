"""Bind what runs inside a model, prove it, and take it out again."""

from __future__ import annotations

import dataclasses
import gc
import sys
from operator import attrgetter
from typing import Any

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tokenmerge.adapters.base import (
    Adapter,
    BlockSpec,
    HookSpec,
    Original,
    Replacement,
    TokenLayout,
    WindowSpec,
    check_parity,
    token_width,
)
from tokenmerge.adapters.taps import AttentionTap, SeamTap
from tokenmerge.errors import AdapterMismatchError, AlreadyPatchedError, UnsupportedError, UnsupportedModelError
from tokenmerge.grids import Grids, Listener
from tokenmerge.guards import guard_methods
from tokenmerge.hooks import HookRunner
from tokenmerge.methods.base import ModelShape, Reduction
from tokenmerge.runner import SEEN, BlockRunner
from tokenmerge.state import ForwardState
from tokenmerge.windows import WindowRunner

__all__ = ["MODULES", "Attachment", "attach"]

MODULES = "tokenmerge_modules"  # the child of a patched model that holds what a method has learned
_RUNNERS: dict[type, type[BlockRunner]] = {BlockSpec: BlockRunner, HookSpec: HookRunner, WindowSpec: WindowRunner}


class Attachment:
    """All that was bound to one model; undoing it leaves no attribute behind."""

    def __init__(self, limits: list[str]) -> None:
        self.limits = limits
        self.runners: list[BlockRunner] = []
        self.parity = 0.0
        self._learning: nn.Module | None = None  # the model that holds what is learned
        self._bound: list[tuple[nn.Module, str, bool, Any]] = []

    def bind(self, *replacements: Replacement) -> None:
        for owner, attribute, value in replacements:
            self._bound.append((owner, attribute, attribute in owner.__dict__, owner.__dict__.get(attribute)))
            if isinstance(value, Original) and value.owner is owner:
                value.previous = owner.__dict__.get(attribute)  # several may be made before the first is bound
            owner.__dict__[attribute] = value

    def learn(self, model: nn.Module, modules: nn.ModuleDict | None) -> None:
        """Put what is learned into the model, where it moves, trains and is saved, and give it to its layers."""
        if modules is None:
            return
        _check_unwrapped(model)
        tensor = next(p for p in model.parameters() if p.is_floating_point())
        model.add_module(MODULES, modules.to(tensor.device, tensor.dtype).train(model.training))
        self._learning = model
        by_layer = dict(modules.items())
        for runner in self.runners:
            runner.module = by_layer.get(str(runner.layer))

    def undo(self) -> None:
        if self._learning is not None:
            del self._learning._modules[MODULES]
            self._learning = None
        for owner, attribute, existed, previous in reversed(self._bound):
            if existed:
                owner.__dict__[attribute] = previous
            else:
                owner.__dict__.pop(attribute, None)
        self._bound.clear()


def attach(
    model: nn.Module,
    adapter: Adapter,
    method: Reduction,
    state: ForwardState,
    layout: TokenLayout,
    prop_attn: bool | str,
    restore: str | None,
) -> Attachment:
    """Bind one runner per block and the adapter's pooling, and prove them; on any error the model is as before.

    Raises `UnsupportedModelError`, `AdapterMismatchError` (a block or tap does not do what the adapter says),
    `UnsupportedError` (proportional attention was demanded, and this attention takes no bias) or `AlreadyPatchedError`.
    """
    _check_unsharded(model)
    blocks = _free_blocks(model, adapter)
    # before the taps: it refuses blocks that are made in another way
    specs = [adapter.spec(block) for _, block in blocks]
    for layer, ((_, block), spec) in enumerate(zip(blocks, specs, strict=True)):
        _check_children(block, layer, spec)
    taps = [adapter.tap(block) for _, block in blocks]
    _check_needs(method, model, layout, specs)
    is_proportional, limits = _proportional(adapter, model, taps, prop_attn, method)
    if "q" in method.needs and adapter.is_positional and any(tap.kind == SeamTap.kind for tap in taps):
        limits.append(f"{method.name} sees queries and keys as they are before the attention turns them by their place")
    method = _seeing(method, adapter, taps, limits)
    attachment = Attachment(limits)
    state.needs_places = adapter.is_positional or bool(adapter.followers) or "places" in method.needs
    try:
        attachment.bind(*adapter.wiring(model))
        runners = attachment.runners = [
            _RUNNERS[type(spec)](block, layer, spec, tap, adapter, method, state, layout, is_proportional)
            for layer, ((_, block), spec, tap) in enumerate(zip(blocks, specs, taps, strict=True))
        ]
        limits += sorted({runner.remark for runner in runners if runner.remark})
        for tap in taps:
            attachment.bind(*tap.seams(method.needs & SEEN))
        cutter = adapter.cutter(model) if "places" in method.needs and layout.grid else None
        if cutter is not None:
            grids = runners[0].grids = Grids()
            attachment.bind(Replacement(cutter, "forward", Listener(adapter, cutter, grids)))
        for runner in runners:
            attachment.bind(*runner.seams())
        attachment.parity = _prove(model, adapter, blocks, runners)
        attachment.learn(model, method.build(_shape(layout, state, blocks)))
        for runner in runners:
            attachment.bind(Replacement(runner.block, "forward", runner))
        _bind_outputs(attachment, model, adapter, state, restore)
        attachment.bind(*adapter.finish(model, state.is_merging, restore))
    except BaseException:
        attachment.undo()
        raise
    return attachment


def _check_unsharded(model: nn.Module) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp and any(isinstance(module, fsdp.FSDPModule) for module in model.modules()):
        raise UnsupportedError(
            f"the parameters of this {type(model).__qualname__} are sharded already (fully_shard), and a piece of them "
            "computes nothing: patch the model first, then shard it."
        )


def _check_unwrapped(model: nn.Module) -> None:
    """Refuse to add what is learned behind the back of a wrapper, which would leave its gradients out of the sums."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    gc.collect()  # a wrapper that nobody holds is none
    wrappers = (thing for thing in gc.get_objects() if issubclass(type(thing), DistributedDataParallel))
    if any(inner is model for wrapper in wrappers for inner in wrapper.modules()):
        raise UnsupportedError(
            f"this {type(model).__qualname__} is in a DistributedDataParallel already, which does not know of modules "
            "that a learned method adds and would not add up their gradients: patch the model first, then wrap it."
        )


def _free_blocks(model: nn.Module, adapter: Adapter) -> list[tuple[str, nn.Module]]:
    blocks = adapter.blocks(model)
    if not blocks:
        raise UnsupportedModelError(
            f"{type(model).__qualname__} matches {adapter.name!r} but has no blocks: nothing to patch."
        )
    if any(_is_patched(block) for _, block in blocks):
        raise AlreadyPatchedError(
            f"blocks of this {type(model).__qualname__} are reduced already, by way of a model around or inside it; "
            "call unpatch on that one first."
        )
    return blocks


def _shape(layout: TokenLayout, state: ForwardState, blocks: list[tuple[str, nn.Module]]) -> ModelShape:
    removed = tokens = None
    if layout.tokens is not None:
        left = state.schedule.tokens(layout.tokens, layout.prefix)
        tokens = (layout.tokens, *left[:-1])
        removed = tuple(before - after for before, after in zip(tokens, left, strict=True))
    active = tuple(layer for layer, amount in enumerate(state.schedule.amounts) if amount != 0)
    width = token_width(blocks[0][1])
    return ModelShape(width, state.depth, layout.prefix, layout.leads_with_class, removed, tokens, active)


def _bind_outputs(
    attachment: Attachment, model: nn.Module, adapter: Adapter, state: ForwardState, restore: str | None
) -> None:
    """Bind what makes everything behind the blocks right: tokens put back, or pooling that weighs, and guards."""
    reason = adapter.grid_head(model)
    if restore == "dense":
        state.restore = "every"
        return
    if reason:
        state.restore = "last"
        attachment.limits.append(f"tokens are put back in their places after the last block: {reason}")
    else:
        head, limits = adapter.head(model, state.final_size)
        attachment.limits += limits
        for replacement in head:
            attachment.bind(replacement)
    if restore is None:
        for replacement in guard_methods(model, adapter.token_methods, state) + adapter.guards(model, state.is_merging):
            attachment.bind(replacement)


def _is_patched(block: nn.Module) -> bool:
    bound = block.__dict__.get("forward")
    while isinstance(bound, Original) and not isinstance(bound, BlockRunner):
        bound = bound.previous
    return isinstance(bound, BlockRunner)


def _check_children(block: nn.Module, layer: int, spec: BlockSpec | HookSpec | WindowSpec) -> None:
    names = (*spec.attention, *spec.mlp) if isinstance(spec, BlockSpec) else dataclasses.astuple(spec)
    missing = []
    for name in filter(None, names):
        try:
            attrgetter(name)(block)
        except AttributeError:
            missing.append(name)
    if missing:
        present = ", ".join(name for name, _ in block.named_children())
        raise AdapterMismatchError(
            f"block {layer} ({type(block).__module__}.{type(block).__qualname__}) has no child "
            f"{', '.join(missing)}, which its adapter expects. It has: {present}."
        )


def _seeing(method: Reduction, adapter: Adapter, taps: list[AttentionTap], limits: list[str]) -> Reduction:
    """Return the method, made to match by features where the adapter allows it and the attention shows no keys."""
    if not adapter.may_match_features or "metric" not in getattr(method, "__dataclass_fields__", {}):
        return method
    try:
        for tap in taps:
            tap.seams(method.needs & SEEN)
    except UnsupportedError:
        limits.append("matched by features: the attention has no queries, keys or values that could be listened to")
        return dataclasses.replace(method, metric="x")  # type: ignore[type-var]
    return method


def _check_needs(
    method: Reduction, model: nn.Module, layout: TokenLayout, specs: list[BlockSpec | HookSpec | WindowSpec]
) -> None:
    """Refuse a method that needs what this model does not have."""
    if "class" in method.needs and not layout.leads_with_class:
        other = ' (for example score="received")' if hasattr(method, "score") else ""
        raise UnsupportedError(
            f"{method.name} needs the attention of a class token, and this {type(model).__qualname__} has none: its "
            f"answer is a mean over its tokens. Choose another score{other}, or another method."
        )
    if any(isinstance(spec, WindowSpec) for spec in specs) and method.needs & {"class", "places"}:
        raise UnsupportedError(
            f"{method.name} needs {', '.join(sorted(method.needs & {'class', 'places'}))}, and this "
            f"{type(model).__qualname__} merges inside windows, for the attention only. Use tome."
        )
    if method.follows_mlp and not all(isinstance(spec, BlockSpec) and spec.mlp for spec in specs):
        raise UnsupportedError(
            f"{method.name} changes what the MLP returns, and the blocks of this {type(model).__qualname__} cannot be "
            "re-composed from attention and MLP. Use another method."
        )


def _proportional(
    adapter: Adapter, model: nn.Module, taps: list[AttentionTap], prop_attn: bool | str, method: Reduction
) -> tuple[bool, list[str]]:
    """Decide on proportional attention; returns it and what the report should say."""
    can = all(tap.takes_bias for tap in taps)
    if prop_attn is True and not can:
        raise UnsupportedError(
            "prop_attn=True, but this attention takes no mask to add log(size) to. Use prop_attn='auto' or False, or a "
            "host version whose attention has an attn_mask argument (timm >= 1.0.16)."
        )
    if prop_attn is not True and prop_attn is not False and not can:
        return False, ["no proportional attention: this attention takes no mask"]
    if prop_attn != "auto":
        return bool(prop_attn), []
    if not method.is_proportional:
        return False, [f"no proportional attention: {method.name} is without it; prop_attn=True adds it"]
    without, doubt = adapter.trained_without_merging(model)
    if without:
        return False, ["no proportional attention: an MAE model trained without merging is better without it"]
    return True, [doubt] if doubt else []


def _prove(
    model: nn.Module, adapter: Adapter, blocks: list[tuple[str, nn.Module]], runners: list[BlockRunner]
) -> float:
    """Probe one block of each make; returns the largest difference from the block's own forward."""
    worst = 0.0
    seen: dict[Any, BlockRunner] = {}
    for (name, block), runner in zip(blocks, runners, strict=True):
        make = (type(block), tuple((child, type(module)) for child, module in block.named_modules()))
        if make in seen:
            runner.rest = seen[make].rest
            continue
        seen[make] = runner
        label = f"{name} ({type(block).__module__}.{type(block).__qualname__})"
        sample = adapter.sample(model, block, runner.layout)
        worst = max(
            worst,
            check_parity(block, runner.parity, runner.probe, runner.layout, label, sample, adapter.is_positional),
        )
    return worst
