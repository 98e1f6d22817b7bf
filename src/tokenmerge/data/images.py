"""Sources of images: Fashion-MNIST, folders, Hugging Face data sets, and streamed shards; see `sources.KINDS`."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from torch import Tensor

from tokenmerge.data.opening import as_seen, decode
from tokenmerge.data.settings import Data
from tokenmerge.data.sources import (
    SPLITS,
    MissingSplitError,
    Raw,
    Source,
    Stream,
    check_classes,
    files_below,
    labelled,
    seed_of,
)
from tokenmerge.errors import DataError, unknown_name

__all__ = ["fashion_mnist", "files", "folder", "hf", "hf_stream", "wds"]

T = TypeVar("T")
HELD_OUT = 2_000  # the last training images are the validation split
SIZE = (3, 224, 224)


def part_of_fashion_mnist(split: str) -> tuple[Tensor, Tensor]:
    """Return images, uint8 `[n, 28, 28]`, and labels of a split; "valid" is the last 2,000 training images."""
    from tokenmerge import assets

    try:
        images, labels = assets.fashion_mnist("test" if split == "test" else "train")
    except FileNotFoundError as error:
        raise DataError(f"the training images are not bundled: {error}.") from error
    part = {"train": slice(-HELD_OUT), "valid": slice(-HELD_OUT, None), "test": slice(None)}[split]
    return images[part], labels[part]


class FashionMNIST(Source):
    """Fashion-MNIST: 58,000 training images, the last 2,000 for validation, and the bundled test set."""

    size = (1, 28, 28)

    def __init__(self, rest: str, split: str, data: Data) -> None:
        import PIL.Image  # noqa: F401 - fail here if it is missing

        from tokenmerge import assets

        self.images, self.labels = part_of_fashion_mnist(split)
        self.classes = assets.CLASSES

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Raw, int]:
        from PIL import Image

        return Image.fromarray(self.images[index].numpy()), int(self.labels[index])


class Folder(Source):
    """A folder PATH/train/CLASS/x.jpg, with valid (or val, validation) and test beside train; or PATH/CLASS/x.jpg."""

    size = SIZE

    def __init__(self, root: str, split: str, data: Data) -> None:
        from PIL import Image

        Image.init()
        self.samples, self.classes = labelled(root, split, list(Image.registered_extensions()), data)

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Raw, int]:
        path, label = self.samples[index]
        return decode(path, lambda: path), label


class Files(Source):
    """Every image below a folder, at any depth and without labels: all are of one class."""

    size = SIZE
    classes = ("image",)

    def __init__(self, root: str, split: str, data: Data) -> None:
        from PIL import Image

        Image.init()
        self.paths = files_below(Path(root), tuple(Image.registered_extensions()))
        if not self.paths:
            raise DataError(f"there is no image below {root}.")

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> tuple[Raw, int]:
        path = self.paths[index]
        return decode(path, lambda: path), 0


class HuggingFace(Source):
    """A data set of the `datasets` library: a name on the hub, or a folder written by `save_to_disk`.

    If the columns cannot be found by type, or it has configurations: `hf:NAME?config=C&image=I&label=L`.
    """

    size = SIZE

    def __init__(self, rest: str, split: str, data: Data) -> None:
        self.name = f"{rest}, {split}"
        rows, self.image, self.label, self.classes = _columns(*_rows(rest, split, streaming=False))
        self.rows = rows.select_columns([self.image, self.label])
        labels = [-1 if label is None else label for label in self.rows[self.label]]
        check_classes(labels, self.classes, self.name, all_there=split == "train")

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> tuple[Raw, int]:
        row = self.rows[index]
        return _cell(f"row {index} of {self.name}", row[self.image]), row[self.label]


class HuggingFaceStream(Stream):
    """A streamed Hugging Face data set; shuffles the shards, and samples within a buffer of `data.shuffle`."""

    size = SIZE

    def __init__(self, rest: str, split: str, data: Data) -> None:
        self.name, self.shuffle = f"{rest}, {split}", data.shuffle if split == "train" else 0
        self.rows, self.image, self.label, self.classes = _columns(*_rows(rest, split, streaming=True))

    def samples(self, epoch: int, seed: int) -> Iterator[tuple[Callable[[], Raw], int]]:
        generator = random.Random(seed_of(seed, epoch))
        shards = list(range(self.rows.num_shards))
        if self.shuffle:
            generator.shuffle(shards)
        for number, (cell, label) in enumerate(_shuffled(self._walk(shards), self.shuffle, generator)):
            yield partial(_cell, f"sample {number} of {self.name}", cell), -1 if label is None else label

    def _walk(self, shards: list[int]) -> Iterator[tuple[Any, int | None]]:
        # iterate shard by shard: iterated as a whole, `datasets` would give each DataLoader worker only its share
        for shard in shards:
            for part in self.rows.shard(self.rows.num_shards, shard).iter(16):
                yield from zip(part[self.image], part[self.label], strict=True)


def _rows(rest: str, split: str, streaming: bool) -> tuple[Any, dict[str, str]]:
    """Return a split of a data set, and the options after its name."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    name, _, query = rest.partition("?")
    options = dict(parse_qsl(query))
    for option in options:
        if option not in ("config", "image", "label"):
            raise unknown_name(f"option of hf:{name}", option, ["config", "image", "label"])
    is_saved = (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file()
    try:
        splits = load_from_disk(name) if is_saved else load_dataset(name, options.get("config"), streaming=streaming)
    except (OSError, ValueError) as error:  # the base classes of both libraries' errors on names, files and connections
        raise DataError(f"cannot open the data set {name}: {error}") from error
    if not isinstance(splits, dict):
        splits = DatasetDict({"train": splits})
    rows = next((splits[there] for there in SPLITS[split] if there in splits), None)
    if rows is None:
        raise MissingSplitError(f"the data set {name} has no {split} split; it has {', '.join(map(str, splits))}.")
    return rows.to_iterable_dataset() if is_saved and streaming else rows, options


def _columns(rows: Any, options: dict[str, str]) -> tuple[Any, str, str, tuple[str, ...]]:
    """Return the rows with undecoded images, the names of the two columns, and the class names."""
    from datasets import ClassLabel, Image

    features = rows.features or {}
    names = {}
    for role, kind in (("image", Image), ("label", ClassLabel)):
        fitting = [name for name, feature in features.items() if isinstance(feature, kind)]
        chosen = options.get(role, fitting[0] if len(fitting) == 1 else role)
        if chosen not in fitting:
            raise DataError(
                f"which column is the {role}? {kind.__name__} columns: {', '.join(fitting) or 'none'}; all columns: "
                f"{', '.join(features) or 'unknown'}. Give hf:NAME?{role}=COLUMN, or cast one with cast_column."
            )
        names[role] = chosen
    classes = tuple(features[names["label"]].names)
    return rows.cast_column(names["image"], Image(decode=False)), names["image"], names["label"], classes


def _cell(name: str, cell: dict[str, Any] | None) -> Raw:
    """Decode a cell of an image column: bytes, or a path on this machine or elsewhere."""
    from datasets import Image

    if cell is None:
        raise OSError(f"{name}: there is no image")
    if cell["bytes"] is not None:
        return decode(name, lambda: io.BytesIO(cell["bytes"]))
    try:
        return as_seen(Image().decode_example(cell))
    except Exception as error:
        raise OSError(f"{name}: {cell['path']}: {error}") from error


class Shards(Stream):
    """WebDataset shards of images, PATH/train-{000..099}.tar: a jpg (png, ...) and a cls file per sample.

    `cls` is a class number or name; `classes.json`, beside the shards, lists the names. Each epoch shuffles the shards,
    and the undecoded samples within a buffer of `data.shuffle`.
    """

    size = SIZE

    def __init__(self, pattern: str, split: str, data: Data) -> None:
        import webdataset
        from braceexpand import braceexpand
        from PIL import Image

        if split != "train" and data.source == f"wds:{pattern}":
            raise DataError(f"{pattern} are the training shards; give the {split} ones as data.valid=wds:PATTERN.")
        self.urls = list(braceexpand(pattern))
        missing = [url for url in self.urls if ":" not in url and not Path(url).is_file()]
        if missing:
            raise DataError(f"{len(missing)} of {len(self.urls)} shards are not there: {', '.join(missing[:3])}.")
        beside = f"{self.urls[0].rpartition('/')[0] or '.'}/classes.json"
        try:
            with webdataset.gopen(beside) as stream:
                names = json.load(stream)
        except Exception as error:  # every URL scheme raises its own errors
            raise DataError(f"cannot read {beside}, a list of the names of the classes: {error}.") from error
        if not isinstance(names, list) or not names:
            raise DataError(f"{beside} holds {str(names)[:40]}; it takes a list of the names of the classes.")
        self.classes = tuple(map(str, names))
        self.shuffle = data.shuffle if split == "train" else 0
        Image.init()
        self.suffixes = {suffix[1:] for suffix in Image.registered_extensions()}

    def samples(self, epoch: int, seed: int) -> Iterator[tuple[Callable[[], Raw], int]]:
        generator = random.Random(seed_of(seed, epoch))
        urls = generator.sample(self.urls, len(self.urls)) if self.shuffle else self.urls
        for sample in _shuffled(self._walk(urls), self.shuffle, generator):
            name = f"{sample['__key__']} of {sample['__url__']}"
            picture = next((sample[suffix] for suffix in sample if suffix in self.suffixes), None)
            if picture is None or "cls" not in sample:
                there = ", ".join(key for key in sample if not key.startswith("__"))
                raise DataError(f"{name} has {there}; it needs an image (jpg, png, ...) and its class (cls).")
            yield partial(decode, name, partial(io.BytesIO, picture)), self._label(name, sample["cls"])

    def _walk(self, urls: list[str]) -> Iterator[dict[str, Any]]:
        import webdataset
        from webdataset.tariterators import group_by_keys, tar_file_expander

        for url in urls:
            try:
                with webdataset.gopen(url) as stream:
                    yield from group_by_keys(tar_file_expander([{"url": url, "stream": stream}]))
            except (OSError, tarfile.TarError, ValueError) as error:
                raise DataError(f"cannot read the shard {url}: {error.args[0]}.") from error

    def _label(self, name: str, content: bytes) -> int:
        text = content.decode(errors="replace").strip()
        if text in self.classes:
            return self.classes.index(text)
        if not text.isdecimal():
            raise DataError(f"{name} is of class {text!r}: no number and none of the {len(self.classes)} names.")
        return int(text)


def _shuffled(samples: Iterable[T], size: int, generator: random.Random) -> Iterator[T]:
    """Yield samples in random order from a buffer of `size` samples."""
    waiting: list[T] = []
    for sample in samples:
        waiting.append(sample)
        if len(waiting) > size:
            chosen = generator.randrange(len(waiting))
            waiting[chosen], waiting[-1] = waiting[-1], waiting[chosen]
            yield waiting.pop()
    generator.shuffle(waiting)
    yield from waiting


# the names used in `sources.KINDS`
fashion_mnist = FashionMNIST
files = Files
folder = Folder
hf = HuggingFace
hf_stream = HuggingFaceStream
wds = Shards
