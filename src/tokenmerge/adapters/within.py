"""The adapter of a model that holds its tokens in one part: CLIP around its vision tower, a classifier around that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from tokenmerge._intercept.taps import AttentionTap
from tokenmerge.adapters.base import Adapter, Binding, BlockSpec, HookSpec, Sizes, TokenLayout, WindowSpec

__all__ = ["Within"]


class Within(Adapter):
    """Describes a whole model by the adapter of its part at `path`; the rest of the model is left alone.

    `token_methods` are those of the whole model, besides the part's own.
    """

    def __init__(self, path: str, inner: Adapter, token_methods: tuple[str, ...] = ()) -> None:
        self.path, self.inner = path, inner
        names = (*token_methods, *(f"{path}.{name}" for name in inner.token_methods))
        # what other adapters say once for their class
        same = ("name", "families", "landmarks", "followers", "is_positional", "may_match_features", "ignores_rest")
        vars(self).update({name: getattr(inner, name) for name in same}, token_methods=names)
        self.restored_methods = tuple(f"{path}.{name}" for name in inner.restored_methods)  # type: ignore[misc]

    def part(self, model: nn.Module) -> nn.Module:
        """Return the part of the model that the inner adapter describes."""
        found: nn.Module = attrgetter(self.path)(model)
        return found

    def matches(self, model: nn.Module) -> bool:
        return self.inner.matches(self.part(model))

    def wiring(self, model: nn.Module) -> list[Binding]:
        return self.inner.wiring(self.part(model))

    def pooling_parts(self, model: nn.Module) -> list[nn.Module]:
        return self.inner.pooling_parts(self.part(model))

    def looping_parts(self, model: nn.Module) -> list[nn.Module]:
        return self.inner.looping_parts(self.part(model))

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        return [(f"{self.path}.{name}", block) for name, block in self.inner.blocks(self.part(model))]

    def spec(self, block: nn.Module) -> BlockSpec | HookSpec | WindowSpec:
        return self.inner.spec(block)

    def layout(self, model: nn.Module) -> TokenLayout:
        return self.inner.layout(self.part(model))

    def cutter(self, model: nn.Module) -> nn.Module | None:
        return self.inner.cutter(self.part(model))

    def grid_of(self, cutter: Any, image: Any, out: Any) -> tuple[int, int] | None:
        return self.inner.grid_of(cutter, image, out)

    def tap(self, block: nn.Module) -> AttentionTap:
        return self.inner.tap(block)

    def core(self, model: nn.Module) -> tuple[Adapter, nn.Module]:
        return self.inner.core(self.part(model))

    def collects(self, model: nn.Module) -> str | None:
        return self.inner.collects(self.part(model))

    def head(self, model: nn.Module, sizes: Sizes) -> tuple[list[Binding], list[str]]:
        return self.inner.head(self.part(model), sizes)

    def grid_head(self, model: nn.Module) -> str | None:
        # what the rest of the model does with tokens that its part hands out is not known
        part = self.part(model)
        return self.inner.grid_head(part) or self.inner.hands_out(part)

    def guards(self, model: nn.Module, is_merging: Callable[[], bool]) -> list[Binding]:
        return self.inner.guards(self.part(model), is_merging)

    def finish(self, model: nn.Module, is_merging: Callable[[], bool], restore: str | None) -> list[Binding]:
        return self.inner.finish(self.part(model), is_merging, restore)

    def sample(self, model: nn.Module, block: nn.Module, layout: TokenLayout) -> tuple[int, dict[str, Any]]:
        return self.inner.sample(self.part(model), block, layout)

    def placed(self, block: nn.Module, places: Tensor) -> list[Binding]:
        return self.inner.placed(block, places)

    def valid(self, given: Mapping[str, Any]) -> Tensor | None:
        return self.inner.valid(given)

    def trained_without_merging(self, model: nn.Module) -> tuple[bool, str | None]:
        return self.inner.trained_without_merging(self.part(model))

    def tiny(self) -> tuple[nn.Module, Tensor]:
        return self.inner.tiny()
