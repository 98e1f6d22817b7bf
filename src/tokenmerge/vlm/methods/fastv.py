"""FastV: the visual tokens that the last token of the prompt attends to in an early layer of the language model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenmerge.errors import ConfigError, UnsupportedError
from tokenmerge.vlm.methods.base import Chooser, Visual, in_order

__all__ = ["FastV", "fastv"]


def fastv(attention: Tensor, k: int) -> Tensor:
    """Return the indices of the `k` tokens with the most `attention` `[N]`; equal ones in their order.

    The attention is that of the last token of the prompt in a layer of the language model, a mean over heads. Later
    layers go on without the other tokens; positions stay.

    Source: FastV, ECCV 2024, arXiv:2403.06764.
    """
    return in_order(attention.float().argsort(descending=True, stable=True)[:k])


@dataclass(frozen=True)
class FastV(Chooser):
    """Leave tokens out inside the language model, after `layer` layers."""

    name = "fastv"
    source = "FastV, ECCV 2024, arXiv:2403.06764"
    layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer < 1:
            raise ConfigError(f"fastv: layer is {self.layer}; it takes at least 1.")

    @property
    def inside(self) -> int:
        return self.layer

    def choose(self, visual: Visual, k: int) -> Tensor:
        if visual.attention is None:
            raise UnsupportedError(
                "fastv chooses by the attention inside the language model, and there is none yet. Use "
                "tokenmerge.vlm.patch(model, keep, method='fastv'), or a method that looks at the features, such as "
                "divprune."
            )
        return fastv(visual.attention, k)
