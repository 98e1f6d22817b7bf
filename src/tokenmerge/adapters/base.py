"""What a model family is: where its blocks are, how one is composed, where keys come from, how it pools."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, ClassVar

from torch import Tensor, nn

from tokenmerge._intercept.follow import Follow
from tokenmerge._intercept.layout import PROBED, TokenLayout, first_of
from tokenmerge._intercept.multihead import MultiheadTap, multihead
from tokenmerge._intercept.override import Binding, Override
from tokenmerge._intercept.pooling import Sizes
from tokenmerge._intercept.taps import AttentionTap, SeamTap
from tokenmerge._intercept.trust import Method, methods_of
from tokenmerge.adapters import _older
from tokenmerge.errors import UnsupportedModelError

__all__ = [
    "PROBED",
    "Adapter",
    "Binding",
    "BlockSpec",
    "Context",
    "Follow",
    "HookSpec",
    "Host",
    "Override",
    "Sizes",
    "Spec",
    "Surroundings",
    "TokenLayout",
    "WindowSpec",
    "class_names",
    "first_of",
    "grid_of_call",
    "has_parts",
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

    @property
    def children(self) -> tuple[str, ...]:
        """The names of all children that are run."""
        return (*self.attention, *self.mlp, *filter(None, (self.closes,)))


@dataclass(frozen=True)
class HookSpec:
    """A block of which only three children are known: it runs its own forward, and they are listened to.

    Tokens become fewer on their way into `norm` and as many again on their way out of `mlp`.
    """

    attn: str
    norm: str
    mlp: str

    @property
    def children(self) -> tuple[str, ...]:
        """The names of the three."""
        return (self.attn, self.norm, self.mlp)


@dataclass(frozen=True)
class WindowSpec:
    """A block on a grid `[B, rows, columns, C]` that must stay complete: it runs its own forward, but for `attn`.

    `attn` is called with `[windows, rows, columns, C]`. `window` names the block's attribute that holds the side of a
    window; 0 stands for one window of everything.
    """

    attn: str
    window: str

    @property
    def children(self) -> tuple[str, ...]:
        """The names of both."""
        return (self.attn, self.window)


Spec = BlockSpec | HookSpec | WindowSpec
Grid = tuple[int, int]  # rows and columns


def grid_of_call(cutter: Any, image: Any, out: Any) -> Grid | None:
    """Return what timm says of an image of this size, else rows and columns of the map `[B, C, rows, columns]` put out.

    `cutter` cut the `image` into `out`; None where that is no map.
    """
    if hasattr(cutter, "dynamic_feat_size"):
        rows, columns = cutter.dynamic_feat_size(tuple(image.shape[-2:]))
        return rows, columns
    return (out.shape[-2], out.shape[-1]) if isinstance(out, Tensor) and out.dim() == 4 else None


@dataclass(frozen=True)
class Host:
    """What is known of a family's own code, as data. Dotted names are paths inside the model.

    Args:
        package: the package whose classes are known by name. "": a model is known by its parts alone, and is tried.
        models: the models' classes, `package.module.Class`, for an adapter that has no `matches` of its own.
        blocks: where the list of blocks is.
        loops: methods that run the blocks; trusted with merged tokens while they are the package's own.
        heads: methods that make an answer of what leaves the blocks; trusted in the same way.
        token_methods: methods that hand tokens out by their place: refused unless the user says what to hand out.
        restored_methods: methods that hand every token out in its place, as tokens are restored after the last block.
        cut_by: the module that cuts images into patches, whose call says their rows and columns; "": not known.
        grid_of: makes rows and columns of a call of that module: itself, the image, what it put out.
        followers: further arguments of a block that belong to its tokens (rotary tables, masks), and how each follows
            the tokens that are left.
        padding: arguments of the first block that say which tokens are real, and what makes `[B, N]` bool of each.
        is_positional: the attention knows where a token lies, and needs the places of those that are left.
        may_match_features: a method that compares keys may compare features where the attention shows no keys.
        ignores_rest: nothing reads what a block returns behind its tokens (attention weights): None may stand for it.
    """

    package: str = ""
    models: Collection[str] = ()
    blocks: str = "blocks"
    loops: tuple[str, ...] = ("forward",)
    heads: tuple[str, ...] = ()
    token_methods: tuple[str, ...] = ()
    restored_methods: tuple[str, ...] = ()
    cut_by: str = ""
    grid_of: Callable[[Any, Any, Any], Grid | None] = grid_of_call
    followers: Mapping[str, Follow] = field(default_factory=dict)
    padding: Mapping[str, Callable[[Any], Tensor]] = field(default_factory=dict)
    is_positional: bool = False
    may_match_features: bool = False
    ignores_rest: bool = False


@dataclass(frozen=True)
class Surroundings:
    """What is around the blocks of one model, and why it needs tokens in their places: a sentence, or None.

    Args:
        adapter: the adapter of `part`.
        part: the module that makes an answer of its tokens: the model, or the tower inside it.
        trusted: methods that run the blocks and have to be the host's own, each a module and a name.
        loops: modules besides `part` that run the blocks and hand out tokens.
        cutter: the module that cuts images into patches.
        every: why what leaves every block is needed with every token in its place.
        last: why what follows the last block needs every token in its place.
        handed_out: which tokens the model hands out; they are put in their places unless merged ones are asked for.
        without_merging: it is an MAE model never trained with merging, which is better without proportional attention;
            None: its weights do not tell.
    """

    adapter: Adapter
    part: nn.Module
    trusted: Sequence[Method] = ()
    loops: Sequence[nn.Module] = ()
    cutter: nn.Module | None = None
    every: str | None = None
    last: str | None = None
    handed_out: str | None = None
    without_merging: bool | None = False


@dataclass(frozen=True)
class Context:
    """How a model is patched, for what stands in around its blocks.

    Args:
        is_merging: says, in a call, whether tokens are merged in it.
        sizes: gives the sizes of tokens that left the last block; None where all are put back in their places.
        restore: what the user asked for; "dense" also where every block has to hand out every token.
    """

    is_merging: Callable[[], bool]
    sizes: Sizes | None
    restore: str | None

    @property
    def must_refuse(self) -> bool:
        """Whether merged tokens leave the blocks and nobody asked for them: what would hand them out is refused."""
        return self.sizes is not None and self.restore is None


class Adapter(ABC):
    """One model family. Adapters recognise a model by its structure and import their host inside functions only.

    A family has to say its names, `layout` and `tiny`, and, where `specs` and `host` say too little, `matches`,
    `blocks`, `spec` and `tap`.
    """

    name: ClassVar[str]
    families: ClassVar[str]  # what `tokenmerge list` shows
    landmarks: ClassVar[tuple[str, ...]] = ()  # names of children that this family has; an error compares them
    host: ClassVar[Host] = Host()
    # how its blocks are made: by their class `package.module.Class`, or several of which the first whose children a
    # block has describes it
    specs: ClassVar[Mapping[str, Spec] | Sequence[Spec]] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _older.adopt(cls)

    def __getattr__(self, name: str) -> Any:
        return _older.read(self, name)

    def matches(self, model: nn.Module) -> bool:
        """Say whether this adapter describes the model. Default: by its class, of `host.models`."""
        return not set(self.host.models).isdisjoint(class_names(model))

    def resolve(self, model: nn.Module) -> Adapter:
        """Return the adapter that describes the model: this one, or that of the one part of it where tokens are."""
        return self

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Return the blocks in order, with their names in the model. Default: the children of `host.blocks`."""
        path = self.host.blocks
        return [(f"{path}.{name}", block) for name, block in attrgetter(path)(model).named_children()]

    def spec(self, block: nn.Module) -> Spec:
        """Describe one block, by `specs`; raises `UnsupportedModelError` where it is not of this family."""
        if isinstance(self.specs, Mapping):
            names = [name for name in class_names(block) if name in self.specs]
            if names:
                return self.specs[names[0]]
            known = " or ".join(name.rpartition(".")[2] for name in self.specs)
            whose = self.name if len(self.host.models) != 1 else next(iter(self.host.models)).rpartition(".")[2]
            raise UnsupportedModelError(
                f"blocks of class {class_names(block)[0]} are not described: {whose} has {known}."
            )
        for spec in self.specs:
            if has_parts(block, spec.children):
                return spec
        raise UnsupportedModelError(
            f"blocks of class {class_names(block)[0]} with the children {[name for name, _ in block.named_children()]} "
            f"are not described: {self.name} has {' or '.join(str(list(spec.children)) for spec in self.specs)}."
        )

    @abstractmethod
    def layout(self, model: nn.Module) -> TokenLayout:
        """Return where the tokens lie, for the input size the model was built with."""

    def tap(self, block: nn.Module) -> AttentionTap:
        """Build the tap of the block's attention, not attached yet. Default: by its projections or norms of q, k, v."""
        path = self.spec(block).attn
        return (SeamTap if multihead(attrgetter(path)(block)) is None else MultiheadTap)(block, path)

    def surroundings(self, model: nn.Module) -> Surroundings:
        """Return what is around the blocks. Default: by `host`, of a model that needs no token in its place."""
        cutter: Any = model
        for name in filter(None, self.host.cut_by.split(".")):
            cutter = getattr(cutter, name, None)
        is_known = isinstance(cutter, nn.Module) and cutter is not model
        trusted = methods_of(model, self.host.loops)
        return Surroundings(self, model, trusted, cutter=cutter if is_known else None)

    def wiring(self, model: nn.Module) -> list[Binding]:
        """Return what is bound first, where a host has no modules that could be called as blocks. Default: nothing."""
        return []

    def overrides(self, model: nn.Module, context: Context) -> list[Binding]:
        """Return what is bound last, around the blocks: pooling that weighs by size, refusals. Default: nothing."""
        return []

    def sample(self, model: nn.Module, block: nn.Module, layout: TokenLayout) -> tuple[int, dict[str, Any]]:
        """Return how many tokens to probe a block with, and the further arguments the model would call it with."""
        return layout.prefix + PROBED, {}

    @abstractmethod
    def tiny(self) -> tuple[nn.Module, Tensor]:
        """Return a small random model of the family in eval mode and an input for it."""


def has_parts(module: nn.Module, paths: Collection[str]) -> bool:
    """Say whether the module has all of these; names may have dots."""
    try:
        for path in paths:
            attrgetter(path)(module)
    except AttributeError:
        return False
    return True


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
