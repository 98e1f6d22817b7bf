"""The callable class: what it reads from models of every host, in which forms images come, and that it can travel."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import tokenmerge
from helpers import randomised, tiny_vit
from tokenmerge import Embedder, MergeConfig
from tokenmerge.errors import (
    AlreadyPatchedError,
    ConfigError,
    DataError,
    UnknownNameError,
    UnsupportedError,
    UnsupportedModelError,
)

IMAGES = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8).numpy()
SHORT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def _timm() -> nn.Module:
    return randomised(tiny_vit())


def _timm_mean() -> nn.Module:
    return randomised(tiny_vit(global_pool="avg"))


def _hf(name: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, name.partition(":")[0])(**SHORT, image_size=32, patch_size=8, **options)
    return randomised(getattr(transformers, name.partition(":")[2])(config)).eval()


def _open_clip() -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16}
    text = {"context_length": 6, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    return randomised(open_clip.CLIP(24, vision, text)).eval()


def _torchvision() -> nn.Module:
    vision = pytest.importorskip("torchvision")
    model = vision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=7)
    model.torchvision_weights = vision.models.ViT_B_16_Weights.DEFAULT
    return randomised(model).eval()


def _pooled_of_timm(model: Any, x: Tensor) -> Tensor:
    found: Tensor = model.forward_head(model.forward_features(x), pre_logits=True)
    return found


# a model, and its embedding as its own library gives it
EMBEDDINGS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "timm": (_timm, _pooled_of_timm),
    "timm, mean": (_timm_mean, _pooled_of_timm),
    "dinov2": (lambda: _hf("Dinov2Config:Dinov2Model"), lambda model, x: model(x).pooler_output),
    "vit classifier": (
        lambda: _hf("ViTConfig:ViTForImageClassification"),
        lambda model, x: model.vit(x).last_hidden_state[:, 0],
    ),
    "clip tower": (
        lambda: _hf("CLIPVisionConfig:CLIPVisionModelWithProjection", projection_dim=24),
        lambda model, x: model(x).image_embeds,
    ),
    "vit without a pooler": (
        lambda: _hf("ViTMSNConfig:ViTMSNModel"),
        lambda model, x: model(x).last_hidden_state[:, 0],
    ),
    "open_clip": (_open_clip, lambda model, x: model.encode_image(x)),
    "torchvision": (
        _torchvision,
        lambda model, x: model.encoder(
            torch.cat((model.class_token.expand(len(x), -1, -1), model._process_input(x)), dim=1)
        )[:, 0],
    ),
}


def prepared(embedder: Embedder) -> Tensor:
    return torch.stack([embedder.prepare(Image.fromarray(image)) for image in IMAGES])


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_an_embedding_is_that_of_the_models_own_library(name: str) -> None:
    build, own = EMBEDDINGS[name]
    model = build()
    plain = Embedder(model, preprocessing=_small)
    x = prepared(plain)
    with torch.no_grad():
        expected = own(model, x)
        torch.testing.assert_close(plain.run(x), expected, atol=0, rtol=0)  # nothing merged: bit for bit
        torch.testing.assert_close(Embedder(model, r=0, preprocessing=_small).run(x), expected, atol=0, rtol=0)
        merged = Embedder(model, r=3, preprocessing=_small)
        tokenmerge.patch(model, r=3, restore="dense" if name == "timm" or name == "timm, mean" else None)
        torch.testing.assert_close(merged.run(x), own(model, x), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(merged.run(x), expected, atol=1e-4)
    assert plain.shape == merged.shape == expected.shape[1:] and expected.dim() == 2


def _small(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB").resize((32, 32)))).permute(2, 0, 1) / 255.0 - 0.5


def test_a_model_that_is_patched_already_merges_as_it_does() -> None:
    model = _timm()
    expected = Embedder(model, r=4)
    tokenmerge.patch(model, r=4)
    found = Embedder(model)
    assert found.merging == expected.merging != ""
    np.testing.assert_array_equal(found({"image": IMAGES})["embedding"], expected({"image": IMAGES})["embedding"])
    with pytest.raises(AlreadyPatchedError):
        Embedder(model, r=2)


def test_a_configuration_of_another_model_is_said(tmp_path: Path) -> None:
    with tokenmerge.patch(randomised(tiny_vit(embed_dim=64)), r=4) as handle:
        handle.save(tmp_path / "merge.json")
    said = (
        r"^VisionTransformer: the configuration was made for another model \(.* 64 wide, .* 32 wide, 1 protected\)\.$"
    )
    with pytest.warns(UserWarning, match=said):
        embed = Embedder(_timm(), tmp_path / "merge.json")
    assert len(embed.remarks) == 1 and pickle.loads(pickle.dumps(embed)).remarks == embed.remarks
    patched = _timm()
    tokenmerge.patch(patched, MergeConfig.load(tmp_path / "merge.json"))
    with pytest.warns(UserWarning, match=said):
        Embedder(patched)


def test_a_model_that_is_given_stays_as_it_is() -> None:
    model = _timm()
    x = torch.randn(2, 3, 32, 32)
    before = model(x)
    Embedder(model, r=4), Embedder(model, r=4, output="dense", dtype="bfloat16")
    assert torch.equal(model(x), before) and tokenmerge.handle_of(model, None) is None
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("form", ["arrays", "list", "object", "images", "bytes", "paths", "dicts", "pixel_values"])
def test_images_in_every_form(form: str, tmp_path: Path) -> None:
    embed = Embedder(_timm(), r=2, column="photo")
    images = [Image.fromarray(image) for image in IMAGES]
    files = [io.BytesIO() for _ in images]
    for image, file in zip(images, files, strict=True):
        image.save(file, "png")
        image.save(tmp_path / f"{len(list(tmp_path.iterdir()))}.png")
    paths = sorted(str(path) for path in tmp_path.iterdir())
    several = np.empty(5, dtype=object)
    several[:] = [*IMAGES]
    given = {
        "arrays": IMAGES,
        "list": [*IMAGES],
        "object": several,
        "images": images,
        "bytes": np.array([file.getvalue() for file in files], dtype=object),
        "paths": paths,
        "dicts": [{"bytes": file.getvalue(), "path": None} for file in files[:2]]
        + [{"bytes": None, "path": path} for path in paths[2:]],
        "pixel_values": prepared(embed).numpy(),
    }[form]
    column = "pixel_values" if form == "pixel_values" else "photo"
    found = embed({"id": np.arange(5), column: given})
    assert found.keys() == {"id", "embedding"} and found["embedding"].dtype == np.float32
    np.testing.assert_allclose(found["embedding"], embed.run(prepared(embed)).numpy(), atol=1e-6)
    assert embed({"photo": []})["embedding"].shape == (0, 32)


def test_images_of_several_sizes_come_back_in_order() -> None:
    embed = Embedder(randomised(tiny_vit(dynamic_img_size=True)), preprocessing=_as_it_is)
    sizes = [(32, 32), (40, 32), (32, 32), (32, 48)]
    images = [torch.randint(0, 256, (*size, 3), dtype=torch.uint8).numpy() for size in sizes]
    found = embed({"image": images})["embedding"]
    for image, row in zip(images, found, strict=True):
        np.testing.assert_allclose(row, embed({"image": [image]})["embedding"][0], atol=1e-5)


def _as_it_is(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255.0


def test_logits_and_dense_features() -> None:
    model = _timm()
    logits = Embedder(model, r=2, output="logits")
    found = logits({"image": IMAGES})
    expected = torch.from_numpy(found["logits"]).softmax(1)
    assert found["logits"].shape == (5, 10) and (found["label"] == expected.argmax(1).numpy()).all()
    np.testing.assert_allclose(found["score"], expected.amax(1).numpy(), atol=1e-6)
    assert logits.classes == [str(i) for i in range(10)]
    x = prepared(logits)
    dense = Embedder(model, r=4, output="dense")
    assert dense.shape == (64, 32)
    tokenmerge.patch(model, r=4, restore="dense")
    with torch.no_grad():
        torch.testing.assert_close(dense.run(x), model.forward_features(x)[:, 1:])


def test_names_of_classes_are_the_models() -> None:
    model = _hf("ViTConfig:ViTForImageClassification", num_labels=3, id2label={0: "ant", 1: "bee", 2: "cat"})
    assert Embedder(model, output="logits", preprocessing=_small).classes == ["ant", "bee", "cat"]


class Depth(nn.Module):
    """A model with neither classes nor an embedding."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"predicted_depth": x.mean(1), "mask": x[:, :1]}


