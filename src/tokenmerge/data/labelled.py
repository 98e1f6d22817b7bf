"""Labelled images for the tools: batches in the form that a model takes, from any source of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tokenmerge.data.answers import declared_classes, run_images
from tokenmerge.data.batches import Batches as Batches
from tokenmerge.data.classes import by_label, how_numbered, numbers_of
from tokenmerge.data.images import FashionMNIST as FashionMNISTSource
from tokenmerge.data.loader import in_order
from tokenmerge.data.prepare import find_preprocessing
from tokenmerge.data.preprocessing import Preprocessing
from tokenmerge.data.settings import Data
from tokenmerge.data.sources import KINDS, MissingSplitError, Source, Stream, class_names, limited, open_source, resolve
from tokenmerge.errors import DataError, TokenMergeError, UnknownNameError

__all__ = [
    "FASHION_MNIST",
    "Batches",
    "FashionMNIST",
    "Folder",
    "Images",
    "Labelled",
    "by_label",
    "calibration_images",
    "check_labelled",
    "check_source",
    "none_read",
    "normalise",
    "open_data",
    "sample_data",
]

FASHION_MNIST = "fashion-mnist"
_FILES = "files:PATH"
_UNLABELLED = "No labels: these images stand in no folders of classes. Answers are compared with the unmerged model's."
_CALIBRATION = 64  # images for "auto"


class Labelled(Protocol):
    """Data for the tools: batches of images `[B, ...]` as the model takes them, labels `[B]`; for repeated passes."""

    source: str
    batch_size: int
    outputs: int  # number of classes a model must have for the labels to apply
    preprocessing: Preprocessing

    @property
    def classes(self) -> Sequence[str]: ...

    @property
    def notes(self) -> Sequence[str]: ...

    @property
    def corrupt(self) -> Sequence[str]:
        """Path and reason of each image that the last pass left out."""

    def __len__(self) -> int:
        """Number of images, including unreadable ones."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


class Images:
    """Images of a source, decoded in worker processes and prepared for the model; see `open_data`.

    An image that cannot be decoded is left out; `corrupt` holds its name and the reason after the pass. Without
    `needs_labels`, images of classes that the model does not have get the label -1.
    """

    def __init__(
        self,
        source: str | Path,
        model: nn.Module,
        batch_size: int,
        workers: int = 0,
        limit: int | None = None,
        preprocessing: Preprocessing | None = None,
        splits: Sequence[str] = ("test", "valid", "train"),
        needs_labels: bool = True,
    ) -> None:
        _check_amounts(batch_size, limit, workers)
        check_source(str(source))
        form, rest = resolve(str(source))
        is_folder = form == "folder:PATH"
        self.source, self.batch_size = rest if is_folder else str(source), batch_size
        self.preprocessing = preprocessing or find_preprocessing(model)
        self.corrupt: list[str] = []
        opened, split = _open(str(source), splits)
        self.classes = list(opened.classes)
        self.outputs = declared_classes(model) or len(self.classes)
        self._numbers = torch.full((len(self.classes),), -1)
        self.notes: tuple[str, ...] = (_UNLABELLED,)
        if form != _FILES:
            try:
                self._numbers = torch.tensor(numbers_of(self.source, self.classes, model, is_folder))
                self.notes = how_numbered(self.classes, model, is_folder)
            except DataError as error:
                if needs_labels:
                    raise
                self.notes = (f"Labels are not used: {error}",)
        if split != splits[0]:
            self.notes += (f"Images of the {split} split: there is no {splits[0]} split.",)
        if isinstance(opened, Stream) and limit is not None:
            self.notes += (f"Of a stream: its first {limit} images.",)
        self._opened, self._workers = limited(opened, limit), workers
        self._count = len(self._opened) if isinstance(self._opened, Source) else None

    def __len__(self) -> int:
        if self._count is None:  # the length of a stream is known only after a pass
            self._count = sum(1 for _ in self._opened.samples(0, 0)) if isinstance(self._opened, Stream) else 0
        return self._count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.corrupt.clear()
        for batch in in_order(self._opened, self.preprocessing, batch_size=self.batch_size, workers=self._workers):
            self.corrupt += batch.unreadable
            if len(batch.labels):
                yield batch.inputs, self._numbers[batch.labels]


