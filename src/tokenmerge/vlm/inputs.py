"""Shorten the inputs of a vision-language model: encode, choose, and leave out placeholders."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge import Handle
from tokenmerge.errors import ConfigError, DataError, UnsupportedError
from tokenmerge.vlm.encode import Chosen, Encoded, Entry, encode
from tokenmerge.vlm.families import Family, find_family, unwrapped
from tokenmerge.vlm.methods import Chooser, Visual, find
from tokenmerge.vlm.methods.base import chosen_by
from tokenmerge.vlm.prompt import PIXELS, Shortened, has_pixels, pads_on_the_right, positions_of, shorten, texts
from tokenmerge.vlm.releases import check_newer

__all__ = ["Compacted", "check_keep", "check_positions", "checked", "compact", "compacted"]

POSITIONS = ("keep", "compact")
_PER_TOKEN = ("attention_mask", "token_type_ids", "mm_token_type_ids", "position_ids", "labels")


@dataclass(frozen=True)
class Compacted:
    """Inputs with fewer visual tokens, and what was left out."""

    inputs: dict[str, Any]  # for `generate` or the model itself
    prompt: Shortened
    tokens: list[tuple[int, int]]  # visual tokens before and after, of each image or crop, then of each video
    kept: list[Tensor]  # places [k, 3] on the grid of each of them, or indices [k] where there is none

    def without_features(self) -> Compacted:
        """Return the record without the visual tokens: what goes on after the prompt needs only its numbers."""
        own = {name: self.inputs[name] for name in ("input_ids", *_PER_TOKEN) if name in self.inputs}
        return replace(self, inputs=own)


def compact(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    keep: float | int,
    method: str | Chooser = "divprune",
    positions: str | None = None,
) -> dict[str, Any]:
    """Return inputs for `model.generate` or `model` with fewer visual tokens. Changes neither the model nor `inputs`.

    Args:
        model: a vision-language model of transformers, see `list_families`.
        inputs: what the processor returns: `input_ids` with placeholders, pixels, masks.
        keep: a share of the visual tokens in (0, 1], or how many of each image, a whole number.
        method: how they are chosen: a name of `list_methods`, or a `Chooser`.
        positions: "keep" leaves every token its position in the whole prompt, "compact" numbers them anew. Default:
            "keep" for models that give tokens positions on the image (M-RoPE), "compact" for others.

    What `generate` returns then starts with the shortened prompt. This needs transformers 5.24, `patch` does not.

    Raises `UnsupportedModelError` for other models, `UnsupportedError` on transformers 4.57,
    `DataError` for inputs whose placeholders and images do not match, `ConfigError` for a wrong `keep`.
    """
    family, base = find_family(unwrapped(model))
    check_keep(keep)
    positions = check_positions(positions, family)
    chooser = find(method)
    if chooser.inside:
        raise UnsupportedError(
            f"{chooser.name} leaves tokens out inside the language model, and shorter inputs know nothing of that. Use "
            f"tokenmerge.vlm.patch(model, keep, method={chooser.name!r})."
        )
    way_out = "Use tokenmerge.vlm.patch(model, keep), and call the model as before."
    check_newer(base, "a model that takes encoded images (mm_encoder_outputs) without being patched", way_out)
    return compacted(base, family, inputs, keep, chooser, positions).inputs


def check_keep(keep: Any) -> None:
    """Raise `ConfigError` for anything but a share in (0, 1] or a whole number of at least 1."""
    is_count = isinstance(keep, Integral) and not isinstance(keep, bool) and int(keep) >= 1
    is_share = isinstance(keep, Real) and not isinstance(keep, Integral) and 0 < float(keep) <= 1
    if not is_count and not is_share:
        raise ConfigError(
            f"keep is {keep!r}. Give a share of the visual tokens, above 0.0 and up to 1.0, or how many of each image "
            "to keep, a whole number of at least 1."
        )


def check_positions(positions: str | None, family: Family) -> str:
    """Return the way to number tokens; raises `ConfigError` for one that the family does not have."""
    if positions is None:
        return "keep" if family.has_places else "compact"
    if positions not in POSITIONS:
        raise ConfigError(f"positions is {positions!r}; allowed: {', '.join(POSITIONS)}.")
    if positions == "compact" and family.has_places:
        raise ConfigError(
            f"positions is 'compact': a {family.name} model places visual tokens on the image's grid, which tokens "
            "that are numbered anew do not have. Give positions='keep'."
        )
    return positions


def compacted(
    base: Any,
    family: Family,
    inputs: Mapping[str, Any],
    keep: float | int,
    method: Chooser,
    positions: str,
    tower: Handle | None = None,
) -> Compacted:
    """Return what `compact` does, with a record of it; `tower` is the handle of merging inside the vision tower."""
    ids, mask = checked(inputs)
    special = {kind: int(getattr(base.config, f"{kind}_token_id")) for kind in PIXELS if _has(base, kind)}
    given = [kind for kind in PIXELS if inputs.get(PIXELS[kind]) is not None]
    if "video" in given and not family.has_videos:
        raise UnsupportedError(
            f"videos of {family.name} models are not shortened yet. Give images, or unpatch the model."
        )
    if len(given) == 2 and family.is_shared:
        raise UnsupportedError(
            f"images and videos are given in one call: a {family.name} model has the same placeholders for both, and "
            "takes one of them. Give them in calls of their own."
        )
    if family.is_shared:
        special["video"] = special["image"]
    is_kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    words = _words(base, ids, mask, special)
    outputs: dict[str, Any] = {}
    records: list[tuple[Entry, Tensor]] = []  # what stays of each
    for kind in given:
        found = encode(base, family, kind, inputs, method, tower)
        is_place = ids == special[kind]
        owners = _owners(kind, is_place, is_kept, found)
        chosen = [
            _choose(entry, keep, method, words[owner]) for entry, owner in zip(found.entries, owners, strict=True)
        ]
        outputs[kind] = found.take(chosen)
        own = [(entry, stays.index) for entry, stays in zip(found.entries, chosen, strict=True)]
        stays = torch.cat([_flags(entry.features.shape[0], index) for entry, index in own])
        is_kept[is_place] &= stays.to(is_kept.device)
        records += own
    prompt = shorten(is_kept, pads_on_the_right(mask))
    short = {name: value for name, value in inputs.items() if name not in PIXELS.values()}
    short["mm_encoder_outputs"] = outputs
    short |= _per_token(base, family, inputs, prompt, positions)
    return Compacted(
        short,
        prompt,
        [(entry.features.shape[0], len(index)) for entry, index in records],
        [_places(entry, index) for entry, index in records],
    )


def _has(base: Any, kind: str) -> bool:
    return hasattr(base, f"get_{kind}_features") and getattr(base.config, f"{kind}_token_id", None) is not None


def checked(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Return `input_ids` and the mask of a prompt with images; raises an error for one that cannot be shortened."""
    if inputs.get("inputs_embeds") is not None:
        raise UnsupportedError(
            "inputs_embeds are given: which of them are visual is not known. Give input_ids, or shorten the embeddings "
            "yourself with the functions of tokenmerge.vlm.methods."
        )
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None:
        raise DataError("there are images and no input_ids. Give what the model's processor returns for both.")
    if inputs.get("mm_encoder_outputs") and has_pixels(inputs):
        raise UnsupportedError(
            "images that are encoded already (mm_encoder_outputs) are given with pixels. Give one of them."
        )
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        found = f"has {mask.dim()} dimensions" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
        raise UnsupportedError(f"the attention mask {found}: only a tensor [batch, tokens] can be shortened.")
    if mask is not None and mask.shape != ids.shape:
        raise DataError(
            f"the attention mask is {tuple(mask.shape)}, the prompt {tuple(ids.shape)}: they must be equal."
        )
    if bool((_steps(inputs) < 0).any()):
        raise UnsupportedError(
            "position_ids start again inside a row, as in packed sequences, and a shortened prompt is one sequence. "
            "Give each sequence a row of its own."
        )
    if isinstance(inputs.get("logits_to_keep"), Tensor):
        raise UnsupportedError(
            "logits_to_keep names places in the prompt, which is shortened. Give how many of the last logits to keep, "
            "a whole number, or choose from all of them by handle.places."
        )
    return ids, mask


