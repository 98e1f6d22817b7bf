"""Where tokens lie in what a block takes and puts out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["PROBED", "TokenLayout", "first_of"]

PROBED = 17  # tokens behind the prefix that a block is proved with: too many to be all that it looks at, and cheap


@dataclass(frozen=True)
class TokenLayout:
    """Where tokens lie: `prefix` protected ones in front, patches on a `grid` of rows and columns, `suffix` behind.

    `tokens` is how many there are in all. `tokens`, `grid` and `input_size` (without the batch; channels first for
    images) are None where the model does not say them.
    """

    prefix: int
    grid: tuple[int, int] | None
    tokens: int | None
    input_size: tuple[int, ...] | None  # images: channels, height, width
    batch_first: bool = True
    has_class: bool | None = None  # the first token is a class token; None: where there is a prefix, it is
    suffix: int = 0

    @property
    def protected(self) -> int:
        """How many tokens are never merged, in front and behind."""
        return self.prefix + self.suffix

    @property
    def leads_with_class(self) -> bool:
        """Whether the first token is a class token."""
        return self.prefix > 0 if self.has_class is None else self.has_class


def first_of(output: Any) -> Any:
    """Return the tokens of what a block or an attention put out: the first entry of a tuple, else all of it."""
    return output[0] if isinstance(output, tuple) else output