def test_a_model_without_such_an_output_says_what_it_has() -> None:
    size = {"given": _sized()}
    has = (
        r"It has: predicted_depth \(an answer of 32 x 32 for an image\), mask \(an answer of 1 x 32 x 32 for an image\)"
    )
    for output, name in (("embedding", "embedding"), ("logits", "logits")):
        with pytest.raises(UnsupportedError, match=rf"Depth has no {name}. {has}"):
            Embedder(Depth(), output=output, preprocessing=size)
    with pytest.raises(UnsupportedError, match="Depth returns tokens, and no adapter says which of them"):
        Embedder(Depth(), output="dense", preprocessing=size)
    with pytest.raises(UnsupportedError, match="has no logits: it was built without a classifier"):
        Embedder(tiny_vit(num_classes=0), output="logits")
    with pytest.raises(UnsupportedError, match=r"Dinov2Model has no logits. It has: last_hidden_state"):
        Embedder(_hf("Dinov2Config:Dinov2Model"), output="logits", preprocessing=_sized())
    with pytest.raises(UnsupportedError, match=r"Depth says neither how its images are prepared nor how large they"):
        Embedder(Depth())
    with pytest.raises(UnsupportedModelError, match="no adapter for"):
        Embedder(Depth(), r=4)
    with pytest.raises(UnknownNameError, match=r"no output 'embeding'. Did you mean 'embedding'"):
        Embedder(_timm(), output="embeding")


