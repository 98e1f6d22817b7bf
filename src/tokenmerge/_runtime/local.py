"""Merge inside the attention only: each window's tokens are merged before it and unmerged after it.

For blocks whose token grid must stay complete. The block runs its own forward; only its attention is replaced. No
sizes pass from one block to the next.

Shapes: B batch, W windows of all images, N tokens per window, M merged tokens, C channels, H heads, D head width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenmerge import kernels
from tokenmerge._intercept.taps import Slot
from tokenmerge._runtime.frames import Frame
from tokenmerge._runtime.residual import ResidualRunner
from tokenmerge._torch.tracing import in_pieces, outside_graph
from tokenmerge.adapters.base import Binding, Override
from tokenmerge.methods.base import TokenView
from tokenmerge.plan import assignment

__all__ = ["LocalRunner"]


class LocalRunner(ResidualRunner):
    """Runs the block's own forward and merges inside its attention; see the module docstring."""

    tap: Any  # also has `project` (tokens to rows that can be merged) and `split` (rows to q, k, v)
    remark = "merged inside windows for the attention only: r counts per window, each block ends with all its tokens"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.slot = Slot()

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:  # [B, rows, columns, C]
        state, layer = self.state, self.layer
        frame, slot = state.begin(layer, x, x.shape[1], bool(self.block._forward_pre_hooks))
        side, (rows, columns) = getattr(self.block, self.spec.window), x.shape[1:3]
        n = side * side if side else rows * columns
        r = state.amount(frame, layer, n, 0)
        if r:
            self._check_device(x)
        has_padding = bool(side) and (rows % side > 0 or columns % side > 0)
        frame.inside[layer + 1] = (n, n)
        out = self.run(x, r, has_padding, frame, *args, **kwargs) if r else self.original(x, *args, **kwargs)
        inside = frame.windows[layer + 1]
        if inside is not None:
            frame.windows[layer + 1] = _of_image(inside, x.shape[0], (rows, columns), side)
        state.record(frame, slot, layer, x.flatten(1, 2), None, None)
        state.put_out(frame, layer, out, bool(self.block._forward_hooks))
        return out

    def run(self, x: Tensor, r: int, has_padding: bool, frame: Frame, *args: Any, **kwargs: Any) -> Any:
        """Run the block with `r` tokens per window removed in its attention; r = 0 recomposes without merging."""
        if in_pieces():
            return outside_graph.run(partial(self.run, x, r, has_padding, frame, *args, **kwargs))
        self.slot.put({"turn": (r, has_padding, frame)})
        self.tap.expect(None, None)
        try:
            out = self.original(x, *args, **kwargs)
            self.tap.check()
            return out
        finally:
            self.slot.take()
            self.tap.forget()

    def attend(self, x: Tensor, r: int, has_padding: bool, frame: Frame) -> Tensor:  # [W, rows, columns, C]
        """Replace the attention: merge the projected rows, attend, and unmerge the output."""
        grid = (x.shape[1], x.shape[2])
        qkv = self.tap.project(x.flatten(1, 2))
        bias = kept = None
        if r:
            tokens = x.detach().flatten(1, 2)  # [W, N, C]
            seen = self.tap.split(qkv.detach(), self.method.captures)
            # padding of the last windows is zero; it is attended to like other tokens, but merged with itself first
            valid = tokens.ne(0).any(dim=-1) if has_padding else None
            view = TokenView(
                stream=tokens,
                x_pre=tokens,
                q=seen.get("q"),
                k=seen.get("k"),
                v=seen.get("v"),
                size=None,
                prefix=0,
                grid=grid,
                layer=self.layer,
                valid=valid,
                depth=self.state.depth,
                scale=self.scale,
            )
            plan = self.method.plan(view, r)
            # an adaptive method may remove fewer than `r`
            frame.inside[self.layer + 1] = (plan.n, plan.keep.shape[1])
            qkv, size = self.method.merge(plan, qkv, None)
            bias, kept = size.log() if self.is_proportional and size is not None else None, plan.keep
        out = self.tap(qkv, bias, kept, grid=grid)  # [W, M, C]
        if r:
            groups = assignment(plan)
            frame.windows[self.layer + 1] = groups if frame.is_tracked else None
            out = kernels.unmerge(out, groups)
        whole: Tensor = out.view(x.shape)
        return whole

    def seams(self) -> list[Binding]:
        attn = self.block.get_submodule(self.spec.attn)
        return [Binding(attn, "forward", _Attention(attn, self))]

    def parity(self, x: Tensor, *args: Any, **given: Any) -> Any:
        return self.run(x.view(x.shape[0], *given["grid"], -1), 0, False, Frame(0))

    def probe(self, x: Tensor, **given: Any) -> Any:
        return self.original(x.view(x.shape[0], *given["grid"], -1))


def _of_image(groups: Tensor, images: int, grid: tuple[int, int], side: int) -> Tensor:  # [W, N]
    """Return the groups of all windows by the places of their tokens in the image, `[B, rows * columns]`.

    Windows follow each other row by row; the last ones may reach over the edge. No number is in two windows.
    """
    W, N = groups.shape
    across = -(-grid[1] // side) if side else 1
    down = W // (images * across)
    number = torch.arange(down * across, device=groups.device).repeat(images)[:, None] * N
    placed = torch.where(groups < 0, groups, groups + number)
    if not side:
        return placed
    whole = placed.view(images, down, across, side, side).transpose(2, 3).reshape(images, down * side, across * side)
    found: Tensor = whole[:, : grid[0], : grid[1]].flatten(1)
    return found


class _Attention(Override):
    def __init__(self, owner: Any, runner: LocalRunner) -> None:
        super().__init__(owner)
        self.runner = runner

    def __call__(self, x: Tensor) -> Tensor:
        turn = self.runner.slot.peek().get("turn")
        if turn is None:
            out: Tensor = self.original(x)
            return out
        self.runner.tap.forget()
        self.runner.tap.turn.put({"has_run": True})
        return self.runner.attend(x, *turn)
