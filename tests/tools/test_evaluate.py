"""Accuracy over labelled images: the figures by hand, and the model that was given stays as it was."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import tokenmerge
from helpers import bound_attributes, tiny_vit
from tokenmerge.data.labelled import Batches, Folder, open_data
from tokenmerge.errors import DataError, UnknownNameError, UnsupportedError, UnsupportedModelError
from tokenmerge.measure import trial as trial_module
from tokenmerge.tools import evaluate as module
from tokenmerge.tools.compare import compare
from tokenmerge.tools.evaluate import Evaluation, evaluate

CLASSES = 7
COLUMNS = ["r", "top-1 %", "top-1 ±", "top-5 %", "agreement %", "images/s", "speed-up", "GMACs", "tokens"]


def _model(num_classes: int = CLASSES) -> nn.Module:
    """A model whose answers differ from image to image, and a little from r to r."""
    model = tiny_vit(num_classes=num_classes)
    noise = nn.functional.interpolate(4 * torch.rand(64, 3, 4, 4) - 2, size=32)
    with torch.no_grad():
        logits = model(noise)
        model.head.bias -= logits.mean(dim=0)
    model.pretrained_cfg = {"input_size": (3, 32, 32), "crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of coarse noise in each of seven classes."""
    for i in range(3 * CLASSES):
        path = tmp_path / "images" / f"class{i % CLASSES}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = Image.frombytes("RGB", (4, 4), bytes(torch.randint(0, 256, (48,)).tolist()))
        noise.resize((32, 32)).save(path)
    return tmp_path / "images"


def _data(folder: Path, model: nn.Module, batch_size: int = 8) -> Folder:
    data = open_data(str(folder), model, batch_size=batch_size, workers=0)
    assert isinstance(data, Folder)
    return data


