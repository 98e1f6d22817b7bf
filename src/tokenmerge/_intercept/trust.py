"""Tell a host's own code from somebody else's: only of the former it is known what becomes of the tokens."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

from torch import nn

from tokenmerge._intercept.override import Override

__all__ = ["insides", "is_of", "leads_to_ours", "methods_of", "mixing", "stranger"]

Method = tuple[nn.Module, str]  # a module, the name of one of its methods

# they wrap a forward (compiled, autocast, hooked) and hand its answer on
_WRAPPERS = ("torch", "accelerate")


def methods_of(model: nn.Module, paths: Iterable[str]) -> list[Method]:
    """Return the methods at these dotted paths that the model has, e.g. `encoder.forward`."""
    found: list[Method] = []
    for path in paths:
        part, _, name = path.rpartition(".")
        try:
            owner = attrgetter(part)(model) if part else model
        except AttributeError:
            continue
        if isinstance(owner, nn.Module) and callable(getattr(owner, name, None)):
            found.append((owner, name))
    return found


def is_of(module: nn.Module, package: str) -> bool:
    """Say whether the module's class is one of this package, or is made from one."""
    return bool(package) and any(cls.__module__.startswith(f"{package}.") for cls in type(module).__mro__)


# of torch: what such a module puts out for a token depends on the others
_MIXING = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.RNNBase, nn.Conv1d)


def insides(methods: Iterable[Method]) -> list[Method]:
    """Return the forwards of all modules inside those whose forward is named, and the other methods as they are."""
    return [(inner, name) for owner, name in methods for inner in (owner.modules() if name == "forward" else (owner,))]


def stranger(methods: Iterable[Method], package: str) -> str | None:
    """Name the first method that the package does not define: overridden in a subclass, or set on class or instance."""
    for owner, name in methods:
        if not _is_defined_by(_behind(owner, name), (package, *_WRAPPERS)):
            possessive = f"{package}'" if package.endswith("s") else f"{package}'s"
            return f"{name} of {type(owner).__qualname__} is not {possessive} own"
    return None


def mixing(methods: Iterable[Method]) -> str | None:
    """Name the first module whose answer for one token depends on the others, not weighed by their sizes."""
    for owner, name in methods:
        if name == "forward" and isinstance(owner, _MIXING):
            return f"a {type(owner).__qualname__} behind the blocks looks at all of its tokens"
    return None


def _behind(owner: nn.Module, name: str) -> Any:
    """Return what runs when nothing of ours is bound."""
    bound = owner.__dict__.get(name)
    while isinstance(bound, Override):
        bound = bound.previous
    return getattr(type(owner), name) if bound is None else bound


def plain_function(function: Any) -> Any:
    """Return the function behind a functools.partial or a bound method."""
    inner = getattr(function, "func", function)
    return getattr(inner, "__func__", inner)


def leads_to_ours(function: Any) -> bool:
    """Say whether what stands on an instance is ours, or wraps it."""
    while function is not None and not isinstance(plain_function(function), Override):
        function = getattr(function, "__wrapped__", None)
    return function is not None


def _is_defined_by(function: Any, packages: tuple[str, ...]) -> bool:
    while function is not None:
        plain = plain_function(function)
        if isinstance(plain, Override):  # what stood there when it was bound was looked at then
            return True
        # not __module__, which functools.wraps copies from what is wrapped
        written_in = getattr(plain, "__globals__", {}).get("__name__") or type(plain).__module__
        if not str(written_in).startswith(tuple(f"{package}." for package in packages)):
            return False
        function = getattr(function, "__wrapped__", None)
    return True
