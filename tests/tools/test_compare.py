"""A comparison: its figures by hand, rows that cannot be measured, and folders that are gone on with."""

from __future__ import annotations

import ast
import csv
import dataclasses
import json
import math
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from torch import Tensor, nn

import tokenmerge
from helpers import bound_attributes, randomised, tiny_vit
from tokenmerge import MergeConfig, methods
from tokenmerge.data.labelled import Batches, FashionMNIST
from tokenmerge.errors import DataError, UnsupportedError, UnsupportedModelError
from tokenmerge.measure import trial as measure
from tokenmerge.report import plots
from tokenmerge.report import progress as progress_module
from tokenmerge.report import table as table_module
from tokenmerge.report.axes import COLOURS, front
from tokenmerge.tools import compare as module
from tokenmerge.tools.compare import Comparison, compare
from tokenmerge.tools.evaluate import evaluate
from tokenmerge.tools.models import Trained

SIZE = (1, 28, 28)
FILES = {"rows.json", "table.md", "table.csv", "table.tex", "plot.png", "plot.svg", "plot.pdf", "index.html"}
PLOT = module.plot_pareto


def _fake_plot(paths: list[Path], rows: Any, title: str) -> None:
    for path in paths:
        path.write_bytes(b"\x89PNG")


@pytest.fixture(autouse=True)
def _no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all that these tests look at."""
    monkeypatch.setattr(module, "plot_pareto", _fake_plot)


def _model(**options: Any) -> nn.Module:
    """A model for the bundled images whose answers differ from image to image."""
    torch.manual_seed(1)
    model = tiny_vit(**{"img_size": 28, "in_chans": 1, "depth": 3, **options})
    with torch.no_grad():
        for images, _ in FashionMNIST(64, 64):
            model.head.bias -= model(images).mean(dim=0)
    return model


def _compare(
    folder: Path, model: nn.Module | None = None, limit: int = 40, batch: int = 24, **options: Any
) -> Comparison:
    given = {"methods": ["tome"], "rounds": 1, "folder": folder, **options}
    return compare(model or _model(), FashionMNIST(batch, limit), **given)


def _measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record every row that is measured from now on."""
    calls: list[str] = []
    row = module._row

    def note(trial: Any, task: Any, *args: Any) -> dict[str, Any]:
        if not task.refusal:
            amount = task.r if task.share is None else task.share
            calls.append("unmerged" if task.method == "unmerged" else f"{task.method} {amount}")
        return row(trial, task, *args)

    monkeypatch.setattr(module, "_row", note)
    return calls


def test_rows_equal_those_of_evaluate(tmp_path: Path) -> None:
    model = _model()
    before = (bound_attributes(model), set(dir(model)))
    full = tokenmerge.flops(model, SIZE)
    rows = _compare(tmp_path, model, rs=[0, 6, (8, -1.0)]).rows
    expected = evaluate(model, FashionMNIST(24, 40), rs=(6, (8, -1.0))).rows
    assert [row["asked"] for row in rows] == ["-", "r 6", "r (8, -1.0)"]
    for row, other in zip(rows, expected, strict=True):
        assert {name: row[name] for name in ("r", "top-1 %", "agreement %", "GMACs", "tokens")} == {
            name: other[name] for name in ("r", "top-1 %", "agreement %", "GMACs", "tokens")
        }
        with tokenmerge.patched(model, r=ast.literal_eval(row["r"])):
            assert row["MACs share"] == round(tokenmerge.flops(model, SIZE) / full, 4)
    assert 0 < rows[1]["agreement %"] < 100, "the comparison would be empty"
    first = rows[0]
    assert (first["KL"], first["MACs share"], first["speed-up"], first["over bound"]) == (0.0, 1.0, 1.0, None)
    assert (bound_attributes(model), set(dir(model))) == before


def test_divergence_by_hand(tmp_path: Path) -> None:
    model = _model()
    (_, row) = _compare(tmp_path, model, rs=[8]).rows
    ((images, _),) = list(FashionMNIST(40, 40))
    with torch.no_grad():
        wanted = model(images).softmax(dim=1).double()
        with tokenmerge.patched(model, r=8):
            got = model(images).softmax(dim=1).double()
    by_hand = (wanted * (wanted / got).log()).sum(dim=1).mean().item()
    assert by_hand > 1e-4 and row["KL"] == pytest.approx(by_hand, rel=1e-3)


