"""Taps for attentions that take no mask, and for attentions that use the weight of `qkv` without calling it.

Shapes: B batch, N tokens, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as everywhere

from tokenmerge._intercept.follow import add_bias
from tokenmerge._intercept.override import Binding
from tokenmerge._intercept.taps import Attending, AttentionTap, Listener, SeamTap
from tokenmerge._torch.tracing import is_compiling
from tokenmerge.errors import UnsupportedError

__all__ = ["ProjectionTap", "listen_with_biases"]


class ProjectionTap(AttentionTap):
    """Computes softmax attention from an attention's own children, for attentions whose forward takes no bias.

    Args:
        block: the block.
        path: the path of the attention in the block.
        qkv: one projection that gives q, k and v, or three projections.
        after: children that are called on the output, in order.
        before: children that are called on the input, in order.
        drop: attribute with the dropout of the weights: a module, a number, or None.
        softmax: the module that computes the weights, if the attention has one.
    """

    kind = "projections"

    def __init__(
        self,
        block: nn.Module,
        path: str,
        qkv: tuple[str, ...] = ("qkv",),
        after: tuple[str, ...] = ("proj", "proj_drop"),
        before: tuple[str, ...] = (),
        drop: str = "attn_drop",
        softmax: str = "attend",
    ) -> None:
        super().__init__(block, path)
        self.qkv, self.before, self.after, self.drop, self.softmax = qkv, before, after, drop, softmax
        self.heads = int(getattr(self.attn, "num_heads", None) or self.attn.heads)
        self.scale: float | None = getattr(self.attn, "scale", None)

    def attend(
        self, run: Callable[..., Any], bias: Tensor | None, kept: Tensor | None, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        x = self._run(self.before, args[0])
        projected = [getattr(self.attn, name)(x) for name in self.qkv]
        parts = projected[0].chunk(3, dim=-1) if len(projected) == 1 else projected
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)  # [B, H, N, D]
        self.slot.put({"q": q, "k": k, "v": v})
        out = self._attend(q, k, v, add_bias(kwargs.get("attn_mask"), bias, q.dtype))
        out = self._run(self.after, out.transpose(1, 2).flatten(2))
        return out if self.rest is None else (out, *self.rest)

    def seams(self, needs: frozenset[str]) -> list[Binding]:
        return [Binding(self.attn, "forward", _Computed(self.attn, self))]

    def _run(self, names: tuple[str, ...], x: Tensor) -> Tensor:
        for name in names:
            x = getattr(self.attn, name)(x)
        return x

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        softmax, drop = getattr(self.attn, self.softmax, None), getattr(self.attn, self.drop, None)
        drops = isinstance(drop, nn.Dropout) and drop.p and drop.training
        if drops or _is_watched(softmax) or _is_watched(drop):
            # like the attention itself, so that dropout drops the same weights
            scores = q @ k.mT * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
            scores = scores if mask is None else scores + mask
            weights = softmax(scores) if isinstance(softmax, nn.Softmax) else scores.softmax(dim=-1)
            return (drop(weights) if isinstance(drop, nn.Module) else weights) @ v
        probability = drop if isinstance(drop, float) and self.attn.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=probability, scale=self.scale)


class _Computed(Attending):
    """Notes the output format of the attention's own forward: a tensor, or a tuple that starts with the tokens."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        is_own = not self.tap.turn.peek()
        out = super().__call__(*args, **kwargs)
        if is_own and isinstance(out, tuple) and self.tap.rest is None:
            self.tap.rest = (None,) * (len(out) - 1)
        return out


def _is_watched(module: Any) -> bool:
    """Return whether a module has forward or backward hooks."""
    hooks = [everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks, everywhere._global_backward_hooks]
    if not isinstance(module, nn.Module):
        return False
    return any((*hooks, module._forward_hooks, module._forward_pre_hooks, module._backward_hooks))


def listen_with_biases(tap: SeamTap, found: list[Binding], needs: frozenset[str]) -> list[Binding]:
    """Return the bindings by which a timm attention with separate biases calls its `qkv`, and the rest of `found`.

    Such an attention uses only the weight of `qkv`. Without a q_bias it calls `qkv`, and the bound projection adds the
    biases.
    """
    attn = tap.attn
    projection = _BiasedProjection(attn, tap, tuple(sorted(needs)))
    tap.following = [bound for bound in tap.following if bound.owner is not attn.qkv] + [projection]
    found = [bound for bound in found if bound.owner is not attn.qkv]
    if projection.is_hidden:
        found.append(Binding(attn, "q_bias", None))
    else:
        found[0] = Binding(attn, "forward", _Unbiased(attn, tap))
    return [*found, Binding(attn.qkv, "forward", projection)]


class _Unbiased(Attending):
    """Runs the attention's own forward on a view without q_bias; the parameter itself stays."""

    def original(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.owner).forward(_WithoutBias(self.owner), *args, **kwargs)


class _WithoutBias:
    """A view of an attention with all its attributes except q_bias."""

    q_bias = None

    def __init__(self, attn: nn.Module) -> None:
        self.attn = attn

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attn, name)


class _BiasedProjection(Listener):
    """The instance `forward` of `qkv`: the projection with the biases of its attention."""

    def __init__(self, attn: Any, tap: SeamTap, names: tuple[str, ...]) -> None:
        super().__init__(attn, "qkv", tap.slot, names, attn.num_heads, 3)
        self.attn = attn
        # timm's own forward can run on another self; a custom one may not
        is_own = "forward" not in attn.__dict__ and type(attn).forward.__module__.startswith("timm.")
        self.is_hidden = not is_own

    def original(self, x: Tensor) -> Tensor:
        attn = self.attn
        q_bias = attn._parameters["q_bias"] if self.is_hidden else attn.q_bias
        bias = torch.cat((q_bias, attn.k_bias, attn.v_bias))
        if attn.qkv_bias_separate:
            projected: Tensor = super().original(x)
            return projected + bias
        return F.linear(x, self.owner.weight, bias)  # type: ignore[arg-type]

    def follow(self) -> None:
        if self.is_hidden and not is_compiling():
            self.attn.__dict__["q_bias"] = None  # assigning the parameter anew removes this entry
        super().follow()

    def move(self, found: Any) -> None:
        if not self.attn.qkv_bias_separate:
            raise UnsupportedError(
                f"since the model was patched, 'qkv' of a {type(self.attn).__qualname__} was replaced by a "
                f"{type(found).__qualname__}. This attention takes the weight of its qkv, and never calls it: what is "
                "put around it has no effect there. Call handle.remove() and patch the model as it is now."
            )
        super().move(found)