Folder = Images  # alias: a path is a source too


class FashionMNIST:
    """The bundled test set: batches `[B, 1, 28, 28]` as the bundled model takes them, and labels `[B]`.

    With `preprocessing`, images go through that instead.
    """

    corrupt: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    source = FASHION_MNIST

    def __init__(
        self,
        batch_size: int,
        limit: int | None = None,
        preprocessing: Preprocessing | None = None,
        split: str = "test",
    ) -> None:
        _check_amounts(batch_size, limit)
        found = FashionMNISTSource("", split, Data())
        self.images, self.labels = found.images[:limit], found.labels[:limit]
        self.batch_size = batch_size
        self.classes = list(found.classes)
        self.outputs = len(self.classes)
        self.preprocessing = preprocessing or _bundled()
        self._own = None if _is_bundled(self.preprocessing) else self.preprocessing

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            yield normalise(images) if self._own is None else _prepared(images, self._own), labels


def _bundled(source: str = "as the bundled model takes them", is_known: bool = True) -> Preprocessing:
    from tokenmerge import assets

    return Preprocessing((1, 28, 28), None, False, "bilinear", (assets.MEAN,), (assets.STD,), source, is_known)


def _is_bundled(found: Preprocessing) -> bool:
    """Return whether the images need exactly what `normalise` does to a whole batch."""
    plain = _bundled()
    return (found.size, found.mean, found.std) == (plain.size, plain.mean, plain.std) and found.resize in (None, 28)


def _prepared(images: Tensor, preprocessing: Preprocessing) -> Tensor:  # uint8 [B, 28, 28]
    from PIL import Image

    return torch.stack([preprocessing(Image.fromarray(image.numpy())) for image in images])


def normalise(images: Tensor) -> Tensor:  # uint8 [B, 28, 28]
    """Return the input of the bundled model, float `[B, 1, 28, 28]`, normalised by `assets.MEAN` and `assets.STD`."""
    from tokenmerge import assets

    return (images[:, None].float() / 255 - assets.MEAN) / assets.STD


def open_data(
    source: str,
    model: nn.Module,
    *,
    batch_size: int,
    workers: int = 2,
    limit: int | None = None,
    preprocessing: Any = None,
    **options: Any,
) -> FashionMNIST | Images:
    """Open the images of a source for evaluation: a folder, or a name as in `data.source` of a recipe.

    Images below `files:PATH`, and in a folder without sub-folders, have no labels: theirs is -1.

    Uses the test split if there is one, else the validation split, else the training split, and a note says which.
    Images are prepared as the model declares, unless `preprocessing` is given: a `Preprocessing`, a Hugging Face image
    processor, or a function of one PIL image. `options` are those of `find_preprocessing`: `beside`, `mean`, ...
    Raises `DataError` for a source that is missing or empty, has other classes, or holds no images.
    """
    check_source(source)
    if source != FASHION_MNIST:
        found = find_preprocessing(model, given=preprocessing, **options)
        return Images(_as_files(source), model, batch_size, workers, limit, found)
    classes = declared_classes(model)
    if classes not in (None, 10):
        raise DataError(f"fashion-mnist has 10 classes, the model has {classes}; use the bundled model 'reference'.")
    return FashionMNIST(batch_size, limit, _for_fashion_mnist(model, preprocessing, options))


def _open(source: str, splits: Sequence[str]) -> tuple[Source | Stream, str]:
    """Open the first of these splits that the source has, and return which one."""
    for split in splits:
        try:
            return open_source(source, split, Data(source="")), split
        except MissingSplitError as error:
            missing = error
    raise missing


def _for_fashion_mnist(model: nn.Module, given: Any, options: dict[str, Any]) -> Preprocessing:
    """Return the preprocessing that a model declares; a model that declares none gets that of the bundled model."""
    changes = {name: value for name, value in options.items() if name != "beside"}
    try:
        found = find_preprocessing(model, given=given, beside=options.get("beside"))
    except TokenMergeError:
        if given is not None:
            raise
        found = None
    if found is None or not found.is_known:
        found = _bundled("the images' own mean and std", is_known=False)
    return found.changed(**changes)