def test_the_bound_drops_the_same_tokens_and_all_run_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, nn.Module]] = []
    interleave = measure.interleave

    def spy(calls: Any, device: torch.device, **options: Any) -> Any:
        assert all(torch.equal(call.args[0], images) for call in calls.values())
        seen.append({name: call.func for name, call in calls.items()})
        return interleave(calls, device, **options)

    monkeypatch.setattr(measure, "interleave", spy)
    images = next(iter(FashionMNIST(24, 40)))[0]
    # tome removes at most half of the tokens; the bound alone could remove more
    _compare(tmp_path, methods=["tome", "ats"], rs=[30])
    assert [set(models) for models in seen] == [{"unmerged"}] + [{"unmerged", "merged", "bound"}] * 2
    for models in seen[1:]:
        left = {name: tokenmerge.handle_of(models[name]).tokens for name in ("merged", "bound")}
        assert left["merged"] == left["bound"] and left["bound"][0] < 50
        assert tokenmerge.handle_of(models["bound"]).config.method.name == "drop"


def test_macs_of_an_adaptive_method_are_those_of_the_tokens_left(tmp_path: Path) -> None:
    model = _model()
    (_, row) = _compare(tmp_path, model, methods=["mpm"], rs=[20]).rows
    left, n = torch.zeros(3, dtype=torch.float64), 0
    with torch.no_grad(), tokenmerge.patched(model, "mpm", r=20) as handle:
        for images, _ in FashionMNIST(24, 40):
            model(images)
            left += torch.tensor(handle.tokens) * len(images)
            n += len(images)
    rounded = [round(x) for x in (left / n).tolist()]
    amounts = [a - b for a, b in zip([50, *rounded], rounded, strict=False)]
    assert any(amount not in (0, 20) for amount in amounts), "nothing depends on the images"
    with tokenmerge.patched(model, "drop", r=amounts):
        macs = tokenmerge.flops(model, SIZE)
    assert row["GMACs"] == round(macs / 1e9, 4)
    assert row["tokens"] == pytest.approx((left / n)[-1].item(), abs=0.051)
    with tokenmerge.patched(model, "mpm", r=20):
        assert tokenmerge.flops(model, SIZE) < macs, "all of r would have been counted"


@pytest.mark.parametrize("method", ["tome", "evit", "ats"])
def test_a_share_of_the_macs_gets_the_smallest_r(tmp_path: Path, method: str) -> None:
    model = _model()
    rows = _compare(tmp_path, model, limit=24, methods=[method], macs=[0.8, 0.6]).rows
    full = tokenmerge.flops(model, SIZE)
    images = next(iter(FashionMNIST(24, 24)))[0]

    def share(r: int) -> float:
        with tokenmerge.patched(model, method, r=r) as handle, torch.no_grad():
            model(images)
            left = handle.tokens
        amounts = [a - b for a, b in zip([50, *left], left, strict=False)]
        with tokenmerge.patched(model, "drop", r=amounts):
            return tokenmerge.flops(model, SIZE) / full

    for row, asked in zip(rows[1:], (0.8, 0.6), strict=True):
        r = int(row["r"])
        assert (row["asked"], row["note"]) == (f"MACs {asked}", "")
        assert share(r) <= asked < share(r - 1)
        assert row["MACs share"] == pytest.approx(share(r), abs=1e-4)


def test_a_share_that_cannot_be_reached_is_a_row_that_says_so(tmp_path: Path) -> None:
    found = _compare(tmp_path, methods=["tome", "evit"], macs=[0.2])
    tome, evit = found.rows[1:]
    assert tome["note"].startswith("cannot reach 0.2 of the MACs: at its largest r (24) it keeps 0.")
    assert tome["top-1 %"] is tome["GMACs"] is tome["images/s"] is None and tome["r"] == "-"
    assert evit["MACs share"] <= 0.2 and evit["note"] == ""
    assert found.marked == 1 and found.has_numbers
    assert found.notes == [f"tome (MACs 0.2): {tome['note']}"]