def _sized() -> Any:
    from tokenmerge.data.preprocessing import Preprocessing

    return Preprocessing((3, 32, 32), 32, True, "bicubic", (0.5,) * 3, (0.5,) * 3, "the test")


def test_a_wrong_batch_is_refused() -> None:
    embed = Embedder(_timm())
    with pytest.raises(DataError, match="the batch has no column 'image'; it has photo"):
        embed({"photo": IMAGES})
    with pytest.raises(DataError, match=r"image 1 of the batch is an array \(32, 32, 3\) of float32: give a PIL image"):
        embed({"image": [IMAGES[0], IMAGES[1].astype(np.float32)]})
    with pytest.raises(DataError, match="image 0 of the batch: cannot identify image file"):
        embed({"image": [b"no image"]})
    with pytest.raises(DataError, match=r"nowhere.png: .*No such file"):
        embed({"image": ["nowhere.png"]})
    with pytest.raises(DataError, match=r"the model does not take images of \(3, 20, 20\)"):
        embed({"pixel_values": torch.randn(1, 3, 20, 20)})
    with pytest.raises(ConfigError, match=r"cannot read the configuration nowhere.json"):
        Embedder(_timm(), "nowhere.json")


def test_it_travels(tmp_path: Path) -> None:
    config = MergeConfig("tofu", r=3)
    config.save(tmp_path / "merge.json")
    embed = Embedder("reference", tmp_path / "merge.json", output="logits", preprocessing={"mean": 0.3})
    content = pickle.dumps(embed)
    assert len(content) < 1000, "a name and options, not the weights"
    images = IMAGES[..., 0][:, :28, :28].copy()
    expected = embed({"image": images})["logits"]
    np.testing.assert_array_equal(pickle.loads(content)({"image": images})["logits"], expected)
    assert pickle.loads(content).settings() == embed.settings() and "tofu" in repr(embed).lower()
    given = Embedder(_timm(), r=4)
    again = pickle.loads(pickle.dumps(given))
    np.testing.assert_array_equal(again({"image": IMAGES})["embedding"], given({"image": IMAGES})["embedding"])


def test_it_compiles_and_runs_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    model = _timm()
    x = torch.randn(2, 3, 32, 32)
    expected = Embedder(model, r=4).run(x)
    torch.testing.assert_close(Embedder(model, r=4, compile=True).run(x), expected, atol=1e-4, rtol=1e-4)
    half = Embedder(model, r=4, dtype="bfloat16").run(x)
    assert half.dtype == torch.float32 and torch.nn.functional.cosine_similarity(half, expected).min() > 0.98


def test_no_engine_is_imported() -> None:
    code = (
        "import sys, tokenmerge; tokenmerge.Embedder; from tokenmerge.batch import job;"
        "found = {'ray', 'datasets', 'pyarrow', 'fsspec', 'webdataset', 'PIL', 'timm'} & set(sys.modules);"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
