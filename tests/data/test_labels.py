"""Class folders and the labels of a Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from tokenmerge.data.classes import by_label
from tokenmerge.errors import DataError


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


def test_a_note_says_how_folders_were_numbered_that_are_no_labels(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    from tokenmerge.data.labelled import open_data

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=16, patch_size=8))
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / name / "0.png")
    data = open_data(str(tmp_path), model, batch_size=1, workers=0)
    assert data.notes == (
        "Class folders are numbered in the order of names: none is called as a label of the model (LABEL_0, LABEL_1).",
    )
