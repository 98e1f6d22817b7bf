"""Merging inside windows by hand: an attention in which each token's projections become its group's means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import tokenmerge
from helpers import assert_close, bound_attributes
from promises import Family, note
from tokenmerge import ToMe
from tokenmerge.plan import Plan, assignment

PLANS: list[Plan] = []


class Recorder(ToMe):
    """ToMe that notes its plans, in the order of the blocks."""

    def plan(self, view: Any, r: int) -> Plan:
        PLANS.append(super().plan(view, r))
        return PLANS[-1]


class _GroupMeans:
    """An attention whose tokens' projections become their groups' means, each at the place that its group keeps.

    With `counts_all` every member of a group is a key, else only the one that is kept.
    """

    def __init__(self, attn: Any, plan: Plan, counts_all: bool) -> None:
        self.attn, self.plan, self.counts_all = attn, plan, counts_all

    def __call__(self, x: Tensor) -> Tensor:
        attn, (W, rows, columns, _) = self.attn, x.shape
        qkv = attn.qkv(x.flatten(1, 2))  # [W, N, 3C]
        groups = assignment(self.plan)
        for window in range(W):
            for slot in range(self.plan.keep.shape[1]):
                members = groups[window] == slot
                qkv[window, members] = qkv[window, members].mean(dim=0)
        q, k, v = qkv.view(W, rows * columns, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        place = self.plan.keep.gather(1, groups)  # [W, N]
        scores = self.relative(q, place, rows, columns) if attn.use_rel_pos else 0
        if attn.rope is not None:
            sine, cosine = attn.rope.get_embed().to(q)[place][:, None].chunk(2, dim=-1)
            q, k = (t * cosine + _quarter_turn(t) * sine for t in (q, k))
        scores = scores + (q / q.shape[-1] ** 0.5) @ k.mT
        if not self.counts_all:
            is_kept = place == torch.arange(rows * columns)
            scores = scores.masked_fill(~is_kept[:, None, None, :], float("-inf"))
        out = scores.softmax(dim=-1) @ v
        return attn.proj(out.transpose(1, 2).reshape(x.shape))

    def relative(self, q: Tensor, place: Tensor, rows: int, columns: int) -> Tensor:
        attn, (W, H, N, D) = self.attn, q.shape
        if len(attn.rel_pos_h) == 2 * rows - 1 and len(attn.rel_pos_w) == 2 * columns - 1:
            down = place[:, :, None] // columns - place[:, None, :] // columns + rows - 1  # [W, N, N]
            right = place[:, :, None] % columns - place[:, None, :] % columns + columns - 1
            table = attn.rel_pos_h[down] + attn.rel_pos_w[right]  # [W, N, N, D]
            return (q[:, :, :, None] * table[:, None]).sum(dim=-1)
        # tables of another size: the host stretches them, for the tokens that stand at their own places
        from timm.models.vision_transformer_sam import get_decomposed_rel_pos_bias

        whole = get_decomposed_rel_pos_bias(
            q.reshape(W * H, N, D), attn.rel_pos_h, attn.rel_pos_w, (rows, columns), (rows, columns)
        ).view(W, H, N, N)
        window = torch.arange(W)[:, None, None]
        return whole.transpose(0, 1)[:, window, place[:, :, None], place[:, None, :]].transpose(0, 1)


def _quarter_turn(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def run(model: nn.Module, x: Tensor) -> Tensor:
    """The model's answer, without gradients."""
    with torch.no_grad():
        out: Tensor = model(x)
    return out


def merged(model: nn.Module, x: Tensor, r: Any, prop_attn: bool = True, **choices: Any) -> tuple[Tensor, list[Plan]]:
    """The answer with tokens merged, and the plan of each block; `choices` are ToMe's."""
    PLANS.clear()
    with tokenmerge.patched(model, Recorder(**choices), r=r, prop_attn=prop_attn):
        return run(model, x), list(PLANS)


def by_hand(model: Any, x: Tensor, plans: list[Plan], counts_all: bool = True) -> Tensor:
    """The answer of the unpatched model when each block's projections are its plan's group means."""
    for block, plan in zip(model.blocks, plans, strict=True):
        block.attn.forward = _GroupMeans(block.attn, plan, counts_all)
    try:
        return run(model, x)
    finally:
        for block in model.blocks:
            del block.attn.forward


def check_windows(model: Any, x: Tensor, r: int = 3, family: Family | None = None) -> list[Plan]:
    """Check a SAM model of timm whose tokens are merged inside windows; returns the plans of its blocks.

    r = 0 is the original, every block ends with all tokens, the answer is the one that group means inside the attention
    give, and removal is bit-exact.
    """
    unmerged, keys = run(model, x), list(model.state_dict())
    answer, plans = merged(model, x, r)
    assert_close(answer, by_hand(model, x, plans), 1e-6)
    assert (answer - unmerged).abs().max() > 1e-6, "merging changed nothing"
    handle = tokenmerge.patch(model, r=0, track=True)
    assert torch.equal(run(model, x), unmerged) and list(model.state_dict()) == keys
    handle.r = r
    run(model, x)
    assert handle.tokens == [plan.n - min(r, plan.n // 2) for plan in plans]
    assert handle.sizes.eq(1).all() and all(torch.equal(groups, handle.groups[0]) for groups in handle.groups)
    report = handle.report()
    handle.remove()
    assert torch.equal(run(model, x), unmerged) and bound_attributes(model) == []
    if family:
        note(family, "supported", "; ".join(report.limits), report.adapter)
    return plans
