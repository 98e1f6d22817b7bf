"""What is read from a model: its embedding, its logits, or the features of every place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from tokenmerge import adapters
from tokenmerge.adapters.base import TokenLayout
from tokenmerge.data.answers import answer, declared_classes
from tokenmerge.errors import TokenMergeError, UnsupportedError, unknown_name

__all__ = ["OUTPUTS", "head_of"]

# how many axes each has, with the batch
OUTPUTS = {"embedding": 2, "logits": 2, "dense": 3}
_POOLED = ("image_embeds", "pooler_output")
_CLASSIFIERS = ("classifier", "cls_classifier", "distillation_classifier", "heads", "fc")
_CROPPED = 200  # characters of a description in an error


def head_of(model: nn.Module, output: str) -> Callable[[Tensor], Tensor]:
    """Return the function from images `[B, C, H, W]` to an output of a model, which may be patched.

    "embedding" `[B, D]` is what enters the classifier; of a model without one its projected or pooled output, else its
    class token, else the mean of its tokens. The classifier is taken out of the model. "logits" `[B, classes]` is the
    answer of a classifier. "dense" `[B, N, D]` is one feature for every place, without class token and registers; the
    model must be patched with `restore="dense"`, if at all. The function raises `UnsupportedError`, which says what the
    model has, where it has no such output; for another name `head_of` raises `UnknownNameError`.
    """
    if output not in OUTPUTS:
        raise unknown_name("output", output, OUTPUTS)
    find = {"embedding": _embedding, "logits": _logits, "dense": _dense}[output](model)

    def read(x: Tensor) -> Tensor:
        found = find(x)
        if not isinstance(found, Tensor) or found.dim() != OUTPUTS[output]:
            raise _without(model, output, found)
        return found

    return read


def _embedding(model: Any) -> Callable[[Tensor], Any]:
    if hasattr(model, "encode_image"):  # two towers
        encode: Callable[[Tensor], Any] = model.encode_image
        return encode
    if hasattr(model, "reset_classifier"):  # timm
        model.reset_classifier(0)
    elif declared_classes(model) is not None or getattr(model, "torchvision_weights", None) is not None:
        for name in _CLASSIFIERS:
            if isinstance(getattr(model, name, None), nn.Module):
                setattr(model, name, nn.Identity())
    return lambda x: _pooled(model, model(x))


def _pooled(model: nn.Module, out: Any) -> Any:
    """Return the embedding in an output: a tensor `[B, D]` of its own, else the class token, else the mean."""
    if isinstance(out, Mapping):
        found = next((out[name] for name in (*_POOLED, "logits") if isinstance(out.get(name), Tensor)), None)
        if found is not None:
            return found.flatten(1) if set(found.shape[2:]) == {1} else found
        out = out.get("last_hidden_state", out)
    if not isinstance(out, Tensor) or out.dim() != 3:
        return out
    layout = _layout(model)
    return out[:, 0] if layout.leads_with_class else out[:, _places(layout)].mean(dim=1)


def _logits(model: Any) -> Callable[[Tensor], Any]:
    has_classes = declared_classes(model) is not None or getattr(model, "torchvision_weights", None) is not None

    def read(x: Tensor) -> Any:
        out = model(x)
        if isinstance(out, Mapping) and "logits" in out:
            return out["logits"]
        return answer(out) if has_classes else out

    if has_classes or not hasattr(model, "reset_classifier"):
        return read
    raise UnsupportedError(
        f"{type(model).__qualname__} has no logits: it was built without a classifier. It has: embedding, dense."
    )


def _dense(model: Any) -> Callable[[Tensor], Any]:
    places = _places(_layout(model))
    if hasattr(model, "forward_features") and hasattr(model, "forward_head"):  # timm
        return lambda x: model.forward_features(x)[:, places]

    def read(x: Tensor) -> Any:
        out = model(x)
        tokens = out.get("last_hidden_state") if isinstance(out, Mapping) else out
        return tokens[:, places] if isinstance(tokens, Tensor) and tokens.dim() == 3 else out

    return read


def _layout(model: nn.Module) -> TokenLayout:
    try:
        return adapters.find(model).layout(model)
    except TokenMergeError as error:
        raise UnsupportedError(
            f"{type(model).__qualname__} returns tokens, and no adapter says which of them stand for places: {error}"
        ) from error


def _places(layout: TokenLayout) -> slice:
    return slice(layout.prefix, -layout.suffix or None)


def _without(model: nn.Module, output: str, found: Any) -> UnsupportedError:
    where = "dense features" if output == "dense" else f"{output}"
    return UnsupportedError(
        f"{type(model).__qualname__} has no {where}. It has: {_described(found)[:_CROPPED]}. Ask for another output "
        f"({', '.join(OUTPUTS)}), or give a model that returns it, as FILE.py:FUNCTION."
    )


def _described(found: Any) -> str:
    if isinstance(found, Tensor):
        return f"an answer of {' x '.join(map(str, found.shape[1:])) or 'one number'} for an image"
    if isinstance(found, Mapping):
        return ", ".join(f"{name} ({_described(part)})" for name, part in found.items() if part is not None)
    if isinstance(found, (list, tuple)):
        return ", ".join(map(_described, found))
    return f"a {type(found).__name__}"
