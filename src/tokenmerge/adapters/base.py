"""What a model family is: where its blocks are, how one is composed, where keys come from, how it pools."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from tokenmerge._intercept.follow import Follow
from tokenmerge._intercept.layout import PROBED, TokenLayout, first_of
from tokenmerge._intercept.override import Binding, Override
from tokenmerge._intercept.pooling import Sizes
from tokenmerge._intercept.taps import AttentionTap
from tokenmerge._intercept.trust import methods_of

__all__ = [
    "PROBED",
    "Adapter",
    "BlockSpec",
    "Follow",
    "HookSpec",
    "Override",
    "Binding",
    "Sizes",
    "TokenLayout",
    "WindowSpec",
    "class_names",
    "first_of",
]


@dataclass(frozen=True)
class BlockSpec:
    """A residual block as data: `x + chain(attention)`, then `x + chain(mlp)`, each chain the children in call order.

    A child that can be called is called, a list of them is called side by side and summed, a parameter multiplies,
    `None` is passed over; names may have dots. `attn` is the child of the first chain that the tap stands in for.
    `closes` names a last child of the second chain that is called with the branch and the tokens and adds the two
    itself. Without `attn` the tap stands in for the whole block and tokens are merged after it, for blocks that have no
    place between attention and MLP.
    """

    attention: tuple[str, ...] = ()
    attn: str = ""
    mlp: tuple[str, ...] = ()
    closes: str = ""


@dataclass(frozen=True)
class HookSpec:
    """A block of which only three children are known: it runs its own forward, and they are listened to.

    Tokens become fewer on their way into `norm` and as many again on their way out of `mlp`.
    """

    attn: str
    norm: str
    mlp: str


@dataclass(frozen=True)
class WindowSpec:
    """A block on a grid `[B, rows, columns, C]` that must stay complete: it runs its own forward, but for `attn`.

    `attn` is called with `[windows, rows, columns, C]`. `window` names the block's attribute that holds the side of a
    window; 0 stands for one window of everything.
    """

    attn: str
    window: str


class Adapter(ABC):
    """One model family. Adapters recognise a model by its structure and import their host inside functions only."""

    name: ClassVar[str]
    families: ClassVar[str]  # what `tokenmerge list` shows
    landmarks: ClassVar[tuple[str, ...]]  # names of children that this family has; an error compares them
    # further arguments of a block that belong to its tokens (rotary tables, masks), and how each follows those left
    followers: ClassVar[Mapping[str, Follow]] = {}
    # the attention knows where a token lies: it needs the places of the tokens that are left
    is_positional: ClassVar[bool] = False
    # methods of the model that hand tokens out by their place: refused unless the user says what to hand out
    token_methods: ClassVar[tuple[str, ...]] = ()
    # those of them that put every token in its place, since tokens are restored after the last block
    restored_methods: ClassVar[tuple[str, ...]] = ()
    # a method that compares keys may compare features where the attention shows no keys
    may_match_features: ClassVar[bool] = False
    # nothing reads what a block returns behind its tokens (attention weights): None may stand for it
    ignores_rest: ClassVar[bool] = False
    # path of the module that cuts images into patches, whose call says their rows and columns; none where it is found
    # in another way, or no module is known to
    cut_by: ClassVar[str] = ""
    # the host's package, whose classes are known by name; "" where a model is known by its parts alone
    package: ClassVar[str] = ""
    # methods that run the blocks, and those that make an answer of what leaves them: trusted where they are the
    # package's own. Dotted names are methods of parts
    loops: ClassVar[tuple[str, ...]] = ("forward",)
    heads: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def matches(self, model: nn.Module) -> bool:
        """Say whether this adapter describes the model."""

    def resolve(self, model: nn.Module) -> Adapter:
        """Return the adapter that describes the model: this one, or that of the one part of it where tokens are."""
        return self

    def wiring(self, model: nn.Module) -> list[Binding]:
        """Return what is bound first, where a host has no modules that could be called as blocks. Default: nothing."""
        return []

    def pooling_parts(self, model: nn.Module) -> list[nn.Module]:
        """Return the modules whose forward runs the blocks and knows what to do with merged tokens. Default: itself."""
        return [model]

    def looping_parts(self, model: nn.Module) -> list[nn.Module]:
        """Return the parts of the model that run the blocks and hand out tokens. Default: none."""
        return []

    @abstractmethod
    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Return the blocks in order, with their names in the model."""

    @abstractmethod
    def spec(self, block: nn.Module) -> BlockSpec | HookSpec | WindowSpec:
        """Describe one block; raises `UnsupportedModelError` where it is not of this family."""

    @abstractmethod
    def layout(self, model: nn.Module) -> TokenLayout:
        """Return where the tokens lie, for the input size the model was built with."""

    def cutter(self, model: nn.Module) -> nn.Module | None:
        """Return the module that cuts each image into patches, by `cut_by`; None where there is none."""
        found: Any = model
        for name in filter(None, self.cut_by.split(".")):
            found = getattr(found, name, None)
        return found if isinstance(found, nn.Module) and found is not model else None

    def grid_of(self, cutter: Any, image: Any, out: Any) -> tuple[int, int] | None:
        """Return the rows and columns of the patches that the cutter has made, from a call of it; None: not known.

        By default what timm's say of an image of its size, else those of the map `[B, C, rows, columns]` it puts out.
        """
        if hasattr(cutter, "dynamic_feat_size"):
            rows, columns = cutter.dynamic_feat_size(tuple(image.shape[-2:]))
            return rows, columns
        if not isinstance(out, Tensor) or out.dim() != 4:
            return None
        return out.shape[-2], out.shape[-1]

    @abstractmethod
    def tap(self, block: nn.Module) -> AttentionTap:
        """Build the tap of the block's attention, not attached yet."""

    def head(self, model: nn.Module, sizes: Sizes) -> tuple[list[Binding], list[str]]:
        """Return what makes pooling weigh tokens by size, and what could not be done. Default: nothing."""
        return [], []

    def grid_head(self, model: nn.Module) -> str | None:
        """Say why what follows the last block needs every token in its place; they are then put back there."""
        return None

    def hands_out(self, model: nn.Module) -> str | None:
        """Say which tokens the model hands out; they are put back in their places unless merged ones are asked for."""
        return None

    def collects(self, model: nn.Module) -> str | None:
        """Say why what leaves every block is needed with every token in its place."""
        return None

    def core(self, model: nn.Module) -> tuple[Adapter, nn.Module]:
        """Return the part of the model that makes an answer of its tokens, and the adapter of that part."""
        return self, model

    def loop_methods(self, model: nn.Module) -> list[tuple[nn.Module, str]]:
        """Return the methods of `loops` that this model has, each as a module and a name."""
        return methods_of(model, self.loops)

    def guards(self, model: nn.Module, is_merging: Callable[[], bool]) -> list[Binding]:
        """Return what refuses, while tokens are merged, outputs that were changed since patching. Default: none.

        It is asked for where merged tokens leave the blocks and nobody has asked for them.
        """
        return []

    def finish(self, model: nn.Module, is_merging: Callable[[], bool], restore: str | None) -> list[Binding]:
        """Return what is bound last, around everything else; it is asked for whatever `restore` says. Default: none."""
        return []

    def sample(self, model: nn.Module, block: nn.Module, layout: TokenLayout) -> tuple[int, dict[str, Any]]:
        """Return how many tokens to probe a block with, and the further arguments the model would call it with."""
        return layout.prefix + PROBED, {}

    def placed(self, block: nn.Module, places: Tensor) -> list[Binding]:
        """Return what makes the unpatched block's attention take token n for one that stands at `places` `[B, N]`.

        For attentions that know places by themselves, not by an argument in `followers`; `simulate` asks.
        """
        return []

    def valid(self, given: Mapping[str, Any]) -> Tensor | None:
        """Return which tokens are real, `[B, N]` bool, from the first block's arguments; None: all."""
        return None

    def trained_without_merging(self, model: nn.Module) -> tuple[bool, str | None]:
        """Say whether this is an MAE model never trained with merging (then no proportional attention); any doubt."""
        return False, None

    @abstractmethod
    def tiny(self) -> tuple[nn.Module, Tensor]:
        """Return a small random model of the family in eval mode and an input for it."""


def class_names(module: nn.Module) -> list[str]:
    """Return the module's class names, most derived first, each as `package.module.Class`."""
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__]


def __getattr__(name: str) -> Any:
    """Adapters of others may know these two by the names they had before 0.6."""
    successor = {"Original": Override, "Replacement": Binding}.get(name)
    if successor is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.{name} is {successor.__name__} now.", DeprecationWarning, stacklevel=2)
    return successor