def _ranked(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argsort(dim=1, descending=True)


def test_figures_equal_those_by_hand(folder: Path) -> None:
    model = _model()
    result = evaluate(model, _data(folder, model), rs=(0, 16, (16, -1.0)), bound=True)
    ((x, labels),) = list(_data(folder, model, batch_size=21))
    answers = _ranked(model, x)[:, 0]
    assert result.images == 21 and result.corrupt == []
    assert [row["r"] for row in result.rows] == ["0", "16", "(16, -1.0)"]
    for r, row in zip((0, 16, (16, -1.0)), result.rows, strict=True):
        with tokenmerge.patched(model, r=r) as handle:
            ranked = _ranked(model, x)
            assert row["tokens"] == handle.tokens[-1]
            assert row["GMACs"] == round(tokenmerge.flops(model, (3, 32, 32)) / 1e9, 4)
        expected = (
            100 * (ranked[:, 0] == labels).double().mean().item(),
            100 * (ranked[:, :5] == labels[:, None]).any(dim=1).double().mean().item(),
            100 * (ranked[:, 0] == answers).double().mean().item(),
        )
        assert (row["top-1 %"], row["top-5 %"], row["agreement %"]) == pytest.approx(expected, abs=0.006)
        assert row["top-5 %"] >= row["top-1 %"]
    assert result.rows[0]["agreement %"] == 100.0
    assert len(answers.unique()) > 2 and result.rows[1]["agreement %"] < 100.0, "the comparison would be empty"


def test_columns_with_and_without_the_bound(folder: Path) -> None:
    model = _model()
    plain = evaluate(model, _data(folder, model), rs=(4,))
    bound = evaluate(model, _data(folder, model), rs=(4,), bound=True)
    assert [list(row) for row in plain.rows] == [COLUMNS] * 2
    assert [list(row) for row in bound.rows] == [[*COLUMNS, "bound images/s", "over bound"]] * 2
    assert bound.rows[0]["bound images/s"] is bound.rows[0]["over bound"] is None
    assert bound.rows[1]["bound images/s"] > 0 and bound.rows[1]["over bound"] > 0
    assert "cores" in plain.environment["device"] or plain.environment["device"]


def test_speeds_follow_from_the_seconds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(trial_module.time, "perf_counter", lambda: clock[0])
    model = _model()

    def tick(block: nn.Module, args: tuple[Tensor, ...]) -> None:
        clock[0] += args[0].shape[1] / 1000  # a millisecond for each token in the last block

    model.blocks[-1].norm2.register_forward_pre_hook(tick)
    rows = evaluate(model, _data(folder, model, batch_size=7), rs=(8,), bound=True).rows
    # three batches of 65 or of 33 tokens; the first batch once more as warm-up, which must not count
    assert [row["images/s"] for row in rows] == [round(7000 / 65, 1), round(7000 / 33, 1)]
    assert [row["speed-up"] for row in rows] == [1.0, round(65 / 33, 2)]
    assert rows[1]["over bound"] == 1.0


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_model_given_is_not_changed(folder: Path, training: bool) -> None:
    model = _model()
    ((x, _),) = list(_data(folder, model, batch_size=21))
    data = _data(folder, model)
    expected, before = model(x), (bound_attributes(model), set(dir(model)))
    evaluate(model.train(training), data, rs=(0, 8), bound=True)
    assert all(m.training is training for m in model.modules())
    assert torch.equal(model.eval()(x), expected)
    assert (bound_attributes(model), set(dir(model))) == before


def test_all_variants_see_the_same_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    made: list[nn.Module] = []
    monkeypatch.setattr(module, "shared_copy", lambda m, copy=module.shared_copy: made.append(copy(m)) or made[-1])
    evaluate(model, _data(folder, model), rs=(4, 8), bound=True)
    assert len(made) >= 4
    for twin in made:
        assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_without_dropout_in_training_mode(folder: Path) -> None:
    model = tiny_vit(num_classes=CLASSES, drop_rate=0.9, proj_drop_rate=0.9)
    model.pretrained_cfg = _model().pretrained_cfg
    quiet = evaluate(model, _data(folder, model), rs=(0,)).rows
    assert evaluate(model.train(), _data(folder, model), rs=(0,)).rows[0]["top-1 %"] == quiet[0]["top-1 %"]


@pytest.mark.parametrize(
    ("options", "method", "prop_attn"),
    [({}, "tome", "auto"), ({"method": "drop"}, "drop", "auto"), ({"prop_attn": False}, "tome", False)],
    ids=["default", "method", "prop_attn"],
)
def test_options_reach_the_reduction(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], method: str, prop_attn: bool | str
) -> None:
    made: list[nn.Module] = []
    monkeypatch.setattr(module, "shared_copy", lambda m, copy=module.shared_copy: made.append(copy(m)) or made[-1])
    model = _model()
    evaluate(model, _data(folder, model), rs=(8,), bound=True, **options)
    merged, bound = (tokenmerge.handle_of(twin).config for twin in made[-2:])
    assert (merged.method.name, merged.r, merged.prop_attn) == (method, 8, prop_attn)
    assert (bound.method.name, bound.r, bound.prop_attn) == ("drop", 8, False)


def test_no_more_than_five_answers_are_ranked(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32), "red").save(tmp_path / name / "x.png")
    model = _model(num_classes=2)
    (row,) = evaluate(model, _data(tmp_path, model), rs=()).rows
    assert row["top-1 %"] == 50.0 and row["top-5 %"] == 100.0


def test_a_truncated_image_is_named_and_the_rest_evaluated(folder: Path) -> None:
    path = folder / "class3" / "3.png"
    path.write_bytes(path.read_bytes()[:60])
    model = _model()
    result = evaluate(model, _data(folder, model), rs=(4,))
    assert result.images == 20
    assert len(result.corrupt) == 1 and result.corrupt[0].startswith(f"{path}: ")
    (x, labels), *rest = list(_data(folder, model, batch_size=21))
    assert rest == []
    hits = (_ranked(model, x)[:, 0] == labels).double().mean().item()
    assert result.rows[0]["top-1 %"] == pytest.approx(100 * hits, abs=0.006)


