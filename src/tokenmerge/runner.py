"""The only code that runs inside somebody else's model: one callable per block, bound as its instance `forward`.

Shapes: B batch, N tokens in, M tokens out, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge.adapters.base import Adapter, BlockSpec, Replacement, TokenLayout, check_parity
from tokenmerge.adapters.taps import AttentionTap
from tokenmerge.errors import AdapterMismatchError, UnsupportedError, UnsupportedModelError
from tokenmerge.methods.base import Reduction, TokenView
from tokenmerge.plan import Plan
from tokenmerge.state import ForwardState

__all__ = ["Attachment", "BlockRunner", "attach"]


class BlockRunner:
    """Re-composes a residual block from its children, with a reduction between attention and MLP.

    While nothing is merged, before it or in it, the block's own forward runs untouched.
    """

    def __init__(
        self,
        block: nn.Module,
        layer: int,
        spec: BlockSpec,
        tap: AttentionTap,
        method: Reduction,
        state: ForwardState,
        layout: TokenLayout,
        is_proportional: bool,
    ) -> None:
        self.block, self.layer, self.spec, self.tap = block, layer, spec, tap
        self.method, self.state, self.layout = method, state, layout
        self.is_proportional = is_proportional
        self.previous = block.__dict__.get("forward")

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        state, layer = self.state, self.layer
        frame = state.begin(layer)
        size = frame.size[layer] if layer else None
        tokens = x if self.layout.batch_first else x.transpose(0, 1)  # [B, N, C]
        r = state.schedule.at(layer, tokens.shape[1], self.layout.prefix) if state.enabled else 0
        if r == 0 and size is None:
            out = self.original(x, *args, **kwargs)
            self.tap.take()
            state.record(frame, layer, tokens, None, None)
            return out
        self._refuse(x, args, kwargs)
        tokens, size, plan = self.compose(tokens, size, r)
        state.record(frame, layer, tokens, size, plan)
        return tokens if self.layout.batch_first else tokens.transpose(0, 1)

    def original(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the block's own forward."""
        # looked up on the class at each call: a stored bound method would unpickle as this runner
        if self.previous:
            return self.previous(x, *args, **kwargs)
        return type(self.block).forward(self.block, x, *args, **kwargs)

    def compose(self, x: Tensor, size: Tensor | None, r: int) -> tuple[Tensor, Tensor | None, Plan | None]:
        """Run attention, reduction and MLP: `[B, N, C]`, `[B, N]` to `[B, M, C]`, `[B, M]` and the plan."""
        x_pre = x
        x, seen = self._attend(x, size.log() if size is not None and self.is_proportional else None)
        plan = self._choose(x, x_pre, seen, size, r) if r else None
        # keys are views of the whole projection: kept through the MLP they would raise peak memory by a sixth
        del seen
        if plan is not None:
            x, size = self.method.merge(plan, x, size)
        return self._apply_mlp(x), size, plan

    def _choose(self, x: Tensor, x_pre: Tensor, seen: dict[str, Tensor], size: Tensor | None, r: int) -> Plan:
        # detached rather than under no_grad, which an exported graph would hold as an operator of its own
        q, k, v = (seen[name].detach() if name in seen else None for name in ("q", "k", "v"))
        prefix, grid = self.layout.prefix, self.layout.grid
        return self.method.plan(TokenView(x.detach(), x_pre.detach(), q, k, v, size, prefix, grid, self.layer), r)

    def parity(self, x: Tensor) -> Tensor:
        """Run the composition with nothing merged; raises `AdapterMismatchError` where the tap sees something else."""
        tokens, seen = self._attend(x if self.layout.batch_first else x.transpose(0, 1), None)
        for name in sorted(self.method.needs):
            got = tuple(seen[name].shape) if name in seen else "nothing"
            if len(got) != 4 or got[2] != tokens.shape[1]:
                raise AdapterMismatchError(
                    f"the attention of block {self.layer} ({type(self.block).__qualname__}) hands over {got} for "
                    f"{name!r}, expected [B, heads, {tokens.shape[1]}, width]: it is not computed where the tap "
                    "listens. Choose another metric, e.g. ToMe(metric='x')."
                )
        tokens = self._apply_mlp(tokens)
        return tokens if self.layout.batch_first else tokens.transpose(0, 1)

    def _attend(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        branch = x
        for name in self.spec.attention:
            branch = self.tap(branch, bias) if name == self.spec.attn else getattr(self.block, name)(branch)
        return x + branch, self.tap.take()

    def _apply_mlp(self, x: Tensor) -> Tensor:
        branch = x
        for name in self.spec.mlp:
            branch = getattr(self.block, name)(branch)
        return x + branch

    def _refuse(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [repr(name) for name, value in kwargs.items() if value is not None and value is not False]
        given += [f"argument {i + 2}" for i, value in enumerate(args) if value is not None and value is not False]
        if given:
            raise UnsupportedError(
                f"block {self.layer} was called with {', '.join(given)} while tokens are merged; a mask made for the "
                "unmerged tokens does not fit. Leave it out, or set handle.r = 0."
            )
        if self.layer == 0 and not torch.compiler.is_compiling():
            parameter = next(self.block.parameters(), None)
            if parameter is not None and parameter.device != x.device:
                raise UnsupportedError(
                    f"tokens are on {x.device}, the patched block's weights on {parameter.device}. nn.DataParallel "
                    "copies modules without their runners and is not supported: use DistributedDataParallel."
                )


class Attachment:
    """All that was bound to one model; undoing it leaves no attribute behind."""

    def __init__(self, runners: list[BlockRunner], limits: list[str]) -> None:
        self.runners, self.limits = runners, limits
        self.parity = 0.0
        self._bound: list[tuple[nn.Module, str, bool, Any]] = []

    def bind(self, replacement: Replacement) -> None:
        owner, attribute, value = replacement
        self._bound.append((owner, attribute, attribute in owner.__dict__, owner.__dict__.get(attribute)))
        owner.__dict__[attribute] = value

    def undo(self) -> None:
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
) -> Attachment:
    """Bind one runner per block and the adapter's pooling, and prove them; on any error the model is as before.

    Raises `UnsupportedModelError`, `AdapterMismatchError` (a block or tap does not do what the adapter says) or
    `UnsupportedError` (proportional attention was demanded, and this attention takes no bias).
    """
    blocks = adapter.blocks(model)
    if not blocks:
        raise UnsupportedModelError(
            f"{type(model).__qualname__} matches {adapter.name!r} but has no blocks: nothing to patch."
        )
    # before the taps: it refuses blocks that are made in another way
    specs = [adapter.spec(block) for _, block in blocks]
    for layer, ((_, block), spec) in enumerate(zip(blocks, specs, strict=True)):
        _check_children(block, layer, spec)
    taps = [adapter.tap(block) for _, block in blocks]
    is_proportional, limits = _proportional(adapter, model, taps, prop_attn)
    runners = [
        BlockRunner(block, layer, spec, tap, method, state, layout, is_proportional)
        for layer, ((_, block), spec, tap) in enumerate(zip(blocks, specs, taps, strict=True))
    ]
    attachment = Attachment(runners, limits)
    try:
        for tap in taps:
            for module, listener in tap.seams(method.needs):
                attachment.bind(Replacement(module, "forward", listener))
        attachment.parity = _prove(blocks, runners)
        for runner in runners:
            attachment.bind(Replacement(runner.block, "forward", runner))
        head, head_limits = adapter.head(model, state.final_size)
        limits += head_limits
        for replacement in head:
            attachment.bind(replacement)
    except BaseException:
        attachment.undo()
        raise
    return attachment


def _check_children(block: nn.Module, layer: int, spec: BlockSpec) -> None:
    missing = [name for name in spec.attention + spec.mlp if not isinstance(getattr(block, name, None), nn.Module)]
    if missing:
        present = ", ".join(name for name, _ in block.named_children())
        raise AdapterMismatchError(
            f"block {layer} ({type(block).__module__}.{type(block).__qualname__}) has no child "
            f"{', '.join(missing)}, which its adapter expects. It has: {present}."
        )


def _proportional(
    adapter: Adapter, model: nn.Module, taps: list[AttentionTap], prop_attn: bool | str
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
    without, doubt = adapter.trained_without_merging(model)
    if without:
        return False, ["no proportional attention: an MAE model trained without merging is better without it"]
    return True, [doubt] if doubt else []


def _prove(blocks: list[tuple[str, nn.Module]], runners: list[BlockRunner]) -> float:
    """Probe one block of each make; returns the largest difference from the block's own forward."""
    worst, seen = 0.0, set()
    for (name, block), runner in zip(blocks, runners, strict=True):
        make = (type(block), tuple((child, type(module)) for child, module in block.named_modules()))
        if make in seen:
            continue
        seen.add(make)
        label = f"{name} ({type(block).__module__}.{type(block).__qualname__})"
        worst = max(worst, check_parity(block, runner.parity, runner.original, runner.layout, label))
    return worst
