"""Leave visual tokens out inside the language model: all of them in its first layers, fewer in the others.

The prompt stays whole for the model, its mask and its positions. From one layer on, the rows of the tokens that are
left are taken of everything that has one per token, and these layers have shorter caches. Only the last row of one
attention is computed a second time.

Shapes: B rows, L tokens of a prompt, M of those that are left, V visual tokens of a row.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge import importance
from tokenmerge._intercept.bindings import bind, is_bound
from tokenmerge._intercept.override import Binding, Override
from tokenmerge.errors import AlreadyPatchedError, ConfigError, UnsupportedError
from tokenmerge.vlm.after import Noted, cache_of, cached_length, note, noted, tokens_of
from tokenmerge.vlm.inputs import Compacted, checked
from tokenmerge.vlm.methods import Chooser, Visual
from tokenmerge.vlm.methods.base import chosen_by
from tokenmerge.vlm.prompt import PIXELS, has_pixels, pads_on_the_right, shorten
from tokenmerge.vlm.releases import check_newer

__all__ = ["Inside", "check_free", "check_generate", "check_inside"]

# attentions whose queries and keys are their projections, rotated in every layer
_KNOWN = {
    "GemmaAttention",
    "Glm4vTextAttention",
    "LlamaAttention",
    "MistralAttention",
    "Qwen2Attention",
    "Qwen2VLAttention",
    "Qwen2_5_VLAttention",
}
_PIECES = ("prefill_chunk_size", "assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
_WAY_OUT = "Choose a method that works before the language model, such as divprune."


@dataclass
class _Call:
    """What is known of one call of the model."""

    method: Chooser
    keep: float
    is_visual: Tensor  # [B, L]
    mask: Tensor | None  # [B, L], of the prompt
    record: Compacted | None = None  # set once the tokens are chosen
    after: int = 0  # tokens behind the prompt, with those of this call; 0: this is the prompt


class Inside:
    """The layers of a language model, which go on with fewer tokens from one of them on."""

    def __init__(self, base: Any, method: Chooser) -> None:
        self.base, self.language = base, _language(base)
        layers, depth = list(self.language.layers), method.inside
        self.modules = [layers[depth - 1].self_attn, *layers[depth:]]
        self._local = threading.local()
        bind(Binding(self.modules[0], "forward", _Attention(self.modules[0], self)))
        for number, layer in enumerate(self.modules[1:]):
            bind(Binding(layer, "forward", _Layer(layer, self, is_first=number == 0)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _local=threading.local())

    @property
    def now(self) -> _Call | None:
        """The call of this thread in which tokens are left out."""
        call: _Call | None = getattr(self._local, "call", None)
        return call

    def run(self, original: Any, given: dict[str, Any], method: Chooser, keep: float, generates: bool) -> Any:
        """Call the model; return its output, and the record of the tokens that were left if it was a prompt."""
        call = self._call(given, method, keep, generates)
        if call is not None and not call.after:
            self._check_layers()
        self._local.call = call
        try:
            out = original(**given)
        finally:
            self._local.call = None
        if call is None or call.after:
            return out, None
        assert call.record is not None
        note(Noted(given["input_ids"], call.record, method.inside), given, out)
        return out, call.record

    def _check_layers(self) -> None:
        found = set(self.language.layers.modules())
        if not found.issuperset(self.modules):
            raise UnsupportedError(
                f"since the model was patched, layers of the {type(self.language).__name__} were replaced. Call "
                "handle.remove() and patch the model as it is now."
            )

    def _call(self, given: dict[str, Any], method: Chooser, keep: float, generates: bool) -> _Call | None:
        cache = cache_of(given)
        pixels = _has_images(given)
        held = cached_length(given)
        if held:
            prompt = noted(given, method.inside)
            if pixels and (prompt is not None or keep != 1.0):
                raise UnsupportedError(
                    "images are given with a cache that holds a prompt: they would not be shortened. Call generate "
                    "with the whole prompt and all of its images"
                    + ("." if prompt is not None else ", or set handle.keep = 1.0 for this call.")
                )
            tokens = tokens_of(given)
            if prompt is None or tokens is None:
                return None
            record = prompt.record
            after = held - record.prompt.length + tokens.shape[1]
            if after < tokens.shape[1]:
                raise UnsupportedError(
                    f"the cache was cut inside the prompt: it holds {held} tokens of {record.prompt.length}, and later "
                    "layers have fewer, of which is not known. Start again with the prompt."
                )
            return _Call(method, keep, torch.zeros(0), None, record, after)
        if not pixels or keep == 1.0:
            return None
        _check_cache(cache, method)
        ids, mask = checked(given)
        if given.get("labels") is not None:
            raise UnsupportedError(f"labels are for all tokens of the prompt, and fewer come out. {_WAY_OUT}")
        if generates and cache is None:
            raise UnsupportedError(
                f"{method.name} chooses once, by the prompt, and goes on with the cache: give use_cache=True. "
                f"{_WAY_OUT}"
            )
        special = [getattr(self.base.config, f"{kind}_token_id", None) for kind in PIXELS]
        is_visual = torch.isin(ids, torch.tensor([x for x in special if x is not None], device=ids.device))
        return _Call(method, keep, is_visual, mask)


class _Attention(Override):
    """The attention by which is chosen: that of the last token to all others."""

    def __init__(self, owner: nn.Module, inside: Inside) -> None:
        super().__init__(owner)
        self.inside = inside
        self.names = list(inspect.signature(owner.forward).parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.inside.now
        if call is not None and not call.after:
            given = self.by_name(args, kwargs)
            with torch.no_grad():
                call.record = _choose(call, given["hidden_states"], self._row(call, given))
        return self.original(*args, **kwargs)

    def _row(self, call: _Call, given: dict[str, Any]) -> Tensor:
        """Return the attention of the last token of each prompt, `[B, L]`, heads averaged."""
        module: Any = self.owner
        hidden, (cos, sin) = given["hidden_states"], given["position_embeddings"]
        B, L, _ = hidden.shape
        last = torch.full((B,), L - 1, device=hidden.device)
        bias = None
        if call.mask is not None:
            mask = call.mask.to(hidden.device)
            bias = torch.zeros(B, L, device=hidden.device).masked_fill(mask == 0, -torch.inf)
            last = (mask * torch.arange(1, L + 1, device=hidden.device)).argmax(dim=1)
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
        heads = (-1, module.head_dim)
        k = module.k_proj(hidden).unflatten(-1, heads).transpose(1, 2)
        q = module.q_proj(_rows(hidden, last[:, None])).unflatten(-1, heads).transpose(1, 2)
        k = rotate(k, k, cos, sin)[1]
        q = rotate(q, q, *(_rows(x.expand(B, -1, -1), last[:, None]) for x in (cos, sin)))[0]
        return next(importance.attention_rows(q, k, module.scaling, bias))[:, :, 0].mean(dim=1)


class _Layer(Override):
    """A layer that goes on with the tokens that are left."""

    def __init__(self, owner: nn.Module, inside: Inside, is_first: bool) -> None:
        super().__init__(owner)
        self.inside, self.is_first = inside, is_first
        self.names = list(inspect.signature(owner.forward).parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.inside.now
        if call is None or call.record is None:
            return self.original(*args, **kwargs)
        given = self.by_name(args, kwargs)
        places = call.record.prompt.places.to(given["hidden_states"].device)
        kind = str(self.inside.language.config._attn_implementation)
        given["attention_mask"] = _mask(given.get("attention_mask"), places, call, given["hidden_states"], kind)
        if not call.after:
            rows = places.clamp_min(0)
            B = rows.shape[0]
            if self.is_first:
                given["hidden_states"] = _rows(given["hidden_states"], rows)
            given["position_embeddings"] = tuple(_rows(x.expand(B, -1, -1), rows) for x in given["position_embeddings"])
            if given.get("position_ids") is not None:
                own = given["position_ids"]
                given["position_ids"] = own.expand(*own.shape[:-2], B, -1).gather(
                    -1, rows.expand(*own.shape[:-2], B, -1)
                )
        # by place: gradient checkpointing keeps gradients of no other arguments
        return self.original(given.pop("hidden_states"), **given)


def _has_images(given: Mapping[str, Any]) -> bool:
    return bool(given.get("mm_encoder_outputs")) or has_pixels(given)


def _language(base: Any) -> Any:
    return getattr(base, "language_model", None) or base.text_model


def check_inside(base: Any, method: Chooser, keep: float | int, positions: str | None = None) -> None:
    """Raise an error for a language model in which tokens cannot be left out, or for options that are for others."""
    check_newer(base, f"{method.name}, which works inside the language model,", _WAY_OUT)
    language = _language(base)
    layers, depth = list(language.layers), method.inside
    if isinstance(keep, Integral):
        raise ConfigError(f"keep is {keep}, and {method.name} ranks all visual tokens of a prompt. Give a share.")
    if positions == "compact":
        raise ConfigError(
            f"positions is 'compact', and the first layers have all tokens in {method.name}: each keeps its position. "
            "Leave it out."
        )
    if depth >= len(layers):
        raise ConfigError(
            f"{method.name} leaves tokens out after {depth} layers, and the language model has {len(layers)}. Give a "
            f"layer from 1 to {len(layers) - 1}."
        )
    kinds = set(getattr(language.config, "layer_types", None) or ["full_attention"])
    attention = layers[depth - 1].self_attn
    reason = None
    if kinds != {"full_attention"} or getattr(language.config, "sliding_window", None):
        reason = "has layers with a window, which counts tokens that are left out"
    elif "deepstack_visual_embeds" in inspect.signature(language.forward).parameters:
        reason = "is given visual features in several layers (DeepStack), for all tokens"
    elif type(attention).__name__ not in _KNOWN:
        reason = f"has a {type(attention).__name__}, whose queries and keys it does not know how to compute"
    if reason is not None:
        raise UnsupportedError(f"{method.name} cannot work in a {type(language).__name__}: it {reason}. {_WAY_OUT}")


def check_free(base: Any) -> None:
    """Raise `AlreadyPatchedError` if the layers of the language model are those of another model, which is patched."""
    if any(map(is_bound, _language(base).modules())):
        raise AlreadyPatchedError(
            "the language model is patched already, in another model that has the same. Call remove() of its handle "
            "first."
        )


def check_generate(model: Any, given: Mapping[str, Any], method: Chooser) -> None:
    """Raise `UnsupportedError` if `generate` would give the model a prompt in pieces, or with guesses behind it."""
    if not _has_images(given):
        return
    config = given.get("generation_config") or model.generation_config
    for name in _PIECES:
        if given.get(name) or getattr(config, name, None):
            raise UnsupportedError(
                f"{name} gives the model the prompt in pieces, or with guesses behind it, and {method.name} chooses by "
                f"the prompt's last token. Leave it out. {_WAY_OUT}"
            )


def _check_cache(cache: Any, method: Chooser) -> None:
    """Raise `UnsupportedError` for a cache whose layers cannot have different lengths."""
    from transformers.cache_utils import DynamicLayer

    others = [type(layer).__name__ for layer in getattr(cache, "layers", ()) if type(layer) is not DynamicLayer]
    if others:
        raise UnsupportedError(
            f"{method.name} needs a cache whose layers may have different lengths, and this one has a {others[0]}. Use "
            f"the default DynamicCache. {_WAY_OUT}"
        )


def _choose(call: _Call, hidden: Tensor, row: Tensor) -> Compacted:
    """Return the record of the tokens that are left: in each row so many of all of its visual ones."""
    is_visual = call.is_visual.to(row.device)
    is_kept = torch.ones_like(is_visual) if call.mask is None else call.mask.to(row.device).bool()
    tokens, kept = [], []
    for number, own in enumerate(is_visual):
        columns = own.nonzero().squeeze(1)
        total = columns.shape[0]
        if not total:
            continue
        k = max(1, round(call.keep * total))
        visual = Visual(hidden[number, columns], attention=row[number, columns])
        index, weights = chosen_by(call.method, visual, k)
        if weights is not None:
            raise UnsupportedError(
                f"{call.method.name} merges tokens inside the language model, where they can only be left out. Return "
                "indices alone."
            )
        is_kept[number, columns] = False
        is_kept[number, columns[index]] = True
        tokens.append((total, index.shape[0]))
        kept.append(index)
    return Compacted({}, shorten(is_kept, pads_on_the_right(call.mask)), tokens, kept)


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """Return `[B, M, C]` of `[B, L, C]`, the rows `[B, M]`."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


