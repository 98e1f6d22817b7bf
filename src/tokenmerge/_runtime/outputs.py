"""Decide after which blocks all input tokens are restored, by how the model uses the block outputs.

Merged tokens leave the blocks only if the code after them is known to weight each token by its size. The host's own
code is known by name. A model recognised only by its structure is tested on generated tokens.

Shapes: B batch, N tokens in, M tokens left, C channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from tokenmerge._intercept.prove import token_width, undisturbed
from tokenmerge._intercept.trust import insides, is_of, methods_of, mixing, stranger
from tokenmerge.adapters.base import Adapter, Binding, Context, Override, Surroundings, TokenLayout

__all__ = ["Outputs", "decide"]

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-7}  # of the largest value; a wrong weight differs by a tenth


class Outputs(NamedTuple):
    """After which blocks all tokens are restored ("every", "last", or "" for none), and why."""

    restore: str
    reason: str


def decide(around: Surroundings, layout: TokenLayout, rest: tuple[None, ...] | None, restore: str | None) -> Outputs:
    """Decide where tokens are restored.

    Args:
        around: the surroundings of the blocks.
        layout: the token layout.
        rest: what the blocks return after their tokens.
        restore: the user's `restore` option.
    """
    if restore == "dense":
        return Outputs("every", "")
    host, part, everywhere = around.adapter.host, around.part, around.every
    if everywhere and restore == "merged" and not host.package:
        return Outputs("", "")  # patched by names: the user takes care of merged tokens
    is_known = is_of(part, host.package)
    if everywhere is None and is_known:
        everywhere = stranger(around.trusted, host.package)
    if everywhere:
        return Outputs("every", everywhere)
    last = around.last or (None if restore == "merged" else around.handed_out)
    if not is_known:
        return _tried(around.adapter, part, layout, rest, last)
    heads = methods_of(part, host.heads)
    last = last or stranger(insides(heads), host.package) or mixing(insides(heads)) or _hooked(heads)
    return Outputs("last" if last else "", last or "")


def _hooked(heads: list[tuple[nn.Module, str]]) -> str | None:
    """Name a module after the blocks that has hooks, whose use of the tokens is unknown."""
    modules = (module for module, name in heads if name == "forward")
    hooked = next((module for module in modules if module._forward_hooks or module._forward_pre_hooks), None)
    return f"hooks of a {type(hooked).__qualname__} behind the blocks see its tokens" if hooked is not None else None


def _tried(
    adapter: Adapter, model: nn.Module, layout: TokenLayout, rest: tuple[None, ...] | None, last: str | None
) -> Outputs:
    """Test where tokens must be restored, by replacing the blocks with stubs that return known tokens."""
    name = type(model).__qualname__
    if not _Trial.is_possible(model, layout):
        return Outputs("every", f"what {name} does with its tokens could not be tried")
    try:
        trial = _Trial(adapter, model, layout, rest)
        expected = trial.answer("every")
        for restore in ("last",) if last else ("", "last"):
            if _agree(trial.answer(restore), expected):
                reason = last or f"{name} does more with its tokens than to take class tokens or the mean that is known"
                return Outputs(restore, reason if restore else "")
    # an unknown forward on noise may raise anything
    except Exception as error:
        return Outputs("every", f"{name} could not be tried on tokens made for it ({type(error).__name__}: {error})")
    return Outputs("every", f"{name} uses the tokens of several blocks")


class _Trial:
    """Runs a model with random parameters and stub blocks that return given tokens, merged or restored."""

    def __init__(self, adapter: Adapter, model: nn.Module, layout: TokenLayout, rest: tuple[None, ...] | None) -> None:
        weight = _weight(model)
        assert weight is not None
        self.adapter, self.model, self.layout, self.rest = adapter, model, layout, rest
        self.blocks = [block for _, block in adapter.blocks(model)]
        unused = {id(parameter) for block in self.blocks for parameter in block.parameters()}
        like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.groups = _groups(layout, len(self.blocks), weight.device)
        width = token_width(self.blocks[0])
        self.devices = [weight.device] if weight.device.type == "cuda" else []
        with torch.random.fork_rng(devices=self.devices):
            torch.manual_seed(0)
            self.x = torch.randn(2, *(layout.input_size or ()), **like)
            self.tokens = [torch.randn(2, int(assign.max()) + 1, width, **like) for assign in self.groups]
            # random values: a zero-initialised classifier would hide every difference
            self.parameters = {
                name: _random(parameter)
                for name, parameter in model.named_parameters()
                if type(parameter) is nn.Parameter and id(parameter) not in unused
            }

    @staticmethod
    def is_possible(model: nn.Module, layout: TokenLayout) -> bool:
        """Return whether the model's input size and token count are known and its weights are not on meta."""
        weight = _weight(model)
        has_tokens = layout.tokens is not None and layout.tokens > layout.protected + 1
        return has_tokens and layout.input_size is not None and weight is not None and not weight.is_meta

    def answer(self, restore: str) -> list[Tensor]:
        """Return the model's outputs if blocks restore as `restore` says; "" pools merged tokens by size."""
        last = len(self.blocks) - 1
        given = []
        for layer, (tokens, assign) in enumerate(zip(self.tokens, self.groups, strict=True)):
            whole = restore == "every" or (restore == "last" and layer == last)
            tokens = tokens[:, assign] if whole else tokens
            out = tokens if self.layout.batch_first else tokens.transpose(0, 1)
            given.append(_Given(self.blocks[layer], out if self.rest is None else (out, *self.rest)))
        stand_ins = [Binding(block.owner, "forward", block) for block in given]
        size = self.groups[-1].bincount().float().expand(2, -1)
        context = Context(lambda: False, lambda x, cut: size, "merged")
        head = [] if restore else self.adapter.overrides(self.model, context)
        with undisturbed(self.model) as run:
            self.model.eval()
            for owner, attribute, value in (*stand_ins, *head):
                value.previous = owner.__dict__.get(attribute)
                owner.__dict__[attribute] = value
            out = run(torch.func.functional_call, self.model, self.parameters, (self.x,))
        return [leaf for leaf in _pytree.tree_leaves(out) if isinstance(leaf, Tensor)]


