"""Labelled images for the tools, from any source of images: batches of them as a model wants them, with labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tokenmerge.data.answers import declared_classes, run_images
from tokenmerge.data.classes import by_label, how_numbered, numbers_of
from tokenmerge.data.images import FashionMNIST as FashionMNISTSource
from tokenmerge.data.loader import in_order
from tokenmerge.data.prepare import find_preprocessing
from tokenmerge.data.preprocessing import Preprocessing
from tokenmerge.data.settings import Data
from tokenmerge.data.sources import KINDS, MissingSplitError, Source, Stream, limited, open_source, resolve
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
    "check_source",
    "none_read",
    "normalise",
    "open_data",
]

FASHION_MNIST = "fashion-mnist"
_CALIBRATION = 64  # images that "auto" chooses by


class Labelled(Protocol):
    """What the tools walk: batches of images `[B, ...]` as the model takes them and labels `[B]`, as often as asked."""

    source: str
    batch_size: int
    outputs: int  # how many answers a model must have for the labels to count
    preprocessing: Preprocessing

    @property
    def classes(self) -> Sequence[str]: ...

    @property
    def notes(self) -> Sequence[str]: ...

    @property
    def corrupt(self) -> Sequence[str]:
        """What the last pass left out: a path and the reason, each."""

    def __len__(self) -> int:
        """How many images there are, with those that cannot be read."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


class _AsGiven:
    def __call__(self, image: Any) -> Any:
        return image

    def __repr__(self) -> str:
        return "done by whoever made the batches"


class Batches:
    """Labelled batches of your own for the tools: a `DataLoader`, or anything else that can be walked again.

    `classes` are the names of the classes, or how many there are; `source` is what outputs call the data. Raises
    `DataError` for what can be walked only once, or holds no batch.
    """

    corrupt: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __init__(
        self, batches: Iterable[tuple[Tensor, Tensor]], classes: int | Sequence[str], source: str = "batches as given"
    ) -> None:
        if iter(batches) is batches:
            raise DataError("an iterator can be walked only once: give a list of batches, or a DataLoader.")
        first = next(iter(batches), None)
        if first is None:
            raise DataError(f"{source}: there is no batch.")
        self.batches, self.source, self.batch_size = batches, source, len(first[0])
        self.classes = tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(classes)
        self.outputs = len(self.classes)
        self.preprocessing = Preprocessing((), None, False, "", None, None, source, own=_AsGiven())
        self._count: int | None = None

    def __len__(self) -> int:
        if self._count is None:
            self._count = sum(len(labels) for _, labels in self.batches)
        return self._count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


class Images:
    """Images of a source, decoded in workers and prepared as the model wants them; `open_data` says which.

    An image that cannot be decoded is left out; its name and the reason are in `corrupt` after the pass.
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
        self._numbers = torch.tensor(numbers_of(self.source, self.classes, model, is_folder))
        self.notes = how_numbered(self.classes, model, is_folder)
        if split != splits[0]:
            self.notes += (f"Images of the {split} split: there is no {splits[0]} split.",)
        if isinstance(opened, Stream) and limit is not None:
            self.notes += (f"Of a stream: its first {limit} images.",)
        self._opened, self._workers = limited(opened, limit), workers
        self._count = len(self._opened) if isinstance(self._opened, Source) else None

    def __len__(self) -> int:
        if self._count is None:  # nobody knows how long a stream is before it was walked
            self._count = sum(1 for _ in self._opened.samples(0, 0)) if isinstance(self._opened, Stream) else 0
        return self._count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.corrupt.clear()
        for batch in in_order(self._opened, self.preprocessing, batch_size=self.batch_size, workers=self._workers):
            self.corrupt += batch.unreadable
            if len(batch.labels):
                yield batch.inputs, self._numbers[batch.labels]


Folder = Images  # a path is a source too


class FashionMNIST:
    """The bundled test set: batches of `[B, 1, 28, 28]` as the bundled model takes them, and labels `[B]`.

    With a `preprocessing` each image goes through that instead.
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
    """Say whether the images go through what `normalise` does to a whole batch."""
    plain = _bundled()
    return (found.size, found.mean, found.std) == (plain.size, plain.mean, plain.std) and found.resize in (None, 28)


