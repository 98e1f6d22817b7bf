"""Class folders and the labels of a Hugging Face model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from tokenmerge.errors import DataError
from tokenmerge.tools.data import by_label


def _model(*labels: str) -> nn.Module:
    model = nn.Identity()
    model.config = SimpleNamespace(label2id={label: i for i, label in enumerate(labels)})  # type: ignore[assignment]
    return model


def test_folders_are_numbered_by_the_labels_they_stand_for() -> None:
    model = _model("Sneaker", "T-shirt/top", "ankle boot")
    assert by_label(model, ["Ankle_Boot", "T-shirt_top", "sneaker"]) == [2, 1, 0]


def test_folders_of_which_only_some_are_labels_are_refused() -> None:
    with pytest.raises(DataError, match=r"1 of 3 classes .*: trainers\. Labels without a class: Sneaker\. Name all"):
        by_label(_model("Sneaker", "top", "boot"), ["boot", "top", "trainers"])


def test_labels_that_differ_in_case_alone_are_told_apart_exactly_or_not_at_all() -> None:
    model = _model("Crane", "crane")
    assert by_label(model, ["crane", "Crane"]) == [1, 0]
    with pytest.raises(DataError, match="CRANE"):
        by_label(model, ["CRANE"])


def test_folders_of_which_none_is_a_label_have_no_numbers_here() -> None:
    assert by_label(_model("LABEL_0", "LABEL_1"), ["bee", "ant"]) is None
    assert by_label(nn.Identity(), ["bee", "ant"]) is None
