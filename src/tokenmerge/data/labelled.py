"""Labelled images for the tools: the bundled Fashion-MNIST test set, or a folder with one sub-folder per class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tokenmerge.data.prepare import find_preprocessing
from tokenmerge.data.preprocessing import Preprocessing
from tokenmerge.errors import DataError, TokenMergeError, UnsupportedError
from tokenmerge.measure.outputs import declared_classes, run_images

__all__ = [
    "FASHION_MNIST",
    "FashionMNIST",
    "Folder",
    "by_label",
    "calibration_images",
    "check_source",
    "normalise",
    "open_data",
]

FASHION_MNIST = "fashion-mnist"
_CALIBRATION = 64  # images that "auto" chooses by


class FashionMNIST:
    """The bundled test set: batches of `[B, 1, 28, 28]` as the bundled model takes them, and labels `[B]`.

    With a `preprocessing` each image goes through that instead.
    """

    corrupt: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    source = FASHION_MNIST

    def __init__(self, batch_size: int, limit: int | None = None, preprocessing: Preprocessing | None = None) -> None:
        from tokenmerge import assets

        _check_amounts(batch_size, limit)
        images, labels = assets.fashion_mnist("test")
        self.images, self.labels = images[:limit], labels[:limit]
        self.batch_size = batch_size
        self.classes = list(assets.CLASSES)
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


class Folder:
    """A folder of images, one sub-folder per class, decoded in workers and prepared as the model wants them.

    An image that cannot be decoded is left out; its path and the reason are in `corrupt` after the pass. `outputs` is
    how many answers a model must have for the labels to count.
    """

    def __init__(
        self,
        root: Path,
        model: nn.Module,
        batch_size: int,
        workers: int,
        limit: int | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        _check_amounts(batch_size, limit, workers)
        self.corrupt: list[str] = []
        self.source, self.batch_size = str(root), batch_size
        check_source(str(root))
        self.preprocessing = preprocessing or find_preprocessing(model)
        dataset, self.classes = _image_folder(root, model, self.preprocessing)
        self.outputs = declared_classes(model) or len(self.classes)
        self.notes = _how_numbered(self.classes, model)
        count = len(dataset.samples)
        if limit is not None and limit < count:
            # spread over the classes, which lie one after the other
            dataset.samples = [dataset.samples[i * count // limit] for i in range(limit)]
        self._dataset = dataset
        self._loader = DataLoader(dataset, batch_size, num_workers=workers, collate_fn=_collate)

    def __len__(self) -> int:
        return len(self._dataset.samples)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.corrupt.clear()
        for images, labels, corrupt in self._loader:
            self.corrupt += corrupt
            if isinstance(images, list):
                raise DataError(
                    f"images of one batch have the sizes {', '.join(map(str, images))} after preprocessing "
                    f"({self.preprocessing}): give --resize HEIGHT WIDTH, or a batch size of 1."
                )
            if images is not None:
                yield images, labels


def open_data(
    source: str,
    model: nn.Module,
    *,
    batch_size: int,
    workers: int = 2,
    limit: int | None = None,
    preprocessing: Any = None,
    **options: Any,
) -> FashionMNIST | Folder:
    """Open `"fashion-mnist"` or a folder; raises `DataError` for a folder missing, empty or of other classes.

    Images are prepared as the model says; `preprocessing` is taken instead: a `Preprocessing`, a Hugging Face image
    processor, or a function of one PIL image. `options` are those of `find_preprocessing`: `beside`, `mean`, ...
    """
    if source != FASHION_MNIST:
        check_source(source)
        found = find_preprocessing(model, given=preprocessing, **options)
        return Folder(Path(source), model, batch_size, workers, limit, found)
    classes = declared_classes(model)
    if classes not in (None, 10):
        raise DataError(f"fashion-mnist has 10 classes, the model has {classes}; use the bundled model 'reference'.")
    return FashionMNIST(batch_size, limit, _for_fashion_mnist(model, preprocessing, options))


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


def calibration_images(source: str, model: nn.Module, preprocessing: Any = None, **options: Any) -> Tensor:
    """Return 64 images for `patch(model, "auto", calibrate=...)`, as the model takes them, `[64, C, H, W]`.

    `"fashion-mnist"`: the first of its training images, never those of the test; a folder: spread over its classes.
    `preprocessing` and `options` are those of `open_data`. Raises `DataError` where there are none, or the model does
    not take them.
    """
    check_source(source, "--calibrate")
    if source == FASHION_MNIST:
        from tokenmerge import assets

        try:
            images = assets.fashion_mnist("train")[0][:_CALIBRATION]
        except FileNotFoundError as error:
            raise DataError(f"the training images are not bundled: {error}. Or give a folder of images.") from error
        own = _for_fashion_mnist(model, preprocessing, options)
        images = normalise(images) if _is_bundled(own) else _prepared(images, own)
    else:
        found = find_preprocessing(model, given=preprocessing, **options)
        folder = Folder(Path(source), model, _CALIBRATION, workers=0, limit=_CALIBRATION, preprocessing=found)
        images = torch.cat([torch.empty(0), *(batch for batch, _ in folder)])
        if not len(images):
            raise DataError(f"none of {len(folder)} images of {source} could be read; the first: {folder.corrupt[0]}.")
    run_images(model, images[:1].to(next(model.parameters())))
    return images


def check_source(source: str, option: str = "--data") -> None:
    """Raise `DataError` where a data source is no folder, before a model is loaded for it."""
    if source != FASHION_MNIST and not Path(source).is_dir():
        raise DataError(
            f"no folder {source}: {option} takes {FASHION_MNIST!r} or a folder with one sub-folder per class."
        )


def _check_amounts(batch_size: int, limit: int | None, workers: int = 0) -> None:
    if batch_size < 1 or (limit is not None and limit < 1):
        raise DataError(f"batch size and limit must be at least 1; got {batch_size} and {limit}.")
    if workers < 0:
        raise DataError(f"the number of workers must be at least 0; got {workers}.")


def _image_folder(root: Path, model: nn.Module, preprocessing: Preprocessing) -> tuple[Any, list[str]]:
    try:
        from torchvision.datasets import ImageFolder
    except ImportError as error:
        raise UnsupportedError('an image folder needs timm and torchvision: pip install "tokenmerge[timm]"') from error
    try:
        dataset = ImageFolder(root, loader=_Loader(preprocessing))
    except FileNotFoundError as error:
        raise DataError(f"{root} holds no labelled images: expected {root}/CLASS/IMAGE. {error}.") from error
    classes = dataset.classes
    numbers = _numbers(root, classes, model)
    dataset.samples = [(path, numbers[label]) for path, label in dataset.samples]
    return dataset, classes


def by_label(model: nn.Module, classes: Sequence[str]) -> list[int] | None:
    """Return a Hugging Face model's number of each class by its labels; None where no class is called as a label.

    Case does not count, and "/" and " " count as "_", since a folder cannot be called as every label. Raises
    `DataError` where some are called so and some are not: numbered by their order, they would be other classes.
    """
    labels = getattr(getattr(model, "config", None), "label2id", None) or {}
    plain: dict[str, set[int]] = {}
    for label, number in labels.items():
        plain.setdefault(_plain(label), set()).add(int(number))
    exact = {str(label): {int(number)} for label, number in labels.items()}
    found = [exact.get(name) or plain.get(_plain(name), set()) for name in classes]
    if not any(found):
        return None
    unknown = [name for name, numbers in zip(classes, found, strict=True) if len(numbers) != 1]
    if unknown:
        free = [str(label) for label, number in labels.items() if {int(number)} not in found]
        raise DataError(
            f"{len(unknown)} of {len(classes)} classes are not called as one of the model's labels: "
            f"{_shortened(unknown)}. Labels without a class: {_shortened(free) or 'none'}. Name all class folders by "
            f"the labels, or all by class index, 0 to {len(labels) - 1}."
        )
    return [next(iter(numbers)) for numbers in found]


def _how_numbered(classes: Sequence[str], model: nn.Module) -> tuple[str, ...]:
    """Say what class folders count as, where a model has labels and no folder is called as one."""
    labels = getattr(getattr(model, "config", None), "label2id", None)
    if not labels or declared_classes(model) is None or by_label(model, classes) is not None:
        return ()
    how = "by the numbers they are called" if all(name.isdecimal() for name in classes) else "in the order of names"
    return (f"Class folders are numbered {how}: none is called as a label of the model ({_shortened([*labels])}).",)


def _plain(label: object) -> str:
    return str(label).casefold().replace("/", "_").replace(" ", "_")


def _shortened(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join([*names[:limit], *(["..."] if len(names) > limit else [])])


def _numbers(root: Path, classes: list[str], model: nn.Module) -> list[int]:
    """Return the model's number of each class folder; raises `DataError` where they do not fit its classes."""
    expected = declared_classes(model)
    found = by_label(model, classes) if expected is not None else None
    if found is not None:
        return found
    # by number even where all are there: in the order of names, "10" comes before "2"
    if all(name.isdecimal() for name in classes) and all(int(name) < (expected or len(classes)) for name in classes):
        return [int(name) for name in classes]
    is_numbered = all(name.isdecimal() for name in classes)
    if expected is not None and (is_numbered or len(classes) != expected):
        raise DataError(
            f"{root} has {len(classes)} class folders ({', '.join(classes[:3])}, ...), the model has {expected} "
            "classes. Folders are numbered in the order of their names: give a folder with all classes, or name the "
            f"sub-folders by class index, 0 to {expected - 1}."
        )
    return list(range(len(classes)))


class _Loader:
    """Decodes and prepares one image; an image that cannot be decoded becomes a sentence."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __call__(self, path: str) -> Tensor | str:
        from PIL import Image

        try:
            with Image.open(path) as image:
                return self.preprocessing(image)
        # what PIL raises for broken files, and for those of absurd size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return f"{path}: {error}"


def _collate(samples: list[tuple[Tensor | str, int]]) -> tuple[Any, Tensor, list[str]]:
    """Return images as one tensor, their labels, and what could not be read; of different sizes, a list of these."""
    good = [(image, label) for image, label in samples if isinstance(image, Tensor)]
    corrupt = [image for image, _ in samples if isinstance(image, str)]
    sizes = list(dict.fromkeys(tuple(image.shape) for image, _ in good))
    images = sizes if len(sizes) > 1 else torch.stack([image for image, _ in good]) if good else None
    return images, torch.tensor([label for _, label in good]), corrupt
