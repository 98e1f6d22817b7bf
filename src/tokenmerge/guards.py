"""Mark the time that a model's own code runs its blocks, and refuse calls that would hand out merged tokens unasked."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from tokenmerge.adapters.base import Adapter, Original, Replacement
from tokenmerge.errors import UnsupportedError
from tokenmerge.state import ForwardState
from tokenmerge.tracing import WHOLE, fail, is_compiling, trace_number

__all__ = ["entries"]


def entries(model: nn.Module, adapter: Adapter, state: ForwardState, refuses: bool) -> list[Replacement]:
    """Return what is bound on every way into the blocks: the forwards around them and the methods that run them.

    `refuses`: the methods named by the adapter's `token_methods` are refused from outside while tokens are merged.
    """
    blocks = [block for _, block in adapter.blocks(model)]
    pooling = adapter.pooling_parts(model)
    looping = [part for part in adapter.looping_parts(model) if all(part is not other for other in pooling)]
    found: list[Original] = [Entry(part, state, blocks, is_loop=False) for part in pooling]
    found += [Entry(part, state, blocks, is_loop=True) for part in looping]
    for name in adapter.token_methods:
        path, _, method = name.rpartition(".")
        owner = _find(model, path)
        if owner is not None and callable(getattr(owner, method, None)):
            found.append(_TokenMethod(owner, method, state, blocks, refuses))
    found.append(_Unscriptable(model, "__prepare_scriptable__"))
    return [Replacement(entry.owner, entry.attribute, entry) for entry in found]


def _find(model: nn.Module, path: str) -> nn.Module | None:
    owner = model
    for name in filter(None, path.split(".")):
        owner = getattr(owner, name, None)  # type: ignore[assignment]
    return owner


class _BlockLists:
    """The lists inside a module that hold its blocks, as they were when it was patched."""

    def __init__(self, owner: nn.Module, blocks: list[nn.Module]) -> None:
        known = set(map(id, blocks))
        self.lists = [
            (name.split(".") if name else [], list(module._modules.values()))
            for name, module in owner.named_modules()
            if any(id(child) in known for child in module.children())
        ]

    def check(self, owner: nn.Module) -> None:
        """Raise `UnsupportedError` where blocks were taken out, put in, replaced or moved since."""
        for names, blocks in self.lists:
            module: Any = owner
            for name in names:
                module = module._modules.get(name)
                if module is None:
                    break
            now = [] if module is None else list(module._modules.values())
            if now != blocks:
                if len(now) != len(blocks) or not all(map(_holds, now, blocks)):
                    raise UnsupportedError(
                        f"the blocks of this {type(owner).__qualname__} are not those that were patched: "
                        f"{'.'.join(names)} held {len(blocks)} then, and {len(now)} now, {_difference(now, blocks)}. "
                        "Unpatch the model and patch it as it is now."
                    )
                blocks[:] = now  # wrapped ones: the patched blocks run inside


def _holds(module: Any, block: Any) -> bool:
    return module is not None and any(inner is block for inner in module.modules())


def _difference(now: list[Any], blocks: list[Any]) -> str:
    other = [i for i, (a, b) in enumerate(zip(now, blocks, strict=False)) if not _holds(a, b)]
    return f"of which {', '.join(map(str, other))} are others" if other else "the first of them the same"


class Entry(Original):
    """The instance `forward` of a model, or of a part that runs the blocks: marks the time that it runs.

    It is a plain attribute without `__wrapped__`: who unwraps what others put on a forward must not lose it.
    """

    def __init__(self, owner: nn.Module, state: ForwardState, blocks: list[nn.Module], is_loop: bool) -> None:
        super().__init__(owner)
        self.state, self.lists, self.is_loop = state, _BlockLists(owner, blocks), is_loop
        self.__signature__ = inspect.signature(getattr(owner, self.attribute))

    @property
    def __code__(self) -> Any:
        """What `torch.export` names a forward by."""
        return getattr(type(self.owner), self.attribute).__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return self._trace(args, kwargs)
        if args and args[0] is self.owner:
            args = args[1:]  # accelerate binds what it finds as a method, once it takes its own wrapper away
        if not self.state.is_merging():
            return self.original(*args, **kwargs)
        self.lists.check(self.owner)
        with self.state.running(self.is_loop):
            return self.original(*args, **kwargs)

    def _trace(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number = trace_number()
        before, outer = WHOLE.trace, self.state.trace_running(number, self.is_loop)
        WHOLE.trace = number
        # where something inside breaks the graph, the compiler leaves a function with `finally` to Python: no half of
        # a forward is traced as if it were whole
        try:
            return self.original(*args, **kwargs)
        finally:
            WHOLE.trace = before
            self.state.trace_left(outer)


class _TokenMethod(Entry):
    """A method that hands tokens out: refused from outside, where the user did not say which tokens are wanted."""

    def __init__(
        self, owner: nn.Module, name: str, state: ForwardState, blocks: list[nn.Module], refuses: bool
    ) -> None:
        self.refuses = refuses
        Original.__init__(self, owner, name)
        self.state, self.lists, self.is_loop = state, _BlockLists(owner, blocks), True
        self.__signature__ = inspect.signature(getattr(owner, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.refuses and self.state.is_merging() and not self.state.is_inside():
            fail(
                f"{self.attribute}() hands out one token per place, and tokens are merged (r is not 0). Patch with "
                "restore='dense' to get every token back in its place, with restore='merged' to get the merged "
                "tokens as they are (weigh them with handle.sizes), or call the model itself."
            )
        if is_compiling():
            return self._trace(args, kwargs)
        if not self.state.is_merging():
            return self.original(*args, **kwargs)
        self.lists.check(self.owner)
        with self.state.running(is_loop=True):
            out = self.original(*args, **kwargs)
            for tokens in [out] if isinstance(out, Tensor) else out if isinstance(out, (tuple, list)) else []:
                if isinstance(tokens, Tensor):
                    self.state.tag(tokens)
        return out


class _Unscriptable(Original):
    """What `torch.jit.script` asks every module for first, where it has it."""

    def __call__(self) -> Any:
        raise UnsupportedError(
            f"torch.jit.script cannot compile a patched {type(self.owner).__qualname__}: it reads source code, and "
            "merging is put in at run time. Use torch.export, torch.compile or torch.jit.trace."
        )
