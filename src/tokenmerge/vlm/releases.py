"""Give models of transformers 4.57 what those of 5.24 have: they take images that are encoded already.

The rest of `tokenmerge.vlm` knows the interface of 5.24 only: `forward` and `generate` take `mm_encoder_outputs` and
the positions of the prompt, and `get_image_features(return_dict=True)` returns an object. Models of 4.57 call their own
`get_image_features` where they put visual tokens into the prompt. While they do, it returns those that stayed, and
`generate` knows of no images. When 4.57 is no longer supported, this file goes, with the lines that import it.

Shapes: B rows and M tokens of a shortened prompt, R rows of a call (B times the beams), C channels.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge._intercept.bindings import bind
from tokenmerge._intercept.override import Binding, Override
from tokenmerge.errors import UnsupportedError, UnsupportedModelError
from tokenmerge.vlm.after import cached_length, noted
from tokenmerge.vlm.prompt import positions_after

__all__ = ["adapt", "base_of", "check_newer", "window_order"]

OLDER = "4.57"
_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
_GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids")
_PIECES = ("prefill_chunk_size", "assistant_model", "assistant_early_exit")
_NO_TEXT_ROW = ("glm4v",)  # whose language model takes the three positions on the grid, and none in the text
_SHARED = ("glm4v",)  # whose videos have the placeholders of images


def base_of(model: Any) -> Any:
    """Return the base model, which encodes images.

    Raises `UnsupportedModelError` for a model of a release whose encoded images cannot be handed over.
    """
    if not _is_older(model):
        return model.base_model
    version = _version()
    if not version.startswith(f"{OLDER}."):
        raise UnsupportedModelError(
            f"{type(model).__qualname__} of transformers {version} takes no encoded images (mm_encoder_outputs). That "
            f"needs transformers 5.24 or newer, or {OLDER}: pip install --upgrade transformers."
        )
    # some have no base_model_prefix, and call themselves their base model
    return getattr(model.base_model, "model", model.base_model)


def check_newer(model: nn.Module, what: str, way_out: str) -> None:
    """Raise `UnsupportedError` for something that models of 4.57 cannot have."""
    if _is_older(model):
        raise UnsupportedError(f"{what} needs transformers 5.24 or newer, and this is {_version()}. {way_out}")


def window_order(tower: Any, grids: Tensor) -> Tensor:
    """Return the order in which a tower with windows takes its units, `[units]`, for images on these grids."""
    source = sys.modules[type(tower).__module__]
    if hasattr(tower, "get_window_index"):
        order: Any = tower.get_window_index(grids)[0]
    else:
        order = source.get_vision_window_index(
            grids,
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )[0]
    return torch.as_tensor(order)


def adapt(model: nn.Module, base: Any) -> None:
    """Bind the interface of 5.24 on a model of 4.57; nothing on others. `undo` of both modules takes it back."""
    if not _is_older(model):
        return
    seam = _Seam(base)
    bind(Binding(model, "forward", _Forward(model, seam, "forward")))
    if hasattr(model, "generate"):
        bind(Binding(model, "generate", _Generate(model, seam, "generate")))
    for kind in _PIXELS:
        if hasattr(base, f"get_{kind}_features"):
            bind(Binding(base, f"get_{kind}_features", _Features(base, seam, kind)))


def _is_older(model: nn.Module) -> bool:
    return "mm_encoder_outputs" not in inspect.signature(type(model).forward).parameters


def _version() -> str:
    import transformers

    return str(transformers.__version__)


@dataclass
class _Output:
    """Encoded images, under the names of 5.24."""

    pooler_output: Any  # [N, C] of each image
    deepstack_features: list[list[Tensor]] | None = None  # [N, C] of each image in each layer
    rest: Any = None  # what else is returned beside the images
    joined: bool = False  # whether they are returned as one tensor

    def handed(self, spread: Any) -> Any:
        """Return what the model's own method returns, for the rows of a call."""
        features = spread(torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in self.pooler_output]))
        if self.deepstack_features is not None:
            return [features], [spread(torch.cat(plane)) for plane in self.deepstack_features]
        # as images of one token: their numbers may differ
        given = features[:, None] if self.joined else [features]
        return given if self.rest is None else (given, self.rest)


