"""`torch.nn.TransformerEncoder` with `norm_first=True`, alone or as the only encoder of a model.

Shapes: B batch, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge._intercept import follow
from tokenmerge._intercept.multihead import MultiheadTap
from tokenmerge._intercept.taps import AttentionTap
from tokenmerge.adapters.base import Adapter, BlockSpec, Host, Surroundings, TokenLayout
from tokenmerge.adapters.generic import count_prefix
from tokenmerge.errors import UnsupportedError, UnsupportedModelError

__all__ = ["TorchEncoder"]

_SPEC = BlockSpec(
    attention=("norm1", "self_attn", "dropout1"),
    attn="self_attn",
    mlp=("norm2", "linear1", "activation", "dropout", "linear2", "dropout2"),
)


def _added(padding: Tensor) -> Tensor:
    """Return a padding mask as an additive one; a bool mask is True for padding, any other is additive already."""
    if padding.dtype != torch.bool:
        return padding
    return torch.zeros(padding.shape, device=padding.device).masked_fill(padding, float("-inf"))


def _real(padding: Tensor) -> Tensor:
    return follow.keys_of_mask(_added(padding))


class TorchEncoder(Adapter):
    name = "torch_encoder"
    families = "torch.nn.TransformerEncoder with norm_first=True, alone or as the one encoder of a model"
    landmarks = ("layers", "norm1", "self_attn", "linear1", "linear2", "norm2")
    # True for padding; the encoder turns it into an additive mask
    host = Host("torch", followers={"src_key_padding_mask": follow.mask}, padding={"src_key_padding_mask": _real})

    def matches(self, model: nn.Module) -> bool:
        return bool(_encoders(model))

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        path, encoder = _one_encoder(model)
        start = f"{path}.layers" if path else "layers"
        return [(f"{start}.{name}", layer) for name, layer in encoder.layers.named_children()]

    def spec(self, block: Any) -> BlockSpec:
        if not isinstance(block, nn.TransformerEncoderLayer):
            raise UnsupportedModelError(
                f"the encoder's layers are of class {type(block).__qualname__}, not nn.TransformerEncoderLayer."
            )
        if not block.norm_first:
            raise UnsupportedModelError(
                "the encoder's layers normalise after each residual (norm_first=False, post-norm): what is merged "
                "between attention and MLP has to be a plain residual. Only norm_first=True can be merged in."
            )
        return _SPEC

    def layout(self, model: nn.Module) -> TokenLayout:
        first: Any = self.blocks(model)[0][1]
        self.spec(first)
        return TokenLayout(count_prefix(model), None, None, None, first.self_attn.batch_first)

    def tap(self, block: Any) -> AttentionTap:
        return _EncoderTap(block, "self_attn")

    def surroundings(self, model: nn.Module) -> Surroundings:
        (path, encoder), why = _one_encoder(model), _tokens(model)
        return Surroundings(self, model, [(encoder, "forward")], last=why if path else None, handed_out=why)

    def tiny(self) -> tuple[nn.Module, Tensor]:
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval(), torch.randn(2, 16, 32)


class _EncoderTap(MultiheadTap):
    """Also passes the padding mask on to the attention, as the encoder layer does."""

    def call(self, attention: Callable[..., Any], x: Tensor, given: dict[str, Any]) -> Any:
        if x.dim() != 3:
            raise UnsupportedError(
                f"the encoder was given one sequence without a batch, {tuple(x.shape)}: give it as a batch of one."
            )
        padding = given.get("src_key_padding_mask")
        return super().call(attention, x, {} if padding is None else {"key_padding_mask": padding})

    def masked(self, given: dict[str, Any]) -> Tensor | None:
        padding = given.get("key_padding_mask")
        return None if padding is None else _added(padding)[:, None, None, :]  # [B, 1, 1, N]


def _tokens(model: nn.Module) -> str:
    prefix = count_prefix(model)
    return f"a torch encoder hands out tokens by their place (in front, {prefix} are protected as class tokens)"


def _encoders(model: nn.Module) -> list[tuple[str, nn.TransformerEncoder]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.TransformerEncoder)]


def _one_encoder(model: nn.Module) -> tuple[str, nn.TransformerEncoder]:
    found = _encoders(model)
    if len(found) > 1:
        names = [name or "the model itself" for name, _ in found]
        raise UnsupportedModelError(
            f"{type(model).__qualname__} holds {len(found)} encoders: {', '.join(names)}. Patch one of them, e.g. "
            f"patch(model.{found[-1][0]}, ...)."
        )
    return found[0]
