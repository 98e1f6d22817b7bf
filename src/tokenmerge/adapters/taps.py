"""Ways to see an attention's queries, keys and values, and to add a bias to its scores.

Shapes: B batch, N tokens, C channels, H heads, D head width.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenmerge.adapters.follow import add_bias
from tokenmerge.adapters.original import Original, Replacement
from tokenmerge.errors import UnsupportedError

__all__ = ["AttentionTap", "MultiheadTap", "SeamTap", "Slot"]

Captured = dict[str, Tensor]

# how attentions spell what comes out as q, k, v: normalised, projected one by one, projected at once
_WORDS = {"q": "query", "k": "key", "v": "value"}
_NORMS = ("{0}_norm", "ln_{0}", "norm_{0}")
_PROJECTIONS = ("{0}_proj", "{1}", "to_{0}", "{0}")
_FUSED = ("qkv", "to_qkv")
_HEADS = ("num_heads", "heads", "n_heads", "n_head", "num_attention_heads")


class AttentionTap(Protocol):
    """Stands in for a block's attention: calls it with a bias, and hands over what it saw."""

    kind: str
    takes_bias: bool

    def __call__(self, x: Tensor, bias: Tensor | None, kept: Tensor | None = None, **given: Any) -> Tensor:
        """Run the attention on the tokens `[B, N, C]` with a bias per key `[B, N]`; returns `[B, N, C]`.

        `kept` `[B, N]` holds the places of these tokens among those of the input, None while all are there; `given`
        what the block was called with besides, for the tokens that are left.
        """
        ...

    def take(self) -> Captured:
        """Return `q`, `k`, `v` (those seen, `[B, H, N, D]`) of the last call in this thread, and forget them."""
        ...

    def intercept(self, bias: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stand in for a call that the host makes itself: the same arguments with a bias, the same kind of output."""
        ...

    def seams(self, needs: frozenset[str]) -> list[Replacement]:
        """Return what is bound while the model is patched, so that those are seen."""
        ...


class Slot:
    """Holds what one thread captured between attention and merging; a plain dict while a tracer is at work."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._traced: dict[str, Any] = {}

    def __reduce__(self) -> tuple[type[Slot], tuple[()]]:
        """Copies and pickles start empty."""
        return Slot, ()

    def put(self, captured: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            self._traced = {**self._traced, **captured}
        else:
            self._local.captured = {**getattr(self._local, "captured", {}), **captured}

    def peek(self) -> dict[str, Any]:
        """Return what is held, and keep it."""
        if torch.compiler.is_compiling():
            return self._traced
        held: dict[str, Any] = getattr(self._local, "captured", {})
        return held

    def take(self) -> dict[str, Any]:
        if torch.compiler.is_compiling():
            captured, self._traced = self._traced, {}
        else:
            captured, self._local.captured = getattr(self._local, "captured", {}), {}
        return captured


class Listener(Original):
    """The instance `forward` of a module whose output is captured: calls the class's own and keeps the result.

    The output is one of q, k, v as `[B, H, N, D]`, one as `[B, N, H * D]`, or all three as `[B, N, 3 * H * D]`.
    """

    def __init__(self, module: nn.Module, slot: Slot, names: tuple[str, ...], heads: int, parts: int) -> None:
        super().__init__(module)
        self.slot, self.names, self.heads, self.parts = slot, names, heads, parts

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self.original(x)
        if out.dim() == 4:
            self.slot.put({self.names[0]: out})
        else:
            split = out.unflatten(-1, (self.parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            order = "qkv" if self.parts == 3 else self.names
            self.slot.put({name: part for name, part in zip(order, split, strict=True) if name in self.names})
        return out


class SeamTap:
    """Listens on children of the attention: `q_norm` and `k_norm` where they exist, else its projections.

    The bias goes in as the `attn_mask` keyword, where the attention has one. `original` is what the tap calls: the
    attention, unless that is intercepted.
    """

    kind = "seam"

    def __init__(self, attn: nn.Module, original: Callable[..., Any] | None = None) -> None:
        self.attn = attn
        self.original = original or attn
        self.slot = Slot()
        self.takes_bias = "attn_mask" in inspect.signature(type(attn).forward).parameters

    def __call__(self, x: Tensor, bias: Tensor | None, kept: Tensor | None = None, **given: Any) -> Tensor:
        out = self.intercept(bias, (x,), given)
        tokens: Tensor = out[0] if isinstance(out, tuple) else out
        return tokens

    def intercept(self, bias: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if bias is None:
            return self.original(*args, **kwargs)
        dtype = next(value.dtype for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return self.original(*args, **{**kwargs, "attn_mask": add_bias(kwargs.get("attn_mask"), bias, dtype)})

    def take(self) -> Captured:
        return self.slot.take()

    def seams(self, needs: frozenset[str]) -> list[Replacement]:
        found, fused = [], []
        heads = next((n for n in (getattr(self.attn, name, None) for name in _HEADS) if isinstance(n, int)), 0)
        for name in sorted(needs):
            module = _child(self.attn, *(spelling.format(name, _WORDS[name]) for spelling in _NORMS))
            if module is None and heads:
                module = _child(self.attn, *(spelling.format(name, _WORDS[name]) for spelling in _PROJECTIONS))
            if module is None:
                fused.append(name)
            else:
                count = heads if name == "q" else getattr(self.attn, "num_kv_heads", None) or heads
                found.append(Replacement(module, "forward", Listener(module, self.slot, (name,), count, 1)))
        if fused:
            qkv = _child(self.attn, *_FUSED)
            if qkv is None or not heads:
                raise UnsupportedError(
                    f"the method needs {', '.join(fused)}, but {type(self.attn).__name__} has neither "
                    f"{fused[0]}_norm nor a fused qkv projection with num_heads to listen on. Choose another metric."
                )
            found.append(Replacement(qkv, "forward", Listener(qkv, self.slot, tuple(fused), heads, 3)))
        return found


def _child(module: nn.Module, *names: str) -> nn.Module | None:
    children = (getattr(module, name, None) for name in names)
    return next((child for child in children if isinstance(child, nn.Module)), None)


class MultiheadTap:
    """Computes `nn.MultiheadAttention` from its parameters, whose layout is torch's public contract.

    Its own forward hides q, k and v from hooks and wants a mask of B * H * N * N entries.
    """

    kind = "nn.MultiheadAttention"
    takes_bias = True

    def __init__(self, attn: nn.MultiheadAttention) -> None:
        if attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn:
            raise UnsupportedError(
                "this nn.MultiheadAttention has separate key/value widths, bias_k or add_zero_attn; only the plain "
                "self-attention form (one in_proj_weight) can be reduced."
            )
        self.attn = attn
        self.slot = Slot()

    def __call__(self, x: Tensor, bias: Tensor | None, kept: Tensor | None = None, **given: Any) -> Tensor:
        attn = self.attn
        B, N, C = x.shape
        qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)  # [B, N, 3C]
        q, k, v = qkv.view(B, N, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D]
        self.slot.put({"q": q, "k": k, "v": v})
        mask = add_bias(given.get("attn_mask"), bias, q.dtype)
        dropout = attn.dropout if attn.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        projected: Tensor = attn.out_proj(out.transpose(1, 2).reshape(B, N, C))
        return projected

    def intercept(self, bias: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        query, key, value, *more = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))
        masks = [*more, kwargs.get("key_padding_mask"), kwargs.get("attn_mask")]
        if key is not query or value is not query or any(isinstance(mask, Tensor) for mask in masks):
            raise UnsupportedError("only self-attention without masks of its own can be merged in.")
        if self.attn.batch_first:
            return self(query, bias), None
        return self(query.transpose(0, 1), bias).transpose(0, 1), None

    def take(self) -> Captured:
        return self.slot.take()

    def seams(self, needs: frozenset[str]) -> list[Replacement]:
        return []
