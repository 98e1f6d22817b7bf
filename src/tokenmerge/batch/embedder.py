"""A picklable class that embeds batches of images: for a loop, or for any engine that calls classes."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge import MergeConfig, Reduction, handle_of
from tokenmerge.batch.heads import head_of
from tokenmerge.config.fingerprint import digest
from tokenmerge.data.answers import known_size
from tokenmerge.data.classes import class_names
from tokenmerge.data.opening import decode
from tokenmerge.data.prepare import find_preprocessing
from tokenmerge.data.preprocessing import Preprocessing
from tokenmerge.errors import DataError, TokenMergeError, UnsupportedError, UnsupportedModelError
from tokenmerge.measure.outputs import find_device, find_dtype, run_images
from tokenmerge.schedule import R
from tokenmerge.tools.models import apply_method, check_takes_images, load, load_unmerged, place_of, read_method

__all__ = ["Embedder"]


class Embedder:
    """A model that is loaded, merged and ready, called with a batch of columns: `embed(batch) -> batch`.

    It fits Ray Data's `map_batches`, `datasets.map(batched=True)` and a loop, and imports none of them. A pickle of it
    holds what it was made of, not the weights of a model that was given by its name: it loads again where it arrives.

    Args:
        model: a name that `tokenmerge.load` takes, or a model (it is copied, and stays as it is).
        config: how it merges: the path of a `merge.json`, a `MergeConfig`, a method or its name.
        r: as in `patch`; without `config` for the method "tome". Without both nothing is merged.
        output: "embedding" `[B, D]`: what enters the classifier, the projected or the pooled output, the class token.
            "logits" `[B, classes]`. "dense" `[B, N, D]`: one feature for every place, restored where tokens merged.
        device: "auto" is a GPU where there is one.
        dtype: float32, bfloat16 or float16; outputs are float32.
        compile: run it by `torch.compile`.
        column: the column of images. Each is a PIL image, an array `[H, W]` or `[H, W, 3]` of uint8, the bytes of a
            file, its path, or `datasets`' dict of both.
        preprocessing: None as the model declares it; else what `find_preprocessing` takes as `given`, or a dict of its
            options (`mean`, `resize`, ...).
        pretrained: take the host's weights for a model given by name, else new ones.
        trust_pickle: as in `load`.

    Warns where the configuration was made for another model or other weights; `remarks` has what it says. Raises the
    errors of `load` and `patch`, and `UnsupportedError` for a model without such an output, when it is made.
    """

    def __init__(
        self,
        model: str | nn.Module,
        config: str | Path | MergeConfig | Reduction | None = None,
        *,
        r: R | None = None,
        output: str = "embedding",
        device: str = "auto",
        dtype: str = "float32",
        compile: bool = False,
        column: str = "image",
        preprocessing: Any = None,
        pretrained: bool = True,
        trust_pickle: bool = False,
    ) -> None:
        self._given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.output, self.column, self.dtype = output, column, find_dtype(dtype)
        self.device = find_device(_best() if device == "auto" else device)
        self.name = model if isinstance(model, str) else type(model).__qualname__
        if isinstance(model, str):
            opened = load if config is None and r is None else load_unmerged
            model = opened(model, pretrained=pretrained, trust_pickle=trust_pickle)
        else:
            model = copy.deepcopy(model).eval()  # its weights too: they change device and dtype
        check_takes_images(model, self.name)
        options = {"beside": place_of(self.name) if isinstance(self._given["model"], str) else None}
        is_changed = isinstance(preprocessing, Mapping)
        options |= preprocessing if is_changed else {"given": preprocessing}
        self.prepare = _preparing(model, options, merges=config is not None or r is not None)
        self.remarks: list[str] = []  # what its configuration says of its model that is not so in this one
        self.merging = self._merge(model, config, r)
        for remark in self.remarks:
            warnings.warn(f"{self.name}: {remark}.", stacklevel=2)
        self._weights = digest(model.state_dict())
        self._size = _size(model, self.prepare.size)
        self.model = model.to(self.device, self.dtype)
        self._head = head_of(self.model, output)
        if compile:
            self._head = torch.compile(self._head)
        self.classes: list[str] = []
        self.shape = self._tried()

    def _merge(self, model: nn.Module, config: Any, r: R | None) -> str:
        """Patch the model and return what it was patched with; "" if with nothing."""
        if config is None and r is None:
            handle = handle_of(model, None)  # it may have been patched before it was given
            self.remarks = [] if handle is None else handle.remarks
            return "" if handle is None else repr(handle.config)
        method = read_method(str(config)) if isinstance(config, (str, Path)) else config
        restore = "dense" if self.output == "dense" else None
        handle = apply_method(model, "tome" if method is None else method, r=r, restore=restore)
        self.remarks = handle.remarks
        return repr(handle.config)

    def _tried(self) -> tuple[int, ...] | None:
        """Run one image and return the shape of its output; None if the size of an input is unknown."""
        if not self._size:
            return None
        shape = tuple(self.run(torch.zeros(1, *self._size)).shape[1:])
        if self.output == "logits":
            self.classes = class_names(self.model, shape[0], unnamed="{}")
        return shape

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch without its images, and with the output: a float32 array under its name.

        "logits" also gives `label`, the number of the likeliest class, and `score`, its probability. Images that come
        prepared are taken from a column `pixel_values` `[B, C, H, W]`. Raises `DataError` without such columns, and
        for an image that cannot be read, with its place in the batch.
        """
        if "pixel_values" in batch:
            values = batch["pixel_values"]
            images = list(values if isinstance(values, Tensor) else torch.as_tensor(_array(values)))
        elif self.column in batch:
            images = [self.read(found, f"image {place} of the batch") for place, found in enumerate(batch[self.column])]
        else:
            raise DataError(f"the batch has no column {self.column!r}; it has {', '.join(batch) or 'none'}.")
        found = self.run_all(images).numpy()
        rest = {name: value for name, value in batch.items() if name not in (self.column, "pixel_values")}
        return {**rest, self.output: found, **(_likeliest(found) if self.output == "logits" else {})}

    def read(self, image: Any, name: str = "the image") -> Tensor:
        """Return one image, as a batch holds it, as the model takes it: `[C, H, W]`, for `pixel_values` or `run_all`.

        A server reads each request by itself: one that is broken must not cost the others. Raises `DataError` with its
        name for what cannot be read.
        """
        found = _image(image, name)
        try:
            return self.prepare(found)
        except TokenMergeError:
            raise
        except Exception as error:  # of whatever prepares it
            raise DataError(f"{name}: {found.size[0]} x {found.size[1]} pixels cannot be prepared: {error}.") from error

    def run(self, images: Tensor) -> Tensor:
        """Return the output `[B, ...]` for prepared images `[B, C, H, W]`, float32 on the CPU.

        Raises `DataError` for images that the model does not take.
        """
        x = images.to(self.device, self.dtype, non_blocking=True)
        # as the tools run images: an error of the model names the size that it was given
        return run_images(self._head, x).float().cpu()  # type: ignore[arg-type]

    def run_all(self, images: Sequence[Tensor]) -> Tensor:
        """Return the output for prepared images `[C, H, W]` of any sizes, in order: one forward for each size."""
        if not len(images):
            return torch.empty(0, *(self.shape or (0,)))
        places: dict[tuple[int, ...], list[int]] = {}
        for place, image in enumerate(images):
            places.setdefault(tuple(image.shape), []).append(place)
        parts = [self.run(torch.stack([images[place] for place in group])) for group in places.values()]
        if len(parts) == 1:
            return parts[0]
        if len({part.shape[1:] for part in parts}) > 1:
            raise DataError(f"images of {', '.join(map(str, places))} have outputs of several shapes: give --resize.")
        order = torch.tensor([place for group in places.values() for place in group])
        return torch.cat(parts)[order.argsort()]

    def settings(self) -> dict[str, Any]:
        """Return what its outputs depend on, as plain values: two with equal settings embed alike."""
        return {
            "model": self.name,
            "weights": self._weights,
            "merging": self.merging or "none",
            "output": self.output,
            "preprocessing": str(self.prepare),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @property
    def is_for_cpu(self) -> bool:
        """Whether it was made for the CPU by name, and not because there was nothing else."""
        return str(self._given["device"]) == "cpu"

    def maker(self, device: str | None = None) -> Callable[[], Embedder]:
        """Return a function that makes the same again, elsewhere or on another device; it can be pickled."""
        return partial(_made, {**self._given, **({} if device is None else {"device": device})})

    def __reduce__(self) -> tuple[Callable[..., Embedder], tuple[dict[str, Any]]]:
        return _made, (self._given,)

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.settings().items() if name != "weights")
        return f"Embedder({given}, device={str(self.device)!r})"