class _Given(Override):
    """A stub block that returns a fixed output."""

    def __init__(self, block: nn.Module, out: Any) -> None:
        super().__init__(block)
        self.out = out

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.out


def _groups(layout: TokenLayout, depth: int, device: torch.device) -> list[Tensor]:
    """Return each token's group per block, `[N]`; one group grows to half of the patches over the depth."""
    n, prefix = layout.tokens or 0, layout.prefix
    place = torch.arange(n, device=device)
    largest = ((layer + 1) * (n - layout.protected) // (2 * depth) for layer in range(depth))
    return [torch.where(place < prefix, place, (place - grown).clamp(min=prefix)) for grown in largest]


def _weight(model: nn.Module) -> Tensor | None:
    """Return the floating-point parameter of most dimensions (a convolution's): it has the input's dtype and device."""
    matrices = [p for p in model.parameters() if p.dim() > 1 and p.is_floating_point()]
    return max(matrices, key=lambda p: p.dim(), default=None)


def _random(parameter: nn.Parameter) -> Tensor:
    if not parameter.is_floating_point():
        return parameter
    # keeps the scale of activations
    scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.5
    return torch.randn_like(parameter) * scale


def _agree(got: list[Tensor], expected: list[Tensor]) -> bool:
    if not expected or [y.shape for y in got] != [y.shape for y in expected]:
        return False
    return all(
        bool((y - z).abs().max() <= _TOLERANCE.get(z.dtype, 4e-2) * max(1.0, float(z.abs().max())))
        for y, z in zip(got, expected, strict=True)
    )
