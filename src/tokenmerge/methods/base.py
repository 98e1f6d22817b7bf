"""What a reduction method is, and what it may see of the model it runs in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenmerge.plan import Plan, merge_weighted

__all__ = ["Reduction", "TokenView"]


@dataclass(frozen=True, eq=False)
class TokenView:
    """The tokens of one block between attention and MLP. B batch, N tokens, C channels, H heads, D head width."""

    stream: Tensor  # [B, N, C] the residual stream, `branch` not added
    x_pre: Tensor  # [B, N, C] the block's input
    q: Tensor | None  # [B, H, N, D]; only what `needs` names
    k: Tensor | None  # [B, H, N, D]
    v: Tensor | None  # [B, H, N, D]
    size: Tensor | None  # [B, N] input tokens per token; None while all are 1
    prefix: int  # protected tokens at the front
    grid: tuple[int, int] | None  # rows and columns of the input patches, where the model has a grid
    layer: int
    valid: Tensor | None = None  # [B, N] bool: which tokens are real; None: all
    branch: Tensor | None = None  # [B, N, C] what the attention adds to the stream; None: nothing is left to add

    @property
    def x(self) -> Tensor:
        """The tokens after the attention residual, `[B, N, C]`: added here, for methods that look at them."""
        return self.stream if self.branch is None else self.stream + self.branch


class Reduction(ABC):
    """A way to make fewer tokens of many: a frozen dataclass whose fields are its options.

    `needs` names what the attention must hand over: any of `"q"`, `"k"`, `"v"`, or nothing.
    """

    name: ClassVar[str]
    needs: frozenset[str] = frozenset()

    @abstractmethod
    def plan(self, view: TokenView, r: int) -> Plan:
        """Choose `r` tokens to remove; output shapes may depend on N and `r` only. The view is detached."""

    def merge(
        self,
        plan: Plan,
        x: Tensor,  # [B, N, C]
        size: Tensor | None,  # [B, N]
        branch: Tensor | None = None,  # [B, N, C]
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the plan to the tokens `x + branch`: `[B, M, C]` and the new sizes `[B, M]`.

        The default is the size-weighted mean, which adds the attention's branch in the same pass.
        """
        return merge_weighted(plan, x, size, branch)
