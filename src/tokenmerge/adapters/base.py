"""The adapter interface: the blocks of a model family, how they are composed, how the model attends and pools."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from tokenmerge._intercept.follow import Follow
from tokenmerge._intercept.layout import PROBED, TokenLayout, first_of
from tokenmerge._intercept.multihead import MultiheadTap, multihead
from tokenmerge._intercept.override import Binding, Override
from tokenmerge._intercept.pooling import Sizes
from tokenmerge._intercept.taps import AttentionTap, SeamTap
from tokenmerge._intercept.trust import Method, methods_of
from tokenmerge._moved import moved_names
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
    "PackedSpec",
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
    """A residual block as data: `x = x + attention(x)`, then `x = x + mlp(x)`, each branch a chain of children.

    The names of a chain are applied in order: a module is called, a ModuleList is summed over its members, a Parameter
    scales, None is skipped. Names may be dotted.

    Args:
        attention: the children of the attention branch.
        attn: the child of the attention branch that the tap replaces. "": the tap replaces the whole block and tokens
            are merged after it, for blocks without a point between attention and MLP.
        mlp: the children of the MLP branch.
        closes: a final child, called as `closes(branch, x)`, that does the residual add itself.
    """

    attention: tuple[str, ...] = ()
    attn: str = ""
    mlp: tuple[str, ...] = ()
    closes: str = ""

    @property
    def children(self) -> tuple[str, ...]:
        """The names of all children that are used."""
        return (*self.attention, *self.mlp, *filter(None, (self.closes,)))


@dataclass(frozen=True)
class PackedSpec(BlockSpec):
    """A residual block whose input holds the tokens of all images behind each other, `[B * N, C]` or `[1, B * N, C]`.

    Args:
        ends: the argument of the block that says where images end, 0 first, as `cu_seqlens` `[B + 1]` or a tuple.
        tables: the argument with rotary tables, two or more of `[B * N, D]`.
        is_batch: the sequence stands in a batch of one, `[1, B * N, C]`.
    """

    ends: str = ""
    tables: str = ""
    is_batch: bool = False


@dataclass(frozen=True)
class HookSpec:
    """A block that cannot be recomposed: it runs its own forward, and three of its children are intercepted.

    Tokens are merged at the input of `norm` and unmerged at the output of `mlp`.
    """

    attn: str
    norm: str
    mlp: str

    @property
    def children(self) -> tuple[str, ...]:
        """The names of the three children."""
        return (self.attn, self.norm, self.mlp)


@dataclass(frozen=True)
class WindowSpec:
    """A block whose grid `[B, rows, columns, C]` must stay complete: its own forward runs, only `attn` is replaced.

    `attn` is called with `[windows, rows, columns, C]`. `window` names the block attribute that holds the side length
    of a window; a value of 0 means one window over the whole grid.
    """

    attn: str
    window: str

    @property
    def children(self) -> tuple[str, ...]:
        """The names of the attention and the window attribute."""
        return (self.attn, self.window)


Spec = BlockSpec | HookSpec | WindowSpec
Grid = tuple[int, int]  # rows and columns


def grid_of_call(cutter: Any, image: Any, out: Any) -> Grid | None:
    """Return the patch grid (rows, columns) of a call `out = cutter(image)` of a patch embedding.

    Uses timm's `dynamic_feat_size` if there is one, else the shape of a feature map `[B, C, rows, columns]`. Returns
    None if `out` is no feature map.
    """
    if hasattr(cutter, "dynamic_feat_size"):
        rows, columns = cutter.dynamic_feat_size(tuple(image.shape[-2:]))
        return rows, columns
    return (out.shape[-2], out.shape[-1]) if isinstance(out, Tensor) and out.dim() == 4 else None


@dataclass(frozen=True)
class Host:
    """The code of a model family, described as data. Dotted names are paths inside the model.

    Args:
        package: the package whose classes are known by name. "": models are recognised by structure and tested.
        models: the model classes, `package.module.Class`, for an adapter without its own `matches`.
        blocks: path of the list of blocks.
        loops: methods that run the blocks; trusted with merged tokens as long as they are the package's own.
        heads: methods that compute the model output from the last block's tokens; trusted on the same condition.
        token_methods: methods that return tokens by position; they raise unless the user chose `restore`.
        restored_methods: methods that return all tokens in order, since tokens are restored after the last block.
        cut_by: path of the patch embedding, whose calls give the patch grid; "": not known.
        grid_of: returns (rows, columns) for a call of the patch embedding, given the module, the image and the output.
        followers: extra block arguments with one row per token (rotary tables, masks), each with the function that
            gathers it for the remaining tokens.
        padding: arguments of the first block that mark real tokens, each with a function that makes `[B, N]` bool.
        is_positional: the attention uses token positions, so it needs those of the remaining tokens.
        may_match_features: methods that compare keys may compare features if keys cannot be captured.
        ignores_rest: no caller reads what a block returns after its tokens (attention weights), so it may be None.
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
    """The code around the blocks of one model, and the reasons why it needs restored tokens.

    `every`, `last` and `handed_out` are sentences for the report, or None.

    Args:
        adapter: the adapter of `part`.
        part: the module that computes an output from the tokens: the model, or the tower inside it.
        trusted: methods that run the blocks and must be the host's own, each as (module, name).
        loops: modules besides `part` that run the blocks and return tokens.
        cutter: the patch embedding.
        every: why all tokens must be restored after every block.
        last: why all tokens must be restored after the last block.
        handed_out: which tokens the model returns; they are restored unless the user chose restore="merged".
        without_merging: True for an MAE model trained without merging, which is better without proportional attention;
            None if the weights do not tell.
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
    """The state of a patched model, for the overrides around its blocks.

    Args:
        is_merging: returns whether the current call merges tokens.
        sizes: returns the sizes of the last block's tokens; None if all tokens are restored.
        restore: the user's `restore` option; "dense" also if every block has to restore all tokens.
    """

    is_merging: Callable[[], bool]
    sizes: Sizes | None
    restore: str | None

    @property
    def must_refuse(self) -> bool:
        """Whether overrides must reject returning tokens: merged ones leave the blocks, and `restore` is not set."""
        return self.sizes is not None and self.restore is None


class Adapter(_older.Older, ABC):
    """Base class of a model family. Adapters import their host package inside functions only.

    A subclass defines `name`, `families`, `layout` and `tiny`. It overrides `matches`, `blocks`, `spec` and `tap` where
    `specs` and `host` do not suffice.
    """

    name: ClassVar[str]
    families: ClassVar[str]  # shown by `tokenmerge list`
    landmarks: ClassVar[tuple[str, ...]] = ()  # typical child names, compared in the error for unknown models
    host: ClassVar[Host] = Host()
    # the structure of the blocks: specs by block class `package.module.Class`, or a sequence of specs, of which the
    # first whose children the block has is used
    specs: ClassVar[Mapping[str, Spec] | Sequence[Spec]] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _older.adopt(cls)

    def __getattr__(self, name: str) -> Any:
        return _older.read(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _older.check_value(self, name, value)
        super().__setattr__(name, value)

    def matches(self, model: nn.Module) -> bool:
        """Return whether this adapter handles the model. Default: its class is in `host.models`."""
        return not set(self.host.models).isdisjoint(class_names(model))

    def resolve(self, model: nn.Module) -> Adapter:
        """Return the adapter to use: this one, or that of the single part of the model that has tokens."""
        return self

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Return the blocks in order, each as (name in the model, block). Default: the children of `host.blocks`."""
        path = self.host.blocks
        if not has_parts(model, (path,)):
            lists = [name for name, part in model.named_modules() if isinstance(part, (nn.ModuleList, nn.Sequential))]
            raise UnsupportedModelError(
                f"host.blocks of {self.name!r} is {path!r}, and this {type(model).__qualname__} has no such part. Its "
                f"lists are: {', '.join(lists) or 'none'}."
            )
        return [(f"{path}.{name}", block) for name, block in attrgetter(path)(model).named_children()]

    def spec(self, block: nn.Module) -> Spec:
        """Return the spec of a block, from `specs`; raises `UnsupportedModelError` if none fits."""
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
        """Return the token layout for the input size that the model was built with."""

    def tap(self, block: nn.Module) -> AttentionTap:
        """Build the tap of the block's attention, without attaching it.

        Default: `MultiheadTap` for an `nn.MultiheadAttention`, else `SeamTap` on the projections or norms of q, k, v.
        """
        path = self.spec(block).attn
        return (SeamTap if multihead(attrgetter(path)(block)) is None else MultiheadTap)(block, path)

    def surroundings(self, model: nn.Module) -> Surroundings:
        """Return the code around the blocks. Default: from `host`, with no need for restored tokens."""
        cutter: Any = model
        for name in filter(None, self.host.cut_by.split(".")):
            cutter = getattr(cutter, name, None)
        is_known = isinstance(cutter, nn.Module) and cutter is not model
        trusted = methods_of(model, self.host.loops)
        return Surroundings(self, model, trusted, cutter=cutter if is_known else None)

    def wiring(self, model: nn.Module) -> list[Binding]:
        """Return bindings to install before the runners, for hosts without callable block modules. Default: none."""
        return []

    def overrides(self, model: nn.Module, context: Context) -> list[Binding]:
        """Return overrides around the blocks, bound after the runners: weighted pooling, refusals. Default: none."""
        return []

    def sample(self, model: nn.Module, block: nn.Module, layout: TokenLayout) -> tuple[int, dict[str, Any]]:
        """Return the number of tokens for probing a block, and the extra arguments the model would pass to it."""
        return layout.prefix + PROBED, {}

    @abstractmethod
    def tiny(self) -> tuple[nn.Module, Tensor]:
        """Return a small random model of the family in eval mode and an input for it."""


def has_parts(module: nn.Module, paths: Collection[str]) -> bool:
    """Return whether the module has attributes at all these dotted paths."""
    try:
        for path in paths:
            attrgetter(path)(module)
    except AttributeError:
        return False
    return True


def class_names(module: nn.Module) -> list[str]:
    """Return the module's class names, most derived first, each as `package.module.Class`."""
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__]


if not TYPE_CHECKING:
    __getattr__ = moved_names(__name__)
