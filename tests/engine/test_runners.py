"""Frames, and each way to merge in a block, on blocks written here: what a runner computes is what a loop computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import assert_close, randomised
from tokenmerge import ToMe
from tokenmerge import plan as plans
from tokenmerge._intercept.layout import TokenLayout
from tokenmerge._intercept.taps import AttentionTap
from tokenmerge._runtime.frames import Call, Frame
from tokenmerge._runtime.residual import ResidualRunner
from tokenmerge._runtime.state import ForwardState
from tokenmerge.adapters.base import BlockSpec
from tokenmerge.adapters.timm.vit import TimmViT
from tokenmerge.schedule import Schedule


def test_a_fork_keeps_what_came_before_and_forgets_what_came_after() -> None:
    frame = Frame(3)
    for slot in range(3):
        frame.size[slot], frame.shape[slot] = torch.full((1, 2), float(slot)), (1, 2)
    frame.last, frame.memory = 2, {0: "a note"}
    other = frame.fork(1)
    assert other.last == 1 and other.memory == frame.memory and other.memory is not frame.memory
    assert other.size[1] is frame.size[1] and other.size[2] is None and other.shape[2] is None
    other.size[1] = None
    assert frame.size[1] is not None and frame.size[2] is not None


class Block(nn.Module):
    """Attention with scores of its own size, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attn, self.mlp = Attention(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = q @ k.mT if bias is None else q @ k.mT + bias[:, None]
        return scores.softmax(dim=-1) @ v


class Tap(AttentionTap):
    """Calls the attention with the bias, and shows its keys as one head."""

    kind = "a test"

    def __init__(self, block: Block) -> None:
        self.attn, self.seen = block.attn, dict[str, Tensor]()

    def __call__(self, x: Tensor, bias: Tensor | None, kept: Tensor | None, **given: Any) -> Tensor:
        self.seen = {"k": self.attn.qkv(x).chunk(3, dim=-1)[1][:, None]}
        return self.attn(x, bias)

    def take(self) -> dict[str, Tensor]:
        return self.seen


def _runner(prefix: int, suffix: int, r: int = 3) -> tuple[Block, ResidualRunner]:
    block = randomised(Block()).eval()
    layout = TokenLayout(prefix, None, 12, None, suffix=suffix)
    state = ForwardState(1, Schedule.of(r, 1))
    spec = BlockSpec(("norm1", "attn"), "attn", ("norm2", "mlp"))
    return block, ResidualRunner(block, 0, spec, Tap(block), TimmViT(), ToMe(), state, layout, True)


def _by_loop(block: Block, x: Tensor, size: Tensor | None, plan: plans.AnyPlan) -> tuple[Tensor, Tensor]:
    """Attention with log(size) added to the scores, the mean of each group by size, then the MLP."""
    bias = None if size is None else size.log()
    x = x + block.attn(block.norm1(x), bias)
    count = torch.ones(x.shape[:2]) if size is None else size
    groups, left = plans.assignment(plan), plan.keep.shape[1]
    merged, sizes = torch.zeros(len(x), left, 8), torch.zeros(len(x), left)
    for image in range(len(x)):
        for slot in range(left):
            of = groups[image] == slot
            sizes[image, slot] = count[image, of].sum()
            merged[image, slot] = (x[image, of] * count[image, of, None]).sum(dim=0) / sizes[image, slot]
    return merged + block.mlp(block.norm2(merged)), sizes


@pytest.mark.parametrize(("prefix", "suffix"), [(0, 0), (1, 0), (0, 4), (2, 3)])
@pytest.mark.parametrize("has_sizes", [False, True])
def test_a_block_is_composed_as_the_formula_says(prefix: int, suffix: int, has_sizes: bool) -> None:
    block, runner = _runner(prefix, suffix)
    x = torch.randn(2, 12, 8)
    size = torch.randint(1, 4, (2, 12)).float() if has_sizes else None
    with torch.no_grad():
        call = runner._call(x, size, None, 3, {}, Frame(1))
        assert call.span == (prefix, 12 - suffix)
        out, sizes, plan = runner.compose(call)
        assert plan is not None and sizes is not None
        expected, counted = _by_loop(block, x, size, plan)
    assert_close(out, expected, 1e-5)
    assert torch.equal(sizes, counted) and out.shape == (2, 9, 8)
    groups = plans.assignment(plan)
    alone = [*range(prefix), *range(12 - suffix, 12)]
    assert all((groups == groups[:, place, None]).sum() == 2 for place in alone), "protected tokens stay alone"
    assert torch.equal(groups[:, 12 - suffix :], torch.arange(9 - suffix, 9).expand(2, -1))


def test_nothing_to_remove_is_the_block_itself_with_its_sizes() -> None:
    block, runner = _runner(1, 0)
    x, size = torch.randn(2, 12, 8), torch.ones(2, 12)
    with torch.no_grad():
        out, sizes, plan = runner.compose(runner._call(x, size, None, 0, {}, Frame(1)))
        assert_close(out, block(x), 1e-6)
    assert sizes is size and plan is None


def test_a_call_cannot_be_changed() -> None:
    call = Call(torch.zeros(1, 2, 3), None, None, None, 1, (0, 2), {}, Frame(1))
    with pytest.raises(AttributeError):
        call.size = torch.ones(1, 2)  # type: ignore[misc]
