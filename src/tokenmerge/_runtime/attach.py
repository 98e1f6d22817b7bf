"""Install the runners on a model, verify them, and undo."""

from __future__ import annotations

import dataclasses
import gc
import math
import sys
from operator import attrgetter
from typing import Any

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tokenmerge._intercept.bindings import bind, is_bound, notes, undo
from tokenmerge._intercept.prove import Parity, Probe, called_children, check_parity, token_width
from tokenmerge._intercept.taps import AttentionTap, SeamTap
from tokenmerge._runtime.grids import Grids, Listener
from tokenmerge._runtime.guards import entries, settle
from tokenmerge._runtime.local import LocalRunner
from tokenmerge._runtime.outputs import decide
from tokenmerge._runtime.residual import ResidualRunner
from tokenmerge._runtime.runners import RUNNERS
from tokenmerge._runtime.state import ForwardState
from tokenmerge.adapters.base import (
    Adapter,
    Binding,
    BlockSpec,
    Context,
    Spec,
    Surroundings,
    TokenLayout,
    WindowSpec,
)
from tokenmerge.errors import AdapterMismatchError, AlreadyPatchedError, UnsupportedError, UnsupportedModelError
from tokenmerge.methods.base import ModelShape, Reduction
from tokenmerge.methods.learned import MODULES

__all__ = ["MODULES", "Bindings", "attach", "is_copied_part"]

# packages whose blocks are described by class; in torch only the encoder layer is a block
_HOSTS = ("timm.", "transformers.", "torchvision.", "open_clip.", "vit_pytorch.", "torch.nn.modules.transformer")
_DOUBT = (
    "proportional attention is on, as for MAE models trained with merging; an off-the-shelf MAE checkpoint is better "
    "with prop_attn=False (arXiv:2210.09461, table 1f), and the weights do not tell"
)


class Bindings:
    """All bindings on one model; `undo` removes every attribute they set."""

    def __init__(self, limits: list[str], state: ForwardState) -> None:
        self.limits, self.state = limits, state
        self.runners: list[ResidualRunner] = []
        self.parity = 0.0
        self._learning: nn.Module | None = None  # the model that holds the learned modules
        self._owners: list[nn.Module] = []  # kept here, since the user may take modules out of the model later

    def bind(self, *replacements: Binding) -> None:
        for replacement in replacements:
            bind(replacement)
            if all(replacement.owner is not owner for owner in self._owners):
                self._owners.append(replacement.owner)

    def learn(self, model: nn.Module, modules: nn.ModuleDict | None) -> None:
        """Add the learned modules to the model, so that they move, train and save with it; give each runner its own."""
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
        for runner in self.runners:
            runner.tap.release()
        if self._learning is not None:
            del self._learning._modules[MODULES]
            self._learning = None
        self.state.is_removed = True  # other code may hold a runner and bind it again
        undo(reversed(self._owners))
        self._owners.clear()


