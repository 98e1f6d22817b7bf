"""The adapter of a model whose tokens are in one part, e.g. CLIP with its vision tower."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from tokenmerge._intercept.taps import AttentionTap
from tokenmerge.adapters.base import Adapter, Binding, Context, Spec, Surroundings, TokenLayout

__all__ = ["Within"]


class Within(Adapter):
    """Applies the adapter of the part at `path` to the whole model; the rest of the model is unchanged.

    `token_methods` are those of the whole model, besides the part's own.
    """

    def __init__(self, path: str, inner: Adapter, token_methods: tuple[str, ...] = ()) -> None:
        self.path, self.inner = path, inner
        host = replace(
            inner.host,
            token_methods=(*token_methods, *self._inside(inner.host.token_methods)),
            restored_methods=self._inside(inner.host.restored_methods),
        )
        # class attributes of other adapters
        vars(self).update(name=inner.name, families=inner.families, landmarks=inner.landmarks, host=host)

    def _inside(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"{self.path}.{name}" for name in names)

    def part(self, model: nn.Module) -> nn.Module:
        """Return the part of the model that the inner adapter describes."""
        found: nn.Module = attrgetter(self.path)(model)
        return found

    def matches(self, model: nn.Module) -> bool:
        return self.inner.matches(self.part(model))

    def wiring(self, model: nn.Module) -> list[Binding]:
        return self.inner.wiring(self.part(model))

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        return [(f"{self.path}.{name}", block) for name, block in self.inner.blocks(self.part(model))]

    def spec(self, block: nn.Module) -> Spec:
        return self.inner.spec(block)

    def layout(self, model: nn.Module) -> TokenLayout:
        return self.inner.layout(self.part(model))

    def tap(self, block: nn.Module) -> AttentionTap:
        return self.inner.tap(block)

    def surroundings(self, model: nn.Module) -> Surroundings:
        # how the rest of the model uses the part's tokens is unknown
        inner = self.inner.surroundings(self.part(model))
        return replace(inner, last=inner.last or inner.handed_out, handed_out=None)

    def overrides(self, model: nn.Module, context: Context) -> list[Binding]:
        return self.inner.overrides(self.part(model), context)

    def sample(self, model: nn.Module, block: nn.Module, layout: TokenLayout) -> tuple[int, dict[str, Any]]:
        return self.inner.sample(self.part(model), block, layout)

    def tiny(self) -> tuple[nn.Module, Tensor]:
        return self.inner.tiny()
