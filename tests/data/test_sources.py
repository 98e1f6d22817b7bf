"""Batches that only seed and position decide, and sources of images with what can be wrong with them."""

from __future__ import annotations

import importlib.util
import json
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tokenmerge import assets
from tokenmerge.data import sources
from tokenmerge.data.loader import Batch, Loader, Position, Source, Stream, evaluation, open_source
from tokenmerge.data.transforms import eval_transform, train_transform
from tokenmerge.errors import ConfigError, DataError, UnknownNameError, UnsupportedError
from tokenmerge.training.recipe import Augment, Data

pytestmark = pytest.mark.usefixtures("bundled_images")

CLASSES = ("a", "b", "c")


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


class Numbers(Source):
    classes = CLASSES

    def __init__(self, length: int, broken: tuple[int, ...] = (), error: type[Exception] = OSError) -> None:
        self.length, self.broken, self.error = length, broken, error

    def __len__(self) -> int:
        return self.length

    def read(self, index: int) -> tuple[Any, int]:
        if index in self.broken:
            raise self.error(f"{index}.png is broken")
        return index, index % 3


class Passing(Stream):
    classes = CLASSES

    def __init__(self, length: int, broken: tuple[int, ...] = ()) -> None:
        self.numbers = Numbers(length, broken)
        self.decoded: list[int] = []

    def samples(self, epoch: int, seed: int) -> Iterator[tuple[Callable[[], Any], int]]:
        order = list(range(len(self.numbers)))
        random.Random(100 * seed + epoch).shuffle(order)
        for index in order:
            yield partial(self._decode, index), index % 3

    def _decode(self, index: int) -> int:
        self.decoded.append(index)
        value: int = self.numbers.read(index)[0]
        return value


def augmented(raw: int) -> Tensor:
    """A value that tells the sample, and one draw of every generator."""
    return torch.tensor([raw, random.random(), np.random.rand(), float(torch.rand(()))], dtype=torch.float64)


def take(loader: Loader, count: int, start: Position | None = None) -> list[Batch]:
    return list(islice(loader.batches(start or Position()), count))


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        a.inputs.equal(b.inputs)
        and a.labels.equal(b.labels)
        and a.position == b.position
        and a.unreadable == b.unreadable
        for a, b in zip(one, other, strict=True)
    )


def values(batches: list[Batch]) -> list[list[int]]:
    return [batch.inputs[:, 0].int().tolist() for batch in batches]


# ---- order ----


