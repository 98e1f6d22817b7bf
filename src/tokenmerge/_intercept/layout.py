"""Layout of the tokens in a block's input and output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["PROBED", "TokenLayout", "first_of"]

PROBED = 17  # patch tokens of a probe: cheap, and more than a local window would cover


@dataclass(frozen=True)
class TokenLayout:
    """Token layout: `prefix` protected tokens, the patches as `grid` (rows, columns), `suffix` protected tokens.

    `tokens` is the total. `tokens`, `grid` and `input_size` (without the batch; channels first for images) are None if
    the model does not define them. Packed tokens are those of all images behind each other, `[B * N, C]` or
    `[1, B * N, C]`.
    """

    prefix: int
    grid: tuple[int, int] | None
    tokens: int | None
    input_size: tuple[int, ...] | None  # images: channels, height, width
    batch_first: bool = True
    has_class: bool | None = None  # the first token is a class token; None: it is one if there is a prefix
    suffix: int = 0
    is_packed: bool = False

    @property
    def protected(self) -> int:
        """How many tokens are never merged, in front and behind."""
        return self.prefix + self.suffix

    @property
    def leads_with_class(self) -> bool:
        """Whether the first token is a class token."""
        return self.prefix > 0 if self.has_class is None else self.has_class


def first_of(output: Any) -> Any:
    """Return the tokens of a block's or attention's output: the first entry of a tuple, else the output itself."""
    return output[0] if isinstance(output, tuple) else output