def _owners(kind: str, is_place: Tensor, is_kept: Tensor, found: Encoded) -> list[int]:
    """Return the row of the prompt that each entry belongs to; raises `DataError` if they do not match."""
    places, tokens = is_place.sum(dim=1).tolist(), [entry.features.shape[0] for entry in found.entries]
    if sum(places) != sum(tokens):
        raise DataError(
            f"the prompt has {sum(places)} placeholders for {kind}s, and the {len(tokens)} {kind}s that are given have "
            f"{sum(tokens)} tokens. Give the processor the same {kind}s as the model."
        )
    if not bool(is_kept[is_place].all()):
        raise DataError(
            f"the attention mask hides placeholders of {kind}s that are given. Leave out what is hidden, and its "
            f"{kind}s."
        )
    owners, row, left = [], 0, places[0]
    for count in tokens:
        while left == 0:
            row += 1
            left = places[row]
        if count > left:
            raise DataError(
                f"row {row} of the prompt has placeholders for {left} tokens where the next {kind} has {count}. Give "
                f"the {kind}s in the order of the prompts."
            )
        owners.append(row)
        left -= count
    return owners


def _words(base: Any, ids: Tensor, mask: Tensor | None, special: Mapping[str, int]) -> list[Tensor]:
    """Return the embeddings of each row's text, `[L, C]`."""
    embed = base.get_input_embeddings()
    with torch.no_grad():
        return [embed(row) for row in texts(ids, mask, special)]


