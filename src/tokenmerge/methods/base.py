"""The interface of reduction methods, and the view of the model that they get."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from tokenmerge import importance
from tokenmerge._torch.tracing import is_compiling
from tokenmerge.errors import ConfigError, UnsupportedError, unknown_name
from tokenmerge.fields import checked
from tokenmerge.matching import largest_r, sink_padding
from tokenmerge.plan import AnyPlan, merge_weighted

__all__ = [
    "ABOVE_ZERO",
    "CAPTURED",
    "FROM_ONE",
    "FROM_ZERO",
    "METRICS",
    "Note",
    "POSITIVE",
    "SCORES",
    "SHARE",
    "Choices",
    "Limits",
    "ModelShape",
    "Reduction",
    "TokenView",
    "Variants",
    "batch_count",
    "last_note",
]

# attention tensors that a method may read
CAPTURED = frozenset({"q", "k", "v"})
# features to compare tokens by: keys, queries, values, the tokens after the attention, the block's input
METRICS = ("k", "q", "v", "x", "x_pre")

# the importance scores of `TokenView.score`, and what each needs
SCORES: dict[str, frozenset[str]] = {
    "class": frozenset({"q", "k", "class"}),
    "class_value": frozenset({"q", "k", "v", "class"}),
    "received": frozenset({"q", "k"}),
    "entropy": frozenset({"q", "k"}),
    "shift": frozenset(),
    "norm": frozenset(),
}
# the scores that can serve as weights
POSITIVE = tuple(name for name in SCORES if name != "entropy")
Variants = tuple[Mapping[str, Any], ...]  # options of each instance
Choices = Mapping[str, Iterable[str]]  # allowed values by option name
Limits = Mapping[str, tuple[float, float]]  # smallest and largest number by option name
ABOVE_ZERO, FROM_ZERO, FROM_ONE = (math.ulp(0.0), math.inf), (0.0, math.inf), (1.0, math.inf)
SHARE = (0.0, 1.0)
Note = TypeVar("Note")


@dataclass(frozen=True, eq=False)
class TokenView:
    """The tokens of one block between attention and MLP. B batch, N tokens, C channels, H heads, D head width."""

    stream: Tensor  # [B, N, C] the residual stream, `branch` not added
    x_pre: Tensor  # [B, N, C] the block's input
    q: Tensor | None  # [B, H, N, D]; only what `needs` names
    k: Tensor | None  # [B, H, N, D]
    v: Tensor | None  # [B, H, N, D]
    size: Tensor | None  # [B, N] input tokens per token; None: all are 1
    prefix: int  # protected tokens at the front
    grid: tuple[int, int] | None  # rows and columns of the image's patches; only where "places" are needed
    layer: int
    valid: Tensor | None = None  # [B, N] bool: which tokens are real; None: all
    branch: Tensor | None = None  # [B, N, C] the attention's output; None: already added to the stream
    depth: int = 1  # blocks of the model
    scale: float | None = None  # factor on the attention scores; None: 1 / sqrt(D)
    bias: Tensor | None = None  # [B, N] the bias per key that was added to the attention scores
    places: Tensor | None = None  # [B, N] the place of each token; None: 0 to N - 1
    module: nn.Module | None = None  # the module of a learned method for this layer
    memory: dict[int, Any] | None = None  # notes of the layers of this forward, by layer

    @property
    def x(self) -> Tensor:
        """The tokens after the attention residual, `[B, N, C]`; each access computes the sum if `branch` is given."""
        return self.stream if self.branch is None else self.stream + self.branch

    def score(self, name: str) -> Tensor:
        """Return an importance score by name (see `SCORES`), `[B, N]` float32; padding gets minus infinity."""
        q, k = self.q, self.k
        if name == "norm":
            score: Tensor = self.x.float().norm(dim=-1)
        elif name == "shift":
            score = importance.shift(self.x, self.x_pre)
        elif name == "class":
            score = importance.class_attention(q, k, self.scale, self.bias).mean(dim=1)  # type: ignore[arg-type]
        elif name == "class_value":
            score = importance.class_value(q, k, self.v, self.scale, self.bias)  # type: ignore[arg-type]
        else:
            by_name = {"received": importance.received_attention, "entropy": importance.entropy}
            score = by_name[name](q, k, self.scale, self.bias)  # type: ignore[arg-type]
        return sink_padding(score, self.valid)

    def note(self, note: Any) -> None:
        """Store a note for later layers and the loss; it replaces this layer's earlier note."""
        if self.memory is not None:
            self.memory[self.layer] = note

    def last_note(self, kind: type[Note]) -> Note | None:
        """Return the newest note of a type from an earlier layer; see the function `last_note`."""
        return last_note(self.memory, self.layer, kind)

    def cells(self) -> tuple[Tensor, tuple[int, int]]:
        """Return the place of each unprotected token on the grid, `[B, N - prefix]`, and the grid's rows and columns.

        Needs "places". Raises `UnsupportedError` if the grid is unknown or does not match the number of tokens.
        """
        B, n, _ = self.stream.shape
        if self.grid is None:
            raise UnsupportedError(
                "this method merges by place, and this model says no grid of patches, or no image was cut into patches "
                "in this forward (blocks that run alone). Run the whole model, or use a method that does not (tome)."
            )
        if self.places is None:
            if n - self.prefix != self.grid[0] * self.grid[1]:
                raise UnsupportedError(
                    f"this method merges by place on a grid of {self.grid[0]} x {self.grid[1]} patches, and the block "
                    f"was given {n - self.prefix}: tokens were dropped or added before it. Build the model for the "
                    "size of its images, or use a method that does not merge by place (tome)."
                )
            return torch.arange(n - self.prefix, device=self.stream.device).expand(B, -1), self.grid
        return self.places[:, self.prefix :] - self.prefix, self.grid


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a model, given to a learned method when its modules are built."""

    width: int  # C
    depth: int
    prefix: int
    has_class: bool
    removed: tuple[int, ...] | None  # planned number of removed tokens per layer; None: unknown
    tokens: tuple[int, ...] | None  # planned number of tokens that enter each layer, as `TokenView` shows them
    active: tuple[int, ...]  # the layers that may remove tokens


class Reduction(ABC):
    """Base class of reduction methods: a frozen dataclass whose fields are the options.

    Instantiation raises `UnknownNameError` for a value that is not among an option's choices, and `ConfigError` for a
    value of the wrong type or outside its limits.
    """

    name: ClassVar[str]
    # allowed values of options; `metric` and `score` allow all of `METRICS` and `SCORES` unless listed here
    choices: ClassVar[Choices] = {}
    # smallest and largest value of numeric options (of each entry of a tuple); thresholds have no limits
    limits: ClassVar[Limits] = {}
    # the fewest unprotected tokens that a block leaves: "half" of them, as in ToMe, or "one"
    leaves: ClassVar[Literal["half", "one"]] = "half"
    # whether the paper adds log(size) to attention scores; the meaning of prop_attn="auto"
    is_proportional: ClassVar[bool] = True
    # the number of removed tokens depends on the images: at most `r`; compiled or exported, exactly `r`
    is_adaptive: ClassVar[bool] = False
    # whether `after_mlp` is called
    follows_mlp: ClassVar[bool] = False
    # options of the instances in the tests of all methods; together they cover every mode of the method
    variants: ClassVar[Variants] = ({},)

    def __post_init__(self) -> None:
        self._check_types()
        for option, allowed in {"metric": METRICS, "score": SCORES, **self.choices}.items():
            value = getattr(self, option, None)
            if value is not None and value not in allowed:
                raise unknown_name(f"{type(self).__name__} {option}", str(value), allowed)
        for option, (least, most) in self.limits.items():
            value = getattr(self, option)
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and not least <= number <= most:
                    raise ConfigError(f"option {option} of {self.name} is {value!r}; it {_within(least, most)}.")

    def _check_types(self) -> None:
        if not dataclasses.is_dataclass(self):
            return
        try:
            plain = checked(self)
        except TypeError as error:
            option, value, kind = error.args
            default = next(part.default for part in dataclasses.fields(self) if part.name == option)
            example = "" if default is dataclasses.MISSING else f", e.g. its default {default!r}"
            raise ConfigError(f"option {option} of {self.name} is {value!r}; it takes {kind}{example}.") from error
        for option, value in plain.items():
            object.__setattr__(self, option, value)

    @classmethod
    def examples(cls) -> list[Reduction]:
        """Return one instance per entry of `variants`, for the tests of all methods."""
        return [cls(**options) for options in cls.variants]

    @property
    def needs(self) -> frozenset[str]:
        """The inputs that the method needs: any of `"q"`, `"k"`, `"v"` (attention), `"class"` and `"places"`.

        `"class"` is a class token in front, `"places"` the input place of each token. Default: what the options
        `metric` and `score` need, if the method has them.
        """
        metric, score = getattr(self, "metric", "x"), getattr(self, "score", "norm")
        return (frozenset({metric}) & CAPTURED) | SCORES[score]

    @property
    def captures(self) -> frozenset[str]:
        """The attention tensors among `needs`: `"q"`, `"k"`, `"v"`."""
        return self.needs & CAPTURED

    @property
    def requires(self) -> frozenset[str]:
        """What the model must have: `"class"` and `"places"` of `needs`; raises `UnknownNameError` for other names."""
        required = self.needs - CAPTURED
        for name in sorted(required - {"class", "places"}):
            raise unknown_name(f"{type(self).__name__} needs", name, ("q", "k", "v", "class", "places"))
        return required

    @property
    def reads_sum(self) -> bool:
        """Whether the plan uses the tokens after the attention; the residual add then runs once, before the plan."""
        return getattr(self, "metric", None) == "x"

    def features(self, view: TokenView) -> Tensor:
        """Return what tokens are compared by, `[B, N, D]` or `[B, H, N, D]`: the option `metric`, else the tokens.

        The similarities of `handle.trace()` are its cosines. It may read what `needs` names, and the tokens.
        """
        found: Tensor = getattr(view, getattr(self, "metric", "x"))
        return found

    @abstractmethod
    def plan(self, view: TokenView, r: int) -> AnyPlan:
        """Choose `r` tokens to remove; output shapes may depend on N and `r` only. The view is detached.

        An adaptive method removes at most `r`, the same number in every image (`batch_count`).
        """

    def merge(
        self,
        plan: Any,
        x: Tensor,  # [B, N, C]
        size: Tensor | None,  # [B, N]
        branch: Tensor | None = None,  # [B, N, C]
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the plan to `x + branch`; return the tokens `[B, M, C]` and the new sizes `[B, M]`.

        Default: the size-weighted mean, computed in one pass with the residual add.
        """
        return merge_weighted(plan, x, size, branch)

    def largest_r(self, n: int, prefix: int) -> int:
        """Return how many of `n` tokens, `prefix` of them protected, one block can remove at most; see `leaves`."""
        return max(0, n - prefix - 1) if self.leaves == "one" else largest_r(n, prefix)

    def build(self, shape: ModelShape) -> nn.ModuleDict | None:
        """Return the learned modules for a model, keyed by layer number; None if the method learns nothing."""
        return None

    def after_mlp(self, x: Tensor, before: Tensor, layer: int, depth: int, memory: dict[int, Any]) -> Tensor:
        """Return the block's output from the tokens after and before its MLP, both `[B, M, C]`; see `follows_mlp`."""
        return x


def last_note(memory: Mapping[int, Any] | None, layer: int, kind: type[Note]) -> Note | None:
    """Return the newest note of a type from an earlier layer; a layer that runs again gets the same note."""
    notes = [note for at, note in sorted((memory or {}).items()) if at < layer and isinstance(note, kind)]
    return notes[-1] if notes else None


def _within(least: float, most: float) -> str:
    if most < math.inf:
        return f"lies from {least:g} to {most:g}"
    return "must be more than 0" if (least, most) == ABOVE_ZERO else f"must be {least:g} or more"


def batch_count(wanted: Tensor, r: int, seen: Tensor) -> int:  # [B], [B, ...]
    """Return how many tokens an adaptive method removes: the fewest that any image of the batch allows, at most `r`.

    `seen` holds the values that the decision is based on; an image with NaN in them does not limit the others. The
    result is `r` while compiling or exporting, for meta tensors and for an empty batch: there it cannot depend on
    values.
    """
    if is_compiling() or wanted.is_meta or not wanted.shape[0]:
        return r
    wanted = wanted.masked_fill(seen.isnan().flatten(1).any(dim=1), r)
    return max(0, min(r, int(wanted.min())))
