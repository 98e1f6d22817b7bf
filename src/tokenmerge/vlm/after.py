"""Go on after a shortened prompt: with its cache, and with the whole prompt in front of what was generated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenmerge.errors import DataError, UnsupportedError
from tokenmerge.vlm.prompt import PIXELS, has_pixels, positions_after

if TYPE_CHECKING:
    from tokenmerge.vlm.inputs import Compacted

__all__ = [
    "Noted",
    "after_cache",
    "cached_length",
    "check_images",
    "decoding",
    "inferred_mask",
    "limits_of",
    "note",
    "noted",
    "tokens_of",
    "whole_prompt",
]

_CACHES = ("cache", "past_key_values")  # the argument's name since transformers 5.24, and before
_NOTE = "_tokenmerge_prompt"  # an attribute of caches, which their copies take along


@dataclass(frozen=True)
class Noted:
    """The shortened prompt that a cache begins with."""

    ids: Tensor  # [B, L], of the whole prompt
    record: Compacted
    layers: int  # after how many layers of the language model it was shortened
    mark: Tensor | None = None  # [B, H, N], by which each row of the cache is known again; None: it cannot be

    @property
    def length(self) -> int:
        """How many tokens of the cache's first layers are the prompt."""
        return self.ids.shape[1] if self.layers else self.record.prompt.places.shape[1]

    @property
    def has_equal_rows(self) -> bool:
        """Whether all rows have their padding, and the position of what follows, alike."""
        pads, inputs = self.record.prompt.places < 0, self.record.inputs
        last = inputs["position_ids"].amax(dim=-1).reshape(-1, pads.shape[0]) if inputs else pads.sum(dim=1)[None]
        return bool((pads == pads[:1]).all() and (last == last[:, :1]).all())

    def rows(self, index: Tensor) -> Noted:
        """Return the note with these rows `[B']`, in this order."""
        own = self.record
        inputs = {name: value.index_select(-2, index.to(value.device)) for name, value in own.inputs.items()}
        prompt = replace(own.prompt, places=own.prompt.places[index.to(own.prompt.places.device)])
        mark = None if self.mark is None else self.mark[index.to(self.mark.device)]
        record = replace(own, inputs=inputs, prompt=prompt)
        return replace(self, ids=self.ids[index.to(self.ids.device)], record=record, mark=mark)


def note(prompt: Noted | None, *holders: Any) -> None:
    """Note the prompt of the caches in the arguments or the answer of a call; None: it was not shortened."""
    for cache in map(cache_of, holders):
        if cache is not None and prompt is not getattr(cache, _NOTE, None):
            setattr(cache, _NOTE, prompt if prompt is None else _marked(prompt, cache))


def noted(given: Mapping[str, Any], layers: int = 0) -> Noted | None:
    """Return the shortened prompt that the cache of a call begins with; None: there is none.

    Raises `UnsupportedError` if the call cannot go on after it.
    """
    prompt: Noted | None = getattr(cache_of(given), _NOTE, None)
    if prompt is None:
        return None
    if prompt.layers != layers:
        raise UnsupportedError(
            f"the cache holds a prompt that was shortened after {prompt.layers} layers of the language model, and the "
            f"method shortens it after {layers}. Go on with the method that the cache was made with, or start again."
        )
    prompt = _followed(prompt, cache_of(given))
    tokens = tokens_of(given)
    if tokens is not None and tokens.shape[0] != prompt.ids.shape[0]:
        raise UnsupportedError(
            f"the cache begins with {prompt.ids.shape[0]} shortened prompts, and {tokens.shape[0]} rows go on after "
            "them. Give one row for each, or start again with as many prompts."
        )
    return prompt