def test_what_cannot_run_is_a_row_that_says_so_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, view: Any, r: int) -> Any:
        raise RuntimeError("no memory\n  left")

    monkeypatch.setattr(methods.PiToMe, "plan", broken)
    model = _model(global_pool="avg", class_token=False)
    names = ["tokenlearner", "evit", "pitome", "tme", "tofu(early=2, late=1)", "tome"]
    found = _compare(tmp_path, model, methods=names, rs=[4, 6])
    by_name = {row["method"]: row for row in found.rows}
    assert by_name["tokenlearner"]["note"].startswith("tokenlearner is learned and has no weights.")
    assert "class" in by_name["evit"]["note"]
    assert by_name["pitome"]["note"] == "no memory left"
    assert by_name["tme"]["note"].startswith("no method 'tme'. Did you mean 'tome'?") and by_name["tme"]["asked"] == "-"
    assert by_name["tofu(early=2, late=1)"]["note"].startswith("no option of tofu 'late'.")
    assert by_name["tome"]["top-1 %"] is not None and by_name["tome"]["note"] == ""
    assert found.marked == 8 and len(found.rows) == 11
    assert sum(note.startswith("pitome (r 4, r 6): no memory") for note in found.notes) == 1


def test_all_are_the_listed_methods_without_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.Trial, "measure", lambda *args: (_ for _ in ()).throw(RuntimeError("skipped")))
    listed = [name for name in tokenmerge.list_methods() if name != "drop"]
    plain = _compare(tmp_path / "a", methods=["all"], rs=[4])
    assert [row["method"] for row in plain.rows] == ["unmerged", *listed] and not plain.has_numbers
    images = torch.randn(2, *SIZE)
    with_auto = _compare(tmp_path / "b", methods=["all", "tome"], rs=[4], calibrate=images)
    assert [row["method"] for row in with_auto.rows] == ["unmerged", *listed, "auto"]


def test_auto_says_what_it_chose_with_the_r_of_tome(tmp_path: Path) -> None:
    model, images = _model(depth=2), next(iter(FashionMNIST(8, 8)))[0]
    _, tome, auto = _compare(tmp_path, model, methods=["tome", "auto"], macs=[0.6], calibrate=images).rows
    handle = tokenmerge.patch(model, "auto", r=int(tome["r"]), calibrate=images)
    assert (auto["r"], auto["note"]) == (str(handle.r), handle.report().choice)
    assert auto["MACs share"] <= 0.6 and tome["note"] == ""


def test_auto_without_images_is_tome_and_says_so(tmp_path: Path) -> None:
    _, auto, tome = _compare(tmp_path, methods=["auto", "tome"], rs=[6]).rows
    assert auto["note"].startswith('tome: "auto" chooses by images, and none were given')
    assert auto["KL"] == tome["KL"] > 0


def test_a_saved_method_runs_once_with_its_own_r(tmp_path: Path) -> None:
    MergeConfig("tofu", r=[5, 3], prop_attn=False).save(tmp_path / "saved.json")
    name = str(tmp_path / "saved.json")
    rows = _compare(tmp_path / "out", methods=[name, "tome"], rs=[4, 6]).rows
    assert [(row["method"], row["asked"]) for row in rows[1:]] == [(name, "as saved"), ("tome", "r 4"), ("tome", "r 6")]
    assert (rows[1]["r"], rows[1]["tokens"]) == ("[5, 3]", 42)


