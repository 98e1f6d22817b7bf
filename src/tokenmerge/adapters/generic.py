"""The adapter for models without their own: the user names the blocks and three of their children."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge._intercept.multihead import multihead
from tokenmerge.adapters.base import (
    PROBED,
    Adapter,
    Binding,
    Context,
    HookSpec,
    Host,
    Override,
    Surroundings,
    TokenLayout,
)
from tokenmerge.errors import ConfigError, UnknownNameError, UnsupportedError, UnsupportedModelError

__all__ = ["Generic", "count_prefix"]


class Generic(Adapter):
    """Describes a model by names: `blocks` is the path of the list of blocks, the others are paths inside a block."""

    name = "generic"
    families = "any pre-norm model, told its names: patch(model, blocks=..., attn=..., norm=..., mlp=...)"
    host = Host(may_match_features=True)

    def __init__(self, blocks: str, attn: str, norm: str, mlp: str, prefix: int | None = None) -> None:
        if prefix is not None and (isinstance(prefix, bool) or not isinstance(prefix, int) or prefix < 0):
            raise ConfigError(f"prefix={prefix!r}: how many tokens in front are protected is a whole number from 0 on.")
        self.path, self.names, self.prefix = blocks, HookSpec(attn, norm, mlp), prefix

    def matches(self, model: Any) -> bool:
        return True

    def blocks(self, model: Any) -> list[tuple[str, nn.Module]]:
        holder = _find(model, self.path, "blocks", type(model).__qualname__)
        found = [(f"{self.path}.{name}", block) for name, block in holder.named_children()]
        if not isinstance(holder, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            raise UnsupportedModelError(
                f"blocks={self.path!r} is one {type(holder).__qualname__}, not a list of blocks. "
                f"Its children are: {', '.join(name for name, _ in holder.named_children()) or 'none'}."
            )
        return found

    def spec(self, block: Any) -> HookSpec:
        for option in ("attn", "norm", "mlp"):
            _find(block, getattr(self.names, option), option, f"the block {type(block).__qualname__}")
        return self.names

    def layout(self, model: Any) -> TokenLayout:
        attns = [multihead(block.get_submodule(self.spec(block).attn)) for _, block in self.blocks(model)]
        batch_first = not any(attn is not None and not attn.batch_first for attn in attns)
        prefix = count_prefix(model) if self.prefix is None else self.prefix
        return TokenLayout(prefix, None, None, None, batch_first)

    def overrides(self, model: Any, context: Context) -> list[Binding]:
        if self.prefix is None:
            return []
        first = self.blocks(model)[0][1]
        return [Binding(first, "forward", _Prefixed(first, self.prefix, self.layout(model).batch_first))]

    def sample(self, model: Any, block: Any, layout: TokenLayout) -> tuple[int, dict[str, Any]]:
        behind = list(inspect.signature(type(block).forward).parameters.values())[2:]
        plain = [p for p in behind if p.kind is p.POSITIONAL_OR_KEYWORD]
        return PROBED, {p.name: None for p in plain if p.default is p.empty}

    def surroundings(self, model: Any) -> Surroundings:
        prefix = self.layout(model).prefix
        every = (
            "what a model that is only known by names does with its tokens is not known (in front, "
            f"{prefix} {'is' if prefix == 1 else 'are'} protected)"
        )
        return replace(super().surroundings(model), every=every)

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from tokenmerge.testing.models.plain import PlainStandIn

        return PlainStandIn().eval(), torch.randn(2, 3, 32, 32)


class _Prefixed(Override):
    """The instance `forward` of the first block: raises if it gets fewer tokens than the user's `prefix`."""

    def __init__(self, block: nn.Module, prefix: int, batch_first: bool) -> None:
        super().__init__(block)
        self.prefix, self.axis = prefix, 1 if batch_first else 0

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.shape[self.axis] < self.prefix:
            raise UnsupportedError(
                f"prefix={self.prefix} tokens in front are to be protected, and the first block was given "
                f"{x.shape[self.axis]} in all, {tuple(x.shape)}."
            )
        return self.original(x, *args, **kwargs)


# [1, n, C] or [C] parameters
_TOKENS = ("cls_token", "class_token", "class_embedding", "dist_token", "distillation_token")
_REGISTERS = ("reg_token", "reg_tokens", "register_tokens", "registers")


def count_prefix(model: nn.Module) -> int:
    """Return how many tokens an unknown model puts in front of its patches, from the usual parameter names.

    The whole model is searched. Of several parameters of one name, the least deep counts.
    """
    declared = getattr(model, "num_prefix_tokens", None)
    if isinstance(declared, int):
        return declared
    found: dict[str, Tensor] = {}
    for path, parameter in sorted(model.named_parameters(), key=lambda item: item[0].count(".")):
        name = path.rpartition(".")[2]
        if name in (*_TOKENS, *_REGISTERS):
            found.setdefault(name, parameter)
    return sum(token.shape[-2] if token.dim() == 3 else 1 for token in found.values())


def _find(module: nn.Module, path: str, option: str, where: str) -> nn.Module:
    here, done = module, ""
    for part in path.split("."):
        child = getattr(here, part, None)
        if not isinstance(child, nn.Module):
            present = ", ".join(name for name, _ in here.named_children()) or "none"
            raise UnknownNameError(
                f"{option}={path!r}: {where}{' at ' + repr(done) if done else ''} has no child {part!r}. "
                f"Its children are: {present}."
            )
        here, done = child, f"{done}.{part}".lstrip(".")
    return here
