"""How images are prepared: as each host does it, changed only as asked, and loudly assumed where nobody says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from helpers import tiny_vit
from tokenmerge.data.labelled import FashionMNIST, normalise, open_data
from tokenmerge.data.prepare import find_preprocessing
from tokenmerge.data.preprocessing import Preprocessing
from tokenmerge.errors import ConfigError, DataError
from tokenmerge.measure.outputs import answer, declared_classes
from tokenmerge.tools.models import load_model

HALF = (0.5,) * 3


def _photo(width: int = 50, height: int = 40) -> Any:
    return Image.frombytes("RGB", (width, height), bytes(torch.randint(0, 256, (height * width * 3,)).tolist()))


def _timm(**cfg: Any) -> nn.Module:
    model = tiny_vit()
    model.pretrained_cfg = {"input_size": (3, 32, 32), "mean": HALF, "std": (0.25,) * 3, "crop_pct": 0.9, **cfg}
    return model


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_timms_own_transform(mode: str) -> None:
    from timm.data import create_transform, resolve_data_config

    model, photo = _timm(crop_mode=mode, interpolation="bilinear"), _photo()
    found = find_preprocessing(model)
    assert torch.equal(found(photo), create_transform(**resolve_data_config({}, model=model))(photo))
    assert found.is_known and found.notes() == [f"Preprocessing: {found}"]
    if mode == "center":
        assert str(found) == (
            "shorter side 35, middle 32 x 32, bilinear, mean 0.5, std 0.25 (from timm's pretrained_cfg)"
        )


def test_the_size_is_that_the_model_was_built_for() -> None:
    assert find_preprocessing(_timm(input_size=(3, 224, 224))).size == (3, 32, 32)


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t.ViTImageProcessor(size={"height": 32, "width": 24}),
        lambda t: t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        lambda t: t.ViTImageProcessor(do_normalize=False, size={"height": 32, "width": 32}),
        lambda t: t.DPTImageProcessor(size={"height": 32, "width": 32}, keep_aspect_ratio=True, ensure_multiple_of=8),
        lambda t: t.ViTImageProcessor(do_rescale=False, size={"height": 32, "width": 32}),
    ],
    ids=["vit", "clip", "not-normalised", "aspect", "not-rescaled"],
)
def test_a_hugging_face_processor_does_it_itself(make: Any, tmp_path: Path) -> None:
    processor, photo = make(pytest.importorskip("transformers")), _photo()
    processor.save_pretrained(tmp_path)
    expected = processor(photo, return_tensors="pt")["pixel_values"][0]
    torch.save(tiny_vit(), tmp_path / "model.pt")
    for found in (
        find_preprocessing(tiny_vit(), given=processor),
        find_preprocessing(tiny_vit(), beside=tmp_path),
        find_preprocessing(tiny_vit(), beside=tmp_path / "model.pt"),
    ):
        assert torch.equal(found(photo), expected) and found.is_known
    assert f"(from {tmp_path / 'preprocessor_config.json'})" in str(found)
    assert ("pixels not normalised" in str(found)) == (not processor.do_normalize)


def test_a_processor_with_other_constants_keeps_its_resizing() -> None:
    transformers = pytest.importorskip("transformers")
    size, photo = {"height": 32, "width": 32}, _photo()
    found = find_preprocessing(
        tiny_vit(), given=transformers.ViTImageProcessor(size=size), mean=[0.1], std=[0.2, 0.3, 0.4]
    )
    other = transformers.ViTImageProcessor(size=size, image_mean=[0.1] * 3, image_std=[0.2, 0.3, 0.4])
    assert torch.equal(found(photo), other(photo, return_tensors="pt")["pixel_values"][0])
    assert str(found).endswith("mean 0.1, std 0.2 0.3 0.4 (from the ViTImageProcessor given; as given: mean, std)")


def test_a_file_that_is_no_processor(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor"}')
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json is no image processor that transformers can"):
        find_preprocessing(tiny_vit(), beside=tmp_path)


def test_open_clips_own_transform() -> None:
    transform = pytest.importorskip("open_clip.transform", reason="open_clip is not installed")
    tower = tiny_vit()
    tower.preprocess_cfg = {"size": 32, "mean": HALF, "std": HALF, "interpolation": "bicubic", "resize_mode": "squash"}
    expected = transform.image_transform_v2(transform.PreprocessCfg(**tower.preprocess_cfg), is_train=False)
    photo, whole = _photo(), nn.Module()
    whole.visual = tower
    for model in (tower, whole):
        found = find_preprocessing(model)
        assert torch.equal(found(photo), expected(photo)) and found.source == "from open_clip's preprocess_cfg"


def test_torchvisions_weights_and_a_function_of_ones_own() -> None:
    presets = pytest.importorskip("torchvision.transforms._presets")
    photo, preset = _photo(), presets.ImageClassification(crop_size=32, resize_size=36)
    found = find_preprocessing(tiny_vit(), given=preset)
    assert torch.equal(found(photo), preset(photo)) and found.size == (3, 32, 32) and found.resize == 36
    own = find_preprocessing(tiny_vit(), given=lambda image: torch.full((3, 2, 2), 7.0))
    assert own(photo).eq(7).all() and own.is_known and "lambda" in str(own)
    with pytest.raises(DataError, match=r"mean cannot be changed in the transform given"):
        own.changed(mean=[0.5])
    with pytest.raises(DataError, match="preprocessing is 3; it takes"):
        find_preprocessing(tiny_vit(), given=3)


def test_what_is_assumed_is_said_until_it_is_given() -> None:
    found = find_preprocessing(tiny_vit())
    assert not found.is_known and found.warning().startswith(
        "WARNING: the model does not say how its images are prepared"
    )
    assert "mean 0.485 0.456 0.406" in found.warning() and found.notes()[1] == found.warning()
    assert found.changed(mean=[0.5]).warning(), "the deviation is still assumed"
    given = found.changed(mean=[0.5], std=[0.25], resize=[32, 32], interpolation="bilinear")
    assert given.warning() == "" and given.resize == (32, 32) and not given.crops
    assert given(Image.new("RGB", (9, 9), "white")).eq(2).all()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"mean": [127.5]},
            r"mean is 127\.5: give 1 or 3 numbers on the scale 0 to 1 \(a mean of 127.5 is 0.5 there\)",
        ),
        ({"std": [0.0]}, r"std is 0\.0: give 1 or 3 numbers"),
        ({"mean": [0.1, 0.2]}, "mean is 0.1 0.2: give 1 or 3 numbers"),
        ({"crop_pct": 1.5}, "crop_pct .* is a share above 0 and up to 1; got 1.5"),
        ({"resize": [0]}, "resize .* takes the shorter side, or height and width"),
        ({"resize": [8], "crop_pct": 0.5}, "give either resize .* or crop_pct"),
        ({"interpolation": "best"}, "no interpolation 'best'; there are: nearest"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_changes_that_make_no_sense(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        find_preprocessing(_timm(), **changes)


def test_a_way_that_the_options_cannot_say_is_not_lost_silently() -> None:
    with pytest.raises(DataError, match=r"mean cannot be changed alone: .* crop_mode border"):
        find_preprocessing(_timm(crop_mode="border"), mean=[0.5])


def test_a_run_wrote_down_how(tmp_path: Path) -> None:
    kept = find_preprocessing(_timm())
    (tmp_path / "model.json").write_text(json.dumps({"preprocessing": kept.as_dict()}))
    found, photo = find_preprocessing(tiny_vit(), beside=tmp_path), _photo()
    assert torch.allclose(found(photo), kept(photo), atol=1e-6) and str(tmp_path / "model.json") in found.source
    (tmp_path / "model.json").write_text('{"preprocessing": {"sizes": 3}}')
    with pytest.raises(ConfigError, match=r"model\.json holds no preprocessing that can be read"):
        find_preprocessing(tiny_vit(), beside=tmp_path)


def test_the_bundled_images_go_through_what_the_model_says() -> None:
    plain = open_data("fashion-mnist", load_model("reference"), batch_size=3, limit=3)
    ((images, _),) = list(plain)
    assert torch.equal(images, normalise(FashionMNIST(3, 3).images)) and plain.preprocessing.is_known
    data = open_data("fashion-mnist", _timm(mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0), batch_size=3, limit=3)
    ((images, _),) = list(data)
    assert images.shape == (3, 3, 32, 32) and images.min() >= 0 and data.preprocessing.is_known
    unknown = open_data("fashion-mnist", tiny_vit(img_size=28, in_chans=1), batch_size=3, limit=3)
    assert not unknown.preprocessing.is_known
    given = open_data("fashion-mnist", tiny_vit(img_size=28, in_chans=1), batch_size=3, limit=3, mean=[0.0], std=[1.0])
    ((images, _),) = list(given)
    assert given.preprocessing.is_known and images.min() == 0 and images.max() <= 1


def test_images_of_different_sizes_are_an_error_that_says_what_to_give(tmp_path: Path) -> None:
    for i, width in enumerate((40, 50)):
        (tmp_path / str(i)).mkdir()
        _photo(width).save(tmp_path / str(i) / "x.png")
    to_tensor = Preprocessing((), None, False, "bilinear", None, None, "as they are")
    data = open_data(str(tmp_path), nn.Flatten(), batch_size=2, workers=0, preprocessing=to_tensor)
    with pytest.raises(
        DataError, match=r"sizes \(3, 40, 40\), \(3, 40, 50\) after preprocessing .*--resize HEIGHT WIDTH"
    ):
        list(data)


def test_the_answer_is_the_one_that_is_meant() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    for output in (
        a,
        (a, b),
        {"other": b, "logits": a},
        {"x": None, "predicted_depth": a},
        (None, (a,)),
        [{"y": (a,)}],
    ):
        assert answer(output) is a
    with pytest.raises(DataError, match="returns a dict without a tensor"):
        answer({"loss": None})


def test_who_declares_classes() -> None:
    assert declared_classes(tiny_vit(num_classes=7)) == 7
    assert declared_classes(tiny_vit(num_classes=0)) is declared_classes(nn.Flatten()) is None
