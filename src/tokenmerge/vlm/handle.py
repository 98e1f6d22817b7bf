"""Give a vision-language model fewer visual tokens while its own `generate` and `forward` are called as before."""

from __future__ import annotations

import inspect
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import tokenmerge
from tokenmerge import Handle
from tokenmerge._intercept.bindings import bind, is_bound, undo
from tokenmerge._intercept.override import Binding, Override
from tokenmerge.errors import AlreadyPatchedError, DataError, NotPatchedError, NotTrackedError, UnsupportedError
from tokenmerge.schedule import R
from tokenmerge.vlm.encode import PIXELS
from tokenmerge.vlm.families import find_family
from tokenmerge.vlm.inputs import Compacted, check_keep, check_positions, compacted
from tokenmerge.vlm.methods import Chooser, find

__all__ = ["PARTS", "VLMHandle", "VLMReport", "patch"]

PARTS = ("tower", "choose", "prefill", "decode")  # of a call, as they are timed
_CACHES = ("cache", "past_key_values")  # the argument's name since transformers 5.24, and before


@dataclass(frozen=True)
class VLMReport:
    """What the handle did in the last call. Prints itself."""

    family: str
    method: str
    keep: float | int
    positions: str
    tokens: list[tuple[int, int]]  # visual tokens before and after, per image, crop or video
    remarks: list[str] = field(default_factory=list)
    tower: Any = None  # the report of merging inside the tower
    seconds: dict[str, float] | None = None  # tower, choose, prefill, decode

    def __str__(self) -> str:
        before, after = (sum(pair[side] for pair in self.tokens) for side in (0, 1))
        lines = [
            f"{self.family}: {self.method}, keep {self.keep}, positions {self.positions}",
            f"visual tokens of the last call: {before} -> {after}, in {len(self.tokens)} images, crops or videos"
            if self.tokens
            else "visual tokens of the last call: none",
        ]
        if self.seconds is not None:
            lines.append(", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in self.seconds.items()))
        lines += self.remarks
        return "\n".join(lines + ([] if self.tower is None else [f"in the tower: {self.tower}"]))


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
        model: a vision-language model of transformers, see `list_families`.
        keep: a share of the visual tokens in (0, 1], or how many of each image, a whole number.
        method: how they are chosen: a name of `list_methods`, or a `Chooser`.
        r: tokens that each block of the vision tower merges, in any form that `tokenmerge.patch` takes.
        positions: "keep" leaves every token its position in the whole prompt, "compact" numbers them anew. Default:
            "keep" for models that give tokens positions on the image (M-RoPE), "compact" for others.

    Raises `UnsupportedModelError` for other models, `AlreadyPatchedError` for a patched one, `ConfigError` for a wrong
    `keep`, and the errors of `tokenmerge.patch` for `r`.
    """
    return VLMHandle(model, keep, find(method), r, positions)


class VLMHandle:
    """Fewer visual tokens in a patched model: change, query, remove. A context manager that removes at its end."""

    def __init__(self, model: nn.Module, keep: float | int, method: Chooser, r: R, positions: str | None) -> None:
        self._family, self._base = find_family(model)
        check_keep(keep)
        if is_bound(model) or tokenmerge.handle_of(model, None) is not None:
            raise AlreadyPatchedError("the model is patched already. Call remove() of its handle first.")
        self.model, self._method, self._keep = model, method, keep
        self.positions = check_positions(positions, self._family)
        self.tower: Handle | None = tokenmerge.patch(model, r=r, restore="dense") if _merges(r) else None
        self._last: Compacted | None = None
        # the prompt that each cache begins with: its ids as they were given, and what was left of it
        self._prompts: WeakKeyDictionary[Any, tuple[Tensor, Compacted]] = WeakKeyDictionary()
        self._remarks: list[str] = []
        self.timed = False  # whether calls are timed, for `report(time=True)`: set it at any time
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._local = threading.local()
        self._is_removed = False
        bind(Binding(model, "forward", _Forward(model, self, "forward")))
        if hasattr(model, "generate"):
            bind(Binding(model, "generate", _Generate(model, self, "generate")))
        for name in (f"get_{kind}_features" for kind in PIXELS):
            if hasattr(self._base, name):
                bind(Binding(self._base, name, _Tower(self._base, self, name)))

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy of the model takes along: no threads, and no caches."""
        return {name: value for name, value in vars(self).items() if name not in ("_local", "_prompts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _local=threading.local(), _prompts=WeakKeyDictionary())

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
        self._keep = value

    @property
    def method(self) -> Chooser:
        """How tokens are chosen. Set it at any time, also to a name."""
        return self._method

    @method.setter
    def method(self, value: str | Chooser) -> None:
        self._method = find(value)

    @property
    def visual_tokens(self) -> list[tuple[int, int]]:
        """Visual tokens before and after, per image, crop or video of the last call with images."""
        return self._seen().tokens

    @property
    def kept(self) -> list[Tensor]:
        """The tokens that were kept, per image, crop or video of the last call with images.

        Places `[k, 3]` on its grid (frame, row, column) where the tokens form one, else their indices `[k]`.
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
            dict(self._seconds) if time else None,
        )

    def remove(self) -> None:
        """Restore the model, bit for bit; raises `NotPatchedError` the second time."""
        if self._is_removed:
            raise NotPatchedError("this handle was removed before.")
        undo({self.model, self._base})
        if self.tower is not None:
            self.tower.remove()
        self._is_removed = True

    def _seen(self) -> Compacted:
        if self._last is None:
            raise NotTrackedError("no call with images was shortened yet. Call generate or the model first.")
        return self._last

    @property
    def _is_whole(self) -> bool:
        return not isinstance(self._keep, Integral) and float(self._keep) == 1.0

    def shortened(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call with fewer visual tokens, or the same ones where there is nothing to do."""
        self._remarks.clear()
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        if self._is_whole:
            self._last = None
            return given
        if all(given.get(name) is None for name in PIXELS.values()):
            return self._continued(given)
        with self._timed("choose"):
            found = compacted(self._base, self._family, given, self._keep, self.method, self.positions)
        self._last = found
        if all(before == after for before, after in found.tokens):
            self._remarks.append(f"nothing was left out: {self.method.name} kept all tokens of every image")
            warnings.warn(f"{self._remarks[-1]}.", stacklevel=4)
        return found.inputs

    def _continued(self, given: dict[str, Any]) -> dict[str, Any]:
        """Shorten a prompt that goes on after the last one, whose images are in the cache."""
        ids = given.get("input_ids")
        special = [getattr(self._base.config, f"{kind}_token_id", None) for kind in PIXELS]
        places = [] if ids is None else [bool((ids == token).any()) for token in special if token is not None]
        if ids is None or given.get("mm_encoder_outputs") or not any(places):
            self._last = None
            return given
        whole, last = self.prompt_of(given) or (None, None)
        if last is None or not ids[:, : last.prompt.length].equal(whole):
            raise DataError(
                "the prompt has placeholders of images, and no images are given. Give what the processor returned for "
                "them, or go on with the cache of a call whose prompt this one starts with."
            )
        return _appended(given, last)

    def prompt_of(self, given: Any) -> tuple[Tensor, Compacted] | None:
        """Return the prompt that the cache of a call begins with, if it was shortened."""
        cache = _cache(given)
        return None if cache is None else self._prompts.get(cache)

    def remember(self, whole: Tensor, *holders: Any) -> None:
        """Note the prompt of the last call for the caches in its arguments and its answer."""
        for cache in map(_cache, holders):
            if cache is not None and self._last is not None:
                self._prompts[cache] = whole, self._last

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        if not self.timed:
            yield
            return
        device = next(self.model.parameters()).device
        before, self._local.inner, start = getattr(self._local, "inner", 0.0), 0.0, _now(device)
        yield
        seconds = _now(device) - start
        # without the parts inside this one
        self._seconds[part] += seconds - self._local.inner
        self._local.inner = before + seconds

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
        if handle._is_inside and not handle.timed:
            return self.original(*args, **kwargs)
        given = short = self.by_name(args, kwargs)
        if not handle._is_inside:
            short = _decoding(handle, given) if _length(given) else handle.shortened(given)
        with handle._timed("decode" if _length(given) else "prefill"):
            out = self.original(**short)
        if short is not given and not _length(given):
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
        given = self.by_name(args, kwargs)
        inputs = given.pop("inputs", None)
        if inputs is not None:
            given.setdefault("input_ids", inputs)
        short = self.handle.shortened(given)
        if short is given:
            with self.handle._inside():
                return self.original(**given)
        whole, length = given["input_ids"], short["input_ids"].shape[1]
        limits = _lengths(self.owner, given, whole.shape[1] - length)
        with self.handle._inside():
            out = self.original(**{**short, **limits})
        if "mm_encoder_outputs" in short:
            self.handle.remember(whole, given, out)
        if isinstance(out, Tensor):
            return _whole_prompt(out, whole, length)
        out.sequences = _whole_prompt(out.sequences, whole, length)
        return out


def _merges(r: R) -> bool:
    return bool(callable(r) or not isinstance(r, (int, float)) or r)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _length(given: dict[str, Any]) -> int:
    """Return how many tokens the cache of a call holds."""
    cache = _cache(given)
    return 0 if cache is None else int(cache.get_seq_length())


def _cache(holder: Any) -> Any:
    """Return the cache in the arguments or the answer of a call; None without one."""
    found = (holder.get(name) for name in _CACHES) if isinstance(holder, Mapping) else ()
    return next((cache for cache in found if cache is not None), None)


def _whole_prompt(sequences: Tensor, whole: Tensor, short: int) -> Tensor:
    """Return sequences `[B', M + new]` with the whole prompt `[B, L]` of each row in the place of the short one."""
    return torch.cat((whole.repeat_interleave(len(sequences) // len(whole), dim=0), sequences[:, short:]), dim=1)


def _lengths(model: Any, given: dict[str, Any], removed: int) -> dict[str, Any]:
    """Return limits of the length with the prompt, lowered by the tokens that the prompt has less."""
    config = given.get("generation_config") or model.generation_config
    limits = {}
    for name in ("max_length", "min_length"):
        value, new = (given.get(key) or getattr(config, key, None) for key in (name, f"{name[:3]}_new_tokens"))
        if value and not new:  # new tokens are counted without the prompt
            limits[name] = max(0, value - removed)
    return limits


def _appended(given: dict[str, Any], last: Compacted) -> dict[str, Any]:
    """Return a call whose prompt starts with the last one: that part shortened as it was, the rest as it is."""
    short, length = dict(given), last.prompt.length
    rest = given["input_ids"].shape[1] - length
    for name in ("input_ids", "token_type_ids", "mm_token_type_ids"):
        if isinstance(given.get(name), Tensor):
            short[name] = torch.cat((last.inputs[name], given[name][:, length:]), dim=1)
    mask = last.inputs["attention_mask"]
    new = (
        given["attention_mask"][:, length:]
        if given.get("attention_mask") is not None
        else mask.new_ones(len(mask), rest)
    )
    short["attention_mask"] = torch.cat((mask, new), dim=1)
    before = last.inputs["position_ids"]
    steps = torch.arange(1, rest + 1, device=before.device)
    short["position_ids"] = torch.cat((before, before.amax(dim=-1, keepdim=True) + steps), dim=-1)
    return short


def _decoding(handle: VLMHandle, given: dict[str, Any]) -> dict[str, Any]:
    """Return a call that goes on after a shortened prompt, with a mask and positions of the shortened one's length."""
    _, last = handle.prompt_of(given) or (None, None)
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if last is None or ids is None:
        return given
    after = _length(given) - last.prompt.places.shape[1]  # tokens in the cache behind the prompt
    short = dict(given)
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == last.prompt.length + after + ids.shape[1]:
        own = last.inputs["attention_mask"]
        short["attention_mask"] = torch.cat((own, mask[:, last.prompt.length :]), dim=1)
    if given.get("position_ids") is None:
        steps = torch.arange(after + 1, after + 1 + ids.shape[1], device=ids.device)
        short["position_ids"] = last.inputs["position_ids"].amax(dim=-1, keepdim=True) + steps
    else:
        raise UnsupportedError(
            "position_ids are given for tokens after a shortened prompt. Leave them out: they follow from the prompt."
        )
    return short
