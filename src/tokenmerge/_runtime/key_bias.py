"""A per-key attention bias as a Tensor subclass, so that a host's SDPA call can be routed to a fused kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmerge import kernels

__all__ = ["KeyBias", "key_bias"]

_KEEPS = (Tensor.__getitem__, Tensor.expand, Tensor.unsqueeze, Tensor.contiguous)


class KeyBias(Tensor):
    """A bias per key, `[B, N]` or viewed as `[B, 1, 1, N]`; a plain tensor for all ops but SDPA and views."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **kwargs)
        if func is Tensor.to and isinstance(args[0], KeyBias):
            # keep full precision: the attention kernel rounds it if needed
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*(_plain(value) for value in args), **{name: _plain(value) for name, value in kwargs.items()})
        return out.as_subclass(KeyBias) if func in _KEEPS else out


def key_bias(bias: Tensor) -> Tensor:  # [B, N]
    """Return the bias for a host's attention: a `KeyBias` if a fused kernel is selected, else unchanged."""
    if kernels.is_replaced("attend"):
        return bias.as_subclass(KeyBias)
    kernels.note("attend", kernels.TABLE["attend"][-1], bias)
    return bias


def _plain(value: Any) -> Any:
    if not isinstance(value, KeyBias):
        return value
    # a view, since dynamo cannot trace as_subclass(Tensor)
    with torch._C.DisableTorchFunctionSubclass():
        return value.view(value.shape)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Replace `F.scaled_dot_product_attention` when one of its arguments is a `KeyBias`."""
    query, key, value = _plain(query), _plain(key), _plain(value)
    is_per_key = attn_mask is not None and attn_mask.dim() == 4 and attn_mask.shape[1:3] == (1, 1)
    if is_per_key and attn_mask is not None and not (dropout_p or is_causal or enable_gqa):
        return kernels.attend(query, key, value, _plain(attn_mask)[:, 0, 0], scale)
    mask = None if attn_mask is None else _plain(attn_mask).to(query.dtype)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )
