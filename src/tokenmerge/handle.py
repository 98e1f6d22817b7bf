"""The handle of a patched model: change the reduction, query it, remove it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from tokenmerge import adapters, kernels
from tokenmerge._intercept.bindings import is_bound, undo
from tokenmerge._runtime.attach import MODULES, attach, is_copied_part
from tokenmerge._runtime.frames import Frame
from tokenmerge._runtime.residual import ResidualRunner
from tokenmerge._runtime.state import ForwardState
from tokenmerge.adapters.base import Adapter
from tokenmerge.adapters.generic import Generic
from tokenmerge.config import Fingerprint, MergeConfig
from tokenmerge.errors import (
    AlreadyPatchedError,
    NotPatchedError,
    NotTrackedError,
    UnsupportedError,
    UnsupportedModelError,
)
from tokenmerge.methods import Learned
from tokenmerge.report import Calibration, Report
from tokenmerge.report.trace import Trace, trace_of
from tokenmerge.schedule import R, Schedule

__all__ = ["ATTRIBUTE", "Handle", "attached", "handle_of", "require_free", "unpatch"]

_RAISE = object()
ATTRIBUTE = "_tokenmerge_handle"  # the attribute of a patched model that holds its handle
_LOOSE = (
    "blocks were called by code that is not the model's own: after each of those, tokens are put back in their places"
)


class Handle:
    """The reduction in a patched model, returned by `patch`: change it, query it, remove it."""

    def __init__(self, model: nn.Module, adapter: Adapter, config: MergeConfig) -> None:
        self.model = model
        self._adapter = adapter
        self._config = config
        self._layout = adapter.layout(model)
        self.calibration: Calibration | None = None  # what "auto" tried
        self._choice = ""
        self._actions: list[Callable[[], None]] = []
        self.followers: list[Callable[[], None]] = []  # called when `r` or `track` was set
        self.remarks: list[str] = []  # what the configuration says of its model that is not so in this one
        if config.fingerprint is not None:
            own = Fingerprint.of(model, adapter, weights=config.fingerprint.weights is not None)
            self.remarks = config.fingerprint.check(own)
        depth = len(adapter.blocks(model))
        self._state = ForwardState(depth, Schedule.of(config.r, depth, config.multiple_of, config.method.largest_r))
        self._state.track, self._state.tokens, self._state.model = config.track, self._layout.tokens, model
        self._attachment = attach(
            model, adapter, config.method, self._state, self._layout, config.prop_attn, config.restore
        )

    @property
    def r(self) -> R:
        """The amount removed per block, in any form that `patch` takes. Set it at any time; 0 turns merging off."""
        return list(self._config.r) if isinstance(self._config.r, list) else self._config.r

    @r.setter
    def r(self, value: R) -> None:
        multiple_of = value.multiple_of if isinstance(value, Schedule) else self._config.multiple_of
        schedule = Schedule.of(value, self._state.depth, multiple_of, self._config.method.largest_r)
        self._config = self._config.changed(r=value, multiple_of=multiple_of)
        self._state.schedule = schedule
        for follow in self.followers:
            follow()

    @property
    def track(self) -> bool | str:
        """Whether forwards record their groups, with `"pairs"` their pairs too; set it at any time."""
        return self._state.track

    @track.setter
    def track(self, value: bool | Literal["pairs"]) -> None:
        self._config = dataclasses.replace(self._config, track=value)
        self._state.track = value
        for follow in self.followers:
            follow()

    @property
    def runners(self) -> list[ResidualRunner]:
        """The callables bound to the blocks, in order; for tools that measure inside them."""
        return self._attachment.runners

    @property
    def config(self) -> MergeConfig:
        """The current settings, to save or to patch another model with."""
        return self._config

    @property
    def tokens(self) -> list[int]:
        """Tokens after each block: of the last forward, or as planned if none has run.

        For models that merge inside windows, for the attention only: the tokens of a window that each attention got.
        """
        frame = self._state.last()
        if frame is None or not frame.last:
            if self._layout.tokens is None:
                raise NotTrackedError("how many tokens this model has is known after a forward; run the model first.")
            return self._state.schedule.tokens(self._layout.tokens, self.protected)
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
    def protected(self) -> int:
        """How many tokens are never merged: those in front and those behind (detection tokens)."""
        return self._layout.protected

    @property
    def has_class(self) -> bool:
        """Whether the first token is a class token."""
        return self._layout.leads_with_class

    @property
    def input_size(self) -> tuple[int, ...] | None:
        """Channels, height and width of the input that the model was built for; None if unknown."""
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
    def windows(self) -> list[Tensor | None]:
        """For each block, the groups of its attention where it merges inside windows, `[B, N]`; needs `track=True`.

        Such a block hands on all its tokens, so `groups` has nothing of it. Tokens with equal numbers were one token
        for the attention of that block, -1 was dropped; None: it merged nothing.
        """
        frame, _ = self._last(), self.groups  # which raises where nothing was tracked
        entries = zip(frame.windows, frame.assign, strict=True)
        return [inside for inside, groups in [*entries][1:] if groups is not None]

    @property
    def positions(self) -> list[Tensor]:
        """After each block, the input token whose place each token keeps, `[B, M]`; needs `track=True`."""
        B, n = self.groups[-1].shape
        everyone = torch.arange(n, device=self.groups[-1].device).expand(B, -1)
        frame = self._last()
        ran = [layer for layer, shape in enumerate(frame.shape) if shape is not None]
        return [everyone if frame.kept[layer] is None else frame.kept[layer] for layer in ran]  # type: ignore[misc]

    def trace(self) -> Trace:
        """Return the pairs, similarities and groups of every block of the last forward; needs `track="pairs"`.

        Methods that drop tokens or mix them have no pairs; blocks that merge inside windows keep all tokens and have
        none. Raises `NotTrackedError` without a forward whose pairs were recorded.
        """
        if self._state.track != "pairs":
            raise NotTrackedError('pairs are recorded only with patch(..., track="pairs") or handle.track = "pairs".')
        frame = self._last()
        if not frame.tracks_pairs:
            raise NotTrackedError("the last forward ran before pairs were tracked; run the model again.")
        return trace_of(frame, repr(self._config.method), self.prefix, self.grid)

    def dense(self, y: Tensor) -> Tensor:  # [B, M, C]
        """Copy to every input token its group's features, `[B, N, C]`; dropped tokens get zeros. Needs `track=True`.

        Raises `ValueError` if `y` does not have the batch and tokens of the last forward.
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
        """Return the report: the adapter, the method, what runs, the tokens per block, and the limitations."""
        runner = self._attachment.runners[0]
        frame = self._state.last()
        planned = frame is None or not frame.last
        ran = {} if frame is None else kernels.ran_in_trace(frame.trace) if frame.trace else frame.ran
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
            kernels={op: " and ".join(name for other, name in sorted(ran) if other == op) for op, _ in ran},
            fallbacks=kernels.fallbacks(ran),
            parity=self._attachment.parity,
            limits=[*self._attachment.limits, *([_LOOSE] if self._state.ran_loose else []), *self.remarks],
            choice=self._choice,
            untouched=adapters.untouched(self.model, [name for name, _ in self._adapter.blocks(self.model)]),
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
        """Return a learned method's part of the training loss, after a forward; raises for methods that have none.

        Zero if the current `r` removes no token, as at the start of a training in which it grows from 0.
        """
        method, frame = self._config.method, self._last()
        if not isinstance(method, Learned) or not method.adds_loss:
            raise UnsupportedError(f"{method.name} adds nothing to the loss.")
        tokens = next(shape[1] for shape in frame.shape if shape is not None)
        is_off = self._state.schedule.tokens(tokens, self.protected)[-1] == tokens
        return torch.zeros(()) if is_off else method.loss(frame.memory)

    def save(self, path: str | Path) -> None:
        """Write the configuration with the model's fingerprint, and what is learned as .safetensors beside it.

        `patch(model, path)` and `MergeConfig.load` read both.
        """
        modules = self.model._modules.get(MODULES)
        self.described().save(path, None if modules is None else modules.state_dict())

    def described(self) -> MergeConfig:
        """Return the present settings with the model's fingerprint; figures that another model gave are left out."""
        old, own = self._config.fingerprint, Fingerprint.of(self.model, self._adapter)
        if old is None or old.check(own):
            return dataclasses.replace(self._config, fingerprint=own, measured=None)
        return dataclasses.replace(self._config, fingerprint=dataclasses.replace(own, base=old.base))

    def remove(self) -> None:
        """Remove the reduction: the model is restored bit for bit. A second call raises `NotPatchedError`."""
        if self.model.__dict__.get(ATTRIBUTE) is not self:
            raise NotPatchedError(
                f"this handle's reduction was taken out of the {type(self.model).__qualname__} already"
                + (", which was patched again since" if ATTRIBUTE in self.model.__dict__ else "")
                + "."
            )
        unpatch(self.model)

    def on_remove(self, action: Callable[[], None]) -> None:
        """Register an action for the removal of the reduction, for code that adds attributes or hooks of its own."""
        self._actions.append(action)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the reduction, unless it was removed inside the `with`."""
        if self.model.__dict__.get(ATTRIBUTE) is self:
            self.remove()

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update({"remarks": [], **values})  # an older release had none
        self._state.model = self.model  # copied or loaded together

    def __repr__(self) -> str:
        return f"<tokenmerge {self._config.method!r}, r={self._config.r!r}, in {type(self.model).__qualname__}>"

    def _last(self) -> Frame:
        frame = self._state.last()
        if frame is None or not frame.last:
            raise NotTrackedError("no forward has run since the model was patched; run the model first.")
        return frame


def attached(model: nn.Module, config: MergeConfig) -> Handle:
    """Patch a model in place from a whole configuration; `patch` and the tools call this.

    Raises what `patch` raises; on any error the model stays as it was.
    """
    require_free(model)
    handle = Handle(model, _adapter(model, config), config)
    model.__dict__[ATTRIBUTE] = handle
    return handle


def require_free(model: nn.Module) -> None:
    """Raise if the model is no `nn.Module`, or is patched already."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"patch takes a torch.nn.Module, got {type(model).__module__}.{type(model).__qualname__}."
        )
    if ATTRIBUTE in model.__dict__:
        raise AlreadyPatchedError(
            f"this model is reduced already: {model.__dict__[ATTRIBUTE]!r}; call unpatch(model) first."
        )