def check_labelled(data: Any) -> None:
    """Raise `DataError` for what is no `Labelled`, such as a loader alone."""
    parts = ("source", "batch_size", "outputs", "preprocessing", "classes", "notes", "corrupt", "__len__", "__iter__")
    lacking = [part for part in parts if not hasattr(data, part)]
    if lacking:
        raise DataError(
            f"this {type(data).__qualname__} has no {', '.join(lacking)}: give Batches(data, classes) of "
            "tokenmerge.data.labelled, or what open_data returns."
        )


def none_read(data: Labelled) -> DataError:
    """Return the error of a pass in which no image could be read, with the first reason."""
    first = f"; the first: {data.corrupt[0]}" if data.corrupt else ""
    return DataError(f"none of the {len(data)} images of {data.source} could be read{first}.")


def calibration_images(source: str, model: nn.Module, preprocessing: Any = None, **options: Any) -> Tensor:
    """Return 64 images for `patch(model, "auto", calibrate=...)`, as the model takes them, `[64, C, H, W]`.

    They are the first ones of `sample_data`, evenly spread over the classes of a folder or data set. Raises `DataError`
    if there are no images or the model does not take them.
    """
    found = {"preprocessing": preprocessing, "option": "--calibrate", **options}
    data = sample_data(source, model, batch_size=_CALIBRATION, workers=0, limit=_CALIBRATION, **found)
    images = torch.cat([torch.empty(0), *(batch for batch, _ in data)])
    if not len(images):
        raise none_read(data)
    run_images(model, images[:1].to(next(model.parameters())))
    return images


def sample_data(
    source: str,
    model: nn.Module,
    *,
    batch_size: int,
    workers: int = 2,
    limit: int | None = None,
    preprocessing: Any = None,
    option: str = "--data",
    **options: Any,
) -> FashionMNIST | Images:
    """Open images to tune a model on: of the training split if there is one, and without a need for labels.

    Labels that do not fit the model are -1, and a note says why; a folder without sub-folders holds unlabelled images.
    The other arguments and errors are those of `open_data`; `option` names the source in messages.
    """
    check_source(source, option)
    if source == FASHION_MNIST:
        own = _for_fashion_mnist(model, preprocessing, options)
        try:
            return FashionMNIST(batch_size, limit, own, split="train")
        except DataError as error:
            raise DataError(f"{error} Or give a folder of images.") from error
    found = find_preprocessing(model, given=preprocessing, **options)
    return Images(
        _as_files(source), model, batch_size, workers, limit, found, ("train", "valid", "test"), needs_labels=False
    )


def _as_files(source: str) -> str:
    """Return the name of a source; that of its files, for a folder that has some and no sub-folder."""
    form, rest = resolve(source)
    is_flat = (
        form == "folder:PATH" and not class_names(Path(rest)) and any(path.is_file() for path in Path(rest).iterdir())
    )
    return f"files:{rest}" if is_flat else source


def check_source(source: str, option: str = "--data") -> None:
    """Raise `DataError` if a source does not exist or holds no images, before a model is loaded for it."""
    try:
        form, rest = resolve(source)
    except UnknownNameError:
        form, rest = "folder:PATH", source
    if form == "folder:PATH" and not Path(rest).is_dir():
        others = ", ".join(kind for kind, (module, _) in KINDS.items() if module == "images")
        raise DataError(
            f"no folder {rest}: {option} takes {FASHION_MNIST!r} or a folder with one sub-folder per class; in full, "
            f"one of {others}."
        )
    held, _ = KINDS[form]
    if held != "images":
        raise DataError(f"{source} holds {held}: {option} takes images. `tokenmerge train` evaluates on {held}.")


def _check_amounts(batch_size: int, limit: int | None, workers: int = 0) -> None:
    if batch_size < 1 or (limit is not None and limit < 1):
        raise DataError(f"batch size and limit must be at least 1; got {batch_size} and {limit}.")
    if workers < 0:
        raise DataError(f"the number of workers must be at least 0; got {workers}.")
