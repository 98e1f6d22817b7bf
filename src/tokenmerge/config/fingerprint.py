"""The model that a configuration was made for: what it runs in, and what was measured with it, depends on that."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge import adapters
from tokenmerge._intercept.prove import token_width
from tokenmerge.adapters.base import Adapter
from tokenmerge.errors import ConfigError, unknown_name
from tokenmerge.fields import checked
from tokenmerge.methods.learned import MODULES

__all__ = ["Fingerprint", "digest"]

_SAMPLES = 64  # of each tensor: reading them all would take a second for a large model, at each patch
_FREE = "To use it unchecked: dataclasses.replace(config, fingerprint=None)."


@dataclass(frozen=True)
class Fingerprint:
    """What is known of a model: enough to say whether a configuration made for it fits another.

    Args:
        architecture: its name in timm, else its class.
        depth: the number of blocks.
        tokens: how many enter the first block; None where the model does not say.
        protected: how many of those are never merged.
        width: channels of a token.
        input_size: of one input, without the batch.
        weights: the dtype and a digest of samples of each tensor; None: not taken.
        base: a timm name, a hub id or a folder that the weights come from, where that is known.
    """

    architecture: str
    depth: int
    tokens: int | None = None
    protected: int = 0
    width: int | None = None
    input_size: tuple[int, ...] | None = None
    weights: str | None = None
    base: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        try:
            fields = checked(self)
        except TypeError as error:
            name, value, kind = error.args
            raise ConfigError(f"{name} of the fingerprint is {value!r}; it takes {kind}.") from error
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @classmethod
    def read(cls, content: Any) -> Fingerprint:
        """Return the fingerprint that a saved object describes; raises `TokenMergeError`."""
        known = [part.name for part in fields(cls)]
        for name in content.keys() - {*known} if isinstance(content, dict) else ():
            raise unknown_name("key of the fingerprint", name, known)
        if not isinstance(content, dict) or not {"architecture", "depth"} <= content.keys():
            held = ", ".join(content) if isinstance(content, dict) else repr(content)
            raise ConfigError(
                f"fingerprint must be an object with architecture and depth; it holds {held or 'nothing'}."
            )
        return cls(**content)

    @classmethod
    def of(
        cls, model: nn.Module, adapter: Adapter | None = None, *, weights: bool | Mapping[str, Any] = True
    ) -> Fingerprint:
        """Return the fingerprint of a model, patched or not; without an adapter its own is found.

        `weights` says whether to take a digest; a state dict is taken in place of the model's own.

        Raises `UnsupportedModelError` for a model that no adapter describes.
        """
        adapter = adapter or adapters.find(model)
        layout, blocks = adapter.layout(model), adapter.blocks(model)
        return cls(
            architecture=_name(model),
            depth=len(blocks),
            tokens=layout.tokens,
            protected=layout.protected,
            width=token_width(blocks[0][1]) if blocks else None,
            input_size=layout.input_size,
            weights=digest(model.state_dict() if weights is True else weights) if weights else None,
        )

    def check(self, other: Fingerprint) -> list[str]:
        """Return what differs in another model that a configuration for this one still runs in, as sentences.

        Raises `ConfigError` for a model with another number of blocks or tokens.
        """
        if self.depth != other.depth:
            raise ConfigError(
                f"this configuration is for a model with {self.depth} blocks ({self.architecture}), and this one has "
                f"{other.depth} ({other.architecture}): what each block removes does not carry over. Take the model "
                f"it was made for, or tune this one. {_FREE}"
            )
        if None not in (self.tokens, other.tokens) and self.tokens != other.tokens:
            raise ConfigError(
                f"this configuration is for {self.tokens} tokens ({self.architecture}{_sized(self)}), and this model "
                f"has {other.tokens} ({other.architecture}{_sized(other)}). Build the model for the same input size "
                f"(timm: img_size=...), or tune this one. {_FREE}"
            )
        mine, its = (f"{part.architecture}, {part.width} wide, {part.protected} protected" for part in (self, other))
        if mine != its:
            return [f"the configuration was made for another model ({mine}; this is {its})"]
        if None in (self.weights, other.weights) or self.weights == other.weights:
            return []
        dtype, own = (str(part.weights).partition(":")[0] for part in (self, other))
        if dtype != own:
            return [f"the configuration was made with weights in {dtype}, these are {own}: not compared"]
        return ["the configuration was made with other weights than these: what was measured then may not hold"]


def _name(model: nn.Module) -> str:
    about = getattr(model, "pretrained_cfg", None)
    name = about.get("architecture") if isinstance(about, Mapping) else None
    return name if isinstance(name, str) else f"{type(model).__module__}.{type(model).__qualname__}"


def _sized(model: Fingerprint) -> str:
    return f", input {' x '.join(map(str, model.input_size))}" if model.input_size else ""


def digest(weights: Mapping[str, Any]) -> str | None:
    """Return the dtype of the weights and a digest of samples of every tensor; None where they cannot be read.

    The names and the order of tensors do not matter: versions of a host give them others.
    """
    found, dtype = [], ""
    for name, value in weights.items():
        if name.startswith(f"{MODULES}.") or not isinstance(value, Tensor):
            continue
        try:
            found.append(_digest_of(value))
        except (RuntimeError, NotImplementedError, TypeError, ValueError):  # weights elsewhere, or of another layout
            return None
        dtype = dtype or (str(value.dtype).removeprefix("torch.") if value.is_floating_point() else "")
    return f"{dtype}:{hashlib.sha256(b''.join(sorted(found))).hexdigest()[:16]}"


def _digest_of(value: Tensor) -> bytes:
    flat = value.detach().reshape(-1)
    some = flat[:: max(1, math.ceil(flat.numel() / _SAMPLES))].cpu().contiguous()
    content = bytes(some.view(torch.uint8).tolist())
    return hashlib.sha256(repr(tuple(value.shape)).encode() + content).digest()
