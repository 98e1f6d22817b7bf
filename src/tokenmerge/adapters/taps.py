"""Ways to see an attention's queries, keys and values, and to add a bias to its scores.

Shapes: B batch, N tokens, C channels, H heads, D head width.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenmerge.errors import UnsupportedError

__all__ = ["AttentionTap", "MultiheadTap", "SeamTap"]

Captured = dict[str, Tensor]


class AttentionTap(Protocol):
    """Stands in for a block's attention: calls it with a bias, and hands over what it saw."""

    kind: str
    takes_bias: bool

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor: ...  # [B, N, C], [B, N] -> [B, N, C]

    def take(self) -> Captured:
        """Return `q`, `k`, `v` (those seen, `[B, H, N, D]`) of the last call in this thread, and forget them."""
        ...

    def seams(self, needs: frozenset[str]) -> list[tuple[nn.Module, Any]]:
        """Return the modules to listen on, each with the callable that becomes its instance `forward`."""
        ...


class Slot:
    """Holds what one thread captured between attention and merging; a plain dict while a tracer is at work."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._traced: Captured = {}

    def __reduce__(self) -> tuple[type[Slot], tuple[()]]:
        """Copies and pickles start empty."""
        return Slot, ()

    def put(self, captured: Captured) -> None:
        if torch.compiler.is_compiling():
            self._traced = {**self._traced, **captured}
        else:
            self._local.captured = {**getattr(self._local, "captured", {}), **captured}

    def take(self) -> Captured:
        if torch.compiler.is_compiling():
            captured, self._traced = self._traced, {}
        else:
            captured, self._local.captured = getattr(self._local, "captured", {}), {}
        return captured


class Listener:
    """The instance `forward` of a module whose output is captured: calls the class's own and keeps the result."""

    def __init__(self, module: nn.Module, slot: Slot, names: tuple[str, ...], heads: int | None = None) -> None:
        self.module, self.slot, self.names, self.heads = module, slot, names, heads
        self.previous = module.__dict__.get("forward")

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self.previous(x) if self.previous else type(self.module).forward(self.module, x)
        if self.heads is None:
            self.slot.put({self.names[0]: out})
        else:
            # a fused projection: [B, N, 3 * H * D]
            B, N, _ = out.shape
            parts = out.view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            self.slot.put({name: part for name, part in zip("qkv", parts, strict=True) if name in self.names})
        return out


class SeamTap:
    """Listens on children of the attention: `q_norm` and `k_norm` where they exist, else the fused `qkv` projection.

    The bias goes in as the `attn_mask` keyword, where the attention has one.
    """

    kind = "seam"

    def __init__(self, attn: nn.Module) -> None:
        self.attn = attn
        self.slot = Slot()
        self.takes_bias = "attn_mask" in inspect.signature(type(attn).forward).parameters

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = self.attn(x) if bias is None else self.attn(x, attn_mask=bias.to(x.dtype)[:, None, None, :])
        return out

    def take(self) -> Captured:
        return self.slot.take()

    def seams(self, needs: frozenset[str]) -> list[tuple[nn.Module, Any]]:
        found: list[tuple[nn.Module, Any]] = []
        fused: tuple[str, ...] = ()
        for name in sorted(needs):
            norm = getattr(self.attn, f"{name}_norm", None)
            if isinstance(norm, nn.Module):
                found.append((norm, Listener(norm, self.slot, (name,))))
            else:
                fused += (name,)
        if fused:
            qkv, heads = getattr(self.attn, "qkv", None), getattr(self.attn, "num_heads", None)
            if not isinstance(qkv, nn.Module) or not isinstance(heads, int):
                raise UnsupportedError(
                    f"the method needs {', '.join(fused)}, but {type(self.attn).__name__} has neither "
                    f"{fused[0]}_norm nor a fused qkv projection with num_heads to listen on. Choose another metric."
                )
            found.append((qkv, Listener(qkv, self.slot, fused, heads)))
        return found


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

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        attn = self.attn
        B, N, C = x.shape
        qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)  # [B, N, 3C]
        q, k, v = qkv.view(B, N, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D]
        self.slot.put({"q": q, "k": k, "v": v})
        mask = None if bias is None else bias.to(q.dtype)[:, None, None, :]
        dropout = attn.dropout if attn.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        projected: Tensor = attn.out_proj(out.transpose(1, 2).reshape(B, N, C))
        return projected

    def take(self) -> Captured:
        return self.slot.take()

    def seams(self, needs: frozenset[str]) -> list[tuple[nn.Module, Any]]:
        return []