def attach(
    model: nn.Module,
    adapter: Adapter,
    method: Reduction,
    state: ForwardState,
    layout: TokenLayout,
    prop_attn: bool | str,
    restore: str | None,
) -> Bindings:
    """Bind one runner per block and the adapter's overrides, and verify them. On any error the model is restored.

    Raises `UnsupportedModelError`, `AdapterMismatchError` (a block or tap does not match its adapter),
    `UnsupportedError` (e.g. `prop_attn=True` for an attention that takes no bias) or `AlreadyPatchedError`.
    """
    _check_loaded(model)
    blocks = _free_blocks(model, adapter)
    # before the taps, since it rejects blocks of another structure
    specs = _specs(adapter, blocks)
    taps = [adapter.tap(block) for _, block in blocks]
    _check_needs(method, model, layout, specs)
    around = adapter.surroundings(model)
    is_proportional, limits = _proportional(around, taps, prop_attn, method)
    if "q" in method.captures and adapter.host.is_positional and any(tap.kind == SeamTap.kind for tap in taps):
        limits.append(f"{method.name} sees queries and keys as they are before the attention turns them by their place")
    method, remarks = _seeing(method, adapter, model, taps, layout)
    attachment = Bindings(limits + remarks, state)
    state.needs_places = adapter.host.is_positional or bool(adapter.host.followers) or "places" in method.requires
    try:
        attachment.bind(*adapter.wiring(model))
        runners = attachment.runners = [
            RUNNERS[type(spec)](block, layer, spec, tap, adapter, method, state, layout, is_proportional)
            for layer, ((_, block), spec, tap) in enumerate(zip(blocks, specs, taps, strict=True))
        ]
        attachment.limits += sorted({runner.remark for runner in runners if runner.remark})
        for tap in taps:
            attachment.bind(*tap.seams(method.captures))
        for runner in runners:
            attachment.bind(*runner.seams())
        _settle(attachment, _prove(model, adapter, blocks, runners), blocks, prop_attn)
        attachment.learn(model, method.build(_shape(layout, state, blocks)))
        for runner in runners:
            attachment.bind(Binding(runner.block, "forward", runner))
        _bind_outputs(attachment, model, adapter, around, restore)
        # after the trial in _bind_outputs, which runs the patch embedding on its own images
        if around.cutter is not None and "places" in method.requires and layout.grid:
            grids = runners[0].grids = Grids()
            attachment.bind(Binding(around.cutter, "forward", Listener(adapter, around.cutter, grids)))
        refuses = restore is None and state.restore != "every"
        attachment.bind(*(ways := entries(model, adapter, around, state, refuses)))
        settle(ways)
    except BaseException:
        attachment.undo()
        raise
    return attachment


def _check_loaded(model: nn.Module) -> None:
    """Reject weights that cannot be verified: sharded ones, and offloaded ones that are loaded at each call."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules():
        if fsdp and isinstance(module, fsdp.FSDPModule):
            raise UnsupportedError(
                f"the parameters of this {type(model).__qualname__} are sharded already (fully_shard), and a piece of "
                "them computes nothing: patch the model first, then shard it."
            )
        hook = module.__dict__.get("_hf_hook")
        if hook is not None and any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            name = next(name for name, other in model.named_modules() if other is module)
            raise UnsupportedError(
                f"weights of this {type(model).__qualname__} are offloaded (accelerate's {type(hook).__qualname__} on "
                f"{name or 'the model'!r} brings them in at each call), so that its blocks cannot be proved: patch the "
                "model first, then offload it."
            )


def _check_unwrapped(model: nn.Module) -> None:
    """Reject adding learned modules to a model already in DDP, which would not reduce their gradients."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    gc.collect()  # drop unreferenced wrappers
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
    bound = next((block for _, block in blocks if is_bound(block)), None)
    if bound is not None:
        raise AlreadyPatchedError(
            f"blocks of this {type(model).__qualname__} are reduced already, "
            + (
                "as a copy of a part of a patched model; call tokenmerge.unpatch(...) on it first."
                if is_copied_part(bound)
                else "by way of a model around or inside it, or one that shares them; call unpatch on that one first."
            )
        )
    if is_bound(model):
        raise AlreadyPatchedError(
            f"this {type(model).__qualname__} is patched by tokenmerge.vlm. Call remove() of its handle; "
            "tokenmerge.vlm.patch(model, keep, r=...) merges in the tower too."
        )
    _check_shared(model, blocks)
    return blocks


def _shape(layout: TokenLayout, state: ForwardState, blocks: list[tuple[str, nn.Module]]) -> ModelShape:
    removed = tokens = None
    if layout.tokens is not None:
        left = [n - layout.suffix for n in state.schedule.tokens(layout.tokens, layout.protected)]
        tokens = (layout.tokens - layout.suffix, *left[:-1])
        removed = tuple(before - after for before, after in zip(tokens, left, strict=True))
    active = tuple(layer for layer, amount in enumerate(state.schedule.amounts) if amount != 0)
    width = token_width(blocks[0][1])
    return ModelShape(width, state.depth, layout.prefix, layout.leads_with_class, removed, tokens, active)


