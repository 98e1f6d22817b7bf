"""What a model family is: where its blocks are, how one is composed, where keys come from, how it pools."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenmerge.adapters.follow import Follow
from tokenmerge.adapters.heads import Sizes
from tokenmerge.adapters.original import Original, Replacement
from tokenmerge.adapters.taps import AttentionTap
from tokenmerge.errors import AdapterMismatchError

__all__ = [
    "Adapter",
    "BlockSpec",
    "Follow",
    "HookSpec",
    "Original",
    "Replacement",
    "Sizes",
    "TokenLayout",
    "WindowSpec",
    "check_parity",
    "class_names",
    "first_of",
    "token_width",
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


@dataclass(frozen=True)
class TokenLayout:
    """Where tokens lie: `prefix` protected ones in front, `grid` rows and columns of patches, `tokens` in all.

    `tokens`, `grid` and `input_size` (without the batch; channels first for images) are None where the model does not
    say them.
    """

    prefix: int
    grid: tuple[int, int] | None
    tokens: int | None
    input_size: tuple[int, ...] | None  # images: channels, height, width
    batch_first: bool = True
    has_class: bool | None = None  # the first token is a class token; None: where there is a prefix, it is

    @property
    def leads_with_class(self) -> bool:
        """Whether the first token is a class token."""
        return self.prefix > 0 if self.has_class is None else self.has_class


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
    # a method that compares keys may compare features where the attention shows no keys
    may_match_features: ClassVar[bool] = False
    # nothing reads what a block returns behind its tokens (attention weights): None may stand for it
    ignores_rest: ClassVar[bool] = False
    # path of the module that cuts images into patches, whose call says their rows and columns; none where it is found
    # in another way, or no module is known to
    cut_by: ClassVar[str] = ""

    @abstractmethod
    def matches(self, model: nn.Module) -> bool:
        """Say whether this adapter describes the model."""

    def resolve(self, model: nn.Module) -> Adapter:
        """Return the adapter that describes the model: this one, or that of the one part of it where tokens are."""
        return self

    def wiring(self, model: nn.Module) -> list[Replacement]:
        """Return what is bound first, where a host has no modules that could be called as blocks. Default: nothing."""
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

    def head(self, model: nn.Module, sizes: Sizes) -> tuple[list[Replacement], list[str]]:
        """Return what makes pooling weigh tokens by size, and what could not be done. Default: nothing."""
        return [], []

    def grid_head(self, model: nn.Module) -> str | None:
        """Say why what follows the last block needs every token in its place; they are then put back there."""
        return None

    def guards(self, model: nn.Module, is_merging: Callable[[], bool]) -> list[Replacement]:
        """Return what refuses, while tokens are merged, the calls of this model that need them all. Default: none.

        `token_methods` are guarded without it.
        """
        return []

    def finish(self, model: nn.Module, is_merging: Callable[[], bool], restore: str | None) -> list[Replacement]:
        """Return what is bound last, around everything else; it is asked for whatever `restore` says. Default: none."""
        return []

    def sample(self, model: nn.Module, block: nn.Module, layout: TokenLayout) -> tuple[int, dict[str, Any]]:
        """Return how many tokens to probe a block with, and the further arguments the model would call it with."""
        return layout.prefix + 5, {}

    def placed(self, block: nn.Module, places: Tensor) -> list[Replacement]:
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


def first_of(output: Any) -> Any:
    """Return the tokens of what a block or an attention put out: the first entry of a tuple, else all of it."""
    return output[0] if isinstance(output, tuple) else output


def check_parity(
    block: nn.Module,
    composed: Callable[..., Any],
    original: Callable[..., Any],
    layout: TokenLayout,
    label: str,
    sample: tuple[int, dict[str, Any]],
    is_positional: bool = False,
) -> float:
    """Compare a block with its description on random tokens, nothing merged, in eval and train mode.

    Returns the largest absolute difference; raises `AdapterMismatchError` where it is more than rounding, or where the
    block knows the places of its tokens and its description does not say so. The model's random state, buffers and
    mode are left as they were.
    """
    found = _parameters(block)
    if not found:
        return 0.0
    parameter = found[0]
    # tokens have the precision of the matrices: CLIP keeps float32 norms beside them
    dtype = next((p.dtype for p in found if p.dim() > 1), parameter.dtype)
    worst = 0.0
    buffers = [buffer.detach().clone() for buffer in block.buffers()]
    modes = [(module, module.training) for module in block.modules()]
    devices = [parameter.device] if parameter.device.type == "cuda" else []
    n, given = sample
    with torch.random.fork_rng(devices=devices), torch.no_grad(), _steady_dropout(block):
        x = torch.randn(2, n, token_width(block), device=parameter.device, dtype=dtype)
        x = x if layout.batch_first else x.transpose(0, 1)
        try:
            for training in (False, True):
                block.train(training)
                results = []
                for forward in (original, composed):
                    torch.manual_seed(0)
                    results.append(forward(x, **given))
                worst = max(worst, _difference(results[0], results[1], label))
            block.eval()
            if not is_positional and all(value is None for value in given.values()):
                _check_places(partial(composed, **given), x, 1 if layout.batch_first else 0, label)
        finally:
            for module, mode in modes:
                module.training = mode
            for buffer, saved in zip(block.buffers(), buffers, strict=True):
                buffer.copy_(saved)
    return worst


def token_width(block: nn.Module) -> int:
    """Return the channels of the tokens that a block takes."""
    return int(_parameters(block)[0].shape[-1])  # norm weight [C] or projection [3C, C]


def _parameters(block: nn.Module) -> list[nn.Parameter]:
    # of a module without children first: what a block or an attention holds itself may be of any inner width
    leaves = (module for module in block.modules() if next(module.children(), None) is None)
    return [p for module in (*leaves, block) for p in module.parameters() if p.is_floating_point()]


@contextmanager
def _steady_dropout(block: nn.Module) -> Iterator[None]:
    """Let dropout scale instead of drawing: it draws in the order of memory, which a composition may change."""
    dropouts = [m for m in block.modules() if isinstance(m, nn.Dropout) and "forward" not in m.__dict__]
    for module in dropouts:
        module.__dict__["forward"] = _Scaling(module)
    try:
        yield
    finally:
        for module in dropouts:
            del module.__dict__["forward"]


class _Scaling(Original):
    def __call__(self, x: Tensor) -> Tensor:
        return x * (1 - 0.5 * self.owner.p) if self.owner.training else x  # type: ignore[operator]


def _difference(original: Any, composed: Any, label: str) -> float:
    if type(original) is not type(composed) or not isinstance(first_of(original), Tensor):
        raise AdapterMismatchError(
            f"{label} returns {type(original).__name__}, its description {type(composed).__name__}; expected are "
            "tokens, or a tuple that starts with them. No adapter describes that."
        )
    original, composed = first_of(original), first_of(composed)
    if original.is_meta:
        return 0.0
    difference = (original - composed).abs().max().item()
    if not difference <= _tolerance(original):  # NaN fails too
        raise AdapterMismatchError(
            f"{label} does not behave as its adapter describes: max |difference| {difference:.2g} with nothing merged. "
            "The host library's block has probably changed, or a subclass adds a step of its own; the model was left "
            "as it was. Describe the block in an adapter of its own (CONTRIBUTING.md, 'a new family')."
        )
    return float(difference)


def _check_places(composed: Callable[..., Any], x: Tensor, axis: int, label: str) -> None:
    """Fail where tokens in another order do not come out as the same tokens in that order."""
    n = x.shape[axis]
    order = torch.tensor([*range(0, n, 2), *range(1, n, 2)], device=x.device)  # no rotation: a convolution follows one
    turned = first_of(composed(x.index_select(axis, order)))
    expected = first_of(composed(x)).index_select(axis, order)
    if expected.is_meta or (turned - expected).abs().max().item() <= _tolerance(expected):
        return
    raise AdapterMismatchError(
        f"{label} treats a token by its place in the sequence (relative or rotary positions, a convolution, a causal "
        "mask), which its adapter does not describe: with tokens merged, places would be wrong. The model was left as "
        "it was."
    )


def _tolerance(expected: Tensor) -> float:
    relative = 1e-5 if expected.dtype in (torch.float32, torch.float64) else 4e-2
    return relative * max(1.0, expected.abs().max().item())