def test_a_trained_model_takes_the_place_of_the_models_weights(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model, other = _model(), _model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    MergeConfig("tome", r=6).save(tmp_path / "merge.json")
    state = {key: value.half().contiguous() for key, value in other.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    other.load_state_dict(state)
    rows = _compare(tmp_path / "out", model, methods=[str(tmp_path), "tome"], rs=[6]).rows
    (_, plain) = _compare(tmp_path / "other", other, methods=["tome"], rs=[6]).rows
    assert rows[1]["top-1 %"] == plain["top-1 %"] and rows[1]["KL"] != rows[2]["KL"]
    assert rows[1]["asked"] == "as saved" and rows[0]["agreement %"] == 100.0
    ((images, _),) = list(FashionMNIST(40, 40))
    with torch.no_grad():
        answers = model(images).argmax(dim=1)
        with tokenmerge.patched(other, r=6):
            same = (other(images).argmax(dim=1) == answers).double().mean().item()
    assert rows[1]["agreement %"] == pytest.approx(100 * same, abs=0.006)


def test_a_finished_comparison_runs_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    first = _compare(tmp_path, model, methods=["tome", "tofu"], rs=[4])
    (tmp_path / "plot.png").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(module, "Trial", lambda *args, **options: pytest.fail("a finished row was run again"))
        second = _compare(tmp_path, model, methods=["tome()", "tofu"], rs=[4])
    assert second.rows == first.rows and (tmp_path / "plot.png").exists()
    calls = _measured(monkeypatch)
    third = _compare(tmp_path, model, methods=["mpm", "tome"], rs=[4, 6])
    assert calls == ["mpm 4", "mpm 6", "tome 6"]
    # those that were asked for come first, and none is lost
    assert [f"{row['method']} {row['r']}" for row in third.rows] == [
        "unmerged 0",
        "mpm 4",
        "mpm 6",
        "tome 4",
        "tome 6",
        "tofu 4",
    ]
    assert [row for row in third.rows if row["r"] == "4" and row["method"] != "mpm"] == first.rows[1:]


def test_a_comparison_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, done = _model(), []
    calls = _measured(monkeypatch)
    row = module._row

    def interrupted(trial: Any, task: Any, *args: Any) -> dict[str, Any]:
        if task.method == "mpm":
            raise KeyboardInterrupt
        return row(trial, task, *args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_row", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _compare(tmp_path, model, methods=["tome", "mpm", "tofu"], rs=[4])
    assert {path.name for path in tmp_path.iterdir()} == {"rows.json"}
    assert [row["method"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]] == ["unmerged", "tome"]
    assert calls == ["unmerged", "tome 4"]
    found = _compare(tmp_path, model, methods=["tome", "mpm", "tofu"], rs=[4], progress=lambda *step: done.append(step))
    assert calls == ["unmerged", "tome 4", "mpm 4", "tofu 4"]
    assert done == [(2, 4), (3, 4), (4, 4)]
    assert [row["method"] for row in found.rows] == ["unmerged", "tome", "mpm", "tofu"]


def test_rows_without_numbers_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    MergeConfig("tome", r=9).save(tmp_path / "late.json")
    late = tmp_path / "late.json"
    text = late.read_text()
    late.unlink()
    first = _compare(tmp_path / "out", model, methods=[str(late), "dtem"], rs=[4])
    assert first.marked == 2 and "late.json: No such file" in first.rows[1]["note"]
    late.write_text(text)
    calls = _measured(monkeypatch)
    second = _compare(tmp_path / "out", model, methods=[str(late), "dtem"], rs=[4])
    assert [row["top-1 %"] is None for row in second.rows] == [False, False, True]
    assert len(calls) == 2 and "unmerged" not in calls
    # what is not asked for any more and has no numbers says nothing
    third = _compare(tmp_path / "out", model, methods=["tome"], rs=[4])
    assert [row["method"] for row in third.rows] == ["unmerged", "tome", str(late)]


def test_weights_written_anew_are_another_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    handle = tokenmerge.patch(model, methods.DTEM(weights="new"), r=4)
    handle.save(tmp_path / "merge.json")
    _compare(tmp_path / "out", _model(), methods=[str(tmp_path / "merge.json")])
    with torch.no_grad():
        for parameter in model.tokenmerge_modules.parameters():
            parameter += 1
    handle.save(tmp_path / "merge.json")
    calls = _measured(monkeypatch)
    found = _compare(tmp_path / "out", _model(), methods=[str(tmp_path / "merge.json")])
    assert len(calls) == 1 and len(found.rows) == 3
    # the same as an object is the same row
    _compare(tmp_path / "out", _model(), methods=[MergeConfig.load(tmp_path / "merge.json")])
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"limit": 41}, r"images: asked 41, there 40\)"),
        ({"batch": 20}, r"batch size: asked 20, there 24\)"),
        ({"label": "other", "limit": 8}, r"model: asked other, there model; images: asked 8, there 40\)"),
        ({"model": tiny_vit(img_size=28, in_chans=1, depth=3)}, r"weights: asked \w{16}, there \w{16}\)"),
        ({"calibrate": torch.zeros(2, *SIZE)}, r"calibrate: asked 2 images \w{16}, there none\)"),
    ],
    ids=["images", "batch", "label", "weights", "calibrate"],
)
def test_another_comparison_is_left_alone(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    _compare(tmp_path, rs=[4])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        DataError, match=rf"holds a comparison with other settings \({text}\. Give another folder \(--out"
    ):
        _compare(tmp_path, rs=[6], **change)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert set(before) == FILES


def _refuse(model: nn.Module, x: Tensor) -> Tensor:
    raise DataError("no such images")


def test_fresh_starts_over_and_keeps_the_old_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _compare(tmp_path, rs=[4])
    old = (tmp_path / "rows.json").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(DataError, match="no such images"):
        patch.setattr(measure, "run_images", _refuse)
        _compare(tmp_path, rs=[6], limit=20, fresh=True)
    assert (tmp_path / "rows.json").read_bytes() == old, "nothing has taken its place yet"
    calls = _measured(monkeypatch)
    found = _compare(tmp_path, rs=[6], limit=20, fresh=True)
    assert calls == ["unmerged", "tome 6"] and found.images == 20
    assert [row["r"] for row in found.rows] == ["0", "6"]
    assert (tmp_path / "rows.json.old").read_bytes() == old