def _mask(mask: Any, places: Tensor, call: _Call, hidden: Tensor, kind: str) -> Any:
    """Return the mask of a layer for the tokens that are left and those behind the prompt; `kind` of attention."""
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() not in (2, 4)):
        raise UnsupportedError(f"a mask that is a {type(mask).__name__} cannot be shortened. {_WAY_OUT}")
    assert call.record is not None
    B = places.shape[0]
    behind = call.record.prompt.length + torch.arange(call.after, device=places.device)
    columns = torch.cat((places, behind.expand(B, -1)), dim=1)  # [B, M + after]
    is_padding = columns < 0
    if mask is None and not bool(is_padding.any()):
        return None
    if mask is None and "flash" in kind:
        return (~is_padding).long()
    if mask is None:  # every token saw all tokens before it
        queries = columns if not call.after else columns[:, -hidden.shape[1] :]
        seen = (columns[:, None, None, :] <= queries[:, None, :, None]) & ~is_padding[:, None, None, :]
        return (
            seen if kind == "sdpa" else hidden.new_zeros(seen.shape).masked_fill(~seen, torch.finfo(hidden.dtype).min)
        )
    columns = columns.clamp_min(0)
    if mask.dim() == 2:
        return mask.expand(B, -1).gather(1, columns).masked_fill(is_padding, 0)
    mask = mask.expand(B, -1, -1, -1)
    if not call.after:
        mask = mask.gather(2, columns[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    mask = mask.gather(3, columns[:, None, None, :].expand(-1, *mask.shape[1:3], -1))
    nothing = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(is_padding[:, None, None, :], nothing)
