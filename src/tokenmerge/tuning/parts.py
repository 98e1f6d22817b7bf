"""The images to tune on, in parts that share no image: to search on, to select on, and to report on."""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenmerge.data.answers import declared_classes, run_images
from tokenmerge.data.labelled import Labelled, check_labelled, sample_data
from tokenmerge.data.preprocessing import Preprocessing
from tokenmerge.errors import DataError

__all__ = ["LEAST", "Part", "Parts", "split", "whole"]

LEAST = 64  # images: fewer say nothing about single percents
_SHARES = (0.5, 0.2)  # of the images: to search on, to select on; the rest is for the report
_SCREENED = (4, 64)  # a quarter of the search images screens candidates, or so many where there are fewer
_CORRUPT = 0.1  # the share of unreadable images from which on it is an error


class _Store:
    """Images in a temporary file: decoded once, and never all in memory."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115, closed with the store
        weakref.finalize(self, self._file.close)
        self.shape: tuple[int, ...] = ()
        self.count = self.copies = 0  # images, and those that are the same as an earlier one
        self.digest = hashlib.sha256()
        self._known: set[bytes] = set()

    def add(self, images: Tensor) -> None:
        if self.count and tuple(images.shape[1:]) != self.shape:
            raise DataError(f"the images have several sizes: {self.shape} and {tuple(images.shape[1:])}.")
        self.shape, self.count = tuple(images.shape[1:]), self.count + len(images)
        for image in images.detach().cpu().float():
            content = image.contiguous().numpy().tobytes()
            self.digest.update(content)
            self._known.add(hashlib.sha256(content).digest())
            self._file.write(content)
        self.copies = self.count - len(self._known)

    def take(self, places: Sequence[int]) -> Tensor:
        out = torch.empty(len(places), *self.shape)
        rows = out.flatten(1).numpy()
        for row, place in zip(rows, places, strict=True):
            self._file.seek(place * row.nbytes)
            self._file.readinto(row)  # type: ignore[attr-defined]
        return out


class Part:
    """Some of the images in batches, as the tools take labelled data; labels of 0 where there are none."""

    corrupt: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __init__(
        self, store: _Store, labels: Tensor | None, places: Sequence[int], batch_size: int, outputs: int, name: str
    ) -> None:
        self._store, self._places, self.batch_size, self.source = store, list(places), batch_size, name
        self.labels = torch.zeros(store.count, dtype=torch.long) if labels is None else labels
        self.outputs = outputs
        self.classes = tuple(map(str, range(max(0, self.outputs))))
        self.preprocessing = Preprocessing((), None, False, "", None, None, name)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self), self.batch_size):
            places = self._places[start : start + self.batch_size]
            yield self._store.take(places), self.labels[places]


class Parts(NamedTuple):
    """The parts of the images; `screen` is the beginning of `search`, the others share no image."""

    screen: Part
    search: Part
    select: Part
    report: Part
    corrupt: tuple[str, ...]
    digest: str
    has_labels: bool
    note: str  # what is to be said about the labels
    copies: int = 0  # images that are the same as another one


def split(
    images: Tensor | str | Labelled,
    labels: Tensor | Sequence[int] | None,
    model: nn.Module,
    *,
    batch_size: int,
    seed: int,
) -> Parts:
    """Read images once and deal them out by the seed, whatever their labels.

    Raises `DataError` for fewer than 64 images, labels that do not fit the images or the model, more than a tenth of
    unreadable images, and images that are not finite.
    """
    store, found, data = _Store(), [], None
    if isinstance(images, Tensor):
        if images.dim() < 2 or not images.is_floating_point():
            raise DataError(
                f"images are {tuple(images.shape)} of {images.dtype}; give the model's inputs [N, ...] as floats."
            )
        _fill(store, [images])
    else:
        if not isinstance(images, str):
            _check_kind(images)
        data = sample_data(images, model, batch_size=batch_size) if isinstance(images, str) else images
        for batch, own in data:
            _fill(store, [batch])
            found.append(own)
    given = _tensor(labels) if labels is not None else torch.cat(found) if found else None
    corrupt = () if data is None else tuple(data.corrupt)
    _check_count(store.count, corrupt, data)
    outputs = _outputs(model, store)
    if data is not None and labels is None and given is not None and bool((given < 0).any()):
        given, note = None, " ".join(data.notes)
    else:
        no_classes = _no_classes(model, outputs, data if labels is None else None)
        given, note = _labels(given, store.count, outputs, no_classes, is_asked=labels is not None)
    if given is None and not _is_classifier(model, outputs):
        outputs = -1  # no model has so many: answers are compared as vectors alone
    # by the seed alone: labels that a target does not read must not change what is found
    order = torch.randperm(store.count, generator=torch.Generator().manual_seed(seed)).tolist()
    first, second = (int(sum(_SHARES[:n]) * store.count) for n in (1, 2))
    places = {"search": order[:first], "select": order[first:second], "report": order[second:]}
    parts = {name: Part(store, given, at, batch_size, outputs, name) for name, at in places.items()}
    screened = order[: min(first, max(first // _SCREENED[0], _SCREENED[1]))]
    screen = Part(store, given, screened, batch_size, outputs, "screen")
    about = (corrupt, store.digest.hexdigest()[:16], given is not None, note, store.copies)
    return Parts(screen, parts["search"], parts["select"], parts["report"], *about)


def whole(images: Tensor, batch_size: int) -> Parts:
    """Return parts that are all the same images `[N, ...]`, for a choice that no figure is reported of."""
    store = _Store()
    store.add(images)
    part = Part(store, None, range(store.count), batch_size, -1, "calibrate")
    return Parts(part, part, part, part, (), store.digest.hexdigest()[:16], has_labels=False, note="")


def _check_kind(images: Any) -> None:
    """Raise `DataError` for what is neither a tensor nor data that can be read again and again."""
    try:
        check_labelled(images)
    except DataError as error:
        raise DataError(
            f"images are of type {type(images).__qualname__}; give the model's inputs as one tensor [N, ...], the name "
            "of a folder, or labelled data: Batches(loader, classes) of tokenmerge.data.labelled."
        ) from error


def _tensor(labels: Tensor | Sequence[int]) -> Tensor:
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"labels are {str(labels)[:60]}; give the class of each image as a whole number.") from error


def _fill(store: _Store, batches: Sequence[Tensor]) -> None:
    for batch in batches:
        is_bad = ~batch.flatten(1).isfinite().all(dim=1)
        if is_bad.any():
            first = store.count + int(is_bad.nonzero()[0])
            raise DataError(f"{int(is_bad.sum())} images hold NaN or infinity, the first is image {first}.")
        store.add(batch)


def _check_count(count: int, corrupt: Sequence[str], data: Labelled | None) -> None:
    whole = count + len(corrupt)
    if len(corrupt) > _CORRUPT * whole:
        raise DataError(
            f"{len(corrupt)} of {whole} images cannot be read, more than a tenth; the first: {corrupt[0]}. "
            "Repair or remove them."
        )
    if count < LEAST:
        source = "" if data is None else f" of {data.source}"
        raise DataError(
            f"tune measures on images, and there are {count}{source}. Give at least {LEAST} as the model sees them in "
            "use (unlabelled ones will do); a few hundred are better. A folder of photographs or a data set's "
            "validation split is enough: --data DIR."
        )


def _outputs(model: nn.Module, store: _Store) -> int:
    """Return how many numbers the model answers with; -1 for more than a vector."""
    answer = run_images(model, store.take([0]).to(next(model.parameters())))
    if not answer.isfinite().all():
        raise DataError("the unmerged model answers the first image with NaN or infinity: nothing can be compared.")
    return answer.shape[1] if answer.dim() == 2 else -1


def _is_classifier(model: nn.Module, outputs: int) -> bool:
    """Whether answers are classes. A last layer without a bias projects, as CLIP's, which timm counts as classes."""
    last = next((part for part in reversed([*model.modules()]) if isinstance(part, nn.Linear)), None)
    return declared_classes(model) == outputs and (last is None or last.bias is not None)


