"""The explorer as a file: what it holds is what the models did, and what cannot be shown is refused or said."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

import tokenmerge
from helpers import randomised, tiny_vit
from tokenmerge.cli import main
from tokenmerge.data.prepare import find_preprocessing
from tokenmerge.errors import AlreadyPatchedError, DataError, UnknownNameError, UnsupportedError
from tokenmerge.report.page import as_page, escaped
from tokenmerge.testing.models.drawn import tiny_vit as drawn
from tokenmerge.tools import explore as tool
from tokenmerge.tools.explore import Exploration, explore, is_untrained

NAMES = [f"kind {number}" for number in range(10)]


def photo(seed: int = 0, size: tuple[int, int] = (90, 70)) -> Any:
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (7, 9, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(small.numpy()).resize(size, Image.BICUBIC)


def vit() -> Any:
    torch.manual_seed(0)
    return tiny_vit()


def data_of(path: Path) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.S)
    assert found
    return json.loads(found[1])


def written(tmp_path: Path, model: Any = None, images: Any = None, **options: Any) -> tuple[Exploration, Any]:
    images = [photo()] if images is None else images
    found = explore(vit() if model is None else model, images, tmp_path / "x.html", **{"rounds": 1, **options})
    return found, data_of(found.path)


def test_the_page_holds_what_the_models_did(tmp_path: Path) -> None:
    model, photos = vit(), [photo(0), photo(1)]
    found, data = written(tmp_path, model, photos, rs=[3, 8], methods=["tome", "evit"], labels=NAMES)
    prepared = find_preprocessing(model)
    assert [method["name"] for method in data["methods"]] == ["tome", "evit"] and data["depth"] == 4
    for method in data["methods"]:
        assert [amount["label"] for amount in method["amounts"]] == ["0", "3", "8"]
        for amount in method["amounts"]:
            assert amount["ms"] > 0 and len(amount["runs"]) == 2
            for image, run in zip(photos, amount["runs"], strict=True):
                with tokenmerge.patched(model, method["name"], r=int(amount["label"]), track="pairs") as handle:
                    with torch.no_grad():
                        out = model(prepared(image)[None])
                    assert run["tokens"] == [65, *handle.tokens]
                    for block, expected in zip(run["blocks"], handle.trace().blocks, strict=True):
                        assert block["gone"] == expected.gone[0].tolist() and block["into"] == expected.into[0].tolist()
                        assert block["similarity"] == [round(value, 3) for value in expected.similarity[0].tolist()]
                    assert run["macs"] == tokenmerge.macs(model, (3, 32, 32))
                shares = out.softmax(dim=1)[0]
                assert run["top"][0] == [NAMES[int(shares.argmax())], round(float(shares.max()), 5)]
    rows = found.rows
    assert [(row["method"], row["r"]) for row in rows] == [
        ("unmerged", "0"),
        ("tome", "3"),
        ("tome", "8"),
        ("evit", "3"),
        ("evit", "8"),
    ]
    assert rows[0]["tokens"] == 65 and rows[2]["tokens"] == 33 and rows[2]["GMACs"] < rows[1]["GMACs"]
    same = [run["top"][0][0] == plain["top"][0][0] for plain, run in _pairs(data, 0, 2)]
    assert rows[2]["same class"] == f"{sum(same)} of 2"
    assert not tokenmerge.handle_of(model, None) and found.path.stat().st_size < 200_000


def _pairs(data: Any, method: int, amount: int) -> Any:
    amounts = data["methods"][method]["amounts"]
    return zip(amounts[0]["runs"], amounts[amount]["runs"], strict=True)


def test_two_runs_write_the_same_page_but_for_times(tmp_path: Path) -> None:
    pages = []
    for name in ("a", "b"):
        found = explore(vit(), [photo()], tmp_path / f"{name}.html", rs=[8], rounds=1)
        pages.append(data_of(found.path))
        for method in pages[-1]["methods"]:
            for amount in method["amounts"]:
                amount["ms"] = 0
    assert pages[0] == pages[1]


def test_the_picture_is_the_photo_in_its_own_resolution(tmp_path: Path) -> None:
    found, data = written(tmp_path, images=[photo(size=(900, 700)), photo(size=(9, 7))])
    first, second = data["images"]
    kind, _, content = first["source"].partition(";base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(content)))
    assert kind == "data:image/jpeg" and picture.size == (first["width"], first["height"])
    assert picture.width == picture.height > 600
    assert first["grid"] == [8, 8] and first["onPhoto"]
    assert (second["width"], second["height"]) == (32, 32), "an upscaled photo is shown as the model is given it"
    assert "Shown as the model is given them, at its resolution: image 2." in found.facts


def test_embeddings_are_compared_as_vectors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = drawn(num_classes=0)
    found, data = written(tmp_path, model, rs=[8])
    plain, merged = (amount["runs"][0] for amount in data["methods"][0]["amounts"])
    assert plain["cosine"] == 1 and 0 < merged["cosine"] < 1 and "top" not in merged
    assert found.rows[1]["cosine"] == pytest.approx(merged["cosine"], abs=1e-5)
    with pytest.raises(DataError, match="10 names of classes for a model with no classes"):
        written(tmp_path, model, labels=NAMES, force=True)


def test_a_hugging_face_model_with_its_own_names(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        id2label={0: "cat", 1: "dog & <b>"},
        label2id={"cat": 0, "dog & <b>": 1},
    )
    model = randomised(transformers.ViTForImageClassification(config)).eval()
    _, data = written(tmp_path, model, rs=[2])
    assert data["images"][0]["grid"] == [4, 4] and data["prefix"] == 1
    assert {name for name, _ in data["methods"][0]["amounts"][1]["runs"][0]["top"]} == {"cat", "dog & <b>"}


def test_a_mixing_and_a_dropping_method(tmp_path: Path) -> None:
    _, data = written(tmp_path, rs=[8], methods=["tokenlearner(weights='new')", "attention"])
    mixed, dropped = (method["amounts"][1]["runs"][0] for method in data["methods"])
    assert all(set(block) == {"lead"} and len(block["lead"]) == 65 for block in mixed["blocks"] if "lead" in block)
    assert any("lead" in block for block in mixed["blocks"])
    assert dropped["blocks"][0]["into"] == [-1] * 8 and dropped["blocks"][0]["similarity"] == [None] * 8


def test_an_adaptive_method_has_the_macs_of_its_own_tokens(tmp_path: Path) -> None:
    model = vit()
    _, data = written(tmp_path, model, [photo(0), photo(1)], rs=[8], methods=["atm"])
    for run in data["methods"][0]["amounts"][1]["runs"]:
        amounts = [a - b for a, b in zip(run["tokens"], run["tokens"][1:], strict=False)]
        with tokenmerge.patched(model, "drop", r=amounts):
            assert run["macs"] == tokenmerge.macs(model, (3, 32, 32))


def test_auto_is_chosen_on_the_photos(tmp_path: Path) -> None:
    found, data = written(tmp_path, images=[photo(0), photo(1)], rs=[8], methods=["tome", "auto"])
    assert [method["name"] for method in data["methods"]] == ["tome", "auto"]
    assert any(fact.startswith("auto, r = 8: ") for fact in found.facts)
    assert "auto was chosen on the photos of this page." in found.facts


def test_a_saved_configuration_keeps_its_r(tmp_path: Path) -> None:
    tokenmerge.MergeConfig("tome", r=[1, 2, 3, 4]).save(tmp_path / "merge.json")
    _, data = written(tmp_path, rs=[8], methods=[str(tmp_path / "merge.json"), "tofu"])
    assert [[amount["label"] for amount in method["amounts"]] for method in data["methods"]] == [
        ["0", "own"],
        ["0", "8"],
    ]
    assert data["methods"][0]["amounts"][1]["runs"][0]["tokens"] == [65, 64, 62, 59, 55]


def test_two_configurations_of_one_method_are_told_apart(tmp_path: Path) -> None:
    for number, r in enumerate(([1, 2, 3, 4], [4, 3, 2, 1], 8)):
        tokenmerge.MergeConfig("tome", r=r).save(tmp_path / f"{number}.json")
    methods = ["tome", *(str(tmp_path / f"{number}.json") for number in range(3))]
    found, data = written(tmp_path, rs=[8], methods=methods)
    labels = ["0", "8", "own", "own (#2)", "8 (#2)"]
    assert [amount["label"] for amount in data["methods"][0]["amounts"]] == labels  # a link names one of them
    assert [row["r"] for row in found.rows] == labels


def test_an_untrained_model_is_said_to_be_one(tmp_path: Path) -> None:
    fresh = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    assert is_untrained(fresh) and not is_untrained(vit()) and not is_untrained(tokenmerge.load("reference"))
    found, _ = written(tmp_path, fresh, rs=[1])
    assert "This model is untrained" in found.notes[0] and "This model is untrained" in found.path.read_text()
    assert not any("untrained" in note for note in written(tmp_path, force=True)[0].notes)


def test_a_model_without_a_grid_is_drawn_as_a_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "_grid", lambda *_: None)
    found, data = written(tmp_path)
    assert any("no grid of patches" in note for note in found.notes)
    image = data["images"][0]
    assert not image["onPhoto"] and image["grid"] == [8, 8] and image["width"] == image["height"] == 192


def test_a_photo_that_is_not_square_has_patches_of_its_aspect(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = drawn(img_size=(24, 40))
    _, data = written(tmp_path, model, rs=[4])
    assert data["images"][0]["grid"] == [6, 10] and data["images"][0]["width"] > data["images"][0]["height"]


def test_merging_inside_windows_is_refused(tmp_path: Path) -> None:
    from tokenmerge.adapters import ADAPTERS

    adapter = next(adapter for adapter in ADAPTERS if adapter.name == "timm_sam")
    model, x = adapter.tiny()
    steps = lambda image: torch.rand(x.shape[1:])  # noqa: E731
    with pytest.raises(UnsupportedError, match="merges inside windows, for the attention only"):
        written(tmp_path, randomised(model), preprocessing=steps, rs=[2])
    assert not (tmp_path / "x.html").exists()


def test_what_cannot_run_is_said_and_the_rest_is_shown(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = drawn(class_token=False, global_pool="avg")
    found, data = written(tmp_path, model, rs=[8], methods=["tome", "evit"])
    assert [method["name"] for method in data["methods"]] == ["tome"]
    assert any(note.startswith("evit is left out at r = 8: ") and "class token" in note for note in found.notes)
    with pytest.raises(UnsupportedError, match="class token"):
        written(tmp_path, model, rs=[8], methods=["evit"], force=True)


def test_bad_input_is_refused_before_a_file_is_touched(tmp_path: Path) -> None:
    old = tmp_path / "x.html"
    old.write_text("mine")
    with pytest.raises(DataError, match=r"x.html exists already: give another name \(-o\), or --force"):
        written(tmp_path)
    (tmp_path / "bad.png").write_text("no image")
    for error, says, model, options in (
        (DataError, "cannot read the image .*bad.png", vit(), {"images": [photo(), tmp_path / "bad.png"]}),
        (DataError, "no images", vit(), {"images": []}),
        (DataError, "at least one r besides 0", vit(), {"rs": [0]}),
        (DataError, "at least 1 timed round", vit(), {"rounds": 0}),
        (DataError, "9 names of classes for a model with 10 classes", vit(), {"labels": NAMES[1:]}),
        (DataError, "cannot read the names of the classes, nowhere.txt", vit(), {"labels": "nowhere.txt"}),
        (UnknownNameError, "tomee", vit(), {"methods": ["tomee"]}),
        (tokenmerge.TokenMergeError, "-3", vit(), {"rs": [8, -3]}),
        (AlreadyPatchedError, "reduced already", tokenmerge.patch(vit(), r=1).model, {}),
    ):
        with pytest.raises(error, match=says):
            written(tmp_path, model, force=True, **options)
        assert old.read_text() == "mine"
    with pytest.raises(DataError, match=r"cannot write results to /proc/x.html"):
        explore(vit(), photo(), "/proc/x.html")
    with pytest.raises(DataError, match=r"the name must end in .html"):
        explore(vit(), photo(), tmp_path / "x.htm")


def test_names_are_texts_wherever_they_stand(tmp_path: Path) -> None:
    evil = '</script><script>alert("1")</script><img src=x onerror=alert(1)>'
    found, data = written(tmp_path, labels=[f"{evil}{number}" for number in range(10)], label=evil, notes=[evil])
    page = found.path.read_text()
    assert evil not in page and "<img" not in page and page.count("<script") == 2 and page.count("</script") == 2
    assert data["model"] == evil and evil in data["methods"][0]["amounts"][0]["runs"][0]["top"][0][0]
    assert escaped(evil) in page and escaped('"&\udcff') == "&quot;&amp;\\udcff"


def test_a_page_allows_its_own_script_and_style_alone() -> None:
    page = as_page(
        "a $title & <b>", "<p>$body</p>", style="p { color: red }", script="let a = '$b';", data={"a": "<&>"}
    )
    policy = re.search(r'content="(default-src[^"]+)"', page)
    assert policy and policy[1].count("'sha256-") == 2 and "unsafe" not in policy[1] and "connect" not in policy[1]
    assert "a $title &amp; &lt;b&gt;" in page and "<p>$body</p>" in page and "let a = '$b';" in page
    assert '{"a":"\\u003c\\u0026\\u003e"}' in page
    assert "script-src 'none'" in as_page("t", "", style="") and "<script" not in as_page("t", "", style="")
    with pytest.raises(ValueError, match="JSON"):
        as_page("t", "", style="", data=float("nan"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photo().save("<b>.png")
    command = ["explore", "reference", "<b>.png", "-r", "4", "8", "--methods", "tome", "tofu", "--rounds", "1"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "| tofu " in said.out.replace("tofu", "tofu ") and "Preprocessing: " in said.out
    assert "Written: explore.html. Open it in a browser." in said.err
    page = Path("explore.html").read_text()
    assert "<title>What merges in &lt;b&gt;.png: reference</title>" in page
    assert data_of(Path("explore.html"))["methods"][0]["amounts"][0]["runs"][0]["top"][0][0] in _fashion()
    assert main(command) == 2 and "explore.html exists already" in capsys.readouterr().err
    assert main([*command, "--force", "--json", "--label", "mine"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [row["r"] for row in content["rows"]] == ["0", "4", "8", "4", "8"] and content["file"] == "explore.html"
    assert data_of(Path("explore.html"))["model"] == "mine"
    assert main(["explore", "reference", "none.png", "-o", "y.html"]) == 2 and not Path("y.html").exists()
    assert "cannot read the image none.png" in capsys.readouterr().err


def _fashion() -> Any:
    from tokenmerge.assets import CLASSES

    return CLASSES


def test_random_weights_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small.py").write_text(
        "import timm\ndef model():\n    return timm.create_model('vit_tiny_patch16_224', img_size=32, depth=2)\n"
    )
    photo().save(tmp_path / "a.png")
    out = tmp_path / "x.html"
    command = ["explore", f"{tmp_path}/small.py:model", str(tmp_path / "a.png"), "-o", str(out), "-r", "1"]
    assert main([*command, "--rounds", "1"]) == 0
    assert "This model is untrained" in capsys.readouterr().out and "This model is untrained" in out.read_text()
