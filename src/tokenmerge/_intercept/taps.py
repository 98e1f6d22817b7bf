"""Attention taps: capture an attention's q, k and v, and add a bias to its scores.

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

# names of the children whose outputs are q, k, v: norms, separate projections, fused projections
_WORDS = {"q": "query", "k": "key", "v": "value"}
_NORMS = ("{0}_norm", "ln_{0}", "norm_{0}")
_PROJECTIONS = ("{0}_proj", "{1}", "to_{0}", "{0}")
_FUSED = ("qkv", "to_qkv")
_HEADS = ("num_heads", "heads", "n_heads", "n_head", "num_attention_heads")


class Slot:
    """Per-thread storage of captured values between attention and merging; a plain dict during tracing."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._traced: dict[str, Any] = {}

    def __reduce__(self) -> tuple[type[Slot], tuple[()]]:
        """Make copies and pickles start empty."""
        return Slot, ()

    def put(self, captured: dict[str, Any]) -> None:
        if not is_compiling():
            self._local.captured = {**self.peek(), **captured}
        elif is_tracing():
            self._traced = {**self._traced, **captured}
        # if blocks are compiled one by one, merging runs outside the graph and nothing is stored here

    def peek(self) -> dict[str, Any]:
        """Return the stored values without removing them."""
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
    """Runs a block's attention with a bias added to its scores, and captures q, k and v.

    The attention is looked up in the block at each call, since it may be wrapped or replaced. `attn` is the attention
    at patch time: it must run inside that call, also if something wraps it.
    """

    kind = ""
    takes_bias = True
    where = "a block"  # the block's name in the model, for errors
    is_proved = False  # whether a probe has verified the tap
    rest: tuple[None, ...] | None = None  # what the attention returns after its tokens; None: no tuple, or not known

    def __init__(self, block: nn.Module, path: str) -> None:
        self.block, self.path = block, path
        self.parts = tuple(filter(None, path.split(".")))
        self.attn: Any = self.found()
        self.slot, self.turn = Slot(), Slot()
        self.needs: tuple[str, ...] = ()  # names that must have been captured when the attention has run
        self.following: list[ChildOverride] = []

    def placed(self, places: Tensor) -> list[Binding]:
        """Return bindings that make the unpatched attention treat token n as being at position `places[:, n]`.

        Default: none, for an attention without positions, or one that gets them as an argument of its block.
        """
        return []

    def found(self) -> Any:
        """Return the module now at the attention's path in the block."""
        module: Any = self.block
        for part in self.parts:
            module = getattr(module, part)
        return module

    def __call__(self, x: Tensor, bias: Tensor | None, kept: Tensor | None = None, **given: Any) -> Tensor:
        """Run the attention on the tokens `[B, N, C]` with a bias per key `[B, N]`; returns `[B, N, C]`.

        `kept` `[B, N]` holds the input positions of these tokens, None if none was removed. `given` holds the block's
        extra arguments for the remaining tokens. Raises `UnsupportedError` if the attention found at patch time does
        not run.
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
        """Call the attention, or its wrapper, as its block does."""
        return attention(x, **given)

    def expect(self, bias: Tensor | None, kept: Tensor | None) -> None:
        """Add the bias in all attention calls of this thread until `check`; a wrapper may call the attention twice."""
        for bound in self.following:
            bound.follow()
        self.turn.take()
        self.turn.put({"bias": bias, "kept": kept})

    def check(self) -> None:
        """Raise `UnsupportedError` if the expected call did not happen, or did not capture all of `needs`."""
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
        """Note the block's name, and that the tap is verified."""
        self.where, self.is_proved = where, True

    def forget(self) -> None:
        """Drop this thread's expected call and captured values, after an error."""
        self.turn.take()
        self.slot.take()

    def attend(
        self, run: Callable[..., Any], bias: Tensor | None, kept: Tensor | None, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """Replace one call of the attention, with the host's arguments and output format, adding the bias.

        `run` is the attention's own forward.
        """
        return run(*args, **kwargs)

    def take(self) -> Captured:
        """Return and forget the captured `q`, `k`, `v` (`[B, H, N, D]`) of the last call in this thread."""
        return self.slot.take()

    def seams(self, needs: frozenset[str]) -> list[Binding]:
        """Return the bindings that capture the tensors named in `needs`."""
        self.needs = tuple(sorted(needs))
        return [Binding(self.attn, "forward", Attending(self.attn, self))]

    def release(self) -> None:
        """Remove listeners that moved to a replacement module."""
        for bound in self.following:
            bound.release()


class Attending(Override):
    """Override of an attention's `forward`: calls `tap.attend` if the tap expects the call, else the original."""

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
    """Override of a child's `forward` that captures the output.

    The output is one of q, k, v as `[B, H, N, D]` or `[B, N, H * D]`, or all three as `[B, N, 3 * H * D]`.
    """

    names: tuple[str, ...]

    def __init__(
        self, parent: nn.Module, child: str, slot: Slot, names: tuple[str, ...], heads: int, parts: int
    ) -> None:
        super().__init__(parent, child)
        self.slot, self.names, self.heads, self.parts = slot, names, heads, parts
        self.moved: Listener | None = None  # the listener bound on the child's replacement

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
        # if it wraps the old child, both listeners capture and the outer one's result is used
        self.moved = Listener(self.parent, self.child, self.slot, self.names, self.heads, self.parts)
        found.__dict__["forward"] = self.moved
        self.around = found

    def release(self) -> None:
        moved, self.moved, self.around = self.moved, None, None
        if moved is not None:
            moved.unbind()


class SeamTap(AttentionTap):
    """Captures from children of the attention: `q_norm` and `k_norm` if they exist, else the projections.

    The bias is passed as `attn_mask`, if the attention has this argument.
    """

    kind = "seam"

    def __init__(self, block: nn.Module, path: str) -> None:
        super().__init__(block, path)
        self.takes_bias = "attn_mask" in inspect.signature(type(self.attn).forward).parameters
        self.unused: frozenset[str] = frozenset()  # children that the attention does not call, despite their names

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
        """Return the listeners for the needed q, k, v; raises `UnsupportedError` if no child provides one of them."""
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
        """Return the names of all children that could provide q, k or v."""
        spellings = (s.format(name, word) for name, word in _WORDS.items() for s in (*_NORMS, *_PROJECTIONS))
        return [name for name in dict.fromkeys((*spellings, *_FUSED)) if self._child(name)]

    def _child(self, *names: str) -> str | None:
        names = tuple(name for name in names if name not in self.unused)
        return next((name for name in names if isinstance(getattr(self.attn, name, None), nn.Module)), None)
