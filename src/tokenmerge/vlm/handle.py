"""Give a vision-language model fewer visual tokens while its own `generate` and `forward` are called as before."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

import tokenmerge
from tokenmerge import Handle
from tokenmerge._intercept.bindings import bind, is_bound, undo
from tokenmerge._intercept.override import Binding, Override
from tokenmerge.errors import (
    AlreadyPatchedError,
    ConfigError,
    NotPatchedError,
    NotTrackedError,
)
from tokenmerge.schedule import R
from tokenmerge.vlm.after import (
    Noted,
    after_cache,
    cached_length,
    check_images,
    decoding,
    inferred_mask,
    limits_of,
    note,
    whole_prompt,
)
from tokenmerge.vlm.families import find_family, unwrapped
from tokenmerge.vlm.inputs import Compacted, check_keep, check_positions, compacted
from tokenmerge.vlm.inside import Inside, check_free, check_generate, check_inside
from tokenmerge.vlm.merging import merge_tower, set_keep
from tokenmerge.vlm.methods import Chooser, find
from tokenmerge.vlm.prompt import PIXELS, has_pixels
from tokenmerge.vlm.releases import adapt
from tokenmerge.vlm.report import PARTS, Clock, VLMReport
from tokenmerge.vlm.tower import check_tower, merges

__all__ = ["PARTS", "VLMHandle", "VLMReport", "patch"]


def patch(
    model: nn.Module,
    keep: float | int = 0.25,
    *,
    method: str | Chooser = "divprune",
    r: R = 0,
    positions: str | None = None,
) -> VLMHandle:
    """Give the language model of a vision-language model fewer visual tokens, in place; return the handle.

    `model.generate(**inputs)` and `model(**inputs)` are called as before: with batches, beams, caches, pipelines. What
    `generate` returns starts with the whole prompt. Calls without images are the original ones.

    Args:
        model: a vision-language model of transformers, see `list_families`; also one that PEFT wrapped.
        keep: a share of the visual tokens in (0, 1], or how many of each image, a whole number.
        method: how they are chosen: a name of `list_methods`, or a `Chooser`.
        r: tokens that each block of the vision tower merges, in any form that `tokenmerge.patch` takes; with "tome" it
            follows from `keep`.
        positions: "keep" leaves every token its position in the whole prompt, "compact" numbers them anew. Default:
            "keep" for models that give tokens positions on the image (M-RoPE) and with "fastv", "compact" for others.

    Raises `UnsupportedModelError` for other models, `AlreadyPatchedError` for a patched one, `ConfigError` for a wrong
    `keep` or options that exclude each other, `UnsupportedError` for a method that this model cannot have, and the
    errors of `tokenmerge.patch` for `r`.
    """
    return VLMHandle(unwrapped(model), keep, find(method), r, positions)


class VLMHandle:
    """Fewer visual tokens in a patched model: change, query, remove. A context manager that removes at its end."""

    def __init__(self, model: nn.Module, keep: float | int, method: Chooser, r: R, positions: str | None) -> None:
        self._family, self._base = find_family(model)
        check_keep(keep)
        if is_bound(model) or tokenmerge.handle_of(model, None) is not None:
            raise AlreadyPatchedError("the model is patched already. Call remove() of its handle first.")
        self.model, self._keep, self._method = model, keep, method
        self._positions = check_positions(positions, self._family)
        if method.inside:
            check_free(self._base)
            check_inside(self._base, method, keep, positions)
            self._positions = "keep"
        check_tower(method, self._base, merges(r))
        self.tower: Handle | None = None
        if method.merges_tower:
            self.tower = merge_tower(model, self._base, self._family, keep, method.name)
        elif merges(r):
            self.tower = tokenmerge.patch(model, r=r, restore="dense")
        if self.tower is not None:
            self.tower.on_remove(self._undo)  # `tokenmerge.unpatch` takes out both
        self._language = Inside(self._base, method) if method.inside else None
        self._last: Compacted | None = None
        self._remarks: list[str] = []
        self.timed = False  # whether calls are timed, for `report(time=True)`: set it at any time
        self._clock = Clock()
        self._local = threading.local()
        self._is_removed = False
        adapt(model, self._base)
        bind(Binding(model, "forward", _Forward(model, self, "forward")))
        if hasattr(model, "generate"):
            bind(Binding(model, "generate", _Generate(model, self, "generate")))
        for name in (f"get_{kind}_features" for kind in PIXELS):
            if hasattr(self._base, name):
                bind(Binding(self._base, name, _Tower(self._base, self, name)))

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy of the model takes along: no threads."""
        return {name: value for name, value in vars(self).items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _local=threading.local())

    def __enter__(self) -> VLMHandle:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._is_removed:
            self.remove()

    @property
    def keep(self) -> float | int:
        """The share of the visual tokens that is kept, or their number per image. Set it at any time."""
        return self._keep

    @keep.setter
    def keep(self, value: float | int) -> None:
        check_keep(value)
        if self.tower is not None and self._method.merges_tower:
            set_keep(self.tower, self._base, self._family, value, self._method.name)
        if self._method.inside:
            check_inside(self._base, self._method, value)
        self._keep = value

    @property
    def method(self) -> Chooser:
        """How tokens are chosen. Set it at any time, also to a name; `tome` and `fastv` only when patching."""
        return self._method

    @method.setter
    def method(self, value: str | Chooser) -> None:
        method = find(value)
        if (method.merges_tower, method.inside) != (self._method.merges_tower, self._method.inside):
            raise ConfigError(
                f"{self._method} cannot become {method}: where in the model a method works is set when patching. Call "
                "remove(), and patch the model with the other."
            )
        if not method.merges_tower:
            check_tower(method, self._base, self.tower is not None)
        self._method = method

    @property
    def r(self) -> R:
        """Tokens that each block of the vision tower merges. Set it at any time if `r` was given when patching."""
        return 0 if self.tower is None else self.tower.r

    @r.setter
    def r(self, value: R) -> None:
        if self.tower is None or self._method.merges_tower:
            reason = (
                "it follows from keep" if self.tower else "the tower was patched without it. Call remove(), and patch"
            )
            raise ConfigError(f"r cannot become {value!r}: {reason}.")
        self.tower.r = value

    @property
    def positions(self) -> str:
        """How tokens are numbered: "keep" or "compact"."""
        return self._positions

    @property
    def visual_tokens(self) -> list[tuple[int, int]]:
        """Visual tokens before and after, of each image or crop, then of each video, of the last call with images.

        With `fastv` of each row of the prompt, in the first layers and in the later ones.
        """
        return self._seen().tokens

    @property
    def kept(self) -> list[Tensor]:
        """The tokens that were kept in the last call with images, of each image or crop, then of each video.

        Places `[k, 3]` on its grid (frame, row, column) where the tokens form one, else their indices `[k]`. With
        `fastv` of each row of the prompt, indices among its visual tokens.
        """
        return self._seen().kept

    @property
    def places(self) -> Tensor:
        """Where each token of the shortened prompt stood in the whole one, `[B, M]`; -1 for padding."""
        return self._seen().prompt.places

    def report(self, *, time: bool = False) -> VLMReport:
        """Return what was done in the last call; with `time` also the seconds of each of `PARTS`.

        Raises `NotTrackedError` if times are asked for and `timed` was not set before the call.
        """
        if time and not self.timed:
            raise NotTrackedError("calls are not timed. Set handle.timed = True, and call the model again.")
        return VLMReport(
            self._family.name,
            repr(self.method),
            self._keep,
            self.positions,
            [] if self._last is None else self._last.tokens,
            list(self._remarks),
            None if self.tower is None else self.tower.report(),
            dict(self._clock.seconds) if time else None,
        )

    def remove(self) -> None:
        """Restore the model, bit for bit; raises `NotPatchedError` the second time."""
        if self._is_removed:
            raise NotPatchedError("this handle was removed before.")
        if self.tower is None:
            self._undo()
        else:
            self.tower.remove()

    def _undo(self) -> None:
        undo({self.model, self._base, *(() if self._language is None else self._language.modules)})
        self._is_removed = True

    def _seen(self) -> Compacted:
        if self._last is None:
            raise NotTrackedError("the last call shortened no images. Call generate or the model with images first.")
        return self._last

    @property
    def _is_whole(self) -> bool:
        return not isinstance(self._keep, Integral) and float(self._keep) == 1.0

    def shortened(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call with fewer visual tokens, or the same ones where there is nothing to do."""
        self._begin(given)
        if not has_pixels(given):  # a prompt that was shortened before goes on as it was, whatever `keep` is now
            short = after_cache(self._base, given, is_whole=self._is_whole)
            if short is given:
                self._last = None
                self._say_encoded(given)
            return short
        check_images(self._base, given, is_whole=self._is_whole)
        if self._is_whole:
            self._last = None
            return given
        with self._timed("choose"):
            found = compacted(self._base, self._family, given, self._keep, self.method, self.positions, self.tower)
        self._local.record = found.without_features()  # of this thread, for its cache
        self._keep_record(self._local.record)
        return found.inputs

    def _begin(self, given: dict[str, Any]) -> None:
        if not cached_length(given):
            note(None, given)  # what the cache held before was taken out of it
        self._remarks.clear()
        self._clock = Clock()

    def _say_encoded(self, given: dict[str, Any]) -> None:
        if self._is_whole or not given.get("mm_encoder_outputs"):
            return
        self._remarks.append("nothing was left out: the images were encoded before (mm_encoder_outputs)")
        # an assistant model gets them from `generate`; to a base model its whole model gave them
        if not hasattr(self.model, "generate"):
            warnings.warn(
                f"{self._remarks[-1]}. To shorten what generate is given, patch the whole model.", stacklevel=5
            )

    def _keep_record(self, record: Compacted) -> None:
        self._last = record
        if all(before == after for before, after in record.tokens):
            self._remarks.append(f"nothing was left out: {self.method.name} kept all tokens of every image")
            warnings.warn(f"{self._remarks[-1]}.", stacklevel=5)

    def _run_inside(self, original: Any, given: dict[str, Any]) -> Any:
        """Call a model that leaves tokens out inside its language model."""
        assert self._language is not None
        goes_on = cached_length(given) > 0
        if not self._is_inside:
            self._begin(given)
        with self._timed("decode" if goes_on else "prefill"):
            out, record = self._language.run(original, given, self.method, float(self._keep), self._is_inside)
        if record is not None:
            self._keep_record(record)
        elif not goes_on:
            self._last = None
        return out

    def remember(self, whole: Tensor, *holders: Any) -> None:
        """Note the prompt of the last call for the caches in its arguments and its answer."""
        note(Noted(whole, self._local.record, layers=0), *holders)

    def _timed(self, part: str) -> AbstractContextManager[None]:
        return self._clock.part(part, next(self.model.parameters()).device) if self.timed else nullcontext()

    @property
    def _is_inside(self) -> bool:
        return getattr(self._local, "depth", 0) > 0

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Mark the calls of this thread as made by `generate`: their inputs are short already."""
        self._local.depth = getattr(self._local, "depth", 0) + 1
        try:
            yield
        finally:
            self._local.depth -= 1


class _Call(Override):
    """A method of the model that takes images."""

    def __init__(self, owner: nn.Module, handle: VLMHandle, attribute: str) -> None:
        super().__init__(owner, attribute)
        self.handle = handle
        method: Any = getattr(owner, attribute)
        self.names = list(inspect.signature(method).parameters)

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the method: `generate` asks which arguments there are."""
        return inspect.signature(self.previous or getattr(type(self.owner), self.attribute).__get__(self.owner))


class _Forward(_Call):
    """The model's forward: shortens a call with images."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        handle = self.handle
        if handle._language is not None:
            return handle._run_inside(self.original, self.by_name(args, kwargs))
        if handle._is_inside and not handle.timed:
            return self.original(*args, **kwargs)
        given = short = self.by_name(args, kwargs)
        goes_on = cached_length(given) > 0  # asked now: the call fills the cache
        if not handle._is_inside:
            short = decoding(given, is_whole=handle._is_whole) if goes_on else handle.shortened(given)
        with handle._timed("decode" if goes_on else "prefill"):
            out = self.original(**short)
        if short is not given and not goes_on:
            handle.remember(given["input_ids"], given, out)
        return out


class _Tower(_Call):
    """The base model's `get_image_features`, timed."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.handle._timed("tower"):
            return self.original(*args, **kwargs)


class _Generate(_Call):
    """The model's generate: shortens the prompt, and puts the whole one in front of what comes back."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.handle._language is not None:
            given = self.by_name(args, kwargs)
            self.handle._begin(given)
            check_generate(self.owner, given, self.handle.method)
            with self.handle._inside():
                return self.original(*args, **kwargs)
        given = self.by_name(args, kwargs)
        if given.get("input_ids") is None and given.get("inputs") is not None:
            given["input_ids"] = given.pop("inputs")
        if has_pixels(given) and given.get("attention_mask") is None:
            given["attention_mask"] = inferred_mask(self.owner, given)
        with torch.no_grad():  # as generate itself
            short = self.handle.shortened(given)
        if short is given:
            with self.handle._inside():
                return self.original(**given)
        whole, length = given["input_ids"], short["input_ids"].shape[1]
        limits = limits_of(self.owner, given, whole.shape[1] - length)
        with self.handle._inside():
            out = self.original(**{**short, **limits})
        if short.get("mm_encoder_outputs"):
            self.handle.remember(whole, given, out)
        if isinstance(out, Tensor):
            return whole_prompt(out, whole, length)
        out.sequences = whole_prompt(out.sequences, whole, length)
        return out