def _made(given: dict[str, Any]) -> Embedder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what is to be said was said of the one that this is a copy of
        return Embedder(**given)


def _preparing(model: nn.Module, options: Mapping[str, Any], *, merges: bool) -> Preprocessing:
    try:
        return find_preprocessing(model, **options)
    except UnsupportedModelError as error:
        if merges:
            raise
        raise UnsupportedError(
            f"{type(model).__qualname__} says neither how its images are prepared nor how large they are, and is of no "
            "family that is known here: put its preprocessor_config.json beside it, or give preprocessing= in Python."
        ) from error


def _best() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _size(model: nn.Module, prepared: tuple[int, ...]) -> tuple[int, ...]:
    """Return the size of an input as it is prepared, else as the model declares it; () if neither says."""
    if prepared:
        return prepared
    try:
        return known_size(model)
    except TokenMergeError:
        return ()


def _array(values: Any) -> Any:
    import numpy as np

    return np.stack([np.asarray(value) for value in values]) if len(values) else np.asarray(values)


def _likeliest(logits: Any) -> dict[str, Any]:
    scores, labels = torch.from_numpy(logits).softmax(dim=1).max(dim=1)
    return {"label": labels.numpy(), "score": scores.numpy()}


def _image(found: Any, name: str) -> Any:
    """Return a PIL image; raises `DataError` with its name."""
    import numpy as np
    from PIL import Image

    if isinstance(found, Mapping) and {"bytes", "path"} >= {*found} and found:
        found = found.get("bytes") or found.get("path")
    try:
        if isinstance(found, (bytes, bytearray)):
            return decode(name, lambda: io.BytesIO(found))
        if isinstance(found, (str, Path)):
            return decode(str(found), lambda: found)
    except OSError as error:
        raise DataError(f"{error}.") from error
    if isinstance(found, Image.Image):
        return found
    array = np.asarray(found)
    if array.dtype == np.uint8 and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)
    what = f"an array {array.shape} of {array.dtype}" if isinstance(found, np.ndarray) else f"a {type(found).__name__}"
    raise DataError(
        f"{name} is {what}: give a PIL image, an array of uint8 [H, W] or [H, W, 3], the bytes of a file, or its path."
    )
