"""Labelled images for the tools: the bundled Fashion-MNIST test set, or a folder with one sub-folder per class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import tokenmerge
from tokenmerge.errors import DataError, UnsupportedError
from tokenmerge.tools.models import known_size, run_images

__all__ = [
    "FASHION_MNIST",
    "FashionMNIST",
    "Folder",
    "calibration_images",
    "check_source",
    "normalise",
    "open_data",
]

FASHION_MNIST = "fashion-mnist"
_CALIBRATION = 64  # images that "auto" chooses by


class FashionMNIST:
    """The bundled test set, normalised for the bundled model: batches of `[B, 1, 28, 28]` and labels `[B]`."""

    corrupt: tuple[str, ...] = ()
    source = FASHION_MNIST

    def __init__(self, batch_size: int, limit: int | None = None) -> None:
        from tokenmerge import assets

        _check_amounts(batch_size, limit)
        images, labels = assets.fashion_mnist("test")
        self.images, self.labels = images[:limit], labels[:limit]
        self.batch_size = batch_size
        self.classes = list(assets.CLASSES)

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            yield normalise(images), labels


def normalise(images: Tensor) -> Tensor:  # uint8 [B, 28, 28]
    """Return what the bundled model takes: float `[B, 1, 28, 28]` of the training set's mean and deviation."""
    from tokenmerge import assets

    return (images[:, None].float() / 255 - assets.MEAN) / assets.STD


class Folder:
    """A folder of images, one sub-folder per class, decoded in workers with timm's own transforms for the model.

    An image that cannot be decoded is left out; its path and the reason are in `corrupt` after the pass.
    """

    def __init__(self, root: Path, model: nn.Module, batch_size: int, workers: int, limit: int | None = None) -> None:
        _check_amounts(batch_size, limit, workers)
        self.corrupt: list[str] = []
        self.source, self.batch_size = str(root), batch_size
        dataset, self.classes = _image_folder(root, model)
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
            if images is not None:
                yield images, labels


def open_data(
    source: str, model: nn.Module, *, batch_size: int, workers: int = 2, limit: int | None = None
) -> FashionMNIST | Folder:
    """Open `"fashion-mnist"` or a folder; raises `DataError` for a folder missing, empty or of other classes."""
    if source == FASHION_MNIST:
        classes = getattr(model, "num_classes", 10)
        if classes != 10:
            raise DataError(
                f"fashion-mnist has 10 classes, the model has {classes}; use the bundled model 'reference'."
            )
        return FashionMNIST(batch_size, limit)
    return Folder(Path(source), model, batch_size, workers, limit)


def calibration_images(source: str, model: nn.Module) -> Tensor:
    """Return 64 images for `patch(model, "auto", calibrate=...)`, as the model takes them, `[64, C, H, W]`.

    `"fashion-mnist"`: the first of its training images, never those of the test; a folder: spread over its classes.
    Raises `DataError` where there are none, or the model does not take them.
    """
    check_source(source, "--calibrate")
    if source == FASHION_MNIST:
        from tokenmerge import assets

        try:
            images = normalise(assets.fashion_mnist("train")[0][:_CALIBRATION])
        except FileNotFoundError as error:
            raise DataError(f"the training images are not bundled: {error}. Or give a folder of images.") from error
    else:
        folder = Folder(Path(source), model, _CALIBRATION, workers=0, limit=_CALIBRATION)
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


def _input_size(model: nn.Module) -> tuple[int, ...]:
    with tokenmerge.patched(model, r=0) as handle:
        return known_size(handle)


def _check_amounts(batch_size: int, limit: int | None, workers: int = 0) -> None:
    if batch_size < 1 or (limit is not None and limit < 1):
        raise DataError(f"batch size and limit must be at least 1; got {batch_size} and {limit}.")
    if workers < 0:
        raise DataError(f"the number of workers must be at least 0; got {workers}.")


def _image_folder(root: Path, model: nn.Module) -> tuple[Any, list[str]]:
    try:
        from timm.data import create_transform, resolve_data_config
        from torchvision.datasets import ImageFolder
    except ImportError as error:
        raise UnsupportedError('an image folder needs timm and torchvision: pip install "tokenmerge[timm]"') from error
    check_source(str(root))
    has_config = bool(getattr(model, "pretrained_cfg", None))
    given = {} if has_config else {"input_size": _input_size(model)}
    transform = create_transform(**resolve_data_config(given, model=model))
    try:
        dataset = ImageFolder(root, transform=transform, loader=_Loader(transform))
    except FileNotFoundError as error:
        raise DataError(f"{root} holds no labelled images: expected {root}/CLASS/IMAGE. {error}.") from error
    expected = getattr(model, "num_classes", None)
    classes = dataset.classes
    is_numbered = all(name.isdecimal() for name in classes)
    if expected is not None and is_numbered and all(int(name) < expected for name in classes):
        # by index even where all classes are there: in the order of names, "10" comes before "2"
        dataset.samples = [(path, int(classes[label])) for path, label in dataset.samples]
    elif expected is not None and (is_numbered or len(classes) != expected):
        raise DataError(
            f"{root} has {len(classes)} class folders ({', '.join(classes[:3])}, ...), the model has {expected} "
            "classes. Folders are numbered in the order of their names: give a folder with all classes, or name the "
            f"sub-folders by class index, 0 to {expected - 1}."
        )
    dataset.transform = None
    return dataset, classes


class _Loader:
    """Decodes and transforms one image; an image that cannot be decoded becomes a sentence."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, path: str) -> Tensor | str:
        from PIL import Image

        try:
            with Image.open(path) as image:
                tensor: Tensor = self.transform(image.convert("RGB"))
                return tensor
        # what PIL raises for broken files, and for those of absurd size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return f"{path}: {error}"


def _collate(samples: list[tuple[Tensor | str, int]]) -> tuple[Tensor | None, Tensor, list[str]]:
    good = [(image, label) for image, label in samples if isinstance(image, Tensor)]
    corrupt = [image for image, _ in samples if isinstance(image, str)]
    images = torch.stack([image for image, _ in good]) if good else None
    return images, torch.tensor([label for _, label in good]), corrupt