def _no_classes(model: nn.Module, outputs: int, data: Labelled | None) -> str:
    """Return why the answers are no classes of these images, "" if they may be."""
    if getattr(model, "num_classes", None) == 0:  # as timm says it
        return "the model answers with features, it has no classes (num_classes = 0)"
    if data is None or data.outputs == outputs or declared_classes(model) is not None:
        return ""
    return f"the model answers with {outputs} numbers, the data has {data.outputs} classes"


def _labels(
    labels: Tensor | None, count: int, outputs: int, no_classes: str, *, is_asked: bool
) -> tuple[Tensor | None, str]:
    """Return the labels if they are classes of the model's answers, and a note where they are not."""
    if labels is None:
        return None, ""
    if labels.shape != (count,) or labels.is_floating_point():
        raise DataError(
            f"labels are {tuple(labels.shape)} of {labels.dtype}; give the class of each of {count} images."
        )
    if no_classes:
        if is_asked:
            raise DataError(f"there are labels, and {no_classes}: give no labels, or the model with its classifier.")
        return None, f"{no_classes}: labels are not used."
    low, high = int(labels.min()), int(labels.max())
    if not 0 <= low <= high < outputs:
        text = f"labels go from {low} to {high}, and the model answers with {max(0, outputs)} classes"
        if is_asked:
            raise DataError(f"{text}: give labels that the model was trained for, or none.")
        return None, f"{text}: they are not used."
    if low == high:
        return labels, f"all images are of class {low}: accuracy and agreement on them say little about others."
    return labels, ""