def _choose(entry: Entry, keep: float | int, method: Chooser, text: Tensor) -> Chosen:
    """Return the tokens of an entry that stay."""
    free = (~entry.is_fixed).nonzero().squeeze(1)
    total = free.shape[0]
    if isinstance(keep, Integral) and keep > total:
        raise DataError(f"keep is {keep}, and an image has {total} tokens. Give a smaller number, or a share.")
    k = int(keep) if isinstance(keep, Integral) else max(1, round(float(keep) * total))
    if k == total:
        return Chosen(torch.arange(entry.features.shape[0], device=entry.features.device))
    attention, keys, targets = (
        None if values is None else values[free] for values in (entry.attention, entry.keys, entry.targets)
    )
    if targets is not None:  # none of them is fixed
        targets = torch.searchsorted(free, targets)
    visual = Visual(entry.features[free], entry.frames, text, attention, keys, targets)
    index, weights = chosen_by(method, visual, k)
    fixed = entry.is_fixed.nonzero().squeeze(1)
    places, order = torch.cat((free[index], fixed)).sort()
    if weights is None:
        return Chosen(places)
    whole = weights.new_zeros(places.shape[0], entry.features.shape[0])
    whole[: index.shape[0], free] = weights
    whole[torch.arange(index.shape[0], places.shape[0], device=places.device), fixed] = 1
    return Chosen(places, whole[order])


def _places(entry: Entry, index: Tensor) -> Tensor:
    """Return frame, row and column of the chosen tokens that are on the grid."""
    if entry.grid is None:
        return index
    # the rank among the tokens that are on the grid
    place = ((~entry.is_fixed).cumsum(0) - 1)[index[~entry.is_fixed[index]]]
    _, rows, columns = entry.grid
    return torch.stack((place // (rows * columns), place // columns % rows, place % columns), dim=1)


def _flags(length: int, index: Tensor) -> Tensor:
    flags = torch.zeros(length, dtype=torch.bool, device=index.device)
    flags[index] = True
    return flags


def _per_token(
    base: Any, family: Family, inputs: Mapping[str, Any], prompt: Shortened, positions: str
) -> dict[str, Any]:
    """Return the tensors with one entry per token of the prompt, shortened."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    config = getattr(base.config, "text_config", base.config)
    padding = getattr(config, "pad_token_id", None) or 0
    short: dict[str, Any] = {"input_ids": prompt.take(ids, padding), "attention_mask": prompt.mask.to(ids.device)}
    for name, fill in (("token_type_ids", 0), ("mm_token_type_ids", 0), ("labels", -100)):
        if isinstance(inputs.get(name), Tensor):
            short[name] = prompt.take(inputs[name], fill)
    own = inputs.get("position_ids")
    if positions == "compact" and bool((_steps(inputs) != 1).any()):
        raise UnsupportedError(
            "position_ids are given that are not 0, 1, 2, ..., and positions='compact' numbers tokens anew. Leave them "
            "out, or give positions='keep'."
        )
    text = positions_of(short["attention_mask"])
    if family.has_places:
        if own is None:
            own = _placed(base, inputs)
        own = own[-3:] if own.dim() == 3 else own.expand(3, -1, -1)
        short["position_ids"] = torch.cat((text[None], prompt.take(own)))
    elif positions == "keep":
        whole = torch.ones_like(ids) if mask is None else mask
        short["position_ids"] = prompt.take(positions_of(whole) if own is None else own)
    else:
        short["position_ids"] = text
    return short


def _steps(inputs: Mapping[str, Any]) -> Tensor:
    """Return the steps between the given positions of tokens that are neighbours, padding left out, of all rows."""
    ids, mask, own = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids")
    if own is None:
        return torch.ones(0)
    rows = (own[0] if own.dim() == 3 else own).expand(ids.shape)
    is_real = torch.ones_like(rows) if mask is None else mask
    return torch.cat([row[real.bool()].diff() for row, real in zip(rows, is_real, strict=True)])


def _placed(base: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Return the positions of the whole prompt on the image's grids, `[3, B, L]`."""
    names = inspect.signature(base.get_rope_index).parameters
    if "mm_token_type_ids" in names and inputs.get("mm_token_type_ids") is None:
        raise DataError(
            "mm_token_type_ids are missing: without them the places of visual tokens are not known. The processor "
            "returns them beside input_ids."
        )
    given = {name: inputs[name] for name in names if inputs.get(name) is not None}
    positions: Tensor = base.get_rope_index(**given)[0]
    return positions