@pytest.mark.parametrize(
    "content",
    [b"", b'{"version": 1', b"[]", b'{"version": 1, "settings": {}}', b"\xff\xfe", "columns", "version", "key"],
    ids=["empty", "cut off", "list", "keys", "bytes", "columns", "version", "row"],
)
def test_a_damaged_file_is_left_alone(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "rows.json"
    if isinstance(content, str):
        _compare(tmp_path, rs=[4])
        whole = json.loads(path.read_text())
        if content == "version":
            whole["version"] = 99
        else:
            del whole["rows"][1]["KL" if content == "columns" else "key"]
        content = json.dumps(whole).encode()
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.json cannot be read as a comparison: .*start over \(--fresh\)"):
        _compare(tmp_path, rs=[4])
    assert path.read_bytes() == content
    _compare(tmp_path, rs=[4], fresh=True)
    assert (tmp_path / "rows.json.old").read_bytes() == content


def test_files_hold_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "plot_pareto", PLOT)
    found = _compare(tmp_path, methods=["tome(metric='x')", "dtem", "a<b>&"], rs=[4, 6], label="<i>model</i>")
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert found.title == "<i>model</i> on 40 images of fashion-mnist"
    page = (tmp_path / "index.html").read_text()
    assert page.startswith("<!doctype html>") and "<i>" not in page and "a<b>" not in page
    assert page.count("<tr>") == 1 + len(found.rows)
    for row in found.rows:
        assert f"<td>{escape(row['method'])}</td><td>{row['asked']}</td><td>{row['r']}</td>" in page
        assert escape(row["note"]) in page
    assert '<canvas id="chart"' in page and "<img" not in page
    table = (tmp_path / "table.md").read_text()
    assert table.startswith(r"# \<i\>model\</i\> on 40 images")
    assert sum(line.startswith("| ") for line in table.splitlines()) == 2 + len(found.rows)
    assert all(f"- {table_module.plain(note)}" in table for note in found.notes) and len(found.notes) == 2
    assert all(table_module.plain(fact) in table for fact in found.facts) and "Measured on: device " in table
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == [row["method"] for row in found.rows]
    assert rows[1]["top-1 %"] == str(found.rows[1]["top-1 %"]) and rows[3]["KL"] == ""
    assert all("torch " in row["measured on"] for row in rows)
    saved = json.loads((tmp_path / "rows.json").read_text())
    assert [{name: row[name] for name in found.rows[0]} for row in saved["rows"]] == found.rows
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_rows_of_other_machines_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    first = _compare(tmp_path, model, rs=[4])
    assert sum(fact.startswith("Measured on: ") for fact in first.facts) == 1
    monkeypatch.setattr(module, "environment", lambda device: {"torch": "99.0"})
    facts = _compare(tmp_path, model, rs=[4, 6]).facts
    assert "The rows come from several runs that differ in what they were measured on:" in facts
    assert "1 rows on: torch 99.0, rounds 1." in facts and any(fact.startswith("2 rows on: device ") for fact in facts)


def test_images_left_out_are_named_also_when_nothing_is_run_again(tmp_path: Path) -> None:
    class Torn(FashionMNIST):
        corrupt = ("torn.png: no image",)

        def __len__(self) -> int:
            return 41

    model = _model()
    for _ in range(2):
        found = compare(model, Torn(24, 40), methods=["tome"], rs=[4], rounds=1, folder=tmp_path)
        assert found.images == 40 and found.title.endswith("on 40 images of fashion-mnist")
        assert found.facts[-1] == "1 images could not be read and were left out: torn.png: no image."


def test_a_model_that_is_no_classifier(tmp_path: Path) -> None:
    found = _compare(tmp_path, tiny_vit(img_size=28, in_chans=1, depth=1, global_pool=""), rs=[4], restore="dense")
    unmerged, merged = found.rows
    assert unmerged["top-1 %"] is unmerged["KL"] is merged["top-1 %"] is None and found.has_numbers
    assert (unmerged["error %"], unmerged["cosine"]) == (0.0, 1.0)
    assert 0 < merged["error %"] < 100 and 0 < merged["cosine"] < 1
    assert "top-1 %" not in found.table[0] and "error %" in found.table[0]
    assert any(fact.startswith("No accuracy: VisionTransformer answers with 50 x 10 numbers") for fact in found.facts)
    assert "error %" in (tmp_path / "index.html").read_text()


