"""What every method of choosing visual tokens gets, and the base class of the methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenmerge.errors import ConfigError, DataError, UnsupportedError
from tokenmerge.fields import checked

__all__ = [
    "Chooser",
    "Merged",
    "Visual",
    "chosen_by",
    "cosine",
    "frames_of",
    "in_order",
    "needs_targets",
    "needs_text",
    "needs_tower",
]


@dataclass(frozen=True)
class Visual:
    """The visual tokens of one image or video, as the language model would get them."""

    features: Tensor  # [N, C], after the projector
    frames: int = 1  # of a video, with equally many tokens each, one after the other
    text: Tensor | None = None  # [L, C], the embeddings of the prompt's text; None: no text
    # of the tower's layer that the features come from, for methods that set `reads_tower`; None: not read
    attention: Tensor | None = None  # [N], what each token receives: of the class token, or of all tokens' sum
    keys: Tensor | None = None  # [N, D], heads averaged, without rotary embedding
    # [N], into which token the tower merged each one, for methods that set `merges_tower`
    targets: Tensor | None = None


class Merged(NamedTuple):
    """Visual tokens that others were merged into."""

    kept: Tensor  # [k] indices, int64 in ascending order: whose places they get
    weights: Tensor  # [k, N]: `weights @ features` are the tokens


@dataclass(frozen=True)
class Chooser(ABC):
    """A method: choose the visual tokens that the language model gets. A value that can be compared and printed."""

    name: ClassVar[str] = ""
    source: ClassVar[str] = ""  # the paper, with its arXiv number
    reads_tower: ClassVar[bool] = False  # whether it needs `attention` and `keys`
    merges_tower: ClassVar[bool] = False  # whether the tower merges down to `keep`, and it needs `targets`

    def __post_init__(self) -> None:
        try:
            plain = checked(self)
        except TypeError as error:
            name, value, allowed = error.args
            raise ConfigError(f"{self.name}: {name} is {value!r}; it takes {allowed}.") from error
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    @property
    def inside(self) -> int:
        """After how many layers of the language model it chooses; 0: before it. Its features are then hidden states."""
        return 0

    @abstractmethod
    def choose(self, visual: Visual, k: int) -> Tensor | Merged:
        """Return the indices of `k` tokens, `[k]` int64 in ascending order, or what is merged there; 1 <= k <= N.

        A method may return another number where its rules say so. Equal inputs give equal indices.
        """


def chosen_by(method: Chooser, visual: Visual, k: int) -> tuple[Tensor, Tensor | None]:
    """Return the indices that a method chose, and the weights `[k, N]` if others are merged there.

    Raises `DataError` for anything but what `choose` is to return.
    """
    total = visual.features.shape[0]
    with torch.no_grad():
        found = method.choose(visual, k)
    index, weights = found if isinstance(found, Merged) else (found, None)
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 1:
        got = f"{index.dtype} {list(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
    elif not index.numel() or not bool((index.diff() > 0).all()) or not 0 <= int(index[0]) <= int(index[-1]) < total:
        got = f"{index.tolist()}"
    elif isinstance(found, Merged) and not isinstance(weights, Tensor):
        got = f"weights in a {type(weights).__name__}"
    elif weights is not None and weights.shape != (index.shape[0], total):
        got = f"weights {list(weights.shape)} for {index.shape[0]} of {total} tokens"
    elif weights is not None and not weights.is_floating_point():
        got = f"weights of {weights.dtype}"
    elif weights is not None and not bool(weights.isfinite().all()):
        got = "weights that are not finite"
    else:
        return index, weights
    raise DataError(
        f"{method.name} was to choose {k} of {total} tokens, and returned {got}. Return their indices as int64 [k], "
        "each once, in ascending order; or Merged(indices, weights [k, N]), which are floats."
    )


def in_order(chosen: Tensor) -> Tensor:
    """Return indices in the order of the prompt."""
    return chosen.sort().values


def cosine(features: Tensor) -> Tensor:
    """Return features `[N, C]` as float32 vectors of length one, so that their products are cosines."""
    return normalize(features.float(), dim=-1)


def needs_text(visual: Visual, name: str) -> Tensor:
    """Return the prompt's text embeddings; raises `UnsupportedError` without any."""
    if visual.text is None or not visual.text.shape[0]:
        raise UnsupportedError(
            f"{name} chooses by the text of the prompt, and there is none. Give a prompt with text, or a method that "
            "looks at the image only, such as divprune."
        )
    return visual.text


def frames_of(visual: Visual, name: str) -> int:
    """Return the number of frames; raises `UnsupportedError` if they cannot have equally many tokens."""
    tokens = visual.features.shape[0]
    if tokens % visual.frames:
        raise UnsupportedError(
            f"{name} compares the frames of a video, and {tokens} tokens are not {visual.frames} equal frames. Choose "
            "a method that needs none, such as divprune."
        )
    return visual.frames


def needs_tower(visual: Visual, name: str) -> tuple[Tensor, Tensor]:
    """Return the tower's attention and keys; raises `UnsupportedError` if they were not read."""
    if visual.attention is None or visual.keys is None:
        raise UnsupportedError(
            f"{name} chooses by the attention and the keys of the vision tower, and they are not given. Give both as "
            "Visual(features, attention=..., keys=...), or a method that looks at the features only, such as divprune."
        )
    return visual.attention, visual.keys


def needs_targets(visual: Visual, name: str) -> Tensor:
    """Return the tokens that others were merged into; raises `UnsupportedError` if the tower merged nothing."""
    if visual.targets is None:
        raise UnsupportedError(
            f"{name} keeps what the vision tower merged, and it merged nothing. Use tokenmerge.vlm.patch(model, keep, "
            f"method={name!r}), which merges in the tower, or a method that looks at the features, such as divprune."
        )
    return visual.targets
