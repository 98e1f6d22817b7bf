"""What every callable that we bind on somebody else's module shares: it can still run what it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

__all__ = ["Original", "Replacement"]


class Replacement(NamedTuple):
    """An attribute of a module that is replaced on the instance while the model is patched."""

    owner: nn.Module
    attribute: str
    value: Any


class Original:
    """A callable that becomes the instance attribute `attribute` of `owner`, in place of the class's own."""

    names: Sequence[str]  # of its positional parameters, where it looks at what it is called with

    def __init__(self, owner: nn.Module, attribute: str = "forward") -> None:
        self.owner, self.attribute = owner, attribute
        self.previous = owner.__dict__.get(attribute)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Run what stood there before: an earlier instance attribute, else the class's own."""
        # looked up on the class at each call: a stored bound method would unpickle as this very object
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return getattr(type(self.owner), self.attribute)(self.owner, *args, **kwargs)

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by their names."""
        # not by zip: the dynamo of torch 2.6 takes its strict=False for True
        return {**{name: args[i] for i, name in enumerate(self.names[: len(args)])}, **kwargs}
