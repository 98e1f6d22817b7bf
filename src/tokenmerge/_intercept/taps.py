"""Ways to see an attention's queries, keys and values, and to add a bias to its scores.

Shapes: B batch, N tokens, C channels, H heads, D head width.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tokenmerge._intercept.follow import add_bias
from tokenmerge._intercept.override import Binding, ChildOverride, Override
from tokenmerge._torch.tracing import is_compiling, is_tracing
from tokenmerge.errors import AdapterMismatchError, UnsupportedError

__all__ = ["AttentionTap", "Attending", "Listener", "SeamTap", "Slot"]

Captured = dict[str, Tensor]

# how attentions spell what comes out as q, k, v: normalised, projected one by one, projected at once
_WORDS = {"q": "query", "k": "key", "v": "value"}
_NORMS = ("{0}_norm", "ln_{0}", "norm_{0}")
_PROJECTIONS = ("{0}_proj", "{1}", "to_{0}", "{0}")
_FUSED = ("qkv", "to_qkv")
_HEADS = ("num_heads", "heads", "n_heads", "n_head", "num_attention_heads")


class Slot:
    """Holds what one thread captured between attention and merging; a plain dict while a tracer is at work."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._traced: dict[str, Any] = {}

    def __reduce__(self) -> tuple[type[Slot], tuple[()]]:
        """Copies and pickles start empty."""
        return Slot, ()

    def put(self, captured: dict[str, Any]) -> None:
        if not is_compiling():
            self._local.captured = {**self.peek(), **captured}
        elif is_tracing():
            self._traced = {**self._traced, **captured}
        # of a block that is compiled by itself, what merges runs outside of the graph: here nobody would take it

    def peek(self) -> dict[str, Any]:
        """Return what is held, and keep it."""
        if is_compiling():
            return self._traced if is_tracing() else {}
        held: dict[str, Any] = getattr(self._local, "captured", {})
        return held

    def take(self) -> dict[str, Any]:
        held = self.peek()
        if not is_compiling():
            self._local.captured = {}
        elif is_tracing():
            self._traced = {}
        return held


