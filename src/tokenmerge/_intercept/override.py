"""Base classes of the callables installed on host modules; `original()` calls the method that was replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from tokenmerge.errors import UnsupportedError

__all__ = ["ChildOverride", "Override", "Binding"]


class Binding(NamedTuple):
    """A module attribute that is replaced on the instance while the model is patched."""

    owner: nn.Module
    attribute: str
    value: Any


class Override:
    """A callable installed as the instance attribute `attribute` of `owner`, in place of the class's method."""

    names: Sequence[str]  # names of the positional parameters; set by subclasses that use `by_name`

    def __init__(self, owner: nn.Module, attribute: str = "forward") -> None:
        self.owner, self.attribute = owner, attribute
        self.previous = owner.__dict__.get(attribute)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Call the replaced method: an earlier instance attribute if there was one, else the class method."""
        # looked up on the class at each call: a stored bound method would unpickle as this very object
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return getattr(type(self.owner), self.attribute)(self.owner, *args, **kwargs)

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return all arguments of a call as a dict by name."""
        # no zip: dynamo in torch 2.6 treats its strict=False as True
        return {**{name: args[i] for i, name in enumerate(self.names[: len(args)])}, **kwargs}


class ChildOverride(Override):
    """An override on the child `child` of `parent` that detects when the child is replaced.

    It keeps working if the new child wraps the old one. Subclasses override `move` to handle other replacements.
    """

    def __init__(self, parent: nn.Module, child: str, attribute: str = "forward") -> None:
        super().__init__(getattr(parent, child), attribute)
        self.parent, self.child = parent, child
        self.around: Any = None  # an accepted replacement of the child

    def follow(self) -> None:
        """Check whether the child was replaced; raises `UnsupportedError` if the new one is not accepted."""
        found = getattr(self.parent, self.child, None)
        if found is not self.owner and found is not self.around:
            self.move(found)

    def move(self, found: Any) -> None:
        """Accept `found` as the new child. Default: only if it wraps the module that this is bound on."""
        self.check_wraps(found)
        self.around = found

    def check_wraps(self, found: Any) -> None:
        """Raise `UnsupportedError` if `found` does not contain the module that this is bound on."""
        if not isinstance(found, nn.Module) or all(module is not self.owner for module in found.modules()):
            raise UnsupportedError(
                f"since the model was patched, {self.child!r} of a {type(self.parent).__qualname__} was replaced: it "
                f"was a {type(self.owner).__qualname__}, and the {type(found).__qualname__} there now does not run it. "
                "Call handle.remove() and patch the model as it is now."
            )

    def release(self) -> None:
        """Remove bindings that `move` made on other modules. Default: none."""

    def unbind(self) -> None:
        """Remove this override from its module, if it is still bound there."""
        bound = self.owner.__dict__
        if bound.get(self.attribute) is self:
            del bound[self.attribute]
            if self.previous is not None:
                bound[self.attribute] = self.previous
