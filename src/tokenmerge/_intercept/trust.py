"""Tell a host's own code from user code: only the host's own handling of tokens is known."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

from torch import nn

from tokenmerge._intercept.override import Override

__all__ = ["insides", "is_of", "leads_to_ours", "methods_of", "mixing", "stranger"]

Method = tuple[nn.Module, str]  # a module, the name of one of its methods

# these packages wrap a forward (compiled, autocast, hooked) and return its result unchanged
_WRAPPERS = ("torch", "accelerate")


def methods_of(model: nn.Module, paths: Iterable[str]) -> list[Method]:
    """Return the methods at these dotted paths, e.g. `encoder.forward`; paths the model lacks are skipped."""
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
    """Return whether the module's class is defined in this package, or inherits from one that is."""
    return bool(package) and any(cls.__module__.startswith(f"{package}.") for cls in type(module).__mro__)


# torch modules whose output for one token depends on the other tokens
_MIXING = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.RNNBase, nn.Conv1d)


def insides(methods: Iterable[Method]) -> list[Method]:
    """Replace each `forward` by the forwards of the module and all its submodules; keep other methods as they are."""
    return [(inner, name) for owner, name in methods for inner in (owner.modules() if name == "forward" else (owner,))]


def stranger(methods: Iterable[Method], package: str) -> str | None:
    """Describe the first method not defined by the package (overridden in a subclass, or set on class or instance)."""
    for owner, name in methods:
        if not _is_defined_by(_behind(owner, name), (package, *_WRAPPERS)):
            possessive = f"{package}'" if package.endswith("s") else f"{package}'s"
            return f"{name} of {type(owner).__qualname__} is not {possessive} own"
    return None


def mixing(methods: Iterable[Method]) -> str | None:
    """Describe the first module that mixes tokens without weighting them by size; None if there is none."""
    for owner, name in methods:
        if name == "forward" and isinstance(owner, _MIXING):
            return f"a {type(owner).__qualname__} behind the blocks looks at all of its tokens"
    return None


def _behind(owner: nn.Module, name: str) -> Any:
    """Return the callable that runs when none of our overrides is bound."""
    bound = owner.__dict__.get(name)
    while isinstance(bound, Override):
        bound = bound.previous
    return getattr(type(owner), name) if bound is None else bound


def plain_function(function: Any) -> Any:
    """Return the function behind a functools.partial or a bound method."""
    inner = getattr(function, "func", function)
    return getattr(inner, "__func__", inner)


def leads_to_ours(function: Any) -> bool:
    """Return whether an instance attribute is one of our overrides, or wraps one."""
    while function is not None and not isinstance(plain_function(function), Override):
        function = getattr(function, "__wrapped__", None)
    return function is not None


def _is_defined_by(function: Any, packages: tuple[str, ...]) -> bool:
    while function is not None:
        plain = plain_function(function)
        if isinstance(plain, Override):  # the method it replaced was checked when it was bound
            return True
        # not __module__: functools.wraps copies it from the wrapped function
        written_in = getattr(plain, "__globals__", {}).get("__name__") or type(plain).__module__
        if not str(written_in).startswith(tuple(f"{package}." for package in packages)):
            return False
        function = getattr(function, "__wrapped__", None)
    return True
