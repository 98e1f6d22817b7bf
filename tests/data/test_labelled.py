"""Labelled images: what a folder must look like, how labels are numbered, and broken images left out."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from helpers import tiny_vit
from tokenmerge import assets
from tokenmerge.data.labelled import Batches, FashionMNIST, Folder, Images, calibration_images, normalise, open_data
from tokenmerge.errors import DataError, UnsupportedError
from tokenmerge.tools.evaluate import evaluate


def _model(num_classes: int = 3) -> nn.Module:
    model = tiny_vit(num_classes=num_classes)
    model.pretrained_cfg = {"input_size": (3, 32, 32), "crop_pct": 1.0, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    return model


def _images(root: Path, classes: dict[str, list[int]]) -> Path:
    """Write one grey 32 x 32 image of each value into its class folder."""
    for name, values in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for value in values:
            Image.new("RGB", (32, 32), (value,) * 3).save(root / name / f"{value:03}.png")
    return root


def _read(data: FashionMNIST | Images) -> tuple[list[int], list[int]]:
    """Return the grey values and the labels of one pass."""
    batches = list(data)
    values = [round(float(image.mean()) * 255) for images, _ in batches for image in images]
    return values, [int(label) for _, labels in batches for label in labels]


def test_folder_gives_images_and_labels_in_batches(tmp_path: Path) -> None:
    data = open_data(
        str(_images(tmp_path, {"b": [10, 20], "a": [30], "c": [40, 50]})), _model(), batch_size=2, workers=0
    )
    assert isinstance(data, Folder) and data.classes == ["a", "b", "c"] and len(data) == 5
    assert [(len(images), images.shape[1:], len(labels)) for images, labels in data] == [
        (n, (3, 32, 32), n) for n in (2, 2, 1)
    ]
    assert _read(data) == ([30, 10, 20, 40, 50], [0, 1, 1, 2, 2])
    assert data.corrupt == []


def test_folder_uses_the_transform_of_the_model(tmp_path: Path) -> None:
    model = _model()
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    data = open_data(str(_images(tmp_path, {"a": [255], "b": [0], "c": [51]})), model, batch_size=3, workers=0)
    ((images, _),) = list(data)
    assert images.mean(dim=(1, 2, 3)).tolist() == pytest.approx([2.0, -2.0, -1.2], abs=1e-5)


def test_workers_read_the_same(tmp_path: Path) -> None:
    root = _images(tmp_path, {"a": [1, 2], "b": [3], "c": [4]})
    (root / "b" / "broken.png").write_bytes(b"nothing")
    data = open_data(str(root), _model(), batch_size=2, workers=1)
    assert _read(data) == ([1, 2, 3, 4], [0, 0, 1, 2])
    assert len(data.corrupt) == 1 and "broken.png" in data.corrupt[0]


def test_limit_is_spread_over_the_classes(tmp_path: Path) -> None:
    root = _images(tmp_path, {"a": [1, 2, 3, 4], "b": [11, 12, 13, 14], "c": [21, 22, 23, 24]})
    data = open_data(str(root), _model(), batch_size=8, workers=0, limit=6)
    assert len(data) == 6
    assert _read(data) == ([1, 3, 11, 13, 21, 23], [0, 0, 1, 1, 2, 2])
    assert len(open_data(str(root), _model(), batch_size=8, workers=0, limit=100)) == 12


def test_folders_named_by_index(tmp_path: Path) -> None:
    root = _images(tmp_path, {"7": [1], "2": [2], "011": [3]})
    assert _read(open_data(str(root), _model(12), batch_size=8, workers=0)) == ([3, 2, 1], [11, 2, 7])


def test_folders_named_by_index_with_every_class_there(tmp_path: Path) -> None:
    # in the order of names, "10" and "11" come before "2"
    root = _images(tmp_path, {str(i): [i] for i in range(12)})
    values, labels = _read(open_data(str(root), _model(12), batch_size=8, workers=0))
    assert sorted(values) == list(range(12)) and values == labels


def test_a_model_that_does_not_say_its_classes_takes_any_folders(tmp_path: Path) -> None:
    model = nn.Flatten()
    model.pretrained_cfg = _model().pretrained_cfg
    assert _read(open_data(str(_images(tmp_path, {"x": [1], "y": [2]})), model, batch_size=8, workers=0))[1] == [0, 1]


@pytest.mark.parametrize(
    "names",
    [["a", "b"], ["a", "b", "c", "d"], ["0", "3"], ["0", "b"], ["0", "²"]],
    ids=["few", "many", "index-too-large", "mixed", "no-decimal"],
)
def test_folders_that_do_not_fit_the_classes(tmp_path: Path, names: list[str]) -> None:
    root = _images(tmp_path, {name: [1] for name in names})
    text = rf"has {len(names)} class folders \(.*\.\.\.\), the model has 3 classes.*name the sub-folders by class index"
    with pytest.raises(DataError, match=text):
        open_data(str(root), _model(), batch_size=8, workers=0)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder .*nowhere: --data takes 'fashion-mnist' or a folder with one sub-"):
        open_data(str(tmp_path / "nowhere"), _model(), batch_size=8)


def test_images_in_no_folders_of_classes_have_no_labels(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "lonely.png")
    for source in (str(tmp_path), f"files:{tmp_path}"):
        data = open_data(source, _model(), batch_size=8, workers=0)
        assert [labels.tolist() for _, labels in data] == [[-1]]
        assert data.notes[0].startswith("No labels: these images stand in no folders of classes")


@pytest.mark.parametrize("case", ["empty", "empty-class-folder"])
def test_folder_without_labelled_images(tmp_path: Path, case: str) -> None:
    if case == "empty-class-folder":
        _images(tmp_path, {"a": [1], "b": [1], "c": []})
    with pytest.raises(DataError, match=rf"{tmp_path} holds no labelled images: expected {tmp_path}/CLASS/IMAGE\."):
        open_data(str(tmp_path), _model(), batch_size=8)


def test_truncated_images_are_named_and_left_out(tmp_path: Path) -> None:
    root = _images(tmp_path, {"a": [1, 2], "b": [3], "c": [4]})
    noise = Image.frombytes("RGB", (32, 32), bytes(torch.randint(0, 256, (32 * 32 * 3,)).tolist()))
    for name in ("half.jpg", "half.png"):
        noise.save(root / "b" / name)
        content = (root / "b" / name).read_bytes()
        (root / "b" / name).write_bytes(content[: len(content) * 9 // 10])
    (root / "c" / "text.png").write_text("no image")
    data = open_data(str(root), _model(), batch_size=2, workers=0)
    assert len(data) == 7
    for _ in range(2):  # a second pass starts to count anew
        assert _read(data) == ([1, 2, 3, 4], [0, 0, 1, 2])
        paths, reasons = zip(*(line.split(": ", 1) for line in data.corrupt), strict=True)
        assert list(paths) == [str(root / "b/half.jpg"), str(root / "b/half.png"), str(root / "c/text.png")]
        assert "truncated" in reasons[0] and "cannot identify" in reasons[2]


def test_fashion_mnist() -> None:
    model = tiny_vit(num_classes=10, in_chans=1)
    data = open_data("fashion-mnist", model, batch_size=4, limit=10)
    assert isinstance(data, FashionMNIST) and len(data) == 10 and data.corrupt == ()
    batches = list(data)
    assert [images.shape for images, _ in batches] == [(4, 1, 28, 28), (4, 1, 28, 28), (2, 1, 28, 28)]
    images, labels = assets.fashion_mnist("test")
    assert torch.equal(torch.cat([batch for batch, _ in batches]), normalise(images[:10]))
    assert torch.equal(torch.cat([batch for _, batch in batches]), labels[:10])
    assert len(FashionMNIST(500)) == 10_000


def test_normalise_uses_the_figures_of_the_training_set() -> None:
    x = normalise(torch.tensor([[[0, 255]]], dtype=torch.uint8))
    assert x.shape == (1, 1, 1, 2)
    assert x.flatten().tolist() == pytest.approx([-assets.MEAN / assets.STD, (1 - assets.MEAN) / assets.STD])
    images, _ = assets.fashion_mnist("test")
    assert normalise(images).mean().abs() < 0.01 and (normalise(images).std() - 1).abs() < 0.01


def test_fashion_mnist_with_a_model_of_other_classes() -> None:
    with pytest.raises(DataError, match=r"fashion-mnist has 10 classes, the model has 1000; use the bundled model"):
        open_data("fashion-mnist", tiny_vit(num_classes=1000), batch_size=4)
    # features are no classes: they are compared with the unmerged model's
    assert len(open_data("fashion-mnist", tiny_vit(num_classes=0), batch_size=4, limit=3)) == 3


@pytest.mark.parametrize("source", ["fashion-mnist", "folder"])
@pytest.mark.parametrize(
    ("batch_size", "limit"), [(0, None), (4, 0), (4, -3)], ids=["batch", "limit-0", "limit-negative"]
)
def test_amounts_that_make_no_sense(tmp_path: Path, source: str, batch_size: int, limit: int | None) -> None:
    if source == "folder":
        source = str(_images(tmp_path, {"0": [1]}))
    with pytest.raises(DataError, match=f"batch size and limit must be at least 1; got {batch_size} and {limit}"):
        open_data(source, tiny_vit(), batch_size=batch_size, workers=0, limit=limit)


def test_a_negative_number_of_workers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the number of workers must be at least 0; got -1"):
        open_data(str(_images(tmp_path, {"0": [1]})), tiny_vit(), batch_size=4, workers=-1)


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.data", None)
    with pytest.raises(UnsupportedError, match=r'needs? timm and torchvision: pip install "tokenmerge\[timm\]"'):
        open_data(str(_images(tmp_path, {"a": [1]})), _model(), batch_size=4)


def test_a_model_without_a_configuration_gets_its_own_input_size(tmp_path: Path) -> None:
    (tmp_path / "one" / "a").mkdir(parents=True)
    (tmp_path / "one" / "b").mkdir()
    for name in "ab":
        Image.new("RGB", (80, 60), "red").save(tmp_path / "one" / name / "0.png")
    model = tiny_vit(num_classes=2)
    images, _ = next(iter(Folder(tmp_path / "one", model, 2, 0)))
    assert images.shape == (2, 3, 32, 32)


def test_numbered_folders_that_start_at_one_are_refused(tmp_path: Path) -> None:
    for name in ("1", "2", "3"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32), "red").save(tmp_path / name / "0.png")
    with pytest.raises(DataError, match=r"name the sub-folders by class index, 0 to 2"):
        Folder(tmp_path, tiny_vit(num_classes=3), 2, 0)


def test_calibration_takes_the_first_training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (2_100, 28, 28), dtype=torch.uint8)
    monkeypatch.setattr(assets, "fashion_mnist", lambda split: {"train": (images, torch.zeros(2_100))}[split])
    found = calibration_images("fashion-mnist", tiny_vit(img_size=28, in_chans=1))
    assert torch.equal(found, normalise(images[:64]))


def test_calibration_without_training_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(assets, "_DEBIAN_FOLDER", tmp_path)
    with pytest.raises(DataError, match=r"the training images are not bundled: .*not found.*give a folder of images"):
        calibration_images("fashion-mnist", tiny_vit(img_size=28, in_chans=1))


def test_calibration_images_of_a_folder_are_spread_over_it(tmp_path: Path) -> None:
    root = _images(tmp_path, {"a": list(range(64)), "b": list(range(100, 132)), "c": list(range(200, 232))})
    (root / "a" / "002.png").write_bytes(b"broken")
    found = calibration_images(str(root), _model())
    values = [round(float(image.mean()) * 255) for image in found]
    assert values == [*(i for i in range(0, 64, 2) if i != 2), *range(100, 132, 2), *range(200, 232, 2)]


@pytest.mark.parametrize("model", [tiny_vit(), tiny_vit(img_size=28)], ids=["size", "channels"])
def test_calibration_images_the_model_does_not_take(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    monkeypatch.setattr(
        assets, "fashion_mnist", lambda split: (torch.zeros(2_064, 28, 28, dtype=torch.uint8), torch.zeros(2_064))
    )
    with pytest.raises(DataError, match=r"the model does not take images of \(1, 28, 28\)"):
        calibration_images("fashion-mnist", model)


def test_calibration_without_a_readable_image(tmp_path: Path) -> None:
    root = _images(tmp_path, {"a": [1], "b": [2], "c": [3]})
    for path in root.rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"none of the 3 images of .* could be read; the first: .*a/001\.png: cannot"):
        calibration_images(str(root), _model())
    with pytest.raises(DataError, match="no folder nowhere: --calibrate takes 'fashion-mnist' or a folder"):
        calibration_images("nowhere", _model())


def test_a_folder_with_splits_is_evaluated_on_its_test_split(tmp_path: Path) -> None:
    for split, value in (("train", 1), ("valid", 2), ("test", 3)):
        _images(tmp_path / split, {"a": [value], "b": [value + 10], "c": [value + 20]})
    for source in (f"folder:{tmp_path}", str(tmp_path)):
        data = open_data(source, _model(), batch_size=8, workers=0)
        assert _read(data) == ([3, 13, 23], [0, 1, 2]) and data.notes == ()
        assert data.source == str(tmp_path)
        assert calibration_images(source, _model()).mean(dim=(1, 2, 3)).mul(255).round().tolist() == [1, 11, 21]


def test_the_split_taken_instead_of_a_missing_one_is_said(tmp_path: Path) -> None:
    for split, value in (("train", 1), ("val", 2)):
        _images(tmp_path / split, {"a": [value], "b": [value + 10], "c": [value + 20]})
    data = open_data(str(tmp_path), _model(), batch_size=8, workers=0)
    assert _read(data)[0] == [2, 12, 22]
    assert data.notes == ("Images of the valid split: there is no test split.",)


def test_classes_may_be_called_as_splits_are(tmp_path: Path) -> None:
    root = _images(tmp_path, {"bus": [1], "tram": [2], "train": [3]})
    assert _read(open_data(str(root), _model(), batch_size=8, workers=0)) == ([1, 3, 2], [0, 1, 2])


def test_a_stream_of_shards(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), (9,) * 3).save(picture, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for key in range(5):
            content = picture.getvalue()[:20] if key == 1 else picture.getvalue()
            for suffix, part in (("png", content), ("cls", str(key % 3).encode())):
                entry = tarfile.TarInfo(f"{key}.{suffix}")
                entry.size = len(part)
                shard.addfile(entry, io.BytesIO(part))
    (tmp_path / "classes.json").write_text('["a", "b", "c"]')
    data = open_data(f"wds:{tmp_path}/a.tar", _model(), batch_size=2, workers=0)
    assert isinstance(data, Images) and len(data) == 5 and _read(data) == ([9] * 4, [0, 2, 0, 1])
    assert len(data.corrupt) == 1 and f"1 of {tmp_path}/a.tar" in data.corrupt[0]
    data = open_data(f"wds:{tmp_path}/a.tar", _model(), batch_size=2, workers=0, limit=3)
    assert len(data) == 3 and _read(data)[1] == [0, 2] and data.notes == ("Of a stream: its first 3 images.",)
    with pytest.raises(
        DataError, match=r"a\.tar has 3 classes \(a, b, c, \.\.\.\), the model has 4 classes\. Give data"
    ):
        open_data(f"wds:{tmp_path}/a.tar", _model(4), batch_size=2)


@pytest.mark.parametrize(("source", "kind"), [("tones", "sounds"), ("frames:/nowhere", "clips")])
def test_what_is_no_image_is_refused_at_once(source: str, kind: str) -> None:
    with pytest.raises(DataError, match=f"{source} holds {kind}: --data takes images"):
        open_data(source, _model(), batch_size=2)


def test_batches_of_your_own() -> None:
    images, labels = torch.rand(5, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 2)
    data = Batches(loader, 3)
    assert (len(data), data.batch_size, data.outputs) == (5, 2, 3)
    found = evaluate(_model(), data, rs=[4])
    assert found.images == 5 and [row["r"] for row in found.rows] == ["0", "4"] and found.rows[0]["top-1 %"] is not None
    with pytest.raises(DataError, match="an iterator can be walked only once"):
        Batches(iter(loader), 3)
    with pytest.raises(DataError, match="there is no batch"):
        Batches([], 3)


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ((torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, dtype=torch.long)), r"labels \(2, 1\)"),
        ((torch.zeros(2, 3, 4, 4), torch.zeros(3, dtype=torch.long)), r"images \(2, 3, 4, 4\) and labels \(3,\)"),
        ((torch.zeros(2, 3, 4, 4), torch.zeros(2)), "of torch.float32"),
        ((torch.zeros(2, 3, 4, 4), torch.tensor([0, 3])), "labels from 0 to 3, and there are 3 classes"),
        ((torch.zeros(2, 3, 4, 4), torch.tensor([-1, 2])), "labels from -1 to 2"),
        ((torch.zeros(2, 3, 4, 4), [0, 1]), r"batch 0 is \(Tensor, list\); give two tensors"),
        (torch.zeros(2, 3, 4, 4), r"batch 0 is \(Tensor\); give two tensors"),
        ({"image": torch.zeros(2, 3, 4, 4)}, r"batch 0 is \(dict\); give two tensors"),
    ],
    ids=["column", "lengths", "floats", "too-large", "negative", "list", "images", "dict"],
)
def test_batches_that_are_none(batch: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        Batches([batch], 3)
    good = (torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))
    with pytest.raises(DataError, match=text.replace("batch 0", "batch 1")):
        list(Batches([good, batch], 3))


@pytest.mark.parametrize("classes", [True, "cat", 0, -1, 2.0, None, []], ids=str)
def test_classes_that_are_none(classes: Any) -> None:
    with pytest.raises(DataError, match=r"classes=.*: give the number of classes, from 1 on, or their names"):
        Batches([(torch.zeros(2, 3, 4, 4), torch.tensor([0, 0]))], classes)


def test_images_that_were_not_prepared() -> None:
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(
        DataError, match=r"batch 0 has images of torch.uint8: give .* images.float\(\) / 255, less the mean"
    ):
        Batches([(pixels, torch.tensor([0, 1]))], 3)


def test_batches_of_other_images_are_other_data() -> None:
    labels = torch.tensor([0, 1])
    one, other = (Batches([(torch.full((2, 3, 4, 4), value), labels)], 3) for value in (0.0, 1.0))
    assert one.source != other.source and one.source.startswith("batches as given (")
    assert Batches([(torch.zeros(2, 3, 4, 4), labels)], 3, "mine").source == "mine"