def _bind_outputs(
    attachment: Bindings, model: nn.Module, adapter: Adapter, around: Surroundings, restore: str | None
) -> None:
    """Make the code after the blocks correct: decide where tokens are restored, bind weighted pooling and refusals."""
    state, runner = attachment.state, attachment.runners[-1]
    state.hands_out_merged = restore == "merged"
    state.restore, reason = decide(around, runner.layout, runner.rest, restore)
    if reason:
        which = "every block" if state.restore == "every" else "the last block"
        attachment.limits.append(f"tokens are put back in their places after {which}: {reason}")
    if not state.restore and around.handed_out:
        attachment.limits.append(f"merged tokens are handed out, weigh them with handle.sizes: {around.handed_out}")
    sizes = None if state.restore else state.final_size
    context = Context(state.is_at_work, sizes, "dense" if state.restore == "every" else restore)
    attachment.bind(*adapter.overrides(model, context))


def _check_shared(model: nn.Module, blocks: list[tuple[str, nn.Module]]) -> None:
    for path in dict.fromkeys(name.rpartition(".")[0] for name, _ in blocks):
        listed = list(model.get_submodule(path)._modules.values())
        for layer, (_, block) in enumerate(blocks):
            count = sum(other is block for other in listed)
            if count > 1:
                raise UnsupportedModelError(
                    f"block {layer} of this {type(model).__qualname__} is used by {count} layers of {path!r}: which of "
                    "them runs cannot be told, nor what it merged. Give each layer a block of its own "
                    "(copy.deepcopy), which may share its parameters."
                )


def is_copied_part(module: nn.Module) -> bool:
    """Return whether a module is a copy of a part of a patched model."""
    bound = (note.value for inner in module.modules() for note in notes(inner))
    states = [value.state for value in bound if isinstance(value, ResidualRunner)]
    return bool(states) and states[0].model is None


def _check_children(block: nn.Module, layer: int, spec: Spec) -> None:
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


def _check_forward(block: nn.Module, name: str) -> None:
    """Reject subclasses of a host block with their own forward: recomposing them could drop what the forward adds."""
    own = [(cls.__module__, cls.__qualname__) for cls in type(block).__mro__ if cls.__module__.startswith(_HOSTS)]
    module = str(getattr(type(block).forward, "__module__", ""))
    if own and module.partition(".")[0] != own[0][0].partition(".")[0]:
        raise AdapterMismatchError(
            f"{name} ({type(block).__module__}.{type(block).__qualname__}) is a {'.'.join(own[0])} with a forward of "
            "its own, and blocks of that class are re-composed from their children: what it adds would be left "
            "out, and a path that starts at zero is not seen by comparing. Patch the model by names, which runs the "
            "blocks' own forward: patch(model, blocks=..., attn=..., norm=..., mlp=...)."
        )


def _seeing(
    method: Reduction, adapter: Adapter, model: nn.Module, taps: list[AttentionTap], layout: TokenLayout
) -> tuple[Reduction, list[str]]:
    """Return the method and remarks; the metric falls back to features if the adapter allows it and keys are hidden.

    For these adapters, children that the attention does not call are not used as projections.
    """
    if not adapter.host.may_match_features:
        return method, []
    for tap in taps:
        if isinstance(tap, SeamTap):
            tap.unused = frozenset(tap.children()) - called_children(
                tap.block, tap.attn, adapter.sample(model, tap.block, layout), layout
            )
    if "metric" not in getattr(method, "__dataclass_fields__", {}):
        return method, []
    try:
        for tap in taps:
            tap.seams(method.captures)
    except UnsupportedError:
        remark = "matched by features: the attention has no queries, keys or values that could be listened to"
        return dataclasses.replace(method, metric="x"), [remark]  # type: ignore[type-var]
    return method, []


