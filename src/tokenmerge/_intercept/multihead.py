"""The tap of `nn.MultiheadAttention`, whose forward hides q, k and v and needs a mask of B * H * N * N entries.

Shapes: B batch, N tokens, C channels, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tokenmerge._intercept.follow import add_bias
from tokenmerge._intercept.taps import AttentionTap
from tokenmerge._torch.memory import is_same
from tokenmerge.errors import UnsupportedError

__all__ = ["MultiheadTap", "multihead"]


def multihead(module: Any) -> nn.MultiheadAttention | None:
    """Return the module if it is a plain `nn.MultiheadAttention`, or the one it wraps (as LoRA does), else None."""
    if not isinstance(module, nn.Module):
        return None
    found = [m for m in module.modules() if isinstance(m, nn.MultiheadAttention)]
    # a subclass with its own forward may compute something other than plain attention
    is_plain = len(found) == 1 and type(found[0]).forward is nn.MultiheadAttention.forward
    return found[0] if is_plain else None


class MultiheadTap(AttentionTap):
    """Computes `nn.MultiheadAttention` from its parameters; their layout is public torch API."""

    kind = "nn.MultiheadAttention"

    def __init__(self, block: nn.Module, path: str) -> None:
        super().__init__(block, path)
        attn = multihead(self.attn)
        if attn is None:
            raise UnsupportedError(
                f"{path!r} of a {type(block).__qualname__} is a {type(self.attn).__qualname__}, neither a plain "
                "nn.MultiheadAttention nor a wrapper of one."
            )
        if attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn:
            raise UnsupportedError(
                "this nn.MultiheadAttention has separate key/value widths, bias_k or add_zero_attn; only the plain "
                "self-attention form (one in_proj_weight) can be reduced."
            )
        self.attn = attn

    def call(self, attention: Callable[..., Any], x: Tensor, given: dict[str, Any]) -> Any:
        if self.attn.batch_first:
            return attention(x, x, x, need_weights=False, **given)
        x = x.transpose(0, 1)
        return attention(x, x, x, need_weights=False, **given)[0].transpose(0, 1)

    def attend(
        self, run: Callable[..., Any], bias: Tensor | None, kept: Tensor | None, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        attn = self.attn
        given = {**dict(zip(("query", "key", "value", "key_padding_mask"), args, strict=False)), **kwargs}
        query = given["query"]
        if kwargs.get("need_weights"):
            raise UnsupportedError(
                "the attention was asked for its weights (need_weights=True), which would be those of merged tokens. "
                "Leave it out, or set handle.r = 0."
            )
        if not (is_same(given["key"], query) and is_same(given["value"], query)) or len(args) > 3:
            raise UnsupportedError("only self-attention, called with one tensor three times, can be merged in.")
        x = query if attn.batch_first else query.transpose(0, 1)
        B, N, C = x.shape
        qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)  # [B, N, 3C]
        q, k, v = qkv.view(B, N, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D]
        self.slot.put({"q": q, "k": k, "v": v})
        mask = add_bias(self.masked(given), bias, q.dtype)
        dropout = attn.dropout if attn.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        # nn.MultiheadAttention uses the weights of out_proj without calling the module
        out = F.linear(out.transpose(1, 2).reshape(B, N, C), attn.out_proj.weight, attn.out_proj.bias)
        return out if attn.batch_first else out.transpose(0, 1), None

    def masked(self, given: dict[str, Any]) -> Tensor | None:
        """Return the mask `[B, 1, 1, N]` of a call; raises `UnsupportedError` for a mask of the unmerged tokens."""
        if any(isinstance(given.get(name), Tensor) for name in ("key_padding_mask", "attn_mask")):
            raise UnsupportedError("only self-attention without masks of its own can be merged in.")
        return None