def _prepared(images: Tensor, preprocessing: Preprocessing) -> Tensor:  # uint8 [B, 28, 28]
    from PIL import Image

    return torch.stack([preprocessing(Image.fromarray(image.numpy())) for image in images])


def normalise(images: Tensor) -> Tensor:  # uint8 [B, 28, 28]
    """Return what the bundled model takes: float `[B, 1, 28, 28]` of the training set's mean and deviation."""
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
    """Open the images of a source to evaluate on: a folder, or one named as in `data.source` of a recipe.

    Of a source with splits the test split is taken, else the validation split, else the training split; the notes say
    so. Images are prepared as the model says; `preprocessing` is taken instead: a `Preprocessing`, a Hugging Face image
    processor, or a function of one PIL image. `options` are those of `find_preprocessing`: `beside`, `mean`, ...
    Raises `DataError` for a source that is missing, empty, of other classes, or holds no images.
    """
    check_source(source)
    if source != FASHION_MNIST:
        found = find_preprocessing(model, given=preprocessing, **options)
        return Images(source, model, batch_size, workers, limit, found)
    classes = declared_classes(model)
    if classes not in (None, 10):
        raise DataError(f"fashion-mnist has 10 classes, the model has {classes}; use the bundled model 'reference'.")
    return FashionMNIST(batch_size, limit, _for_fashion_mnist(model, preprocessing, options))


def _open(source: str, splits: Sequence[str]) -> tuple[Source | Stream, str]:
    """Open the first of these splits that a source has, and say which."""
    for split in splits:
        try:
            return open_source(source, split, Data(source="")), split
        except MissingSplitError as error:
            missing = error
    raise missing


def _for_fashion_mnist(model: nn.Module, given: Any, options: dict[str, Any]) -> Preprocessing:
    """Return what a model says of its images; one that says nothing gets what the bundled model's go through."""
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


def none_read(data: Labelled) -> DataError:
    """Return the error of a pass over images that yielded none, with the first reason."""
    first = f"; the first: {data.corrupt[0]}" if data.corrupt else ""
    return DataError(f"none of the {len(data)} images of {data.source} could be read{first}.")


def calibration_images(source: str, model: nn.Module, preprocessing: Any = None, **options: Any) -> Tensor:
    """Return 64 images for `patch(model, "auto", calibrate=...)`, as the model takes them, `[64, C, H, W]`.

    They are those of the training split where there is one: of `"fashion-mnist"` the first, of a folder or data set
    spread over its classes, of a stream the first once it is shuffled. `preprocessing` and `options` are those of
    `open_data`. Raises `DataError` where there are none, or the model does not take them.
    """
    check_source(source, "--calibrate")
    if source == FASHION_MNIST:
        own = _for_fashion_mnist(model, preprocessing, options)
        try:
            data: FashionMNIST | Images = FashionMNIST(_CALIBRATION, _CALIBRATION, own, split="train")
        except DataError as error:
            raise DataError(f"{error} Or give a folder of images.") from error
    else:
        found = find_preprocessing(model, given=preprocessing, **options)
        data = Images(source, model, _CALIBRATION, 0, _CALIBRATION, found, ("train", "valid", "test"))
    images = torch.cat([torch.empty(0), *(batch for batch, _ in data)])
    if not len(images):
        raise none_read(data)
    run_images(model, images[:1].to(next(model.parameters())))
    return images


def check_source(source: str, option: str = "--data") -> None:
    """Raise `DataError` where a source does not exist or holds no images, before a model is loaded for it."""
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
