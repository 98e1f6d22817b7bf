"""Track when a model's own code runs its blocks, and reject calls that would return merged tokens unexpectedly."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from tokenmerge._intercept.trust import insides, leads_to_ours, methods_of, stranger
from tokenmerge._runtime.state import ForwardState
from tokenmerge._torch.tracing import WHOLE, fail, is_compiling, refuse_symbols, trace_number
from tokenmerge.adapters.base import Adapter, Binding, Override, Surroundings
from tokenmerge.errors import UnsupportedError

__all__ = ["entries", "settle"]


def entries(
    model: nn.Module, adapter: Adapter, around: Surroundings, state: ForwardState, refuses: bool
) -> list[Binding]:
    """Return the overrides of every entry point to the blocks: the forwards around them and the methods that run them.

    With `refuses`, calls from outside to the host's `token_methods` raise while tokens are merged.
    """
    # if every block restores all tokens, any code may follow
    watch = None if state.restore == "every" else _Watch(around)
    lists = _ListsOf([block for _, block in adapter.blocks(model)])
    found: list[Override] = [Entry(around.part, state, lists, is_loop=False, watch=watch)]
    found += [Entry(part, state, lists, is_loop=True) for part in around.loops if part is not around.part]
    host = adapter.host
    for name in (*host.token_methods, *host.restored_methods):
        path, _, method = name.rpartition(".")
        owner = _find(model, path)
        if owner is not None and callable(getattr(owner, method, None)):
            found.append(_TokenMethod(owner, method, state, lists, refuses and name in host.token_methods))
    found.append(_Unscriptable(model, "__prepare_scriptable__"))
    return [Binding(entry.owner, entry.attribute, entry) for entry in found]


def _find(model: nn.Module, path: str) -> nn.Module | None:
    owner = model
    for name in filter(None, path.split(".")):
        owner = getattr(owner, name, None)  # type: ignore[assignment]
    return owner


class _BlockLists:
    """A snapshot, made at patch time, of the module lists that hold the blocks."""

    def __init__(self, owner: nn.Module, known: set[int]) -> None:
        self.lists = [(names, list(module._modules.values())) for names, module in _holders(owner, known, [])]

    def problem(self, owner: nn.Module, state: ForwardState) -> str:
        """Describe which blocks were removed, added, replaced or moved since; "" if none."""
        for names, blocks in self.lists:
            module: Any = owner
            for name in names:
                module = module._modules.get(name)
                if module is None:
                    break
            now = [] if module is None else list(module._modules.values())
            if now != blocks:
                if len(now) != len(blocks) or not all(map(_holds, now, blocks)):
                    return (
                        f"the blocks of this {type(owner).__qualname__} are not those that were patched: "
                        f"{'.'.join(names)} held {len(blocks)} then, and {len(now)} now, {_difference(now, blocks)}. "
                        "Unpatch the model and patch it as it is now."
                    )
                blocks[:], state.is_wrapped = now, True  # the patched blocks run inside
        return ""


def _holders(module: nn.Module, known: set[int], names: list[str]) -> Iterator[tuple[list[str], nn.Module]]:
    """Yield each module that has blocks as children, with its path; does not descend into blocks."""
    if any(id(child) in known for child in module._modules.values()):
        yield names, module
    for name, child in module._modules.items():
        if child is not None and id(child) not in known:
            yield from _holders(child, known, [*names, name])


class _ListsOf(dict[nn.Module, _BlockLists]):
    """The block lists by owner, computed once per owner, since a model has several entry points."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.known = set(map(id, blocks))

    def __missing__(self, owner: nn.Module) -> _BlockLists:
        self[owner] = _BlockLists(owner, self.known)
        return self[owner]


class _Watch:
    """A snapshot, made at patch time, of the methods that are trusted with merged tokens."""

    def __init__(self, around: Surroundings) -> None:
        host, self.part = around.adapter.host, around.part
        self.loops, self.heads, self.package = around.trusted, host.heads, host.package
        self.before: list[Any] | None = None

    def problem(self) -> str:
        """Describe the first method that was replaced by code other than the host's own; "" if none."""
        methods = [*self.loops, *insides(methods_of(self.part, self.heads))]
        now = [(owner, owner.__dict__.get(name), getattr(type(owner), name, None)) for owner, name in methods]
        if self.before is None or now == self.before:
            self.before = now
            return ""
        strange = None
        if len(now) != len(self.before) or not all(map(_is_alike, now, self.before)):
            strange = stranger(methods, self.package) if self.package else "a method of it is another one"
        if strange:
            return (
                f"since this {type(self.part).__qualname__} was patched, {strange}: what it does with merged tokens is "
                "not known. Unpatch the model and patch it as it is now."
            )
        self.before = now
        return ""