def _marked(prompt: Noted, cache: Any) -> Noted:
    """Return the note with the mark of each row of the cache, which has several per prompt after beams or samples."""
    mark, rows = _mark(cache, prompt.length), prompt.ids.shape[0]
    if mark is not None and mark.shape[0] != rows:
        each = torch.arange(rows, device=mark.device).repeat_interleave(mark.shape[0] // rows)
        prompt = prompt.rows(each)
    return replace(prompt, mark=mark)


def _mark(cache: Any, length: int) -> Tensor | None:
    """Return one channel of the keys of so many tokens in the first layer, without those that left its window."""
    layers = [layer for layer in getattr(cache, "layers", ()) if getattr(layer, "keys", None) is not None]
    layers.sort(key=lambda layer: bool(layer.is_sliding))
    keys = layers[0].keys if layers else None
    if keys is None or keys.dim() != 4:
        return None
    gone = max(0, int(layers[0].get_seq_length()) - keys.shape[2])
    return keys[:, :, : length - gone, 0].detach().clone() if length > gone else None


def _followed(prompt: Noted, cache: Any) -> Noted:
    """Return the note in the order that the rows of the cache have now.

    Raises `UnsupportedError` if a row is none of those that were noted.
    """
    end = min(prompt.length, int(cache.get_seq_length()))
    now, own = _mark(cache, end), prompt.mark
    if now is None or own is None:
        if prompt.has_equal_rows:
            return prompt
        raise UnsupportedError(
            "the cache begins with shortened prompts of different lengths, and holds no keys of them by which its rows "
            "are known: it is quantised, or its window is over. Use the default cache, prompts of one length, or a "
            "cache for each."
        )
    first = end - now.shape[2] - (prompt.length - own.shape[2])
    own = own[:, :, first : first + now.shape[2]].to(now.device)
    if now.equal(own):
        return prompt
    is_row = (now[:, None] == own[None]).flatten(2).all(dim=2)  # [B', B]
    if not bool(is_row.any(dim=1).all()):
        raise UnsupportedError(
            "the cache begins with a shortened prompt, and its keys are others than after that call: which row is "
            "which is not known. Reorder its rows only, or start again with the prompts."
        )
    prompt = prompt.rows(is_row.long().argmax(dim=1))
    setattr(cache, _NOTE, prompt)
    return prompt


def tokens_of(given: Mapping[str, Any]) -> Tensor | None:
    """Return the ids or else the embeddings of a call."""
    ids: Tensor | None = given.get("input_ids")
    return given.get("inputs_embeds") if ids is None else ids


def cached_length(given: dict[str, Any]) -> int:
    """Return how many tokens the cache of a call holds."""
    cache = cache_of(given)
    return 0 if cache is None else int(cache.get_seq_length())


def cache_of(holder: Any) -> Any:
    """Return the cache in the arguments or the answer of a call; None without one."""
    found = (holder.get(name) for name in _CACHES) if isinstance(holder, Mapping) else ()
    return next((cache for cache in found if cache is not None), None)


def whole_prompt(sequences: Tensor, whole: Tensor, short: int) -> Tensor:
    """Return sequences `[B', M + new]` with the whole prompt `[B, L]` of each row in the place of the short one."""
    return torch.cat((whole.repeat_interleave(len(sequences) // len(whole), dim=0), sequences[:, short:]), dim=1)


def limits_of(model: Any, given: Mapping[str, Any], removed: int) -> dict[str, Any]:
    """Return limits of the length with the prompt, lowered by the tokens that the prompt has less."""
    limits = {}
    for name in ("max_length", "min_length"):
        value, new = _setting(model, given, name), _setting(model, given, f"{name[:3]}_new_tokens")
        if value and not new:  # new tokens are counted without the prompt
            limits[name] = max(0, value - removed)
    return limits


def inferred_mask(model: Any, given: Mapping[str, Any]) -> Tensor | None:
    """Return the mask `[B, L]` that `generate` infers from padding where none is given; None: there is no padding."""
    ids = given.get("input_ids")
    pad, end = _setting(model, given, "pad_token_id"), _setting(model, given, "eos_token_id")
    ends = torch.as_tensor([] if end is None else end).flatten().tolist()
    if ids is None or pad is None or int(pad) in ends or not bool((ids == pad).any()):
        return None
    mask: Tensor = (ids != pad).long()
    return mask


def _setting(model: Any, given: Mapping[str, Any], name: str) -> Any:
    """Return a setting of `generate`: of the call, else of its configuration, else of the model's; None: a default."""
    default = getattr(type(model.generation_config)(), name, None)  # of 4.57, which does not count as a setting
    own = (getattr(config, name, None) for config in (given.get("generation_config"), model.generation_config))
    found = (given.get(name), *(value for value in own if value != default))
    return next((value for value in found if value is not None), None)


def after_cache(base: Any, given: dict[str, Any], is_whole: bool) -> dict[str, Any]:
    """Return a call without pixels that goes on after the shortened prompt in its cache; the same one without any.

    `is_whole`: nothing is to be left out. Raises `DataError` for placeholders without images, and the errors of
    `noted` and `appended`.
    """
    ids, last = given.get("input_ids"), None if given.get("mm_encoder_outputs") else noted(given)
    special = _special(base)
    if last is not None:
        return appended(given, last, special)
    embedded = given.get("inputs_embeds") is not None or given.get("mm_encoder_outputs")
    if is_whole or ids is None or embedded or not bool(torch.isin(ids, special.to(ids.device)).any()):
        return given
    raise DataError(
        "the prompt has placeholders of images, and no images are given. Give what the processor returned for "
        "them, or go on with the cache of a call whose prompt this one starts with."
    )


def _special(base: Any) -> Tensor:
    """Return the ids of placeholders."""
    tokens = [getattr(base.config, f"{kind}_token_id", None) for kind in PIXELS]
    return torch.tensor([token for token in tokens if token is not None])


def appended(given: dict[str, Any], prompt: Noted, special: Tensor) -> dict[str, Any]:
    """Return a call whose prompt starts with the noted one: that part shortened as it was, the rest as it is.

    As in transformers, it may also have only what is new, with the mask of all. Raises `DataError` for another prompt,
    `UnsupportedError` if placeholders (ids `special`) were cut off its cache.
    """
    last, ids, mask = prompt.record, given.get("input_ids"), given.get("attention_mask")
    held, own, length = cached_length(given), last.inputs["input_ids"], last.prompt.length
    if bool(torch.isin(own[:, held:], special.to(own.device)).any()):
        raise UnsupportedError(
            f"the cache was cut inside the images: it holds {held} tokens of a shortened prompt of {own.shape[1]}. "
            "Give the prompt with its images, and no cache."
        )
    behind = held - own.shape[1]  # tokens of the cache behind the prompt
    starts = ids is not None and ids[:, :length].equal(prompt.ids)
    is_new = mask is not None and ids is not None and 0 <= behind == mask.shape[1] - length - ids.shape[1]
    if ids is None or not (starts or is_new):
        raise DataError(
            f"the cache begins with a shortened prompt of {length} tokens, and "
            + ("inputs_embeds are" if ids is None else f"{list(ids.shape)} input_ids are")
            + " given that do not start with it. Give the prompt with its placeholders and all that follows as "
            "input_ids, or what is new alone with the attention mask of all."
        )
    short = dict(given)
    if starts:
        for name in ("input_ids", "token_type_ids", "mm_token_type_ids"):
            if isinstance(given.get(name), Tensor):
                short[name] = torch.cat((last.inputs[name], given[name][:, length:]), dim=1)
    before, own_mask = last.inputs["position_ids"], last.inputs["attention_mask"]
    rest = (ids if starts or mask is None else mask).shape[1] - length
    new = own_mask.new_ones(own_mask.shape[0], rest) if mask is None else mask[:, length:]
    short["attention_mask"] = torch.cat((own_mask, new), dim=1)
    steps = torch.arange(1, rest + 1, device=before.device)
    short["position_ids"] = torch.cat((before, positions_after(before, steps)), dim=-1)
    return short


def check_images(base: Any, given: dict[str, Any], is_whole: bool) -> None:
    """Raise `UnsupportedError` for images with a cache that holds images: which of them are new is not known.

    `is_whole`: nothing is to be left out, and only a prompt that was shortened before is in the way.
    """
    held, ids = cached_length(given), given.get("input_ids")
    if not held or ids is None:
        return
    if noted(given) is not None or (
        not is_whole and bool(torch.isin(ids[:, :held], _special(base).to(ids.device)).any())
    ):
        raise UnsupportedError(
            "images are given with a cache that holds a prompt with images. Call generate with the whole prompt and "
            "all of its images, and without the cache."
        )


def decoding(given: dict[str, Any], is_whole: bool) -> dict[str, Any]:
    """Return a call that goes on after the shortened prompt in its cache, with a mask and positions of that length.

    Raises `UnsupportedError` for images that are to be shortened (not `is_whole`), and for positions.
    """
    if not is_whole and has_pixels(given):
        raise UnsupportedError(
            "images are given with a cache that holds a prompt: they would not be shortened. Call generate with "
            "the whole prompt and all of its images, or set handle.keep = 1.0 for this call."
        )
    prompt = noted(given)
    tokens, mask = tokens_of(given), given.get("attention_mask")
    if prompt is None or tokens is None:
        return given
    last, new = prompt.record, tokens.shape[1]
    held, M = cached_length(given), last.prompt.places.shape[1]
    after = max(0, held - M)  # tokens in the cache behind the prompt, whose end may have been cut off
    short = dict(given)
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == last.prompt.length + held - M + new:
        own = last.inputs["attention_mask"][:, :held]
        short["attention_mask"] = torch.cat((own, mask[:, mask.shape[1] - after - new :]), dim=1)
    if given.get("position_ids") is None:
        steps = torch.arange(after + 1, after + 1 + new, device=tokens.device)
        short["position_ids"] = positions_after(last.inputs["position_ids"][..., :held], steps)
    else:
        raise UnsupportedError(
            "position_ids are given for tokens after a shortened prompt. Leave them out: they follow from the prompt."
        )
    return short
