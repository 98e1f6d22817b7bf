"""The runner of residual blocks: one callable per block, bound as its instance `forward`.

Shapes: B batch, N tokens in, M tokens out, C channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere

from tokenmerge import kernels
from tokenmerge._intercept.follow import rows
from tokenmerge._intercept.taps import AttentionTap
from tokenmerge._runtime.frames import Call, Frame
from tokenmerge._runtime.grids import Grids
from tokenmerge._runtime.key_bias import key_bias
from tokenmerge._runtime.state import ForwardState
from tokenmerge._torch.memory import watched
from tokenmerge._torch.tracing import in_pieces, is_compiling, outside_graph
from tokenmerge.adapters.base import Adapter, Binding, Override, TokenLayout, first_of
from tokenmerge.errors import AdapterMismatchError, UnsupportedError
from tokenmerge.matching import pair_cosines
from tokenmerge.methods.base import Reduction, TokenView
from tokenmerge.plan import AnyPlan, Plan, keep_behind, lead_by_real

__all__ = ["ResidualRunner"]


class ResidualRunner(Override):
    """Recomposes a residual block from its children, with a reduction between attention and MLP.

    If nothing is merged in this block or before it, the block's own forward runs unchanged.
    """

    remark = ""  # a remark on this way of merging, for the report

    def __init__(
        self,
        block: nn.Module,
        layer: int,
        spec: Any,
        tap: AttentionTap,
        adapter: Adapter,
        method: Reduction,
        state: ForwardState,
        layout: TokenLayout,
        is_proportional: bool,
    ) -> None:
        super().__init__(block)
        self.block, self.layer, self.spec, self.tap, self.adapter = block, layer, spec, tap, adapter
        self.method, self.state, self.layout = method, state, layout
        self.is_proportional = is_proportional
        self.module: nn.Module | None = None  # a learned method's module for this layer
        self.grids: Grids | None = None  # the noted patch grids, for positional methods
        self.scale = _scale(getattr(tap, "attn", None))
        self.names = list(inspect.signature(type(block).forward).parameters)[2:]
        self.rest: tuple[None, ...] | None = None  # what the block returns after its tokens; None: it returns no tuple

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        state, layer = self.state, self.layer
        tokens = x if self.layout.batch_first else x.transpose(0, 1)  # [B, N, C]
        frame, slot = state.begin(
            layer, x, tokens.shape[1], bool(self.block._forward_pre_hooks or everywhere._global_forward_pre_hooks)
        )
        size, kept = frame.size[slot], frame.kept[slot]
        if kept is not None and frame.restored[slot]:
            # all members of a group hold the same features: take the row at the kept position
            tokens = rows(tokens, kept)
        if layer == 0 and self.grids is not None and frame.grid is None:
            frame.grid = self.grids.take(tokens.shape[1] - self.layout.protected)
        r = state.amount(frame, layer, tokens.shape[1], self.layout.protected)
        if r == 0 and size is None:
            out = self.original(x, *args, **kwargs)
            self.tap.take()
            state.record(frame, slot, layer, tokens, None, None)
        else:
            self._check_device(x)
            given = self.by_name(args, kwargs)
            if size is None:
                size = self._begin_sizes(frame, given, tokens.shape[0])
            call = self._call(tokens, size, kept, r, given, frame)
            tokens, size, plan = self.compose(call)
            state.record(frame, slot, layer, tokens, size, plan)
            out = self._hand_out(tokens, frame)
        state.put_out(frame, layer, first_of(out), bool(self.block._forward_hooks or everywhere._global_forward_hooks))
        return out

    def _call(
        self, x: Tensor, size: Tensor | None, kept: Tensor | None, r: int, given: Mapping[str, Any], frame: Frame
    ) -> Call:
        bias = self._bias(size, frame.has_padding)
        return Call(x, size, bias, kept, r, (self.layout.prefix, x.shape[1] - self.layout.suffix), given, frame)

    def compose(self, call: Call) -> tuple[Tensor, Tensor | None, AnyPlan | None]:
        """Run attention, reduction and MLP; returns tokens `[B, M, C]`, sizes `[B, M]` and the plan."""
        x, size, plan = outside_graph.run(self._merge, call) if in_pieces() else self._merge(call)
        after = self._apply_mlp(x)
        if self.method.follows_mlp:
            end = x.shape[1] - self.layout.suffix
            parts = after[:, :end], x[:, :end], self.layer, self.state.depth, call.frame.memory
            after = torch.cat((self.method.after_mlp(*parts), after[:, end:]), dim=1)
        return after, size, plan

    def _merge(self, call: Call) -> tuple[Tensor, Tensor | None, AnyPlan | None]:
        """Run attention and reduction."""
        x, branch, seen = self._attend(call)
        if not call.r:
            return x if branch is None else x + branch, call.size, None
        if branch is not None and self.method.reads_sum:
            x, branch = x + branch, None
        plan = self._choose(call, x, branch, seen)
        # keys are views of the whole projection: keeping them through the MLP raises peak memory by a sixth
        del seen
        return self._apply(plan, call, x, branch)

    def _apply(
        self, plan: AnyPlan, call: Call, x: Tensor, branch: Tensor | None
    ) -> tuple[Tensor, Tensor | None, AnyPlan]:
        """Merge the span by the plan that was made for it; returns tokens, sizes and the plan for all tokens."""
        n, stop = x.shape[1], call.span[1]
        if stop == n:
            return *self.method.merge(plan, x, call.size, branch), plan
        merged, size = self.method.merge(plan, x[:, :stop], _first(call.size, stop), _first(branch, stop))
        if size is not None:
            behind = size.new_ones(size.shape[0], n - stop) if call.size is None else call.size[:, stop:]
            size = torch.cat((size, behind), dim=1)
        stays = x[:, stop:] if branch is None else x[:, stop:] + branch[:, stop:]
        return torch.cat((merged, stays), dim=1), size, keep_behind(plan, n)

    def parity(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the recomposed block without merging; raises `AdapterMismatchError` if the tap captured wrong shapes."""
        tokens = x if self.layout.batch_first else x.transpose(0, 1)
        return self._mirror(self.counted(tokens, None, None, self.by_name(args, kwargs)))

    def counted(self, x: Tensor, size: Tensor | None, kept: Tensor | None, given: Mapping[str, Any]) -> Tensor:
        """Run the recomposed block without merging, on tokens `[B, N, C]` with sizes and positions `[B, N]`."""
        x, branch, seen = self._attend(self._call(x, size, kept, 0, given, Frame(0)))
        self._check_seen(seen, x.shape[1])
        return self._apply_mlp(x if branch is None else x + branch)

    def _check_seen(self, seen: dict[str, Tensor], n: int) -> None:
        for name in sorted(self.method.captures):
            got = tuple(seen[name].shape) if name in seen else "nothing"
            if len(got) != 4 or got[2] != n:
                raise AdapterMismatchError(
                    f"the attention of block {self.layer} ({type(self.block).__qualname__}) hands over {got} for "
                    f"{name!r}, expected [B, heads, {n}, width]: it is not computed where the tap "
                    "listens. Choose another metric, e.g. ToMe(metric='x')."
                )

    def _bias(self, size: Tensor | None, has_padding: bool) -> Tensor | None:  # [B, N]
        if size is None or not self.is_proportional:
            return None
        # not -inf for padding: attention over an image of padding only would be NaN
        return key_bias(size.log().clamp_min(-1e4) if has_padding else size.log())

    def _choose(self, call: Call, x: Tensor, branch: Tensor | None, seen: dict[str, Tensor]) -> AnyPlan:
        """Let the method plan on the stream `x` and the attention branch, both `[B, N, C]`, up to the span's end."""
        start, stop = call.span

        def shown(tensor: Tensor | None, dim: int = 1) -> Any:
            found = _first(tensor, stop, dim)
            return _cut(found) if self.module is None else found  # learned modules need gradients through their inputs

        size = _first(call.size, stop)
        valid = size > 0 if call.frame.has_padding and size is not None else None
        view = TokenView(
            stream=shown(x),
            x_pre=shown(call.x),
            q=shown(seen.get("q"), 2),
            k=shown(seen.get("k"), 2),
            v=shown(seen.get("v"), 2),
            size=size,
            prefix=start,
            grid=call.frame.grid,
            layer=self.layer,
            valid=valid,
            branch=shown(branch),
            depth=self.state.depth,
            scale=self.scale,
            bias=_first(call.bias, stop),
            places=_first(call.kept, stop),
            module=self.module,
            memory=call.frame.memory,
        )
        plan = self.method.plan(view, call.r)
        plan = plan if valid is None else lead_by_real(plan, valid)
        if call.frame.tracks_pairs and isinstance(plan, Plan):
            call.frame.similarity[self.layer + 1] = pair_cosines(self.method.features(view), plan).detach()
        return plan

    def _attend(self, call: Call) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Return the residual stream, the attention branch (None: already added) and the captured q, k, v."""
        x, given = call.x, self._follow(call.given, call.kept)
        if not self.spec.attn:
            return self.tap(x, call.bias, call.kept, **given), None, self.tap.take()
        branch = x
        for name in self.spec.attention:
            is_tapped = name == self.spec.attn
            branch = self.tap(branch, call.bias, call.kept, **given) if is_tapped else self._step(name, branch)
        return x, branch, self.tap.take()

    def _apply_mlp(self, x: Tensor) -> Tensor:
        if not self.spec.mlp:
            return x
        branch = x
        for name in self.spec.mlp:
            branch = self._step(name, branch)
        if not self.spec.closes:
            return x + branch
        closed: Tensor = attrgetter(self.spec.closes)(self.block)(branch, x)
        return closed

    def _step(self, name: str, x: Tensor) -> Tensor:
        child = attrgetter(name)(self.block)
        if isinstance(child, nn.ModuleList):
            return torch.stack([branch(x) for branch in child]).sum(dim=0)
        out: Tensor = x if child is None else x * child if isinstance(child, Tensor) else child(x)
        return out

    def _follow(self, given: Mapping[str, Any], kept: Tensor | None) -> dict[str, Any]:
        """Return the block's extra arguments for the remaining tokens.

        Raises `UnsupportedError` for an argument without a follower.
        """
        given = {name: value for name, value in given.items() if value is not None and value is not False}
        followers = self.adapter.host.followers
        unknown = [repr(name) for name in given if name not in followers]
        if unknown:
            raise UnsupportedError(
                f"block {self.layer} was called with {', '.join(unknown)} while tokens are merged; what was made for "
                "the unmerged tokens (a mask) does not fit. Leave it out, or set handle.r = 0."
            )
        return given if kept is None else {name: followers[name](value, kept) for name, value in given.items()}

    def _begin_sizes(self, frame: Frame, given: Mapping[str, Any], B: int) -> Tensor | None:
        """Return the sizes before any merging, where some tokens are padding: 0 for these, 1 for the others."""
        padding = ((given.get(name), real) for name, real in self.adapter.host.padding.items())
        valid = next((real(argument) for argument, real in padding if argument is not None), None)
        frame.has_padding = valid is not None
        return None if valid is None else valid.float().expand(B, -1)

    def _hand_out(self, tokens: Tensor, frame: Frame) -> Any:
        groups = frame.assign[self.layer + 1]
        if frame.restored[self.layer + 1] and groups is not None:
            tokens = watched(kernels.unmerge, tokens, groups)
        return self._mirror(tokens)

    def _mirror(self, tokens: Tensor) -> Any:
        """Return tokens in the output format of the block's own forward."""
        out = tokens if self.layout.batch_first else tokens.transpose(0, 1)
        return out if self.rest is None else (out, *self.rest)

    def seams(self) -> list[Binding]:
        """Return the bindings inside the block besides the tap's; none for a recomposed block."""
        return []

    def probe(self, x: Tensor, **given: Any) -> Any:
        """Run the block's own forward and note its output format."""
        output = self.original(x, **given)
        self.learn_output(output)
        return output

    def learn_output(self, output: Any) -> None:
        """Note the output format of the block's own forward: a tensor, or a tuple of tokens and None entries."""
        self.rest = output[1:] if isinstance(output, tuple) else None
        if self.rest and self.adapter.host.ignores_rest:
            self.rest = (None,) * len(self.rest)
        if self.rest and any(entry is not None for entry in self.rest):
            raise AdapterMismatchError(
                f"block {self.layer} ({type(self.block).__qualname__}) returns more than its tokens: "
                f"{[type(entry).__name__ for entry in output]}. What belongs to unmerged tokens cannot be handed on; "
                "switch it off (output_attentions=False)."
            )

    def _check_device(self, x: Tensor) -> None:
        if self.layer == 0 and not is_compiling():
            parameter = next(self.block.parameters(), None)
            if parameter is None or parameter.device == x.device:
                return
            # accelerate keeps offloaded weights on meta and loads them when a module is called
            if not any("_hf_hook" in module.__dict__ for module in self.block.modules()):
                raise UnsupportedError(
                    f"tokens are on {x.device}, the patched block's weights on {parameter.device}. nn.DataParallel "
                    "copies modules without their runners and is not supported: use DistributedDataParallel."
                )


def _first(x: Tensor | None, stop: int, dim: int = 1) -> Tensor | None:
    return x if x is None or x.shape[dim] == stop else x.narrow(dim, 0, stop)


def _scale(attention: Any) -> float | None:
    """Return the scale of an attention's scores; None if the module does not store one."""
    values = (getattr(attention, name, None) for name in ("scale", "scaling"))
    return next((value for value in values if isinstance(value, float)), None)


def _cut(x: Any) -> Any:
    """Detach a method's input if gradients are enabled. Not `no_grad`, which leaves an operator in exported graphs."""
    return x.detach() if x is not None and torch.is_grad_enabled() else x
