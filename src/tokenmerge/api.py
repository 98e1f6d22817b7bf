"""The public entry points: patch a model, and check whether a model is supported."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from tokenmerge.config import MergeConfig, read_method
from tokenmerge.errors import (
    AlreadyPatchedError,
    ConfigError,
    InvalidScheduleError,
    TokenMergeError,
    unknown_name,
)
from tokenmerge.handle import Handle, attached, handle_of, require_free, unpatch
from tokenmerge.methods import Reduction
from tokenmerge.report import Calibration, Report
from tokenmerge.schedule import R, Schedule

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tokenmerge.config import Options

__all__ = ["Handle", "Report", "Support", "handle_of", "patch", "patched", "supports", "unpatch"]

AUTO = "auto"
_Function = TypeVar("_Function", bound=Callable[..., Any])

_OPTIONS = {
    field.name: field.default for field in dataclasses.fields(MergeConfig) if field.compare and field.name != "method"
}


def _with_options(function: _Function) -> _Function:
    """Let `help` and notebooks list the options one by one, as type checkers do."""
    signature = inspect.signature(function)
    own = [parameter for name, parameter in signature.parameters.items() if name != "options"]
    kind = inspect.Parameter.KEYWORD_ONLY
    options = [inspect.Parameter(name, kind, default=default) for name, default in (_OPTIONS | {"r": None}).items()]
    function.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return function


@_with_options
def patch(
    model: nn.Module,
    method: str | Path | Reduction | MergeConfig = "tome",
    *,
    calibrate: Tensor | None = None,
    **options: Unpack[Options],
) -> Handle:
    """Make a vision transformer merge tokens, in place; on any error the model stays as it was.

    Args:
        model: any model that `supports` takes; a model that no adapter describes is patched by names, see `blocks`.
        method: a name (`list_methods()`), a name with options as `"tome(metric='x')"`, an object, a `MergeConfig` or
            the path of a saved one, which is checked to be for such a model. `"auto"` is chosen on `calibrate`;
            without images it is ToMe.
        r: what each block removes, see `Schedule.of`: 8 tokens, a share 0.1, a list, a pair, a callable, a `Schedule`.
        prop_attn: add log(size) to the attention scores; `"auto"` (default) follows the method's paper.
        track: record `handle.groups`; `"pairs"` records also what `handle.trace` returns.
        restore: `"dense"`: every output that exposes tokens has the unmerged length and order; `"merged"`: these
            outputs have the merged tokens. Without either, calls that return tokens raise.
        multiple_of: round what each block removes so that the tokens left are a multiple of this; some kernels are
            faster on multiples of 8.
        calibrate: a batch of unlabelled inputs for `"auto"` (64 are enough); it spends the MACs of ToMe at `r`.
        blocks: the path to the blocks of a model that no adapter describes, as `"encoder.layers"`.
        attn: the attention of such a block, a child's name.
        norm: the norm before the MLP of such a block, a child's name.
        mlp: the MLP of such a block, a child's name.
        prefix: how many tokens in front of such a model are protected.

    Returns the handle, which is a context manager: `with tokenmerge.patch(model, r=8):` takes the reduction out again.
    Raises `TokenMergeError`: an unsupported model, an unknown name or keyword, a model patched already, a wrong `r`
    (also a ValueError).

    >>> import timm, tokenmerge
    >>> model = timm.create_model("vit_tiny_patch16_224").eval()
    >>> handle = tokenmerge.patch(model, r=16)
    >>> handle.tokens
    [181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11]
    """
    for name in options.keys() - _OPTIONS.keys():
        raise _unknown_keyword(name, method)
    require_free(model)
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    found, choice = None, ""
    if method == AUTO and "r" in given:
        # what is handed out or recorded is not tried: the answers are compared with the unmerged ones
        if isinstance(given["r"], Schedule):
            given.setdefault("multiple_of", given["r"].multiple_of)
        tried = {name: value for name, value in given.items() if name not in ("r", "track", "restore")}
        found, choice = _choose(model, given["r"], calibrate, tried)
        method = found.best.method if found else "tome"
        given["r"] = found.best.r if found else given["r"]
    elif calibrate is not None and method != AUTO:
        raise ConfigError(f'calibrate=... goes with the method "auto", not with {method!r}.')
    method = method if method == AUTO else read_method(method)
    if isinstance(method, MergeConfig):
        config = method.changed(**given)
    elif "r" not in given:
        raise InvalidScheduleError("r is missing: say how many tokens each block removes, e.g. patch(model, r=8).")
    else:
        config = MergeConfig(method, **given)
    handle = attached(model, config)
    handle.calibration, handle._choice = found, choice
    return handle


def _choose(model: nn.Module, r: R, images: Tensor | None, options: dict[str, Any]) -> tuple[Calibration | None, str]:
    """Return the configuration that "auto" chose on the images, and a remark for the report."""
    if images is None:
        return None, 'tome: "auto" chooses by images, and none were given (calibrate=images)'
    from tokenmerge.tuning.auto import calibrate

    found = calibrate(model, r, images, options)
    return found, str(found)


@_with_options
@contextmanager
def patched(
    model: nn.Module,
    method: str | Path | Reduction | MergeConfig = "tome",
    *,
    calibrate: Tensor | None = None,
    **options: Unpack[Options],
) -> Iterator[Handle]:
    """Patch the model inside a `with` block; takes the arguments of `patch`."""
    with patch(model, method, calibrate=calibrate, **options) as handle:
        yield handle


@dataclass(frozen=True)
class Support:
    """Whether `patch` would take a model: true or false, with the adapter that describes it, or why there is none."""

    adapter: str
    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        return self.reason or f"supported by {self.adapter}"


def supports(model: nn.Module) -> Support:
    """Say whether `patch` would take the model, and if not, why; nothing is changed.

    >>> import timm
    >>> print(supports(timm.create_model("vit_tiny_patch16_224")), bool(supports(torch.nn.Linear(2, 2))))
    supported by timm_vit False
    """
    try:
        with patched(model, r=0) as handle:
            return Support(handle.report().adapter)
    except AlreadyPatchedError:
        found = handle_of(model, None)
        return Support("" if found is None else found.report().adapter)
    except TokenMergeError as error:
        return Support("", str(error))


def _unknown_keyword(name: str, method: object) -> TokenMergeError:
    known = [*_OPTIONS, "calibrate"]
    kind = type(read_method(method)) if isinstance(method, str) and method != AUTO else type(method)
    if issubclass(kind, Reduction) and name in getattr(kind, "__dataclass_fields__", {}):
        option = f"it is an option of the method: patch(model, {kind.__qualname__}({name}=...))"
        return unknown_name(f"keyword of patch ({option})", name, known)
    return unknown_name("keyword of patch", name, known)
