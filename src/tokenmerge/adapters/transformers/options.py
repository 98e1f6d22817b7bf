"""Wrappers for transformers models: reject options that merging would break; gradient checkpointing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor

from tokenmerge.adapters.base import Override
from tokenmerge.errors import UnsupportedError

__all__ = ["Checkpointed", "RefusedOptions"]

_REASONS = {
    "output_hidden_states": (
        "hidden states and feature maps have one token per place, and tokens are merged (r is not 0). Patch with "
        "restore='dense' to get every token back in its place after every block, or set handle.r = 0."
    ),
    "output_attentions": (
        "attention maps would be those of merged tokens, and no restoring makes them those of the input (r is not 0). "
        "Leave it out, or set handle.r = 0."
    ),
    "attention_mask": (
        "which tokens are padding is not told apart from the positions that share this argument of the blocks, and "
        "tokens are merged (r is not 0). Leave it out, or set handle.r = 0."
    ),
}


class RefusedOptions(Override):
    """The instance `forward` of a model: while merging, rejects options whose output merging would break.

    `right` holds the indices of the hidden states that have all tokens in order anyway.
    """

    def __init__(
        self,
        owner: Any,
        is_merging: Callable[[], bool],
        refused: tuple[str, ...],
        right: Iterable[int] = (),
    ) -> None:
        super().__init__(owner)
        self.is_merging, self.refused, self.right = is_merging, refused, set(right)
        self.__signature__ = inspect.signature(owner.forward)
        self.names = list(self.__signature__.parameters)

    @property
    def __code__(self) -> Any:
        """The code object by which `torch.export` names the forward."""
        return type(self.owner).forward.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_merging():
            call = self.by_name(args, kwargs)
            for option in self.refused:
                if self._is_asked(option, call.get(option)):
                    raise UnsupportedError(
                        f"{type(self.owner).__qualname__} was called for {option}: {_REASONS[option]}"
                    )
        return self.original(*args, **kwargs)

    def _is_asked(self, option: str, given: Any) -> bool:
        asked = getattr(self.owner.config, option, None) if given is None else given
        if asked is None or isinstance(asked, (bool, Tensor)):
            return asked is not None and asked is not False
        # transformers 5 also takes the indices of the hidden states to return
        return not self.right.issuperset([asked] if isinstance(asked, int) else asked)


class Checkpointed(Override):
    """The instance `forward` of a block: runs the bound runner under transformers 5's gradient checkpointing."""

    def __init__(self, block: Any, is_merging: Callable[[], bool]) -> None:
        super().__init__(block)
        self.is_merging = is_merging

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        block: Any = self.owner
        if block.gradient_checkpointing and block.training and self.is_merging():
            return block._gradient_checkpointing_func(partial(self._run, **kwargs), x, *args)
        return self.original(x, *args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        # a hooked block runs its class's forward, which would checkpoint again
        block: Any = self.owner
        block.gradient_checkpointing = False
        try:
            return self.original(*args, **kwargs)
        finally:
            block.gradient_checkpointing = True