def _is_alike(now: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    """Return whether a method is the same or only wrapped; each is (module, instance attribute, class attribute)."""
    (owner, bound, function), (old_owner, old_bound, old_function) = now, before
    return owner is old_owner and function is old_function and (bound is old_bound or leads_to_ours(bound))


def _holds(module: Any, block: Any) -> bool:
    return module is not None and any(inner is block for inner in module.modules())


def _difference(now: list[Any], blocks: list[Any]) -> str:
    other = [i for i, (a, b) in enumerate(zip(now, blocks, strict=False)) if not _holds(a, b)]
    return f"of which {', '.join(map(str, other))} are others" if other else "the first of them the same"


def settle(found: Iterable[Binding]) -> None:
    """Take the snapshot of the trusted methods, once everything is bound."""
    for _, _, entry in found:
        if isinstance(entry, Entry):
            entry.problem()


class Entry(Override):
    """Override of the `forward` of a model, or of a part that runs the blocks; marks it as running.

    It has no `__wrapped__`, so that code which unwraps forwards does not remove it.
    """

    watch: _Watch | None = None

    def __init__(
        self,
        owner: nn.Module,
        state: ForwardState,
        lists: _ListsOf,
        is_loop: bool,
        watch: _Watch | None = None,
    ) -> None:
        super().__init__(owner)
        self.watch = watch
        self.state, self.lists, self.is_loop = state, lists[owner], is_loop
        self.__signature__ = inspect.signature(getattr(owner, self.attribute))

    def check(self) -> None:
        """Raise `UnsupportedError` if the blocks or trusted methods changed since the model was patched."""
        problem = self.problem()
        if problem:
            fail(problem)

    def problem(self) -> str:
        return self.lists.problem(self.owner, self.state) or (self.watch.problem() if self.watch else "")

    @property
    def __code__(self) -> Any:
        """The code object of the class method; `torch.export` takes the name from it."""
        return getattr(type(self.owner), self.attribute).__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return self._trace(args, kwargs)
        if args and args[0] is self.owner:
            args = args[1:]  # accelerate binds this as a method when it removes its own wrapper
        if not self.state.is_merging():
            return self.original(*args, **kwargs)
        self.check()
        with self.state.running(self.is_loop):
            return self.original(*args, **kwargs)

    # dynamo calls it while tracing and treats the result as a constant (see tracing.py)
    problem._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _trace(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.state.is_merging():
            self.check()
        number = trace_number()
        before, outer = WHOLE.trace, self.state.trace_running(number, self.is_loop)
        WHOLE.trace = number
        # on a graph break dynamo runs a function with `finally` in Python, so half a forward is never traced as whole
        try:
            return self.original(*args, **kwargs)
        finally:
            WHOLE.trace = before
            self.state.trace_left(outer)


class _TokenMethod(Entry):
    """Override of a method that returns tokens; raises for outside calls unless the user chose `restore`."""

    def __init__(self, owner: nn.Module, name: str, state: ForwardState, lists: _ListsOf, refuses: bool) -> None:
        self.refuses = refuses
        Override.__init__(self, owner, name)
        self.state, self.lists, self.is_loop = state, lists[owner], True
        self.__signature__ = inspect.signature(getattr(owner, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.refuses and self.state.is_merging() and not self.state.is_inside():
            if not is_compiling():
                refuse_symbols(args)
            fail(
                f"{self.attribute}() hands out one token per place, and tokens are merged (r is not 0). Patch with "
                "restore='dense' to get every token back in its place, with restore='merged' to get the merged "
                "tokens as they are (weigh them with handle.sizes), or call the model itself."
            )
        if is_compiling():
            return self._trace(args, kwargs)
        if not self.state.is_merging():
            return self.original(*args, **kwargs)
        self.check()
        with self.state.running(is_loop=True):
            out = self.original(*args, **kwargs)
            for tokens in [out] if isinstance(out, Tensor) else out if isinstance(out, (tuple, list)) else []:
                if isinstance(tokens, Tensor):
                    self.state.tag(tokens)
        return out


class _Unscriptable(Override):
    """Override of `__prepare_scriptable__`, which `torch.jit.script` calls first; raises `UnsupportedError`."""

    def __call__(self) -> Any:
        raise UnsupportedError(
            f"torch.jit.script cannot compile a patched {type(self.owner).__qualname__}: it reads source code, and "
            "merging is put in at run time. Use torch.export, torch.compile or torch.jit.trace."
        )