@pytest.mark.parametrize("source", [Numbers(14), Passing(14)], ids=["indexed", "streamed"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_neither_workers_nor_processes_nor_cuts_change_a_batch(source: Any, workers: int, world: int) -> None:
    expected = take(Loader(source, augmented, batch_size=4, seed=7), 8)  # over two borders of epochs, with 2 left out
    ranks = [
        take(Loader(source, augmented, batch_size=4, seed=7, rank=rank, world=world, workers=workers), 8)
        for rank in range(world)
    ]
    for i, batch in enumerate(expected):
        parts = [rank[i] for rank in ranks]
        assert torch.cat([part.inputs for part in parts]).equal(batch.inputs)
        assert torch.cat([part.labels for part in parts]).equal(batch.labels)
        assert all(part.position == batch.position and len(part.labels) == 4 // world for part in parts)
    for cut in (1, 3, 5):  # within an epoch, at its end, in the next
        again = Loader(source, augmented, batch_size=4, seed=7, rank=world - 1, world=world, workers=workers)
        assert same(take(again, 8 - cut, expected[cut - 1].position), ranks[-1][cut:])


@pytest.mark.parametrize("source", [Numbers(14), Passing(14)], ids=["indexed", "streamed"])
def test_an_epoch_has_every_sample_once_less_what_makes_no_batch(source: Any) -> None:
    batches = take(Loader(source, augmented, batch_size=4, seed=0), 6)
    for epoch in (batches[:3], batches[3:]):
        seen = list(chain(*values(epoch)))
        assert len(seen) == len(set(seen)) == 12 and set(seen) <= set(range(14))
    assert [(b.position.epoch, b.position.index) for b in batches] == [(e, i) for e in (0, 1) for i in (4, 8, 12)]
    assert values(batches[:3]) != values(batches[3:])
    assert all((b.labels == b.inputs[:, 0] % 3).all() for b in batches)
    assert values(take(Loader(source, augmented, batch_size=4, seed=1), 3)) != values(batches[:3])


def test_augmentation_differs_by_sample_epoch_and_seed() -> None:
    def drawn(seed: int) -> Tensor:
        batches = take(Loader(Numbers(4), augmented, batch_size=4, seed=seed), 2)
        return torch.cat([b.inputs[b.inputs[:, 0].argsort(), 1:] for b in batches])

    everything = torch.cat([drawn(0), drawn(1)])
    assert all(len(column.unique()) == 16 for column in everything.unbind(1))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_callers_generators_are_left_alone(workers: int) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def start() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    start()
    expected = [draw() for _ in range(3)]
    start()
    batches = Loader(Numbers(8), augmented, batch_size=4, seed=0, workers=workers).batches()
    got = [draw()]
    for _ in range(2):
        next(batches)
        got.append(draw())
    assert got == expected


@pytest.mark.parametrize("kind", ["image", "clip"])
def test_workers_may_be_started_anew(kind: str) -> None:
    """Where processes are not forked, all that they need is pickled."""
    size = (1, 8, 8) if kind == "image" else (1, 2, 8, 8)
    transform = train_transform(Augment(crop="resize", erase=0.5), kind, size)
    loader = Loader(Pictures(kind), transform, batch_size=2, seed=0)
    assert same(take(pickle.loads(pickle.dumps(loader)), 3), take(loader, 3))


class Pictures(Numbers):
    def __init__(self, kind: str) -> None:
        super().__init__(6)
        self.kind = kind

    def read(self, index: int) -> tuple[Any, int]:
        picture = _checks("L")
        return (picture if self.kind == "image" else torch.from_numpy(np.array(picture)).expand(2, -1, -1)), 0


def test_what_was_passed_of_a_stream_is_not_decoded() -> None:
    stream = Passing(12)
    (batch,) = take(Loader(stream, augmented, batch_size=4, seed=0, rank=1, world=2), 1, Position(0, 4))
    assert stream.decoded == batch.inputs[:, 0].int().tolist() and len(stream.decoded) == 2


def test_steps_per_epoch() -> None:
    assert Loader(Numbers(14), augmented, batch_size=4, seed=0).steps_per_epoch == 3
    assert Loader(Passing(14), augmented, batch_size=4, seed=0).steps_per_epoch is None


# ---- unreadable samples, and what cannot be a batch ----


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [OSError, ValueError, SyntaxError])
def test_unreadable_samples_are_left_out_and_named(workers: int, error: type[Exception]) -> None:
    whole = take(Loader(Numbers(8), augmented, batch_size=4, seed=0), 2)
    broken = Numbers(8, broken=(3, 5), error=error)
    batches = take(Loader(broken, augmented, batch_size=4, seed=0, workers=workers), 2)
    for batch, full in zip(batches, whole, strict=True):
        kept = [i for i, value in enumerate(full.inputs[:, 0].tolist()) if value not in (3, 5)]
        assert batch.inputs.equal(full.inputs[kept]) and batch.labels.equal(full.labels[kept])
    assert sorted(chain(*(b.unreadable for b in batches))) == ["3.png is broken", "5.png is broken"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_without_a_readable_sample(workers: int) -> None:
    loader = Loader(Numbers(2, broken=(0, 1)), augmented, batch_size=2, seed=0, workers=workers)
    with pytest.raises(DataError, match=r"^none of 2 samples could be read: \d\.png is broken; \d\.png is broken\.$"):
        next(loader.batches())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_transform_is_none_of_the_file(workers: int) -> None:
    with pytest.raises(ValueError, match="could not convert"):
        next(Loader(Numbers(2), _wrong, batch_size=2, seed=0, workers=workers).batches())


def _wrong(raw: int) -> Tensor:
    raise ValueError("could not convert")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_label_without_a_class(workers: int) -> None:
    source = Numbers(4)
    source.classes = ("a", "b")
    with pytest.raises(DataError, match=r"^sample 2 has label 2; there are 2 classes\.$"):
        next(Loader(source, augmented, batch_size=4, seed=0, workers=workers).batches())


@pytest.mark.parametrize(
    ("length", "options", "text"),
    [
        (0, {}, "there are no samples to train on"),
        (3, {}, "a batch of 4 needs as many samples, there are 3; make batch_size smaller"),
        (8, {"world": 3}, "a batch of 4 cannot be shared equally by 3 processes; give 3 or 6"),
        (8, {"batch_size": 0}, "got batch size 0, 0 workers, rank 0 of 1"),
        (8, {"rank": 1}, "got batch size 4, 0 workers, rank 1 of 1"),
        (8, {"workers": -1}, "got batch size 4, -1 workers"),
    ],
)
def test_batches_that_cannot_be(length: int, options: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        Loader(Numbers(length), augmented, **{"batch_size": 4, "seed": 0, **options})


@pytest.mark.parametrize("length", [0, 3])
def test_a_stream_shorter_than_a_batch(length: int) -> None:
    text = "a batch of 4 needs as many samples, there are 3" if length else "no samples to train on"
    with pytest.raises(DataError, match=text):
        next(Loader(Passing(length), augmented, batch_size=4, seed=0, workers=1).batches())


# ---- evaluation ----


@pytest.mark.parametrize("source", [Numbers(11), Passing(11)], ids=["indexed", "streamed"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_sample_once(source: Any, workers: int, world: int) -> None:
    ranks = [
        list(evaluation(source, augmented, batch_size=2, rank=rank, world=world, workers=workers))
        for rank in range(world)
    ]
    seen = [list(chain(*values(batches))) for batches in ranks]
    assert sorted(chain(*seen)) == list(range(11))
    if isinstance(source, Numbers):
        assert all(share == list(range(rank, 11, world)) for rank, share in enumerate(seen))
    assert all(len(batch.labels) == 2 for batches in ranks for batch in batches[:-1])


def test_evaluation_names_what_it_cannot_read() -> None:
    batches = list(evaluation(Numbers(5, broken=(2, 3)), augmented, batch_size=2))
    assert [len(b.labels) for b in batches] == [2, 0, 1] and len(batches[1].unreadable) == 2
    with pytest.raises(DataError, match="none of 2 samples could be read"):
        list(evaluation(Numbers(2, broken=(0, 1)), augmented, batch_size=1))
    with pytest.raises(DataError, match="no samples to evaluate on"):
        list(evaluation(Numbers(0), augmented, batch_size=1))


# ---- opening ----


def test_names_that_do_not_exist() -> None:
    with pytest.raises(UnknownNameError, match=r"no data source 'fashon-mnist'. Did you mean 'fashion-mnist'\?.*wds:"):
        open_source("fashon-mnist", "train", Data())
    with pytest.raises(UnknownNameError, match=r"no split 'trian'\. Did you mean 'train'"):
        open_source("fashion-mnist", "trian", Data())
    with pytest.raises(DataError, match="data source 'folder': give folder:PATH"):
        open_source("folder", "train", Data())
    with pytest.raises(DataError, match="data source 'fashion-mnist:x': give fashion-mnist"):
        open_source("fashion-mnist:x", "train", Data())


@pytest.mark.parametrize(("name", "library"), [("folder:x", "PIL"), ("hf:x", "datasets"), ("wds:x", "webdataset")])
def test_a_missing_library_is_said(name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    kind = name.partition(":")[0]
    text = rf'data source {kind} needs {library}: pip install "tokenmerge\[train\]"'
    with pytest.raises(UnsupportedError, match=text):
        open_source(name, "train", Data())


def test_limit_is_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib, "import_module", lambda _: _Module)
    source = open_source("tones", "train", Data(limit=4))
    assert isinstance(source, Source)
    assert len(source) == 4 and [source.read(i)[0] for i in range(4)] == [0, 3, 6, 9]
    assert (source.kind, source.classes, source.flippable) == ("image", CLASSES, False)
    for split, data, count in (
        ("valid", Data(limit=4), 12),
        ("valid", Data(held=6), 6),
        ("train", Data(held=6), 12),
        ("train", Data(limit=99), 12),
    ):
        assert len(open_source("tones", split, data)) == count  # type: ignore[arg-type]
    for split, data, key in (("train", Data(limit=4), "limit"), ("test", Data(held=4), "held")):
        with pytest.raises(
            DataError, match=rf"data\.{key} is 4: a stream has no samples to choose from; give fewer sh"
        ):
            open_source("wds:x", split, data)


class _Module:
    @staticmethod
    def tones(rest: str, split: str, data: Data) -> Source:
        source = Numbers(12)
        source.flippable = False
        return source

    @staticmethod
    def wds(rest: str, split: str, data: Data) -> Stream:
        return Passing(12)


def test_fashion_mnist_has_three_splits() -> None:
    images, labels = assets.fashion_mnist("test")
    test = open_source("fashion-mnist", "test", Data())
    assert isinstance(test, Source) and len(test) == 10_000 and test.classes == assets.CLASSES
    picture, label = test.read(7)
    assert np.array_equal(np.asarray(picture), images[7].numpy()) and label == labels[7]
    train, valid = (open_source("fashion-mnist", split, Data()) for split in ("train", "valid"))
    assert isinstance(train, Source) and isinstance(valid, Source)
    # here the 10,000 bundled images stand for the 60,000
    assert (len(train), len(valid)) == (8_000, 2_000)
    for source, index, original in ((train, 7_999, 7_999), (valid, 0, 8_000)):
        assert np.array_equal(np.asarray(source.read(index)[0]), images[original].numpy())


def test_training_images_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(split: str) -> None:
        raise FileNotFoundError("apt-get install dataset-fashion-mnist")

    monkeypatch.setattr(assets, "fashion_mnist", missing)
    with pytest.raises(DataError, match=r"training images are not bundled: .*dataset-fashion-mnist"):
        open_source("fashion-mnist", "train", Data())


# ---- folders ----


def _folder(root: Path, classes: dict[str, list[int]], split: str = "train") -> str:
    """Write one grey 20 x 24 picture of each value into its class folder."""
    for name, greys in classes.items():
        (root / split / name).mkdir(parents=True, exist_ok=True)
        for grey in greys:
            Image.new("RGB", (24, 20), (grey,) * 3).save(root / split / name / f"{grey:03}.png")
    return f"folder:{root}"


def _read(source: Source | Stream) -> list[tuple[int, int]]:
    """The grey value and label of every sample."""
    batches = evaluation(source, eval_transform("image", (3, 16, 16), mean=(0.0,) * 3, std=(1.0,) * 3), batch_size=2)
    return [
        (round(float(image.mean()) * 255), int(label))
        for b in batches
        for image, label in zip(b.inputs, b.labels, strict=True)
    ]


def test_folder(tmp_path: Path) -> None:
    name = _folder(tmp_path, {"b": [10, 20], "a": [30], ".hidden": []})
    (tmp_path / "train" / "b" / "notes.txt").write_text("no picture")
    _folder(tmp_path, {"b": [40]}, "val")  # numbered as in training, where "a" is before it
    train, valid = open_source(name, "train", Data()), open_source(name, "valid", Data())
    assert train.classes == valid.classes == ("a", "b") and train.size == (3, 224, 224)
    assert _read(train) == [(30, 0), (10, 1), (20, 1)] and _read(valid) == [(40, 1)]
    with pytest.raises(DataError, match=rf"no folder {tmp_path}/test for the test split, with one sub-folder per cl"):
        open_source(name, "test", Data())


def test_folders_named_by_number_are_numbered_so(tmp_path: Path) -> None:
    name = _folder(tmp_path, {str(i): [i] for i in range(11)})
    assert _read(open_source(name, "train", Data())) == [(i, i) for i in range(11)]


def test_a_class_without_pictures_is_named(tmp_path: Path) -> None:
    name = _folder(tmp_path, {"a": [1], "b": [], "c": []})
    with pytest.raises(DataError, match=rf"{tmp_path}/train has no sample of 2 of 3 classes: b, c\."):
        open_source(name, "train", Data())
    _folder(tmp_path, {"b": [1], "c": [2]})
    with pytest.raises(DataError, match=rf"{tmp_path}/test has no samples"):
        _folder(tmp_path, {"b": []}, "test")
        open_source(name, "test", Data())
    with pytest.raises(DataError, match=rf"{tmp_path}/valid has classes that {tmp_path}/train has not: x\."):
        _folder(tmp_path, {"x": [1]}, "valid")
        open_source(name, "valid", Data())


def test_a_folder_without_classes(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=rf"{tmp_path}/train has no sub-folders"):
        open_source(f"folder:{tmp_path}", "train", Data())


def test_broken_pictures_are_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = _folder(tmp_path, {"a": [1, 2], "b": [3]})
    folder = tmp_path / "train" / "a"
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes((folder / "001.png").read_bytes()[:50])
    Image.new("RGB", (300, 300)).save(folder / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)  # twice as many are refused
    batch = next(
        Loader(
            open_source(name, "train", Data()),
            eval_transform("image", (3, 16, 16)),
            batch_size=6,
            seed=0,
        ).batches()
    )
    assert batch.inputs.shape == (3, 3, 16, 16) and sorted(batch.labels.tolist()) == [0, 0, 1]
    assert len(batch.unreadable) == 3
    for file in ("empty.png", "cut.png", "huge.png"):
        assert sum(f"{folder / file}: " in sentence for sentence in batch.unreadable) == 1


# ---- Hugging Face ----


def _dataset(classes: tuple[str, ...] = CLASSES, count: int = 9, **columns: Any) -> Any:
    import datasets

    pictures = [Image.new("RGB", (16, 16), (10 * i,) * 3) for i in range(count)]
    labels = [i % 3 for i in range(count)]
    features = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=list(classes))}
    features |= {name: feature for name, (feature, _) in columns.items()}
    content = {"picture": pictures, "kind": labels} | {name: content for name, (_, content) in columns.items()}
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


@needs("datasets")
def test_a_saved_data_set(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": _dataset(), "validation": _dataset(count=2)}).save_to_disk(tmp_path)
    source = open_source(f"hf:{tmp_path}", "train", Data())
    assert source.classes == CLASSES and isinstance(source, Source)
    assert _read(source) == [(10 * i, i % 3) for i in range(9)]
    assert len(_read(open_source(f"hf:{tmp_path}", "valid", Data()))) == 2  # and no class needs to be there
    with pytest.raises(DataError, match=r"has no test split; it has train, validation\."):
        open_source(f"hf:{tmp_path}", "test", Data())
    with pytest.raises(UnknownNameError, match=r"no option of hf:.* 'lable'. Did you mean 'label'\?"):
        open_source(f"hf:{tmp_path}?lable=x", "train", Data())


@needs("datasets")
def test_a_data_set_with_two_kinds_of_labels(tmp_path: Path) -> None:
    import datasets

    other = datasets.ClassLabel(names=["x", "y"])
    _dataset(coarse=(other, [0, 1, 1] * 3)).save_to_disk(tmp_path)
    text = r"which column is the label\? ClassLabel columns: kind, coarse; .* Give hf:NAME\?label=COLUMN"
    with pytest.raises(DataError, match=text):
        open_source(f"hf:{tmp_path}", "train", Data())
    source = open_source(f"hf:{tmp_path}?label=coarse", "train", Data())
    assert source.classes == ("x", "y") and [label for _, label in _read(source)] == [0, 1, 1] * 3


@needs("datasets")
def test_data_sets_that_cannot_be_trained_on(tmp_path: Path) -> None:
    _dataset(classes=(*CLASSES, "d")).save_to_disk(tmp_path / "short")
    with pytest.raises(DataError, match="no sample of 1 of 4 classes: d"):
        open_source(f"hf:{tmp_path / 'short'}", "train", Data())
    _dataset().remove_columns("kind").save_to_disk(tmp_path / "plain")
    with pytest.raises(DataError, match=r"which column is the label\? ClassLabel columns: none; all columns: picture"):
        open_source(f"hf:{tmp_path / 'plain'}", "train", Data())
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="cannot open the data set"):
        open_source(f"hf:{tmp_path / 'nothing'}", "train", Data())


def _parquet(folder: Path, count: int = 18) -> str:
    for shard in range(3):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        part = _dataset(count=count).select(range(shard, count, 3))
        part.to_parquet(folder / "data" / f"train-{shard:05}-of-00003.parquet")
    return f"hf-stream:{folder}"


@needs("datasets")
def test_a_streamed_data_set(tmp_path: Path) -> None:
    """Shards of parquet files, as the hub has them."""
    name = _parquet(tmp_path)
    stream = open_source(name, "train", Data(shuffle=4))
    assert isinstance(stream, Stream) and stream.classes == CLASSES
    _check_stream(stream)
    _check_order_of_shards(open_source(name, "train", Data(shuffle=1)))
    with pytest.raises(DataError, match=r"has no test split"):
        open_source(name, "test", Data())


@needs("datasets")
def test_a_saved_data_set_as_a_stream(tmp_path: Path) -> None:
    _dataset(count=18).save_to_disk(tmp_path)
    _check_stream(open_source(f"hf-stream:{tmp_path}", "train", Data(shuffle=4)))


def _check_stream(stream: Any) -> None:
    """18 greys, each of class number modulo 3 and 10 times its number: once an epoch, whoever asks, wherever from."""
    transform = eval_transform("image", (3, 16, 16), mean=(0.0,) * 3, std=(1.0,) * 3)
    expected = take(Loader(stream, transform, batch_size=6, seed=3), 6)
    orders = [[round(float(image.mean()) * 25.5) for b in part for image in b.inputs] for part in _halves(expected)]
    labels = [[int(label) for b in part for label in b.labels] for part in _halves(expected)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(18)) and orders[0] != orders[1]
    assert labels == [[number % 3 for number in order] for order in orders]
    assert orders[0] != list(range(18))
    shared = [take(Loader(stream, transform, batch_size=6, seed=3, rank=k, world=2, workers=2), 6) for k in (0, 1)]
    for i, batch in enumerate(expected):
        assert torch.cat([shared[0][i].inputs, shared[1][i].inputs]).equal(batch.inputs)
    assert same(take(Loader(stream, transform, batch_size=6, seed=3), 2, expected[3].position), expected[4:])


def _check_order_of_shards(stream: Any) -> None:
    """Each of the three shards holds one class, and all come first in one epoch or another."""
    assert {next(stream.samples(epoch, 0))[1] for epoch in range(12)} == {0, 1, 2}


def _halves(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    return batches[:3], batches[3:]


@needs("datasets")
def test_a_broken_row_is_left_out_and_named(tmp_path: Path) -> None:
    import datasets

    undecoded = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=list(CLASSES))})
    cells = [{"bytes": b"nothing", "path": None}, None]
    rows = datasets.Dataset.from_dict({"picture": cells, "kind": [0, 1]}, features=undecoded)
    datasets.concatenate_datasets([rows, _dataset(count=3)]).save_to_disk(tmp_path)
    for kind, names in (("hf", "row"), ("hf-stream", "sample")):
        (batch,) = evaluation(
            open_source(f"{kind}:{tmp_path}", "train", Data(shuffle=0)),
            eval_transform("image", (3, 16, 16)),
            batch_size=6,
        )
        assert batch.labels.tolist() == [0, 1, 2]
        assert [s.partition(" of ")[0] for s in batch.unreadable] == [f"{names} {i}" for i in range(2)]
        assert "cannot identify" in batch.unreadable[0] and "there is no image" in batch.unreadable[1]


@needs("datasets")
def test_a_row_that_points_to_a_file(tmp_path: Path) -> None:
    from tokenmerge.data.images import _cell

    Image.new("L", (4, 5), 7).save(tmp_path / "x.png")
    assert _cell("row 1", {"bytes": None, "path": str(tmp_path / "x.png")}).size == (4, 5)
    with pytest.raises(OSError, match=rf"^row 1: {tmp_path}/gone.png: "):
        _cell("row 1", {"bytes": None, "path": str(tmp_path / "gone.png")})


# ---- WebDataset ----


def _shards(root: Path, count: int = 18, classes: Any = CLASSES, cls: Callable[[int], Any] = lambda i: i % 3) -> str:
    import webdataset

    for shard in range(3):
        with webdataset.TarWriter(str(root / f"train-{shard:03}.tar")) as tar:
            for i in range(shard, count, 3):
                tar.write({"__key__": f"s{i:04}", "png": Image.new("RGB", (16, 16), (10 * i,) * 3), "cls": cls(i)})
    (root / "classes.json").write_text(json.dumps(classes))
    return f"wds:{root}/train-{{000..002}}.tar"


@needs("webdataset")
def test_shards(tmp_path: Path) -> None:
    name = _shards(tmp_path)
    stream = open_source(name, "train", Data(source=name, shuffle=4))
    assert isinstance(stream, Stream) and stream.classes == CLASSES
    _check_stream(stream)
    _check_order_of_shards(open_source(name, "train", Data(shuffle=1)))
    expected = [(10 * i, i % 3) for shard in range(3) for i in range(shard, 18, 3)]
    assert _read(open_source(name, "valid", Data(valid=name))) == expected  # not shuffled
    with pytest.raises(DataError, match=r"are the training shards; give the valid ones as data.valid=wds:PATTERN"):
        open_source(name, "valid", Data(source=name))


@needs("webdataset")
def test_a_shuffle_within_shards_reaches_as_far_as_its_buffer(tmp_path: Path) -> None:
    name = _shards(tmp_path)
    near, far = [
        [round(value / 10) for value, _ in _read(open_source(name, "train", Data(shuffle=n)))] for n in (1, 100)
    ]
    assert sorted(near) == sorted(far) == list(range(18))
    shards = [number % 3 for number in far]
    assert len({tuple(shards[i : i + 6]) for i in (0, 6, 12)}) == 3 and near != far


@needs("webdataset")
def test_shards_name_their_classes(tmp_path: Path) -> None:
    name = _shards(tmp_path, cls=lambda i: "abc"[i % 3].encode())
    assert {label for _, label in _read(open_source(name, "train", Data()))} == {0, 1, 2}
    (tmp_path / "classes.json").unlink()
    with pytest.raises(DataError, match=rf"cannot read {tmp_path}/classes.json, a list of the names of the classes"):
        open_source(name, "train", Data())
    (tmp_path / "classes.json").write_text("3")
    with pytest.raises(DataError, match=r"holds 3; it takes a list of the names of the classes"):
        open_source(name, "train", Data())


@needs("webdataset")
@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (lambda i: b"zebra", r"s0000 of .*train-000.tar is of class 'zebra': no number and none of the 3 names"),
        (lambda i: 9, r"has label 9; there are 3 classes"),
    ],
)
def test_shards_with_classes_nobody_knows(tmp_path: Path, cls: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        _read(open_source(_shards(tmp_path, cls=cls), "train", Data(shuffle=0)))


@needs("webdataset")
def test_shards_missing_broken_or_of_something_else(tmp_path: Path) -> None:
    import webdataset

    name = _shards(tmp_path)
    with pytest.raises(DataError, match=rf"2 of 5 shards are not there: {tmp_path}/train-003.tar"):
        open_source(name.replace("002", "004"), "train", Data())
    (tmp_path / "train-001.tar").write_bytes(b"nothing" * 200)
    with pytest.raises(DataError, match=r"cannot read the shard .*train-001.tar: .{10,60}$"):
        _read(open_source(name, "train", Data(shuffle=0)))
    with webdataset.TarWriter(str(tmp_path / "train-001.tar")) as tar:
        tar.write({"__key__": "s", "txt": "words"})
    with pytest.raises(DataError, match=r"s of .*train-001.tar has txt; it needs an image .* and its class"):
        _read(open_source(name, "train", Data(shuffle=0)))
    with webdataset.TarWriter(str(tmp_path / "train-001.tar")) as tar:
        tar.write({"__key__": "s", "png": b"words", "cls": 0})
    (batch,) = evaluation(
        open_source(name, "train", Data(shuffle=0)), eval_transform("image", (3, 16, 16)), batch_size=99
    )
    assert len(batch.labels) == 12 and len(batch.unreadable) == 1
    assert batch.unreadable[0].startswith(f"s of {tmp_path}/train-001.tar: cannot identify")


# ---- transforms ----


def _checks(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Any:
    generator = torch.Generator().manual_seed(0)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    return Image.fromarray(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).numpy())


@pytest.mark.parametrize("crop", ["shift", "resize", "none"])
@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize("size", [(1, 28, 28), (3, 24, 32)])
def test_training_images_have_the_size_asked(crop: str, mode: str, size: tuple[int, ...]) -> None:
    transform = train_transform(Augment(crop=crop, auto="rand-m9-mstd0.5-inc1", erase=1.0), "image", size)
    picture = _checks().convert(mode)
    for _ in range(5):
        tensor = transform(picture)
        assert tensor.shape == size and tensor.dtype == torch.float32 and tensor.isfinite().all()


@pytest.mark.parametrize("policy", ["rand-m10-mstd0-inc1-n1", "original", "v0", "augmix-m10", "3a"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_policy_may_keep_no_bit_of_an_image(mode: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its highest magnitude "PosterizeIncreasing" keeps 0 bits, which is a black image and no error."""
    from timm.data import auto_augment

    monkeypatch.setattr(auto_augment, "_RAND_INCREASING_TRANSFORMS", ["PosterizeIncreasing"])
    size = (1 if mode == "L" else 3, 30, 40)
    transform = train_transform(Augment(crop="none", flip=0.0, auto=policy), "image", size)
    images = [transform(_checks(mode)) for _ in range(40)]
    assert all(image.shape == size and image.isfinite().all() for image in images)
    if policy.startswith("rand"):
        black = eval_transform("image", size)(Image.new(mode, (40, 30)))
        assert any(torch.equal(image, black) for image in images)


def test_a_shift_is_a_shift_on_black() -> None:
    picture = _checks("L", (28, 28))
    whole = eval_transform("image", (1, 28, 28))(picture)
    assert whole.allclose(
        (torch.from_numpy(np.array(picture)).float() / 255 - assets.MEAN)[None] / assets.STD, atol=1e-6
    )
    black = -assets.MEAN / assets.STD
    padded = torch.nn.functional.pad(whole, (2, 2, 2, 2), value=black)
    windows = [padded[:, y : y + 28, x : x + 28] for y in range(5) for x in range(5)]
    shift = train_transform(Augment(shift=2, flip=0.0), "image", (1, 28, 28))
    found = {
        next(i for i, window in enumerate(windows) if window.allclose(tensor, atol=1e-6))
        for tensor in (shift(picture) for _ in range(60))
    }
    assert len(found) > 15


@pytest.mark.parametrize("kind", ["image", "clip"])
def test_a_flip_mirrors_unless_it_changes_the_label(kind: str) -> None:
    size = (1, 28, 28) if kind == "image" else (1, 4, 28, 28)
    raw = _checks("L", (28, 28))
    raw = raw if kind == "image" else torch.from_numpy(np.array(raw)).expand(4, 28, 28)
    whole = eval_transform(kind, size)(raw)
    always = Augment(crop="none", flip=1.0)
    assert train_transform(always, kind, size)(raw).equal(whole.flip(-1))
    assert train_transform(always, kind, size, flippable=False)(raw).equal(whole)


@pytest.mark.parametrize("crop", ["shift", "resize", "none"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("colour", [False, True])
def test_all_frames_of_a_clip_are_treated_alike(crop: str, channels: int, colour: bool) -> None:
    frame = torch.from_numpy(np.array(_checks("RGB" if colour else "L")))
    clip = frame.expand(5, *frame.shape)
    transform = train_transform(Augment(crop=crop, erase=1.0), "clip", (channels, 5, 24, 32))
    seen = [transform(clip) for _ in range(4)]
    for tensor in seen:
        assert tensor.shape == (channels, 5, 24, 32) and tensor.dtype == torch.float32
        assert (tensor == tensor[:, :1]).all()
    assert not seen[0].equal(seen[1])


def test_a_clip_keeps_its_channels_and_time_in_place() -> None:
    clip = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    clip[1, :, :, 2] = 255
    tensor = eval_transform("clip", (3, 2, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)(clip)
    assert tensor[2, 1].eq(1).all() and tensor.sum() == 64
    with pytest.raises(DataError, match=r"a clip has 2 frames where data.size asks for 4"):
        eval_transform("clip", (3, 4, 8, 8))(clip)


def test_evaluation_resizes_and_cuts_out_the_middle() -> None:
    picture = Image.new("RGB", (60, 30), (0, 0, 0))
    picture.paste((255, 255, 255), (20, 5, 40, 25))
    plain = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    assert eval_transform("image", (3, 20, 20), crop_pct=20 / 30, **plain)(picture).eq(1).all()  # type: ignore[arg-type]
    assert not eval_transform("image", (3, 20, 20), **plain)(picture).eq(1).all()  # type: ignore[arg-type]
    clip = torch.from_numpy(np.array(picture))[None]
    assert eval_transform("clip", (3, 1, 20, 20), crop_pct=20 / 30, **plain)(clip).eq(1).all()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "size"),
    [("image", (28, 28)), ("image", (2, 28, 28)), ("clip", (3, 28, 28)), ("sound", (3, 64, 128)), ("image", ())],
)
def test_sizes_that_do_not_fit(kind: str, size: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=rf"data\.size is \({', '.join(map(str, size))}.*; {kind}s take \("):
        eval_transform(kind, size)


def test_policies_and_statistics_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"augment\.auto is 'nonsense', no policy timm knows"):
        train_transform(Augment(auto="nonsense"), "image", (3, 28, 28))
    with pytest.raises(ConfigError, match=r"policies are for images; for clips it must be none"):
        train_transform(Augment(auto="rand-m9"), "clip", (3, 4, 28, 28))
    with pytest.raises(ConfigError, match="do not fit 3 channels"):
        eval_transform("image", (3, 28, 28), mean=(0.5,), std=(0.5,))


def test_sixteen_bits_are_scaled_and_deeper_values_refused(tmp_path: Path) -> None:
    small = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    (tmp_path / "a").mkdir()
    Image.fromarray(small).save(tmp_path / "a" / "0.png")
    Image.fromarray(small.astype(np.uint16) * 257).save(tmp_path / "a" / "1.png")
    Image.fromarray(small.astype(np.int32) * 1000).save(tmp_path / "a" / "2.tif")
    Image.fromarray(small.astype(np.float32)).save(tmp_path / "a" / "3.tif")
    source = open_source(f"files:{tmp_path}", "test", Data())
    assert isinstance(source, Source)
    eight, sixteen, floats = (np.asarray(source.read(i)[0].convert("L")) for i in (0, 1, 3))
    assert (eight == small).all() and (sixteen == small).all() and (floats == small).all()
    with pytest.raises(OSError, match=r"2\.tif: values from 0 to 220000 \(mode I\): save it with 8 or 16 bits"):
        source.read(2)
