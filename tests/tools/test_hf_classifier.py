"""Every command on models as people have them: a Hugging Face classifier, a CLIP tower, a depth model.

The classifier's figures are those of its own pipeline, to the image.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from torch import nn

from helpers import randomised
from tokenmerge import assets
from tokenmerge.cli import main
from tokenmerge.data.labelled import open_data
from tokenmerge.errors import DataError
from tokenmerge.tools.compare import compare
from tokenmerge.tools.engines import TARGETS
from tokenmerge.tools.evaluate import evaluate
from tokenmerge.tools.models import load_model
from tokenmerge.training.run_folder import load

transformers = pytest.importorskip("transformers")

Capture = pytest.CaptureFixture[str]
SIZE = {"height": 32, "width": 32}
NAMES = [name.replace("/", "-") for name in assets.CLASSES]  # not in the order of the alphabet
TRAINED, HELD = 300, 100
TOWER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}


class Files(NamedTuple):
    model: Path
    images: Path  # with train/ and valid/
    hits: int  # of the pipeline among the validation images


def _write(images: torch.Tensor, labels: torch.Tensor, folder: Path) -> None:
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / NAMES[label] / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).convert("RGB").save(path)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A small ViT, fine-tuned for seconds on 300 images by its own processor, saved as `save_pretrained` does it."""
    root = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    images, labels = (part[: TRAINED + HELD] for part in assets.fashion_mnist("test"))
    _write(images[:TRAINED], labels[:TRAINED], root / "images" / "train")
    _write(images[TRAINED:], labels[TRAINED:], root / "images" / "valid")
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    config = transformers.ViTConfig(**TOWER, image_size=32, patch_size=8, **names)
    model = transformers.ViTForImageClassification(config).train()
    processor = transformers.ViTImageProcessor(size=SIZE)
    pixels = torch.cat([processor(_picture(image), return_tensors="pt")["pixel_values"] for image in images[:TRAINED]])
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(10):
        for some in torch.randperm(TRAINED).split(50):
            model(pixel_values=pixels[some], labels=labels[some]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval().save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    return Files(root / "model", root / "images", _hits(root / "model", root / "images" / "valid"))


def _picture(image: torch.Tensor) -> Any:
    return Image.fromarray(image.numpy()).convert("RGB")


def _hits(model: Path, folder: Path) -> int:
    """Count what Hugging Face's own pipeline gets right."""
    pipe = transformers.pipeline("image-classification", model=str(model), device="cpu")
    paths = sorted(folder.rglob("*.png"))
    answers = pipe([str(path) for path in paths], top_k=1)
    return sum(found[0]["label"] == path.parent.name for found, path in zip(answers, paths, strict=True))


def _run(capsys: Capture, *arguments: Any) -> tuple[str, str]:
    assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr()


def _json(capsys: Capture, *arguments: Any) -> Any:
    return json.loads(_run(capsys, *arguments, "--json")[0])


def _data(files: Files) -> list[Any]:
    return ["--data", files.images / "valid", "--workers", 0, "-b", 32]


PREPARED = "resize 32 x 32, bilinear, mean 0.5, std 0.5 (from "


def test_eval_counts_what_the_pipeline_counts(files: Files, capsys: Capture) -> None:
    assert 0.3 * HELD < files.hits < HELD, "the model has learned nothing, or there is nothing to get wrong"
    content = _json(capsys, "eval", files.model, *_data(files), "-r", 0, 2)
    unmerged, merged = content["rows"]
    assert (unmerged["top-1 %"], unmerged["agreement %"]) == (100 * files.hits / HELD, 100.0)
    assert unmerged["top-1 ±"] == pytest.approx(
        (unmerged["top-1 %"] * (100 - unmerged["top-1 %"]) / HELD) ** 0.5, abs=0.01
    )
    assert merged["tokens"] == 17 - 3 * 2 and merged["agreement %"] > 50
    assert content["notes"] == [f"Preprocessing: {PREPARED}{files.model / 'preprocessor_config.json'})"]


def test_compare_counts_what_the_pipeline_counts(files: Files, capsys: Capture, tmp_path: Path) -> None:
    out, _ = _run(
        capsys, "compare", files.model, *_data(files), "-r", 2, "--methods", "tome", "--rounds", 1, "--out", tmp_path
    )
    assert f"Preprocessing: {PREPARED}" in out
    kept = json.loads((tmp_path / "rows.json").read_text())
    assert kept["rows"][0]["top-1 %"] == 100 * files.hits / HELD
    assert kept["settings"]["preprocessing"].startswith(PREPARED)
    assert PREPARED in (tmp_path / "index.html").read_text() and PREPARED in (tmp_path / "table.md").read_text()
    assert "tabular" in (tmp_path / "table.tex").read_text()
    # other pixels are another comparison
    with pytest.raises(DataError, match=r"other settings .*preprocessing: asked "):
        data = open_data(str(files.images / "valid"), model := load_model(str(files.model)), batch_size=32, mean=[0.1])
        compare(model, data, methods=["tome"], rs=[2], rounds=1, folder=tmp_path, label=str(files.model))


def test_train_evaluates_what_the_pipeline_counts(files: Files, capsys: Capture, tmp_path: Path) -> None:
    run = tmp_path / "run"
    base = [
        "train",
        "finetune",
        "--out",
        run,
        "--set",
        f"model.name={files.model}",
        f"data.source=folder:{files.images}",
    ]
    base += ["steps=2", "batch_size=8", "merge.r=0", "save.log=1", "augment.crop=none", "optimizer.warmup=0"]
    _, err = _run(capsys, *base, "optimizer.lr=0", "optimizer.min_lr=0", "distill.weight=0")
    assert f"Preprocessing: {PREPARED}" in err
    (line,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"valid"' in line]
    # nothing was learned: the accuracy is the model's, whose classes stand in another order than the folders
    assert line["accuracy"] == pytest.approx(files.hits / HELD, abs=1e-6)
    rows = _json(capsys, "eval", run, *_data(files), "-r", 0)["rows"]
    assert rows[0]["top-1 %"] == 100 * files.hits / HELD
    _run(capsys, *base[:3], tmp_path / "learns", *base[4:], "merge.r=2", "optimizer.lr=0.001", "distill.weight=0.5")


@pytest.mark.parametrize("given", ["nothing", "processor", "beside", "options"])
def test_where_the_preprocessing_comes_from(files: Files, tmp_path: Path, capsys: Capture, given: str) -> None:
    saved = tmp_path / "model.pt"
    model = load_model(str(files.model))
    model.name_or_path = ""  # where it came from, and its processor with it
    torch.save(model, saved)
    processor = transformers.AutoImageProcessor.from_pretrained(files.model)
    if given == "processor":
        data = open_data(str(files.images / "valid"), model, batch_size=32, workers=0, preprocessing=processor)
        result = evaluate(model, data, rs=[])
        rows, notes = result.rows, result.notes
        assert notes == [f"Preprocessing: {PREPARED}the ViTImageProcessor given)"]
    else:
        options = ["--mean", 0.5, "--std", 0.5, "--resize", 32, 32] if given == "options" else []
        if given == "beside":
            processor.save_pretrained(tmp_path)
        content = _json(capsys, "eval", saved, "--trust-pickle", *_data(files), "-r", 0, *options)
        rows, notes = content["rows"], content["notes"]
    if given == "nothing":
        assert (
            notes[1].startswith("WARNING: the model does not say how its images are prepared") and "--mean" in notes[1]
        )
        assert rows[0]["top-1 %"] != 100 * files.hits / HELD, "the wrong pixels would not show"
        return
    assert len(notes) == 1
    # torchvision's resizing of pictures rounds otherwise than the processor's
    tolerance = 2.0 if given == "options" else 0.0
    assert rows[0]["top-1 %"] == pytest.approx(100 * files.hits / HELD, abs=tolerance)


def _clip(folder: Path) -> Path:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    from open_clip.model import set_model_preprocess_cfg

    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16}
    text = {"context_length": 6, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    tower = randomised(open_clip.CLIP(24, vision, text).visual).eval()
    cfg = {
        "size": 32,
        "mean": (0.4, 0.5, 0.6),
        "std": (0.2,) * 3,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    set_model_preprocess_cfg(tower, cfg)
    torch.save(tower, folder / "tower.pt")
    return folder / "tower.pt"


def _dense(folder: Path) -> Path:
    tower = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    neck = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [16] * 4, "fusion_hidden_size": 16}
    options = {"image_size": 32, "patch_size": 8, "is_hybrid": False, "readout_type": "project"}
    model = transformers.DPTForDepthEstimation(transformers.DPTConfig(**tower, **neck, **options))
    _steady(model).save_pretrained(folder / "depth")
    transformers.DPTImageProcessor(size=SIZE).save_pretrained(folder / "depth")
    return folder / "depth"


def _steady(model: nn.Module) -> nn.Module:
    """A tower that hides nothing, and a neck and a head that keep what it says: no ReLU of the head cuts it off."""
    randomised(model.dpt)
    with torch.no_grad():
        for part in (model.neck, model.head):
            for parameter in part.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, parameter[0].numel() ** -0.5)
                else:
                    parameter.fill_(8.0 if part is model.head else 0.0)
    return model.eval()


OTHERS = {
    "clip": (_clip, "24", "shorter side 32, middle 32 x 32, bicubic, mean 0.4 0.5 0.6, std 0.2", ("--trust-pickle",)),
    "dense": (_dense, "64 x 64", "resize 32 x 32, bicubic, mean 0.5, std 0.5", ("--restore", "dense")),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_that_is_no_classifier_is_measured_by_its_answers(
    files: Files, tmp_path: Path, capsys: Capture, kind: str
) -> None:
    make, numbers, prepared, options = OTHERS[kind]
    model = make(tmp_path)
    content = _json(capsys, "eval", model, *_data(files), "--limit", 32, "-r", 0, 2, *options)
    unmerged, merged = content["rows"]
    assert not any("top-1" in name or "agreement" in name for name in merged), "these are no classes"
    assert (unmerged["error %"], unmerged["cosine"]) == (0.0, 1.0)
    assert 0 < merged["error %"] < 100 and 0.5 < merged["cosine"] <= 1
    assert content["notes"][0].startswith(f"Preprocessing: {prepared}")
    assert f"answers with {numbers} numbers for an image, the data has 10 classes" in content["notes"][1]
    out = tmp_path / "compared"
    _run(
        capsys,
        "compare",
        model,
        *_data(files),
        "--limit",
        32,
        "-r",
        2,
        "--methods",
        "tome",
        "--rounds",
        1,
        "--out",
        out,
        *options,
    )
    rows = json.loads((out / "rows.json").read_text())["rows"]
    assert [row["top-1 %"] for row in rows] == [None, None]
    assert rows[1]["error %"] == pytest.approx(merged["error %"], rel=1e-3)
    assert "No accuracy: " in (out / "index.html").read_text()


@pytest.mark.parametrize("kind", ["classifier", *OTHERS])
def test_bench_doctor_and_export(files: Files, tmp_path: Path, capsys: Capture, kind: str) -> None:
    make, _, prepared, options = OTHERS.get(kind, (lambda folder: files.model, "", PREPARED, ()))
    model = make(tmp_path)
    rows = _json(capsys, "bench", model, "-r", 0, 2, "-b", 2, "--rounds", 1, *options)["rows"]
    assert [row["r"] for row in rows] == ["0", "2"] and rows[1]["tokens"] < rows[0]["tokens"] == 17
    findings = {
        name: (good, text) for name, good, text in _json(capsys, "doctor", model, "-r", 2, *options)["findings"]
    }
    assert findings["r = 0"][0] and findings["unpatch"][0] and findings["conclusion"][0] is not False, findings
    assert findings["equivalence"][0] is not False and findings["preprocessing"][1].startswith(prepared)
    if kind == "classifier":
        return  # see the next test
    out = tmp_path / "out.pt2"
    found = _json(capsys, "export", model, "-r", 2, "--to", "torch-export", "--out", out, *options)
    assert out.is_file() and found["preprocessing"].startswith(prepared) and found["answers"]


@pytest.mark.parametrize("command", ["doctor", "export", "bench"])
def test_a_warning_names_options_that_its_command_has(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = transformers.ViTModel(transformers.ViTConfig(**TOWER, image_size=32, patch_size=8))
    randomised(model).save_pretrained("model")
    options: list[Any] = {"export": ["--to", "torch-export"], "bench": ["-b", 2, "--rounds", 1]}.get(command, [])
    if command == "bench":  # only what auto chooses by is prepared there
        Image.new("RGB", (32, 32), (9, 99, 199)).save(_made(tmp_path / "images" / "a") / "1.png")
        options += ["--method", "auto", "--calibrate", "images"]
    printed, _ = _run(capsys, command, "model", "-r", 2, *options)
    assert "WARNING: the model does not say how its images are prepared" in printed and "--mean and --std" in printed
    printed, _ = _run(capsys, command, "model", "-r", 2, *options, "--mean", 0.5, "--std", 0.25)
    assert "WARNING" not in printed and "mean 0.5, std 0.25" in printed


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def test_the_exported_classifier_counts_as_the_merged_one(files: Files, tmp_path: Path, capsys: Capture) -> None:
    has_onnx = all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnxscript"))
    to, suffix = ("onnx", ".onnx") if has_onnx else ("torch-export", ".pt2")
    out = tmp_path / f"model{suffix}"
    printed, _ = _run(capsys, "export", files.model, "-r", 2, "--to", to, "--out", out)
    assert "answer [batch, 10]" in printed and PREPARED in printed
    run = TARGETS[to].load(out)
    model = load_model(str(files.model))
    data = open_data(str(files.images / "valid"), model, batch_size=50, workers=0)
    hits = sum(int((run(images).argmax(dim=1) == labels).sum()) for images, labels in data)
    merged = evaluate(model, data, rs=[2]).rows[1]
    assert merged["top-1 %"] == 100 * hits / HELD


@pytest.mark.parametrize("kind", OTHERS)
def test_train_refuses_what_is_no_classifier(files: Files, tmp_path: Path, capsys: Capture, kind: str) -> None:
    model = OTHERS[kind][0](tmp_path)
    source = [f"model.name={model}", f"data.source=folder:{files.images}", "data.size=[3, 32, 32]", "merge.r=2"]
    arguments = ["train", "finetune", "--trust-pickle", "--out", str(tmp_path / "run"), "--set", *source]
    assert main(arguments) == 2
    assert "the data has 10 classes, the model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_from_a_folder_needs_that_folder_no_more(
    files: Files, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is made with a relative path; it is read from elsewhere, by us and by transformers."""
    shutil.copytree(files.model, tmp_path / "here" / "model")
    monkeypatch.chdir(tmp_path / "here")
    run = tmp_path / "run"
    settings = ["model.name=model", f"data.source=folder:{files.images}", "steps=2", "batch_size=8", "merge.r=2"]
    _run(capsys, "train", "finetune", "--out", run, "--set", *settings, "distill.weight=0")
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(tmp_path / "here")
    model = load(run, merged=False)
    x = torch.randn(2, 3, 32, 32)
    theirs = transformers.ViTForImageClassification.from_pretrained(run).eval()
    with torch.no_grad():
        assert torch.equal(model(x).logits, theirs(x).logits)
    assert theirs.config.id2label == dict(enumerate(sorted(NAMES))) == model.config.id2label
    rows = _json(capsys, "eval", run, *_data(files), "-r", 0)["rows"]
    assert rows[0]["top-1 %"] == 100 * _hits(run, files.images / "valid") / HELD


@pytest.mark.parametrize("architecture", ["ViTForImageClassification", "ViTModel"])
def test_train_gives_a_tower_and_other_classes_a_new_classifier(
    files: Files, tmp_path: Path, capsys: Capture, architecture: str
) -> None:
    source = getattr(transformers, architecture).from_pretrained(files.model)
    source.save_pretrained(tmp_path / "model")
    transformers.AutoImageProcessor.from_pretrained(files.model).save_pretrained(tmp_path / "model")
    for name in NAMES[:4]:
        for split in ("train", "valid"):
            shutil.copytree(files.images / split / name, tmp_path / "images" / split / name)
    settings = [f"model.name={tmp_path / 'model'}", f"data.source=folder:{tmp_path / 'images'}", "steps=2"]
    run = tmp_path / "run"
    settings += ["batch_size=8", "merge.r=2", "distill.weight=0", "optimizer.lr=0", "optimizer.min_lr=0"]
    _run(capsys, "train", "finetune", "--out", run, "--set", *settings)
    trained = load(run, merged=False)
    assert trained.config.id2label == dict(enumerate(sorted(NAMES[:4]))) and trained.classifier.out_features == 4
    tower = getattr(source, "vit", source)
    assert torch.equal(trained.vit.layernorm.weight, tower.layernorm.weight), "the tower is not the one that was given"
    rows = _json(capsys, "eval", run, "--data", tmp_path / "images" / "valid", "--workers", 0, "-r", 0, 2)["rows"]
    assert rows[1]["tokens"] == 17 - 3 * 2


def test_a_folder_whose_weights_are_of_another_tower_is_refused(files: Files, tmp_path: Path) -> None:
    shutil.copytree(files.model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(DataError, match=r"do not fit its config\.json: vit"):
        load_model(str(tmp_path / "model"), num_classes=3)