class AttentionTap:
    """Has a block's attention run with a bias, inside its own call, and hands over what it saw.

    The attention is looked up in the block at each call, since people wrap and replace it. `attn` is the one that was
    there when the model was patched: it has to run in that call, whatever is around it by then.
    """

    kind = ""
    takes_bias = True
    where = "a block"  # the block's name in the model, for errors
    is_proved = False  # whether the attention has been seen to run
    rest: tuple[None, ...] | None = None  # what the attention returns behind its tokens; None: no tuple, or not known

    def __init__(self, block: nn.Module, path: str) -> None:
        self.block, self.path = block, path
        self.parts = tuple(filter(None, path.split(".")))
        self.attn: Any = self.found()
        self.slot, self.turn = Slot(), Slot()
        self.needs: tuple[str, ...] = ()  # what must have been seen when the attention has run
        self.following: list[ChildOverride] = []

    def placed(self, places: Tensor) -> list[Binding]:
        """Return what makes the unpatched attention take token n for one that stands at `places` `[B, N]`.

        Default: nothing, for an attention that knows no places, or is told them by an argument of its block.
        """
        return []

    def found(self) -> Any:
        """Return what stands where the attention was when the model was patched."""
        module: Any = self.block
        for part in self.parts:
            module = getattr(module, part)
        return module

    def __call__(self, x: Tensor, bias: Tensor | None, kept: Tensor | None = None, **given: Any) -> Tensor:
        """Run the attention on the tokens `[B, N, C]` with a bias per key `[B, N]`; returns `[B, N, C]`.

        `kept` `[B, N]` holds the places of these tokens among those of the input, None while all are there; `given`
        what the block was called with besides, for the tokens that are left. Raises `UnsupportedError` where the
        attention that was there when the model was patched does not run.
        """
        self.expect(bias, kept)
        try:
            out = self.call(self.found(), x, given)
        except BaseException:
            self.forget()
            raise
        self.check()
        tokens: Tensor = out[0] if isinstance(out, tuple) else out
        return tokens

    def call(self, attention: Callable[..., Any], x: Tensor, given: dict[str, Any]) -> Any:
        """Call the attention, or what is around it, as its block does."""
        return attention(x, **given)

    def expect(self, bias: Tensor | None, kept: Tensor | None) -> None:
        """Let the calls of the attention in this thread have the bias, until `check`: a wrapper may call it twice."""
        for bound in self.following:
            bound.follow()
        self.turn.take()
        self.turn.put({"bias": bias, "kept": kept})

    def check(self) -> None:
        """Raise `UnsupportedError` where the call that was expected did not come, or showed less than is needed."""
        seen = self.slot.peek()
        missing = [name for name in self.needs if name not in seen]
        if not missing and self.turn.take().get("has_run"):
            return
        self.forget()
        old, new = type(self.attn), type(self.found())
        if not self.is_proved:
            raise AdapterMismatchError(
                f"the attention of a {type(self.block).__qualname__} hands over nothing for "
                f"{', '.join(map(repr, missing)) or 'its call'}: it is not computed where the tap listens. Choose "
                "another metric, e.g. ToMe(metric='x')."
            )
        what = f"is a {new.__module__}.{new.__qualname__} that does not run it"
        if self.found() is self.attn:
            what = f"does not show its {', '.join(missing)}" if missing else "does not run"
        raise UnsupportedError(
            f"{self.where} had a {old.__module__}.{old.__qualname__} as its attention {self.path!r} when the model was "
            f"patched; what is there now {what}. Call handle.remove() and "
            "patch the model as it is now, or set handle.r = 0."
        )

    def settle(self, where: str) -> None:
        """Note the block's name, and that the attention was seen to do what is expected of it."""
        self.where, self.is_proved = where, True

    def forget(self) -> None:
        """Drop what was expected and seen in this thread: after an error."""
        self.turn.take()
        self.slot.take()

    def attend(
        self, run: Callable[..., Any], bias: Tensor | None, kept: Tensor | None, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """Stand in for one call of the attention: the host's arguments, its kind of output, and a bias.

        `run` is the attention's own forward.
        """
        return run(*args, **kwargs)

    def take(self) -> Captured:
        """Return `q`, `k`, `v` (those seen, `[B, H, N, D]`) of the last call in this thread, and forget them."""
        return self.slot.take()

    def seams(self, needs: frozenset[str]) -> list[Binding]:
        """Return what is bound while the model is patched, so that those are seen."""
        self.needs = tuple(sorted(needs))
        return [Binding(self.attn, "forward", Attending(self.attn, self))]

    def release(self) -> None:
        """Take off what moved to another module than the one it was bound on."""
        for bound in self.following:
            bound.release()


class Attending(Override):
    """The instance `forward` of an attention: stood in for where its tap expects the call, else as it always was."""

    def __init__(self, attn: nn.Module, tap: AttentionTap) -> None:
        super().__init__(attn)
        self.tap = tap

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tap = self.tap
        turn = tap.turn.peek()
        if not turn:
            for bound in tap.following:
                bound.follow()
            return self.original(*args, **kwargs)
        tap.turn.put({"has_run": True})
        return tap.attend(self.original, turn["bias"], turn["kept"], args, kwargs)


class Listener(ChildOverride):
    """The instance `forward` of a child whose output is captured: calls the class's own and keeps the result.

    The output is one of q, k, v as `[B, H, N, D]`, one as `[B, N, H * D]`, or all three as `[B, N, 3 * H * D]`.
    """

    names: tuple[str, ...]

    def __init__(
        self, parent: nn.Module, child: str, slot: Slot, names: tuple[str, ...], heads: int, parts: int
    ) -> None:
        super().__init__(parent, child)
        self.slot, self.names, self.heads, self.parts = slot, names, heads, parts
        self.moved: Listener | None = None  # bound on what stands in the child's place now

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.original(x, *args, **kwargs)
        if out.dim() == 4:
            self.slot.put({self.names[0]: out})
        else:
            split = out.unflatten(-1, (self.parts, self.heads, -1))
            order = "qkv" if self.parts == 3 else self.names
            parts = split.permute(2, 0, 3, 1, 4).unbind(0)
            self.slot.put({name: part for name, part in zip(order, parts, strict=True) if name in self.names})
        return out

    def move(self, found: Any) -> None:
        if not isinstance(found, nn.Module):
            self.check_wraps(found)
        if is_compiling():
            raise UnsupportedError(
                f"{self.child!r} of a {type(self.parent).__qualname__} was replaced by a {type(found).__qualname__} "
                "since the model was patched: run it once without compiling, or patch it again."
            )
        self.release()
        # where it wraps the old child, both listen, and the outer one has the last word
        self.moved = Listener(self.parent, self.child, self.slot, self.names, self.heads, self.parts)
        found.__dict__["forward"] = self.moved
        self.around = found

    def release(self) -> None:
        moved, self.moved, self.around = self.moved, None, None
        if moved is not None:
            moved.unbind()


class SeamTap(AttentionTap):
    """Listens on children of the attention: `q_norm` and `k_norm` where they exist, else its projections.

    The bias goes in as the `attn_mask` keyword, where the attention has one.
    """

    kind = "seam"

    def __init__(self, block: nn.Module, path: str) -> None:
        super().__init__(block, path)
        self.takes_bias = "attn_mask" in inspect.signature(type(self.attn).forward).parameters
        self.unused: frozenset[str] = frozenset()  # children that are known not to give what their names say

    def attend(
        self, run: Callable[..., Any], bias: Tensor | None, kept: Tensor | None, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        if bias is None:
            return run(*args, **kwargs)
        dtype = next(value.dtype for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return run(*args, **{**kwargs, "attn_mask": add_bias(kwargs.get("attn_mask"), bias, dtype)})

    def seams(self, needs: frozenset[str]) -> list[Binding]:
        bound = super().seams(needs)
        self.following = self.listeners(needs)
        return bound + [Binding(listener.owner, "forward", listener) for listener in self.following]

    def listeners(self, needs: frozenset[str]) -> list[ChildOverride]:
        """Return what listens for those of q, k and v; raises `UnsupportedError` where nothing can be listened to."""
        found: list[ChildOverride] = []
        fused = []
        heads = next((n for n in (getattr(self.attn, name, None) for name in _HEADS) if isinstance(n, int)), 0)
        for name in sorted(needs):
            child = self._child(*(spelling.format(name, _WORDS[name]) for spelling in _NORMS))
            if child is None and heads:
                child = self._child(*(spelling.format(name, _WORDS[name]) for spelling in _PROJECTIONS))
            if child is None:
                fused.append(name)
            else:
                count = heads if name == "q" else getattr(self.attn, "num_kv_heads", None) or heads
                found.append(Listener(self.attn, child, self.slot, (name,), count, 1))
        if fused:
            child = self._child(*_FUSED)
            if child is None or not heads:
                raise UnsupportedError(
                    f"the method needs {', '.join(fused)}, but {type(self.attn).__name__} has neither "
                    f"{fused[0]}_norm nor a fused qkv projection with num_heads to listen on. Choose another metric."
                )
            found.append(Listener(self.attn, child, self.slot, tuple(fused), heads, 3))
        return found

    def children(self) -> list[str]:
        """Return the names of those children that q, k and v could be listened for on."""
        spellings = (s.format(name, word) for name, word in _WORDS.items() for s in (*_NORMS, *_PROJECTIONS))
        return [name for name in dict.fromkeys((*spellings, *_FUSED)) if self._child(name)]

    def _child(self, *names: str) -> str | None:
        names = tuple(name for name in names if name not in self.unused)
        return next((name for name in names if isinstance(getattr(self.attn, name, None), nn.Module)), None)