def test_a_batch_of_broken_images_only(folder: Path) -> None:
    for path in (folder / "class0").iterdir():
        path.write_bytes(b"broken")
    model = _model()
    result = evaluate(model, _data(folder, model, batch_size=3), rs=(4,))
    assert (result.images, len(result.corrupt)) == (18, 3)


def test_every_image_is_broken(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        path.write_bytes(b"broken")
    model = _model()
    with pytest.raises(DataError, match=r"none of the 21 images of .* could be read; .*class0/0\.png: cannot id"):
        evaluate(model, _data(folder, model), rs=(4,))


def test_progress_counts_images(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = _model()
    evaluate(model, _data(folder, model), rs=(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(8, 21), (16, 21), (21, 21)]


def test_images_the_model_does_not_take() -> None:
    model = tiny_vit(num_classes=10)
    data = open_data("fashion-mnist", model, batch_size=2, limit=2)
    with pytest.raises(
        DataError, match=r"the model does not take images of \(1, 28, 28\): Input height \(28\).*\(32\)\.$"
    ):
        evaluate(model, data, rs=(4,))


def test_a_model_that_is_no_classifier(folder: Path) -> None:
    model = tiny_vit(num_classes=CLASSES, global_pool="")
    model.pretrained_cfg = _model().pretrained_cfg
    result = evaluate(model, _data(folder, model), rs=(4,), restore="dense")
    unmerged, merged = result.rows
    assert "top-1 %" not in unmerged and (unmerged["error %"], unmerged["cosine"]) == (0.0, 1.0)
    ((x, _),) = list(_data(folder, model, batch_size=21))
    with torch.no_grad():
        plain = model(x).flatten(1)
        with tokenmerge.patched(model, r=4, restore="dense"):
            got = model(x).flatten(1)
    error = ((got - plain).norm(dim=1) / plain.norm(dim=1)).mean().item()
    assert merged["error %"] == pytest.approx(100 * error, rel=1e-3) and error > 1e-3
    assert merged["cosine"] == pytest.approx(torch.cosine_similarity(got, plain).mean().item(), abs=2e-5)
    assert result.notes[-2].startswith("No accuracy: VisionTransformer answers with 65 x 7 numbers for an image")
    assert result.notes[-1] == "recall@10 needs at least 50 images, and there are 21."
    with pytest.raises(
        DataError, match=r"merged, the model answers with \(8, 49, 7\), unmerged with \(8, 65, 7\).*--r"
    ):
        evaluate(model, _data(folder, model), rs=(4,), restore="merged")


def _sixty(folder: Path) -> Path:
    torch.manual_seed(0)
    folder.mkdir()
    for i in range(60):
        noise = torch.randint(0, 256, (32 * 32 * 3,), dtype=torch.uint8).tolist()
        Image.frombytes("RGB", (32, 32), bytes(noise)).save(folder / f"{i:02}.png")
    return folder


@pytest.mark.parametrize("pool", ["token", "", "avg"], ids=["vectors", "class-token", "mean"])
def test_embeddings_are_searched_for(tmp_path: Path, pool: str) -> None:
    """Every image is a query; the neighbours by a loop in plain Python."""
    model = tiny_vit(num_classes=0, global_pool="" if pool == "avg" else pool, class_token=pool != "avg")
    model.pretrained_cfg = _model().pretrained_cfg
    data = open_data(str(_sixty(tmp_path / "flat")), model, batch_size=16, workers=0)
    result = evaluate(model, data, rs=(0, 12), restore="dense")
    x = torch.cat([images for images, _ in data])

    def embedded() -> list[list[float]]:
        with torch.no_grad():
            y = model(x)
        y = y if y.ndim == 2 else y[:, 0] if pool == "" else y.mean(dim=1)
        return torch.nn.functional.normalize(y, dim=1).tolist()

    def neighbours(query: int, queries: list[list[float]], index: list[list[float]]) -> set[int]:
        scores = {i: sum(a * b for a, b in zip(queries[query], y, strict=True)) for i, y in enumerate(index)}
        return set(sorted((i for i in scores if i != query), key=lambda i: -scores[i])[:10])

    old = embedded()
    with tokenmerge.patched(model, r=12, restore="dense"):
        new = embedded()
    for name, index in (("recall@10", new), ("recall@10 old", old)):
        found = sum(len(neighbours(i, old, old) & neighbours(i, new, index)) for i in range(60)) / 600
        assert found < 0.99 and result.rows[1][name] == pytest.approx(found, abs=0.004)
        assert result.rows[0][name] == 1.0
    assert "of the 10 images nearest to each of 60" in result.notes[-1]


def test_images_without_labels_give_agreement(tmp_path: Path) -> None:
    model = _model()
    data = open_data(str(_sixty(tmp_path / "flat")), model, batch_size=16, workers=0)
    result = evaluate(model, data, rs=(8,))
    with torch.no_grad():
        x = torch.cat([images for images, _ in data])
        plain = model(x).argmax(dim=1)
        with tokenmerge.patched(model, r=8):
            same = (model(x).argmax(dim=1) == plain).float().mean().item()
    assert "top-1 %" not in result.rows[0] and "cosine" not in result.rows[0]
    assert result.rows[1].agreement == pytest.approx(100 * same, abs=0.01) and result.rows[0].agreement == 100.0
    assert any(note.startswith("No labels: ") for note in result.notes)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"device": "cuda:99"}, UnsupportedError, "no device 'cuda:99' on this machine"),
        ({"method": "tme"}, UnknownNameError, "'tme'.*Did you mean 'tome'"),
    ],
    ids=["device", "method"],
)
def test_wrong_options_come_before_the_images(
    folder: Path, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    for path in folder.rglob("*.png"):
        path.write_bytes(b"broken")  # would raise DataError
    model = _model()
    with pytest.raises(error, match=text):
        evaluate(model, _data(folder, model), rs=(4,), **options)


def test_a_loader_alone_is_refused_with_what_to_do() -> None:
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.rand(2, 3, 32, 32), torch.zeros(2).long())
    )
    for tool in (evaluate, partial(compare, methods=["tome"])):
        with pytest.raises(
            DataError, match=r"DataLoader has no source, outputs, .*: give Batches\(data, classes\) of token"
        ):
            tool(_model(), loader)  # type: ignore[operator]