def _check_needs(method: Reduction, model: nn.Module, layout: TokenLayout, specs: list[Spec]) -> None:
    """Reject a method whose requirements this model does not meet."""
    if "class" in method.requires and not layout.leads_with_class:
        other = ' (for example score="received")' if hasattr(method, "score") else ""
        raise UnsupportedError(
            f"{method.name} needs the attention of a class token, and this {type(model).__qualname__} has none: its "
            f"answer is a mean over its tokens. Choose another score{other}, or another method."
        )
    if any(isinstance(spec, WindowSpec) for spec in specs) and method.requires:
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
    around: Surroundings, taps: list[AttentionTap], prop_attn: bool | str, method: Reduction
) -> tuple[bool, list[str]]:
    """Decide whether to use proportional attention; returns the decision and remarks for the report."""
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
    if around.without_merging:
        return False, ["no proportional attention: an MAE model trained without merging is better without it"]
    return True, [_DOUBT] if around.without_merging is None else []


def _specs(adapter: Adapter, blocks: list[tuple[str, nn.Module]]) -> list[Spec]:
    """Return the spec of each block; raises `AdapterMismatchError` for a block that does not match its spec."""
    specs = [adapter.spec(block) for _, block in blocks]
    for layer, ((name, block), spec) in enumerate(zip(blocks, specs, strict=True)):
        _check_children(block, layer, spec)
        if isinstance(spec, BlockSpec):
            _check_forward(block, name)
    return specs


def _settle(attachment: Bindings, proved: Parity, blocks: list[tuple[str, nn.Module]], prop_attn: bool | str) -> None:
    """Apply the results of the verification: record parity, and turn off proportional attention if it had no effect."""
    runners = attachment.runners
    attachment.parity = proved.difference
    if math.isnan(proved.difference):
        attachment.limits.append("nothing was proved: the weights are on the meta device, where there are no numbers")
    if runners[0].is_proportional and not proved.counts:
        attachment.limits.append(_uncounted(runners[0].tap, prop_attn))
        for runner in runners:
            runner.is_proportional = False
    for (name, _), runner in zip(blocks, runners, strict=True):
        runner.tap.settle(name)


def _uncounted(tap: AttentionTap, prop_attn: bool | str) -> str:
    """Return the remark on an attention that ignores token sizes; raises `UnsupportedError` if `prop_attn` is True."""
    what = (
        f"log(size) added to the mask of this attention ({type(tap.attn).__qualname__}) does not make a token count as "
        "the tokens it stands for: it may read masks as true and false, multiply by them, or take another shape"
    )
    if prop_attn is True:
        raise UnsupportedError(f"prop_attn=True, but {what}. Use prop_attn='auto' or False.")
    return f"no proportional attention: {what}"


def _prove(
    model: nn.Module, adapter: Adapter, blocks: list[tuple[str, nn.Module]], runners: list[ResidualRunner]
) -> Parity:
    """Probe one block of each structure; returns the largest difference and whether all count tokens by size."""
    found: list[Parity] = []
    seen: dict[Any, ResidualRunner] = {}
    for (name, block), runner in zip(blocks, runners, strict=True):
        make = (type(block), tuple((child, type(module)) for child, module in block.named_modules()))
        if make in seen:
            runner.rest, runner.tap.rest = seen[make].rest, seen[make].tap.rest
            continue
        seen[make] = runner
        label = f"{name} ({type(block).__module__}.{type(block).__qualname__})"
        tokens, given = adapter.sample(model, block, runner.layout)
        has_places = adapter.host.is_positional or any(value is not None for value in given.values())
        probe = Probe(tokens, given, runner.layout, label, has_places)
        counted = None if isinstance(runner, LocalRunner) else runner.counted
        found.append(check_parity(block, runner.probe, runner.parity, probe, counted))
    # NaN (nothing could be computed) must win over numbers
    worst = max((parity.difference for parity in found), key=lambda value: (math.isnan(value), value))
    return Parity(worst, all(parity.counts for parity in found))