@dataclass(frozen=True)
class _Carried:
    """A shortened prompt on its way through `generate`."""

    ids: Tensor  # [B, M]
    outputs: dict[str, _Output]
    positions: Tensor  # [B, M] or [4, B, M]

    def features(self, base: Any, kind: str, rows: int) -> Any:
        """Return the encoded images of R rows, as the model's own method returns them."""
        name = "image" if base.config.model_type in _SHARED else kind
        counts = (self.ids == getattr(base.config, f"{name}_token_id")).sum(dim=1).tolist()
        times = rows // len(counts)

        def spread(features: Tensor) -> Tensor:
            own = features.split(counts)
            return torch.cat([part for part in own for _ in range(times)])

        return self.outputs[kind].handed(spread)

    def placed(self, start: int, tokens: int, rows: int) -> Tensor:
        """Return the positions of so many tokens behind the first `start`, of R rows."""
        own = self.positions
        steps = torch.arange(1, 1 + max(0, start + tokens - own.shape[-1]), device=own.device)
        own = torch.cat((own, positions_after(own, steps)), dim=-1)[..., start : start + tokens]
        return own.repeat_interleave(rows // own.shape[-2], dim=-2)


class _Seam:
    """What the methods of one model tell each other, each thread by itself."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"base": self.base}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _local=threading.local())

    @property
    def carried(self) -> _Carried | None:
        """The prompt of the `generate` that runs now."""
        carried: _Carried | None = getattr(self._local, "carried", None)
        return carried

    def handed(self, kind: str) -> Any:
        """The encoded images of the `forward` that runs now, or None."""
        return getattr(self._local, "handed", {}).get(kind)

    @contextmanager
    def having(self, **values: Any) -> Iterator[None]:
        """Let this thread see these values."""
        before = dict(vars(self._local))
        vars(self._local).update(values)
        try:
            yield
        finally:
            vars(self._local).clear()
            vars(self._local).update(before)


class _Seamed(Override):
    """A method with the interface of 5.24."""

    def __init__(self, owner: nn.Module, seam: _Seam, attribute: str) -> None:
        super().__init__(owner, attribute)
        self.seam = seam
        self.names = list(self.__signature__.parameters)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.previous or getattr(type(self.owner), self.attribute).__get__(self.owner))


class _Forward(_Seamed):
    """The model's forward, which takes encoded images: of this call, or of the `generate` around it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given, seam = self.by_name(args, kwargs), self.seam
        outputs = given.pop("mm_encoder_outputs", None)
        ids: Any = given.get("input_ids")
        carried = seam.carried
        if outputs:
            carried = _Carried(ids, outputs, given["position_ids"])
        elif carried is not None:
            start = cached_length(given)
            given["position_ids"] = carried.placed(start, ids.shape[1], ids.shape[0])
            outputs = {} if start else carried.outputs
        positions = given.get("position_ids")
        if seam.base.config.model_type in _NO_TEXT_ROW and positions is not None and positions.dim() == 3:
            given["position_ids"] = positions[-3:]
        if not outputs:
            return self.original(**given)
        assert carried is not None
        handed = {kind: carried.features(seam.base, kind, ids.shape[0]) for kind in outputs}
        # that there are some makes the model ask for their features
        given |= {_PIXELS[kind]: torch.zeros(1, device=ids.device) for kind in outputs}
        with seam.having(handed=handed):
            return self.original(**given)


class _Generate(_Seamed):
    """The model's generate, which takes encoded images and the positions of the prompt."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.by_name(args, kwargs)
        outputs, positions = given.pop("mm_encoder_outputs", None), given.get("position_ids")
        if positions is None or (outputs is None and noted(given) is None):
            return self.original(**given)
        if outputs and cached_length(given):  # 4.57 takes images only where a prompt starts
            check_newer(self.owner, "images behind a cache of text", "Call generate without the cache.")
        config = given.get("generation_config") or self.owner.generation_config
        for name in _PIECES:
            if given.get(name) or getattr(config, name, None):
                # the prompt goes there in pieces, or to a model that is given no images
                check_newer(self.owner, f"{name} with fewer visual tokens", "Leave it out, or set handle.keep = 1.0.")
        base = self.seam.base
        visual = {"position_ids", *_GRIDS}
        for name in (f"get_{kind}_features" for kind in _PIXELS):
            visual |= set(inspect.signature(getattr(base, name)).parameters) if hasattr(base, name) else set()
        given = {name: value for name, value in given.items() if name not in visual}
        if hasattr(base, "rope_deltas"):
            # those of another call, or None, which `prepare_inputs_for_generation` cannot take: `forward` places tokens
            base.rope_deltas = positions.new_zeros(given["input_ids"].shape[0], 1)
        with self.seam.having(carried=_Carried(given["input_ids"], outputs or {}, positions)):
            return self.original(**given)


class _Features(_Seamed):
    """The base model's `get_image_features` or `get_video_features`, which returns an object if it is asked to."""

    def __init__(self, owner: nn.Module, seam: _Seam, kind: str) -> None:
        self.kind = kind
        super().__init__(owner, seam, f"get_{kind}_features")

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the method, with the names of 5.24."""
        own = super().__signature__
        names = list(own.parameters.values())
        if self.kind == "video":  # LLaVA-OneVision calls them pixel_values
            names = [x.replace(name=_PIXELS["video"]) if x.name == _PIXELS["image"] else x for x in names]
        elif self.seam.base.config.model_type == "llava":  # among its further arguments, for Pixtral
            names.insert(-1, inspect.Parameter("image_sizes", inspect.Parameter.KEYWORD_ONLY, default=None))
        return own.replace(parameters=names)

    @property
    def _adds_newline(self) -> bool:
        """Whether the model puts a newline behind each video by itself."""
        return self.kind == "video" and hasattr(self.owner, "image_newline")

    def __call__(self, *args: Any, return_dict: bool = False, **kwargs: Any) -> Any:
        handed = self.seam.handed(self.kind)
        if handed is not None:
            return handed[:-1].transpose(0, 1) if self._adds_newline else handed
        if not return_dict:
            return self.original(*args, **kwargs)
        base: Any = self.owner
        given = self.by_name(args, kwargs)
        for own in super().__signature__.parameters.values():
            if own.name == _PIXELS["image"]:
                given[own.name] = given.pop(_PIXELS[self.kind])
            elif own.name not in given and own.default is own.empty and hasattr(base.config, own.name):
                given[own.name] = getattr(base.config, own.name)
        found = self.original(**given)
        if self._adds_newline:
            newlines = base.image_newline.to(found).expand(found.shape[0], 1, -1)
            found = torch.cat((found, newlines), dim=1)
        return _output(base.config.model_type, found)


def _output(name: str, found: Any) -> _Output:
    """Return what a method of a family of this name returned, as an object."""
    if name == "qwen3_vl":
        images, planes = found
        counts = [rows.shape[0] for rows in images]
        return _Output(list(images), [list(plane.split(counts)) for plane in planes])
    if name == "ovis2":
        images, indicators = found
        return _Output(images, rest=indicators, joined=True)
    return _Output(found if isinstance(found, Tensor) else list(found), joined=isinstance(found, Tensor))