def test_answers_that_are_no_numbers_are_told() -> None:
    model, images = _model(), torch.rand(6, 3, 32, 32)
    images[4, 0, 0, 0] = float("nan")
    answers = _ranked(model, images)[:, 0]
    answers[4] = 0  # what NaN would be ranked as
    data = Batches([(images[:3], answers[:3]), (images[3:], answers[3:])], CLASSES)
    result = evaluate(model, data, rs=(0, 16))
    row = result.rows[0]
    assert (row["top-1 %"], row["agreement %"]) == (83.33, 83.33)
    said = "the answers to 1 of 6 images hold NaN, merged or not: they count as wrong, and distances leave them out."
    assert [note for note in result.notes if "NaN" in note] == [f"r = {r}: {said}" for r in ("0", "16")]
    assert said in str(result)

    bare = tiny_vit(num_classes=CLASSES, global_pool="")
    result = evaluate(bare, data, rs=(4,), restore="dense")
    assert result.rows[0]["error %"] == 0.0 and 0 < result.rows[1]["error %"] < 1e3
    assert sum("NaN" in note for note in result.notes) == 2

    nothing = Batches([(torch.full_like(images, float("nan")), answers)], CLASSES)
    result = evaluate(model, nothing, rs=(16,))
    assert result.rows[1]["top-1 %"] == 0.0 and "6 of 6 images hold NaN" in str(result)


def test_an_unsupported_model() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    with pytest.raises(UnsupportedModelError, match=r"no adapter for torch\.nn.*Sequential"):
        evaluate(model, open_data("fashion-mnist", model, batch_size=2, limit=2), rs=(4,))


def test_the_result_starts_with_nothing_left_out() -> None:
    assert Evaluation([], {}, 0).corrupt == []
