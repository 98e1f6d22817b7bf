"""Taps between an attention and its own projections: where it takes no mask, and where it passes its `qkv` by.

Shapes: B batch, N tokens, H heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenmerge.adapters.follow import add_bias
from tokenmerge.adapters.original import Replacement
from tokenmerge.adapters.taps import Listener, Slot
from tokenmerge.errors import UnsupportedError

__all__ = ["ProjectionTap", "biased_projection"]


class ProjectionTap:
    """Runs softmax attention between an attention's own children, where its forward would take no bias.

    `qkv` names one projection that gives all three, or three of them; `before` and `after` are called in their order,
    `drop` is the dropout of the weights: a module, a number, or None.
    """

    kind = "projections"
    takes_bias = True

    def __init__(
        self,
        attn: nn.Module,
        qkv: tuple[str, ...] = ("qkv",),
        after: tuple[str, ...] = ("proj", "proj_drop"),
        before: tuple[str, ...] = (),
        drop: str = "attn_drop",
    ) -> None:
        self.attn, self.qkv, self.before, self.after, self.drop = attn, qkv, before, after, drop
        self.heads = int(getattr(attn, "num_heads", None) or attn.heads)  # type: ignore[arg-type]
        self.scale: float | None = getattr(attn, "scale", None)
        self.slot = Slot()

    def __call__(self, x: Tensor, bias: Tensor | None, kept: Tensor | None = None, **given: Any) -> Tensor:
        x = self._run(self.before, x)
        projected = [getattr(self.attn, name)(x) for name in self.qkv]
        parts = projected[0].chunk(3, dim=-1) if len(projected) == 1 else projected
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)  # [B, H, N, D]
        self.slot.put({"q": q, "k": k, "v": v})
        out = self._attend(q, k, v, add_bias(given.get("attn_mask"), bias, q.dtype))
        return self._run(self.after, out.transpose(1, 2).flatten(2))

    def intercept(self, bias: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise UnsupportedError("this attention is called by its block's description only.")

    def take(self) -> dict[str, Tensor]:
        return self.slot.take()

    def seams(self, needs: frozenset[str]) -> list[Replacement]:
        return []

    def _run(self, names: tuple[str, ...], x: Tensor) -> Tensor:
        for name in names:
            x = getattr(self.attn, name)(x)
        return x

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        drop = getattr(self.attn, self.drop, None)
        if isinstance(drop, nn.Dropout) and drop.p and drop.training:
            # as the attention itself would, so that the same weights are dropped
            scores = q @ k.mT * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
            dropped: Tensor = drop((scores if mask is None else scores + mask).softmax(dim=-1))
            return dropped @ v
        probability = drop if isinstance(drop, float) and self.attn.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=probability, scale=self.scale)


def biased_projection(attn: Any, slot: Slot, needs: frozenset[str]) -> list[Replacement]:
    """Return what lets a timm attention with separate biases call its `qkv`, whose weight alone it uses otherwise.

    An attention that finds no q_bias calls `qkv`, which then adds the biases.
    """
    projection = _BiasedProjection(attn, slot, tuple(sorted(needs)))
    return [Replacement(attn, "q_bias", None), Replacement(attn.qkv, "forward", projection)]


class _BiasedProjection(Listener):
    """The instance `forward` of `qkv`: the projection with the biases of the attention around it."""

    def __init__(self, attn: Any, slot: Slot, names: tuple[str, ...]) -> None:
        super().__init__(attn.qkv, slot, names, attn.num_heads, 3)
        self.attn = attn

    def original(self, x: Tensor) -> Tensor:
        attn, own = self.attn, self.attn._parameters
        bias = torch.cat((own["q_bias"], attn.k_bias, own["v_bias"]))
        if attn.qkv_bias_separate:
            projected: Tensor = super().original(x)
            return projected + bias
        return F.linear(x, attn.qkv.weight, bias)
