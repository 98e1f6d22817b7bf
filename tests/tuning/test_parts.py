"""The images are dealt once, no part shares one with another, and what cannot be used is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tokenmerge.data.labelled import Batches
from tokenmerge.errors import DataError
from tokenmerge.testing import tiny_vit
from tokenmerge.tuning.parts import Part, Parts, split


def _numbered(count: int) -> Tensor:
    return torch.arange(count)[:, None, None, None].expand(-1, 3, 32, 32).float() / count


def _numbers(part: Part, count: int) -> list[int]:
    images = torch.cat([batch for batch, _ in part])
    return (images[:, 0, 0, 0] * count).round().int().tolist()


def _split(images: Any, labels: Any = None, model: nn.Module | None = None, seed: int = 0) -> Parts:
    return split(images, labels, model or tiny_vit(), batch_size=16, seed=seed)


def test_parts_share_no_image_and_leave_none_out() -> None:
    parts = _split(_numbered(100))
    found = [_numbers(part, 100) for part in (parts.search, parts.select, parts.report)]
    assert [len(numbers) for numbers in found] == [50, 20, 30]
    assert sorted(number for numbers in found for number in numbers) == list(range(100))
    screened = _numbers(parts.screen, 100)
    assert screened == found[0][: len(screened)] and len(screened) == 50


def test_images_come_back_as_they_were_in_any_pass_and_order() -> None:
    images = torch.randn(70, 3, 32, 32)
    parts = _split(images)
    for part in (parts.search, parts.report):
        first, again = (torch.cat([batch for batch, _ in part]) for _ in range(2))
        assert torch.equal(first, again)
        assert all(any(torch.equal(image, own) for own in images) for image in first)


def test_the_seed_deals_and_the_same_seed_deals_alike() -> None:
    one, same, other = (_numbers(_split(_numbered(100), seed=seed).search, 100) for seed in (0, 0, 1))
    assert one == same and sorted(one) != sorted(other)


def test_labels_do_not_decide_where_an_image_goes_and_go_with_it() -> None:
    labels = torch.arange(100) % 10
    plain = _split(_numbered(100))
    for given in (labels, labels.flip(0), torch.zeros(100, dtype=torch.long)):
        parts = _split(_numbered(100), given)
        for part, other in ((parts.search, plain.search), (parts.select, plain.select), (parts.report, plain.report)):
            numbers = _numbers(part, 100)
            assert numbers == _numbers(other, 100)
            assert torch.equal(given[numbers], torch.cat([batch for _, batch in part]))


def test_labels_of_a_classifier_make_accuracies_and_a_projection_has_no_classes() -> None:
    labels = torch.arange(64) % 10
    assert _split(_numbered(64), labels).has_labels and not _split(_numbered(64)).has_labels
    assert _split(_numbered(64)).search.outputs == 10
    tower = tiny_vit()
    tower.head = nn.Linear(32, 10, bias=False)
    assert _split(_numbered(64), model=tower).search.outputs == -1
    assert _split(_numbered(64), model=tiny_vit(num_classes=0)).search.outputs == -1


def test_labels_that_come_with_images_and_do_not_fit_are_left_out_with_a_note() -> None:
    batches = Batches([(_numbered(64), torch.arange(64) % 20)], 20)
    parts = _split(batches)
    assert not parts.has_labels and "labels go from 0 to 19, and the model answers with 10 classes" in parts.note


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(0, 3, 32, 32), None, "there are 0. Give at least 64"),
        (torch.randn(1, 3, 32, 32), None, "there are 1. Give at least 64"),
        (torch.randn(63, 3, 32, 32), None, "at least 64 .* a folder of photographs|A folder of photographs"),
        (torch.zeros(64, 3, 32, 32, dtype=torch.uint8), None, "give the model's inputs"),
        (torch.full((64, 3, 32, 32), float("nan")), None, "64 images hold NaN or infinity, the first is image 0"),
        (torch.randn(64, 3, 32, 32), torch.zeros(63, dtype=torch.long), r"labels are \(63,\)"),
        (torch.randn(64, 3, 32, 32), torch.full((64,), 10), "labels go from 10 to 10, and the model answers with 10"),
        (torch.randn(64, 3, 32, 32), torch.zeros(64), "torch.float32; give the class of each of 64 images"),
        (torch.randn(64, 3, 32, 32), ["cat"] * 64, r"labels are \['cat'.*give the class of each image"),
        ([torch.randn(64, 3, 32, 32)], None, "images are of type list; give the model's inputs as one tensor"),
        (None, None, "images are of type NoneType; give"),
        (
            DataLoader(TensorDataset(torch.randn(64, 3, 32, 32))),
            None,
            r"images are of type DataLoader.*Batches\(loader",
        ),
        (torch.randn(64, 3, 20, 20), None, "the model does not take images of"),
    ],
)
def test_what_cannot_be_used_is_refused(images: Any, labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _split(images, labels)


def test_a_model_that_answers_with_nan_is_named_at_the_first_batch() -> None:
    model = tiny_vit()
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))  # type: ignore[union-attr,operator]
    with pytest.raises(DataError, match="the unmerged model answers the first image with NaN"):
        _split(torch.randn(64, 3, 32, 32), model=model)


def test_images_of_one_class_are_noted() -> None:
    assert "all images are of class 3" in _split(_numbered(64), torch.full((64,), 3)).note


def _folder(root: Path, good: int, bad: int) -> str:
    (root / "a").mkdir()
    for i in range(good):
        Image.new("RGB", (40, 40), (i, 2 * i % 255, 7)).save(root / "a" / f"{i:03}.png")
    for i in range(bad):
        (root / "a" / f"bad{i}.png").write_bytes(b"no image")
    return str(root)


def test_corrupt_files_are_counted_and_skipped(tmp_path: Path) -> None:
    parts = _split(_folder(tmp_path, 70, 3))
    assert len(parts.corrupt) == 3 and "bad0.png" in parts.corrupt[0]
    assert len(parts.search) + len(parts.select) + len(parts.report) == 70


def test_more_than_a_tenth_of_corrupt_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"10 of 80 images cannot be read, more than a tenth; the first: .*bad0.png"):
        _split(_folder(tmp_path, 70, 10))
