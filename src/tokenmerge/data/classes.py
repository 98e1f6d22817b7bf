"""Map class names to a model's class numbers: by its labels, by numeric names, or by order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tokenmerge.data.answers import declared_classes
from tokenmerge.errors import DataError

__all__ = ["by_label", "class_names", "how_numbered", "numbers_of"]


def by_label(model: nn.Module, classes: Sequence[str]) -> list[int] | None:
    """Return a Hugging Face model's number for each class name; None if no name is one of its labels.

    Names are compared without case, and "/" and " " equal "_", because a folder name cannot contain every character.
    Raises `DataError` if only some names are labels: numbering by order would then give wrong classes.
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


def class_names(
    model: nn.Module, count: int | None, given: Sequence[str] | str | Path | None = None, *, unnamed: str = "class {}"
) -> list[str]:
    """Return the names of a model's classes in their order: `given` (also a file with one a line), or its own.

    `unnamed` makes names of numbers where the model says none. Empty for a model without classes (`count` None).
    Raises `DataError` for another number of names.
    """
    if given is None:
        found = _own_names(model, count) if count else []
        return found if len(found) == (count or 0) else [unnamed.format(n) for n in range(count or 0)]
    if isinstance(given, (str, Path)):
        try:
            given = Path(given).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read the names of the classes, {given}: {error}.") from error
    names = [name.strip() for name in given if name.strip()]
    if count is None or len(names) != count:
        raise DataError(f"{len(names)} names of classes for a model with {count or 'no'} classes; give one for each.")
    return names


def _own_names(model: nn.Module, count: int) -> list[str]:
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if labels:
        return [str(label) for _, label in sorted(labels.items(), key=lambda item: int(item[0]))]
    if weights := getattr(model, "torchvision_weights", None):
        return list(weights.meta.get("categories", ()))
    known: Any = getattr(model, "pretrained_cfg", None)
    if not known:
        return []
    names = known.get("label_names") if isinstance(known, dict) else getattr(known, "label_names", None)
    return list(names) if names else _imagenet_names(model)


def _imagenet_names(model: nn.Module) -> list[str]:
    """Return the names of the classes of a timm model that was trained on a part of ImageNet."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    part = infer_imagenet_subset(model)
    if not part:
        return []
    info = ImageNetInfo(part)
    return [info.index_to_description(number).partition(",")[0] for number in range(info.num_classes())]


def how_numbered(classes: Sequence[str], model: nn.Module, is_folder: bool = True) -> tuple[str, ...]:
    """Describe how classes are numbered if the model has labels and no class name is one of them."""
    labels = getattr(getattr(model, "config", None), "label2id", None)
    if not labels or declared_classes(model) is None or by_label(model, classes) is not None:
        return ()
    what, order = ("Class folders", "in the order of names") if is_folder else ("Classes", "in their own order")
    how = "by the numbers they are called" if all(name.isdecimal() for name in classes) else order
    return (f"{what} are numbered {how}: none is called as a label of the model ({_shortened([*labels])}).",)


def numbers_of(source: str, classes: Sequence[str], model: nn.Module, is_folder: bool = True) -> list[int]:
    """Return the model's number for each class; raise `DataError` if the classes do not fit the model."""
    expected = declared_classes(model)
    found = by_label(model, classes) if expected is not None else None
    if found is not None:
        return found
    # number numeric names by value, never by order: as text, "10" sorts before "2"
    is_numbered = all(name.isdecimal() for name in classes)
    if is_numbered and all(int(name) < (expected or len(classes)) for name in classes):
        return [int(name) for name in classes]
    if expected is not None and (is_numbered or len(classes) != expected):
        what = "class folders" if is_folder else "classes"
        order = (
            "Folders are numbered in the order of their names: give a folder with all classes, or name the sub-folders "
            if is_folder
            else "Give data with all classes, or name the classes by the model's labels or "
        )
        raise DataError(
            f"{source} has {len(classes)} {what} ({', '.join(classes[:3])}, ...), the model has {expected} classes. "
            f"{order}by class index, 0 to {expected - 1}."
        )
    return list(range(len(classes)))


def _plain(label: object) -> str:
    return str(label).casefold().replace("/", "_").replace(" ", "_")


def _shortened(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join([*names[:limit], *(["..."] if len(names) > limit else [])])
