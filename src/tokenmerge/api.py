"""What a user calls: put a reduction into a model, ask what it did, take it out again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge import adapters, kernels
from tokenmerge.adapters.base import Adapter
from tokenmerge.adapters.generic import Generic
from tokenmerge.attach import MODULES, attach, is_copied_part
from tokenmerge.bindings import is_bound, undo
from tokenmerge.calibrate import Calibration
from tokenmerge.calibrate import calibrate as run_trials
from tokenmerge.config import MergeConfig
from tokenmerge.errors import (
    AlreadyPatchedError,
    ConfigError,
    InvalidScheduleError,
    NotPatchedError,
    NotTrackedError,
    TokenMergeError,
    UnsupportedError,
    UnsupportedModelError,
    unknown_name,
)
from tokenmerge.methods import Learned, Reduction
from tokenmerge.report import Report
from tokenmerge.runner import BlockRunner
from tokenmerge.schedule import R, Schedule
from tokenmerge.state import ForwardState, Frame

__all__ = ["Handle", "Report", "handle_of", "patch", "patched", "supports", "unpatch"]

AUTO = "auto"
_LOOSE = (
    "blocks were called by code that is not the model's own: after each of those, tokens are put back in their places"
)
_ATTRIBUTE = "_tokenmerge_handle"
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


class Handle:
    """A reduction inside a model: change it, ask it, remove it. `patch` returns it."""

    def __init__(self, model: nn.Module, adapter: Adapter, config: MergeConfig) -> None:
        self.model = model
        self._adapter = adapter
        self._config = config
        self._layout = adapter.layout(model)
        self.calibration: Calibration | None = None  # what "auto" tried
        self._choice = ""
        self._actions: list[Callable[[], None]] = []
        self.followers: list[Callable[[], None]] = []  # called when `r` or `track` was set
        depth = len(adapter.blocks(model))
        self._state = ForwardState(depth, Schedule.of(config.r, depth, config.multiple_of, config.method.largest_r))
        self._state.track, self._state.tokens, self._state.model = config.track, self._layout.tokens, model
        self._attachment = attach(
            model, adapter, config.method, self._state, self._layout, config.prop_attn, config.restore
        )

    @property
    def r(self) -> R:
        """What is removed per block, in any form that `patch` takes; set it at any time, 0 switches merging off."""
        return list(self._config.r) if isinstance(self._config.r, list) else self._config.r

    @r.setter
    def r(self, value: R) -> None:
        schedule = Schedule.of(value, self._state.depth, self._config.multiple_of, self._config.method.largest_r)
        self._config = dataclasses.replace(self._config, r=value)
        self._state.schedule = schedule
        for follow in self.followers:
            follow()

    @property
    def track(self) -> bool:
        """Whether forwards record their groups; set it at any time."""
        return self._state.track

    @track.setter
    def track(self, value: bool) -> None:
        self._config = dataclasses.replace(self._config, track=value)
        self._state.track = value
        for follow in self.followers:
            follow()

    @property
    def runners(self) -> list[BlockRunner]:
        """The callables bound to the blocks, in order; for tools that measure inside them."""
        return self._attachment.runners

    @property
    def config(self) -> MergeConfig:
        """The present settings, to be saved or to patch another model with."""
        return self._config

    @property
    def tokens(self) -> list[int]:
        """Tokens after each block: those of the last forward, or those planned before any.

        Where tokens are merged inside windows, for the attention only: those of a window that each attention saw.
        """
        frame = self._state.last()
        if frame is None or not frame.last:
            if self._layout.tokens is None:
                raise NotTrackedError("how many tokens this model has is known after a forward; run the model first.")
            return self._state.schedule.tokens(self._layout.tokens, self._layout.prefix)
        shapes = [inside or shape for inside, shape in zip(frame.inside, frame.shape, strict=True)]
        return [shape[1] for shape in shapes[1:] if shape is not None]

    @property
    def sizes(self) -> Tensor:
        """How many input tokens each output token of the last forward stands for, `[B, M]` float."""
        frame = self._last()
        size = frame.size[frame.last]
        if size is not None:
            return size
        device = next((parameter.device for parameter in self.model.parameters()), None)
        return torch.ones(frame.shape[frame.last], device=device)  # type: ignore[arg-type]

    @property
    def has_merged(self) -> bool:
        """Whether the last forward merged anything."""
        frame = self._last()
        return frame.size[frame.last] is not None or any(inside and inside[1] < inside[0] for inside in frame.inside)

    @property
    def prefix(self) -> int:
        """How many tokens at the front (class, distillation, registers) are protected."""
        return self._layout.prefix

    @property
    def has_class(self) -> bool:
        """Whether the first token is a class token."""
        return self._layout.leads_with_class

    @property
    def input_size(self) -> tuple[int, ...] | None:
        """Channels, height and width of the input the model was built for, where it says so."""
        return self._layout.input_size

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the input's patches, for the model's own input size."""
        return self._layout.grid

    @property
    def groups(self) -> list[Tensor]:
        """After each block, the output token of each input token, `[B, N]`, -1 for dropped; needs `track=True`."""
        if not self._state.track:
            raise NotTrackedError(
                "groups are recorded only while tracking; patch(..., track=True) or handle.track = True."
            )
        frame = self._last()
        if not frame.is_tracked:
            raise NotTrackedError("the last forward ran before tracking was switched on; run the model again.")
        return [assign for assign in frame.assign[1:] if assign is not None]

    @property
    def positions(self) -> list[Tensor]:
        """After each block, the input token whose place each token keeps, `[B, M]`; needs `track=True`."""
        B, n = self.groups[-1].shape
        everyone = torch.arange(n, device=self.groups[-1].device).expand(B, -1)
        frame = self._last()
        ran = [layer for layer, shape in enumerate(frame.shape) if shape is not None]
        return [everyone if frame.kept[layer] is None else frame.kept[layer] for layer in ran]  # type: ignore[misc]

    def dense(self, y: Tensor) -> Tensor:  # [B, M, C]
        """Give every input token its group's features, `[B, N, C]`; dropped tokens get zeros. Needs `track=True`.

        Raises `ValueError` where `y` is not what the last forward put out.
        """
        groups = self.groups[-1]
        frame = self._last()
        expected = (groups.shape[0], frame.shape[frame.last][1])  # type: ignore[index]
        if y.dim() != 3 or y.shape[:2] != expected:
            raise ValueError(
                f"dense() takes the last forward's tokens, [{expected[0]}, {expected[1]}, C]; got {tuple(y.shape)}."
            )
        return kernels.unmerge(y, groups)

    def report(self) -> Report:
        """Return what was found, what runs, the tokens per block, and what could not be done."""
        runner = self._attachment.runners[0]
        frame = self._state.last()
        planned = frame is None or not frame.last
        # stand for the keys [B, H, N, D] and the tokens [B, N, C] of a forward without gradients
        parameter = next(self.model.parameters(), torch.empty(0))
        keys = torch.empty(1, 2, 2, 64, device=parameter.device, dtype=parameter.dtype)
        seen = {"bipartite": keys, "merge": keys[0], "attend": keys}
        return Report(
            model=f"{type(self.model).__module__}.{type(self.model).__qualname__}",
            adapter=self._adapter.name,
            method=repr(self._config.method),
            r=repr(self._config.r),
            blocks=self._state.depth,
            tokens=[] if planned and self._layout.tokens is None else self.tokens,
            planned=planned,
            prop_attn=runner.is_proportional,
            attention=runner.tap.kind,
            kernels={op: kernels.select(op, x).name for op, x in seen.items()},
            fallbacks=[line for op, x in seen.items() for line in kernels.fallbacks(op, x)],
            parity=self._attachment.parity,
            limits=[*self._attachment.limits, *([_LOOSE] if self._state.ran_loose else [])],
            choice=self._choice,
        )

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the original model inside the `with`."""
        before, self._state.enabled = self._state.enabled, False
        try:
            yield
        finally:
            self._state.enabled = before

    def loss(self) -> Tensor:
        """Return what a learned method adds to the training loss after a forward; raises for methods that do not.

        Nothing where the present `r` takes no token, as at the start of a training in which it grows from 0.
        """
        method, frame = self._config.method, self._last()
        if not isinstance(method, Learned) or not method.adds_loss:
            raise UnsupportedError(f"{method.name} adds nothing to the loss.")
        tokens = next(shape[1] for shape in frame.shape if shape is not None)
        is_off = self._state.schedule.tokens(tokens, self._layout.prefix)[-1] == tokens
        return torch.zeros(()) if is_off else method.loss(frame.memory)

    def save(self, path: str | Path) -> None:
        """Write the configuration, and what is learned as .safetensors beside it; `MergeConfig.load` reads both."""
        modules = self.model._modules.get(MODULES)
        self._config.save(path, None if modules is None else modules.state_dict())

    def remove(self) -> None:
        """Take the reduction out: the model is what it was, bit for bit. A second call raises `NotPatchedError`."""
        if self.model.__dict__.get(_ATTRIBUTE) is not self:
            raise NotPatchedError(
                f"this handle's reduction was taken out of the {type(self.model).__qualname__} already"
                + (", which was patched again since" if _ATTRIBUTE in self.model.__dict__ else "")
                + "."
            )
        unpatch(self.model)

    def on_remove(self, action: Callable[[], None]) -> None:
        """Call `action` when the reduction is taken out: for surfaces that add something of their own."""
        self._actions.append(action)

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)
        self._state.model = self.model  # copied or loaded together

    def __repr__(self) -> str:
        return f"<tokenmerge {self._config.method!r}, r={self._config.r!r}, in {type(self.model).__qualname__}>"

    def _last(self) -> Frame:
        frame = self._state.last()
        if frame is None or not frame.last:
            raise NotTrackedError("no forward has run since the model was patched; run the model first.")
        return frame


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
    if _ATTRIBUTE in model.__dict__:
        raise AlreadyPatchedError(
            f"this model is reduced already: {model.__dict__[_ATTRIBUTE]!r}; call unpatch(model) first."
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
    model.__dict__[_ATTRIBUTE] = handle
    return handle


def _choose(model: nn.Module, r: R, images: Tensor | None, options: dict[str, Any]) -> tuple[Calibration | None, str]:
    """Return what "auto" found on the images, and what the report shall say of it."""
    if images is None:
        return None, 'tome: "auto" chooses by images, and none were given (calibrate=images)'
    found = run_trials(model, r, images, partial(patched, **options))
    return found, str(found)


def unpatch(model: nn.Module) -> None:
    """Give the original model back, bit for bit, with no attribute left; raises `NotPatchedError`.

    Takes a patched model, a copy of one, or a copy of a part of one.
    """
    if _ATTRIBUTE not in model.__dict__ and is_copied_part(model):
        undo(model.modules())
        return
    handle = handle_of(model)
    del model.__dict__[_ATTRIBUTE]
    handle._attachment.undo()
    with ExitStack() as actions:  # all of them, in order, though one may raise
        for action in reversed(handle._actions):
            actions.callback(action)


def handle_of(model: nn.Module) -> Handle:
    """Return the handle of a patched model, e.g. of a copy or a loaded one; raises `NotPatchedError`."""
    handle = model.__dict__.get(_ATTRIBUTE)
    if handle is None:
        part = any(is_bound(module) for module in model.modules())
        raise NotPatchedError(
            f"this {type(model).__qualname__} is a part of a patched model, or of a copy of one, and has no handle "
            "of its own: ask that of the whole model. unpatch() takes the reduction out of a copied part."
            if part
            else f"this {type(model).__qualname__} is not patched by tokenmerge: nothing to take back."
        )
    assert isinstance(handle, Handle)
    return handle


@contextmanager
def patched(model: nn.Module, method: str | Reduction | MergeConfig = "tome", **options: Any) -> Iterator[Handle]:
    """Patch the model for the length of a `with`; takes what `patch` takes."""
    handle = patch(model, method, **options)
    try:
        yield handle
    finally:
        if _ATTRIBUTE in model.__dict__:
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