def _adapter(model: nn.Module, config: MergeConfig) -> Adapter:
    names = {option: getattr(config, option) for option in ("blocks", "attn", "norm", "mlp")}
    missing = [option for option, name in names.items() if name is None]
    if len(missing) == len(names) and config.prefix is None:
        return adapters.find(model)
    if missing:
        raise UnsupportedModelError(
            f"a model patched by names needs blocks, attn, norm and mlp; missing: {', '.join(missing)}."
        )
    return Generic(**names, prefix=config.prefix)


def unpatch(model: nn.Module) -> None:
    """Restore the original model bit for bit, with no attribute left; raises `NotPatchedError`.

    Takes a patched model, a copy of one, or a copy of a part of one.
    """
    if ATTRIBUTE not in model.__dict__ and is_copied_part(model):
        undo(model.modules())
        return
    handle = handle_of(model)
    del model.__dict__[ATTRIBUTE]
    handle._attachment.undo()
    with ExitStack() as actions:  # runs all of them, even if one raises
        for action in reversed(handle._actions):
            actions.callback(action)


@overload
def handle_of(model: nn.Module) -> Handle: ...


@overload
def handle_of(model: nn.Module, default: None) -> Handle | None: ...


def handle_of(model: nn.Module, default: Any = _RAISE) -> Handle | None:
    """Return the handle of a patched model, e.g. of a copy or a loaded one; raises `NotPatchedError`.

    With `default=None` it returns None for a model that is not patched.
    """
    handle = model.__dict__.get(ATTRIBUTE)
    if handle is None and default is not _RAISE:
        return None
    if handle is None and hasattr(model.__dict__.get("forward"), "handle"):
        raise NotPatchedError(
            f"this {type(model).__qualname__} is patched by tokenmerge.vlm: its handle is model.forward.handle. Call "
            "remove() of that."
        )
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
