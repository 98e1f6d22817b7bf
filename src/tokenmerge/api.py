"""What a user calls: put a reduction into a model, ask what it did, take it out again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from tokenmerge import adapters
from tokenmerge.adapters.base import Adapter
from tokenmerge.adapters.generic import Generic
from tokenmerge.calibrate import Calibration
from tokenmerge.calibrate import calibrate as run_trials
from tokenmerge.config import MergeConfig
from tokenmerge.errors import (
    AlreadyPatchedError,
    ConfigError,
    InvalidScheduleError,
    TokenMergeError,
    UnsupportedModelError,
    unknown_name,
)
from tokenmerge.handle import ATTRIBUTE, Handle, handle_of, unpatch
from tokenmerge.methods import Reduction
from tokenmerge.report import Report
from tokenmerge.schedule import R

__all__ = ["Handle", "Report", "handle_of", "patch", "patched", "supports", "unpatch"]

AUTO = "auto"
_KEYWORDS = (
    "r",
    "prop_attn",
    "track",
    "restore",
    "multiple_of",
    "calibrate",
    "blocks",
    "attn",
    "norm",
    "mlp",
    "prefix",
)


def patch(
    model: nn.Module,
    method: str | Reduction | MergeConfig = "tome",
    *,
    r: R | None = None,
    prop_attn: bool | str | None = None,
    track: bool | None = None,
    restore: str | None = None,
    multiple_of: int | None = None,
    calibrate: Tensor | None = None,
    blocks: str | None = None,
    attn: str | None = None,
    norm: str | None = None,
    mlp: str | None = None,
    prefix: int | None = None,
    **unknown: Any,
) -> Handle:
    """Make a vision transformer merge tokens, in place; on any error the model stays as it was.

    `method` is a name, an object or a saved configuration; `r` what is removed per block (see `Schedule.of`);
    `prop_attn` adds log(size) to attention scores (`"auto"` follows the paper); `track` records `handle.groups`;
    `restore="dense"` hands out every token in its place, wherever the model hands tokens out, `restore="merged"` the
    merged ones (without either, calls that need them all are refused); `multiple_of=8` rounds what each block removes
    so that the tokens left are a multiple, on which some kernels are faster. A model that no adapter describes is
    patched by names: `blocks` is the path to its blocks, `attn`, `norm` (before the MLP) and `mlp` are children of a
    block, `prefix` how many tokens in front are protected. The method `"auto"` is chosen on `calibrate`, a batch of
    unlabelled inputs (64 are enough), with the MACs of ToMe at `r`; without them it is ToMe.
    Raises `TokenMergeError`: an unsupported model, an unknown name or keyword, a model patched already, a wrong `r`
    (also a ValueError).

    >>> import timm, tokenmerge
    >>> model = timm.create_model("vit_tiny_patch16_224").eval()
    >>> handle = tokenmerge.patch(model, r=16)
    >>> handle.tokens
    [181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11]
    """
    for name in unknown:
        raise _unknown_keyword(name, method)
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"patch takes a torch.nn.Module, got {type(model).__module__}.{type(model).__qualname__}."
        )
    if ATTRIBUTE in model.__dict__:
        raise AlreadyPatchedError(
            f"this model is reduced already: {model.__dict__[ATTRIBUTE]!r}; call unpatch(model) first."
        )
    given = {"r": r, "prop_attn": prop_attn, "track": track, "restore": restore, "multiple_of": multiple_of}
    values = {name: value for name, value in given.items() if value is not None}
    names = {"blocks": blocks, "attn": attn, "norm": norm, "mlp": mlp}
    found, choice = None, ""
    if isinstance(method, str) and method == AUTO and r is not None:
        found, choice = _choose(model, r, calibrate, {**names, "prefix": prefix, "prop_attn": prop_attn})
        method = found.best.method if found else "tome"
        values["r"] = found.best.r if found else r
    elif calibrate is not None and method != AUTO:
        raise ConfigError(f'calibrate=... goes with the method "auto", not with {method!r}.')
    if isinstance(method, MergeConfig):
        config = dataclasses.replace(method, **values)  # type: ignore[arg-type]
    elif r is None:
        raise InvalidScheduleError("r is missing: say how many tokens each block removes, e.g. patch(model, r=8).")
    else:
        config = MergeConfig(method, **values)  # type: ignore[arg-type]
    handle = Handle(model, _adapter(model, names, prefix), config)
    handle.calibration, handle._choice = found, choice
    model.__dict__[ATTRIBUTE] = handle
    return handle


def _choose(model: nn.Module, r: R, images: Tensor | None, options: dict[str, Any]) -> tuple[Calibration | None, str]:
    """Return what "auto" found on the images, and what the report shall say of it."""
    if images is None:
        return None, 'tome: "auto" chooses by images, and none were given (calibrate=images)'
    found = run_trials(model, r, images, partial(patched, **options))
    return found, str(found)


@contextmanager
def patched(model: nn.Module, method: str | Reduction | MergeConfig = "tome", **options: Any) -> Iterator[Handle]:
    """Patch the model for the length of a `with`; takes what `patch` takes."""
    handle = patch(model, method, **options)
    try:
        yield handle
    finally:
        if ATTRIBUTE in model.__dict__:
            handle.remove()


def supports(model: nn.Module) -> bool:
    """Say whether `patch` would take the model; nothing is changed. `patch` itself says why not."""
    try:
        with patched(model, r=0):
            return True
    except AlreadyPatchedError:
        return True
    except TokenMergeError:
        return False


def _adapter(model: nn.Module, names: dict[str, str | None], prefix: int | None) -> Adapter:
    given = {option: name for option, name in names.items() if name is not None}
    if not given and prefix is None:
        return adapters.find(model)
    missing = [option for option in names if option not in given]
    if missing:
        raise UnsupportedModelError(
            f"a model patched by names needs blocks, attn, norm and mlp; missing: {', '.join(missing)}."
        )
    return Generic(**given, prefix=prefix)


def _unknown_keyword(name: str, method: str | Reduction | MergeConfig) -> TokenMergeError:
    from tokenmerge import methods

    if isinstance(method, str) and name in getattr(methods.find(method), "__dataclass_fields__", {}):
        cls = methods.find(method).__qualname__
        return unknown_name(
            f"keyword of patch (it is an option of the method: patch(model, {cls}({name}=...)))", name, _KEYWORDS
        )
    return unknown_name("keyword of patch", name, _KEYWORDS)