def test_a_model_that_is_not_described(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no adapter"):
        _compare(tmp_path, nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), rs=[4])


def test_a_model_without_a_bound_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    amounts = measure.Trial._amounts
    monkeypatch.setattr(measure.Trial, "_amounts", lambda self, left: [*amounts(self, left)[:-1], 0])
    (_, row) = _compare(tmp_path, rs=[4]).rows
    assert row["top-1 %"] is None and "the free bound cannot drop tokens where this model merges them" in row["note"]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"rs": [4], "macs": [0.5]}, DataError, "not both"),
        ({"macs": [0.5, 1.5]}, DataError, r"lie between 0 and 1; got 0\.5, 1\.5\."),
        ({"macs": [float("nan")]}, DataError, "lie between 0 and 1"),
        ({"rs": [0]}, DataError, "at least one method, and one r other than 0"),
        ({"methods": []}, DataError, "at least one method"),
        ({"rounds": 0}, DataError, "at least 1 timed round; got 0"),
        ({"device": "cuda:99"}, UnsupportedError, "no device 'cuda:99'"),
    ],
    ids=["both", "share", "nan", "r-0", "none", "rounds", "device"],
)
def test_requests_that_make_no_sense(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        _compare(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write to .*file/out: Not a directory\."):
        _compare(tmp_path / "file" / "out")


def test_methods_may_be_objects(tmp_path: Path) -> None:
    given = [methods.ToMe(metric="x"), MergeConfig("tofu", r=3)]
    rows = _compare(tmp_path, methods=given, rs=[4]).rows
    assert [(row["method"], row["asked"]) for row in rows[1:]] == [
        ("tome(metric='x')", "r 4"),
        ("tofu", "as saved"),
    ]
    assert dataclasses.is_dataclass(Trained) and all(isinstance(row["KL"], float) for row in rows)


def test_a_half_precision_model_and_one_in_training(tmp_path: Path) -> None:
    model = _model().to(torch.bfloat16).train()
    rows = _compare(tmp_path, model, rs=[4]).rows
    assert rows[1]["note"] == "" and all(m.training for m in model.modules())


def test_answers_that_are_more_than_logits(tmp_path: Path) -> None:
    class Wrapped(type(_model())):  # type: ignore[misc]
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": super().forward(x)}

    model = _model()
    expected = _compare(tmp_path / "a", model, rs=[4]).rows[1]
    model.__class__ = Wrapped
    assert _compare(tmp_path / "b", model, rs=[4]).rows[1]["KL"] == expected["KL"]


def test_progress_says_how_much_time_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((0.0, 20.0, 100.0, 120.0, 490.0))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    with progress_module.Progress("rows") as progress:
        for done in (50, 51, 52, 53, 99):
            progress(done, 100)
    # 50 were there before: they took no time; a line each tenth, and each minute
    assert capsys.readouterr().err.splitlines() == [
        "rows: 50/100",
        "rows: 52/100, about 40 min left",
        "rows: 99/100, about 10 s left",
    ]


def _points(*points: tuple[str, float, float, float]) -> list[dict[str, Any]]:
    """Rows of a method, its share of the MACs, its speed-up over 100 images per second, and its accuracy."""
    names = ("method", "MACs share", "speed-up", "top-1 %")
    # the machine was twice as fast while all but the first were measured
    speeds = [100.0, *(200 * point[2] for point in points[1:])]
    return [
        {"asked": "r 8", "images/s": speed, **dict(zip(names, point, strict=True))}
        for speed, point in zip(speeds, points, strict=True)
    ]


def test_the_front_is_what_no_other_beats_in_both() -> None:
    rows = _points(
        ("unmerged", 1.0, 1.0, 90.0),
        ("a", 0.5, 1.9, 89.0),
        ("b", 0.502, 2.1, 89.5),  # as good as equal in MACs, and better
        ("c", 0.75, 1.5, 89.2),
        ("d", 0.3, 3.0, 80.0),
        ("e", 0.4, 2.2, 79.0),
    )
    assert [row["method"] for row in front(rows, "top-1 %", "MACs share")] == ["d", "b", "unmerged"]
    assert [row["method"] for row in front(rows, "top-1 %", "speed-up")] == ["d", "b", "unmerged"]


def _draw(path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> tuple[Any, list[Any]]:
    """Draw a plot; returns the left panel and the points of both, row by row."""
    from matplotlib import pyplot

    drawn: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(pyplot, "close", drawn.append)
        plots.plot_pareto(path, rows, "costs $1 to $2")
    pyplot.close(drawn[0])
    left, right = drawn[0].axes
    assert path.stat().st_size > 10_000
    return left, [[line.get_xydata().tolist()[0] for line in axes.lines[: len(rows)]] for axes in (left, right)]


def test_the_plot_names_the_front_and_has_arrows_for_low_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = [(f"${i}$", 0.5 + i / 2000, 1.5 + i / 10, 89.0 + i / 10) for i in range(9)]
    rows = _points(("unmerged", 1.0, 1.0, 90.0), *good, ("poor", 0.45, 1.51, 20.0))
    left, (shares, speeds) = _draw(tmp_path / "plot.png", monkeypatch, rows)
    # a row far below is an arrow with its value: no point is drawn where it is not, and none joins the front
    assert [text.get_text() for text in left.texts] == ["20", r"\$8\$ r 8"]
    arrows = [line for line in left.lines if line.get_marker() == "v" and line.get_ydata()[0] < 88]
    assert [line.get_color() for line in arrows] == [COLOURS[9 % 7]]
    low, high = left.get_ylim()
    assert 10 <= high - low < 13 and low < arrows[0].get_ydata()[0] < low + 1.5, "two points would be a cliff"
    assert shares[0] == pytest.approx([1.0, 90.0]) and [0.45, 20.0] not in shares
    # as fast as the unmerged model's round says
    assert speeds[9] == pytest.approx([230.0, 89.8])
    (legend,) = left.figure.legends
    assert "Arrows: rows below 89, at their values." in legend.get_title().get_text()
    assert [text.get_text() for text in legend.texts] == ["unmerged model", *(rf"\${i}\$" for i in range(9)), "poor"]
    _draw(tmp_path / "alone.png", monkeypatch, rows[:1])


def test_only_what_lies_below_the_panels_is_an_arrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Error bars make the panels higher: a row that has its place there is drawn in it."""
    good = [(f"m{i}", 0.5 + i / 100, 1.5 + i / 10, 89.5 + i / 20) for i in range(12)]
    rows = _points(("unmerged", 1.0, 1.0, 90.0), *good, ("near", 0.4, 1.6, 88.9), ("poor", 0.45, 1.51, 20.0))
    rows = [{**row, "top-1 ±": 1.0} for row in rows]
    left, (shares, speeds) = _draw(tmp_path / "plot.png", monkeypatch, rows)
    below = [line.get_color() for line in left.lines if line.get_marker() == "v" and line.get_ydata()[0] < 86]
    assert below == [COLOURS[13 % 7]]
    near = next(row for row in shares if row[1] == pytest.approx(88.9))
    assert near[0] == pytest.approx(0.4, abs=0.05) and any(row[1] == pytest.approx(88.9) for row in speeds)
    (legend,) = left.figure.legends
    assert "Arrows: rows below 87.9, at their values." in legend.get_title().get_text()


def test_the_legend_lies_below_and_names_stay_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _points(("unmerged", 1.0, 1.0, 90.0), *((f"m{i}" * 9, 1 - i / 20, 1 + i / 9, 90 - i / 9) for i in range(9)))
    rows = [{**row, "top-1 ±": 1.2} for row in rows]
    left, _ = _draw(tmp_path / "plot.png", monkeypatch, rows)
    FigureCanvasAgg(left.figure).draw()  # all of it in one resolution again: the files have others
    (legend,) = left.figure.legends
    for axes in left.figure.axes:
        assert legend.get_window_extent().y1 <= axes.get_tightbbox().y0
        # each text, its line to the point left out
        boxes = [Text.get_window_extent(text) for text in axes.texts]
        assert len(boxes) == 8
        panel = axes.get_window_extent()
        assert all(panel.x0 <= box.x0 and box.x1 <= panel.x1 and panel.y1 >= box.y1 for box in boxes)
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        bars = [path for line in axes.collections for path in line.get_segments()]
        assert len(bars) == 10 and all(bar[1][1] - bar[0][1] == pytest.approx(2.4) for bar in bars)


def test_answers_that_are_no_classes_are_drawn_by_their_cosine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _points(("unmerged", 1.0, 1.0, 90.0), ("a", 0.5, 2.0, 80.0))
    rows = [{**row, "top-1 %": None, "cosine": value} for row, value in zip(rows, (1.0, 0.97), strict=True)]
    left, (shares, _) = _draw(tmp_path / "plot.svg", monkeypatch, rows)
    assert (
        shares[0] == [1.0, 1.0]
        and shares[1] == pytest.approx([0.5, 0.97])
        and left.get_ylabel().startswith("cosine similarity")
    )


@pytest.mark.parametrize("kept", [0, 24 * 10 * 4, 2**20], ids=["none", "one-batch", "all"])
def test_what_is_kept_of_the_unmerged_answers_changes_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    monkeypatch.setattr(measure, "_KEPT", kept)
    model, data = _model(), FashionMNIST(24, 60)
    subject = measure.Trial(model, data, torch.device("cpu"), rounds=1)
    reduced = subject.reduced(MergeConfig("tome", r=4))
    found = [subject.unmerged(), subject.measure(reduced), subject.measure(reduced)]
    held = sum(answers.nbytes for answers in subject._answers)
    assert held <= kept and len(subject._answers) == {0: 0, 24 * 10 * 4: 1, 2**20: 3}[kept]
    rows = evaluate(model, data, rs=[4]).rows
    assert [row["top-1 %"] for row in found] == [rows[i]["top-1 %"] for i in (0, 1, 1)]
    assert [row["agreement %"] for row in found] == [rows[i]["agreement %"] for i in (0, 1, 1)]
    assert found[1]["KL"] == found[2]["KL"] > found[0]["KL"] == 0


def test_images_that_changed_meanwhile_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    data = FashionMNIST(24, 60)
    subject = measure.Trial(_model(), data, torch.device("cpu"), rounds=1)
    subject.unmerged()
    data.labels = data.labels.clone()
    data.labels[50] += 1
    with pytest.raises(DataError, match="the images changed since the unmerged model saw them"):
        subject.measure(subject.reduced(MergeConfig("tome", r=4)))
    data.images, data.labels = data.images[:48], data.labels[:48]
    with pytest.raises(DataError, match="the images changed since the unmerged model saw them"):
        subject.measure(subject.reduced(MergeConfig("tome", r=4)))


@pytest.mark.parametrize("change", ["one pixel", "order"])
def test_other_images_under_the_same_labels_are_told(change: str) -> None:
    images, labels = torch.rand(6, 3, 32, 32), torch.zeros(6, dtype=torch.long)
    images[5, 0, 0, 0] = float("nan")  # equal to itself here
    data = Batches([[images[:3], labels[:3]], [images[3:], labels[3:]]], 10)
    model = randomised(tiny_vit()).eval()
    subject = measure.Trial(model, data, torch.device("cpu"), rounds=1)
    subject.unmerged()
    reduced = subject.reduced(MergeConfig("tome", r=4))
    subject.measure(reduced)
    if change == "order":
        data.batches[0][0] = images[:3].flip(0)
    else:
        data.batches[0][0][1, 2, 3, 4] += 0.5
    with pytest.raises(DataError, match="the images changed since the unmerged model saw them"):
        subject.measure(reduced)


def test_answers_that_are_no_numbers_are_told_in_the_row() -> None:
    images = torch.rand(6, 3, 32, 32)
    images[4] = float("nan")
    data = Batches([(images, torch.zeros(6, dtype=torch.long))], 10)
    subject = measure.Trial(randomised(tiny_vit()).eval(), data, torch.device("cpu"), rounds=1)
    for row in (subject.unmerged(), subject.measure(subject.reduced(MergeConfig("tome", r=4)))):
        assert "the answers to 1 of 6 images hold NaN, merged or not" in row["note"] and math.isfinite(row["KL"])


def test_points_in_one_place_are_all_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _points(("unmerged", 1.0, 1.0, 90.0), *((f"m{i}", 0.5, 2.0, 89.0) for i in range(8)), ("x", 0.6, 1.5, 88.0))
    left, (shares, _) = _draw(tmp_path / "plot.png", monkeypatch, rows)
    pixels = left.transData.transform(shares)[1:9]
    distances = (torch.tensor(pixels)[:, None] - torch.tensor(pixels)).abs().sum(dim=2) + 100 * torch.eye(8)
    assert distances.min() > 8
    # the row that is named stays where it is, the others near it
    assert shares[1] == pytest.approx([0.5, 89.0]) and (torch.tensor(shares)[1:9, 0] - 0.5).abs().max() < 0.06
    assert shares[9] == pytest.approx([0.6, 88.0])
