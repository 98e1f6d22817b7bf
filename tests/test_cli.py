"""The command line: what it prints and writes, and for every mistake the exit code and a sentence on stderr."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import tokenmerge
from helpers import tiny_vit
from tokenmerge import MergeConfig, api, assets
from tokenmerge.adapters import ADAPTERS
from tokenmerge.cli import main as run_command
from tokenmerge.data import labelled as data_module
from tokenmerge.data.labelled import normalise
from tokenmerge.measure import trial as measure_module
from tokenmerge.tools import bench as bench_module
from tokenmerge.tools import compare as compare_module
from tokenmerge.tools import models as models_module
from tokenmerge.tools.bench import Bench
from tokenmerge.tools.compare import Comparison

Capture = pytest.CaptureFixture[str]


def main(arguments: list[str]) -> int:
    """Run a command; the saved models of these tests are pickles that it may load."""
    trust = ["--trust-pickle"] if any(argument.endswith(".pt") for argument in arguments) else []
    return run_command([*arguments, *trust])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of saved models: `tiny.pt` for 32 x 32 images of three classes, `grey.pt` for the bundled images."""
    folder = tmp_path_factory.mktemp("models")
    tiny = tiny_vit(num_classes=3)
    tiny.pretrained_cfg = {"input_size": (3, 32, 32), "crop_pct": 1.0}
    torch.save(tiny, folder / "tiny.pt")
    torch.save(tiny_vit(img_size=28, in_chans=1, depth=2), folder / "grey.pt")
    torch.save(nn.Linear(2, 2), folder / "linear.pt")
    torch.save(tiny.state_dict(), folder / "state.pt")
    (folder / "text.pt").write_text("no pickle")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two plain images in each of three classes."""
    for name, colour in (("ant", "red"), ("bee", "lime"), ("cat", "blue")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (32, 32), colour).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def _fake_plot(paths: list[Path], rows: Any, title: str) -> None:
    for path in paths:
        path.write_bytes(b"\x89PNG")


def _expect_failure(capsys: Capture, arguments: list[str], *texts: str) -> None:
    """Run a command that must end with exit code 2, nothing on stdout and one sentence on stderr."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tokenmerge: ") and len(err.splitlines()) == 1, err
    for text in texts:
        assert text in err


def _refuse_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models_module, "load_model", lambda *args, **options: pytest.fail("the work began"))


def test_list(capsys: Capture) -> None:
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("methods\n") and "\nfamilies\n" in out
    for name in (*tokenmerge.list_methods(), *(adapter.families for adapter in ADAPTERS)):
        assert name in out


def test_list_json(capsys: Capture) -> None:
    assert main(["list", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert sorted(content["methods"]) == sorted(tokenmerge.list_methods()) and all(content["methods"].values())
    assert content["families"] == {adapter.name: adapter.families for adapter in ADAPTERS}


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tokenmerge.cli", "list"], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("methods\n") and "timm_vit" in done.stdout


def test_bench_prints_table_verdict_and_environment(
    capsys: Capture, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["bench", str(models / "tiny.pt"), "-r", "0", "4", "8,-1", "-b", "1", "--rounds", "1"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    title, table, rest = out.split("\n\n")[0], out.split("\n\n")[1].splitlines()[:5], out.splitlines()[-3:]
    assert title == f"{models / 'tiny.pt'}, medians of interleaved rounds"
    # no number is shortened: what does not fit is left out, and that is said
    assert all(len(line) <= 80 for line in table) and "speed-up" in table[0]
    assert [line.split("|")[1].strip() for line in table] == ["r", "-" * 7, "0", "4", "(8, -1)"]
    assert rest[0].startswith("Not shown: model, ") and "peak MB" in rest[0] and "(--wide" in rest[0]
    assert rest[1] == "Too few rounds to tell faster from slower: at least 5 are needed (--rounds)."
    assert rest[2].startswith("Measured on: device ") and rest[2].endswith("dtype float32, compiled False, rounds 1")
    assert "rounds: 12/12" in err
    assert main([*arguments, "--wide"]) == 0
    out = capsys.readouterr().out
    assert "Not shown" not in out and "unmerged attention" in out


def test_bench_json_is_all_that_is_printed(capsys: Capture, models: Path) -> None:
    assert main(["bench", str(models / "tiny.pt"), "-r", "4", "-b", "2", "--rounds", "1", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert list(content) == ["title", "environment", "rows", "notes"]
    (row,) = content["rows"]
    assert (row["r"], row["batch"], row["tokens"]) == ("4", 2, 49)
    assert len(content["notes"]) == 1 and content["environment"]["rounds"] == "1"


def test_results_are_drawn_for_papers(capsys: Capture, models: Path, images: Path, tmp_path: Path) -> None:
    out = [str(tmp_path / name) for name in ("plot.svg", "plot.pdf", "plot.png", "rows.tex")]
    assert main(["bench", str(models / "tiny.pt"), "-r", "0", "4", "-b", "1", "2", "--rounds", "2", "--out", *out]) == 0
    first = Path(out[0]).read_bytes()
    assert first.startswith(b"<?xml") and b"free bound" not in first[:20]
    assert Path(out[1]).read_bytes().startswith(b"%PDF") and Path(out[2]).read_bytes().startswith(b"\x89PNG")
    assert r"\toprule" in Path(out[3]).read_text()
    data = ["--data", str(images), "--workers", "0", "-r", "4"]
    assert main(["eval", str(models / "tiny.pt"), *data, "--out", *out]) == 0
    assert Path(out[0]).read_bytes() != first and "top-1" in Path(out[3]).read_text()
    capsys.readouterr()


@pytest.mark.parametrize("command", ["bench", "eval", "demo", "list"])
def test_quietly_nothing_goes_to_stderr_but_an_error(
    capsys: Capture, models: Path, images: Path, tmp_path: Path, command: str
) -> None:
    arguments = {
        "bench": [str(models / "tiny.pt"), "-r", "4", "-b", "1", "--rounds", "1"],
        "eval": [str(models / "tiny.pt"), "--data", str(images), "--workers", "0", "-r", "4"],
        "demo": ["--out", str(tmp_path / "demo"), "--limit", "4", "-r", "8"],
    }.get(command, [])
    assert main([command, *arguments, "-q"]) == 0
    out, err = capsys.readouterr()
    assert out and err == ""
    _expect_failure(capsys, ["doctor", "no_such_model", "--quiet"], "no model 'no_such_model'")


def test_what_was_said_before_is_said_again_after_a_quiet_command(capsys: Capture) -> None:
    import logging

    assert main(["list", "-q"]) == 0
    logging.getLogger("tokenmerge.test").warning("said")
    assert logging.root.manager.disable == 0


@pytest.mark.parametrize("suffix", ["json", "csv", "md"])
def test_bench_writes_its_rows(capsys: Capture, models: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"rows.{suffix}"
    arguments = [
        "bench",
        str(models / "tiny.pt"),
        "-r",
        "0",
        "4",
        "-b",
        "1",
        "--rounds",
        "1",
        "--json",
        "--out",
        str(out),
    ]
    assert main(arguments) == 0
    content = json.loads(capsys.readouterr().out)
    text = out.read_text()
    if suffix == "json":
        assert json.loads(text) == {name: content[name] for name in ("environment", "rows", "notes")}
    elif suffix == "csv":
        expected = [{**row, **content["environment"]} for row in content["rows"]]
        assert list(csv.DictReader(text.splitlines())) == [
            {k: "" if v is None else str(v) for k, v in row.items()} for row in expected
        ]
    else:
        lines = text.splitlines()
        names = [cell.strip() for cell in lines[0].strip("|").split("|")]
        assert names == list(content["rows"][0])
        assert [line.split("|")[2].strip() for line in lines[2:4]] == ["0", "4"]
        assert content["notes"][0] in lines and lines[-1].startswith("Measured on: ")


def test_bench_hands_every_argument_on(monkeypatch: pytest.MonkeyPatch, capsys: Capture, models: Path) -> None:
    given: dict[str, Any] = {}

    def fake(model: nn.Module, **options: Any) -> Bench:
        given.update(options)
        return Bench([{"r": "0"}], {}, [])

    monkeypatch.setattr(bench_module, "bench", fake)
    name = str(models / "tiny.pt")
    text = f"bench {name} -r 0.1 [4,2] -b 1 2 --method drop --dtype bfloat16 --compile --compare --training --rounds 3"
    assert main([*text.split(), "--device", "cpu", "--input-size", "3", "48", "48"]) == 0
    given.pop("progress")
    assert callable(given.pop("so_far"))
    assert given == {
        "rs": [0.1, [4, 2]],
        "batches": [1, 2],
        "method": "drop",
        "restore": None,
        "device": "cpu",
        "dtype": "bfloat16",
        "compiled": True,
        "compare": True,
        "training": True,
        "rounds": 3,
        "input_size": [3, 48, 48],
        "label": name,
    }


def test_eval_prints_accuracy_and_what_was_left_out(
    capsys: Capture, models: Path, images: Path, tmp_path: Path
) -> None:
    (images / "bee" / "1.png").write_bytes(b"broken")
    out = tmp_path / "rows.json"
    name = str(models / "tiny.pt")
    arguments = ["eval", name, "--data", str(images), "-r", "4", "--workers", "0", "--out", str(out)]
    assert main(arguments) == 0
    printed, err = capsys.readouterr()
    lines = printed.splitlines()
    assert lines[0] == f"{name} on 5 images of {images}"
    assert [line.split("|")[1].strip() for line in lines[4:6]] == ["0", "4"]
    assert "± " in lines[4] and lines[6].startswith("Not shown: top-5 %, GMACs (--wide, ")
    notes = lines[7:11]
    assert notes[0].startswith(
        "Preprocessing: shorter side 32, middle 32 x 32, bicubic, mean 0.485 0.456 0.406, std 0.2"
    )
    assert notes[1].startswith(
        "WARNING: the model does not say how its images are prepared (no mean and std in its pre"
    )
    assert notes[2] == "1 of 6 images could not be read and were left out:"
    assert notes[3].startswith(f"  {images / 'bee' / '1.png'}: ")
    assert "images: 5/6" in err
    saved = json.loads(out.read_text())
    assert saved["notes"] == notes
    model = torch.load(name, weights_only=False)
    x = torch.stack([torch.eye(3)[c][:, None, None].expand(3, 32, 32) for c in (0, 0, 1, 2, 2)])
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    with torch.no_grad():
        hits = (model((x - mean) / std).argmax(dim=1) == torch.tensor([0, 0, 1, 2, 2])).double().mean().item()
    assert saved["rows"][0]["top-1 %"] == pytest.approx(100 * hits, abs=0.006)


def test_eval_json_on_the_bundled_images(capsys: Capture, models: Path) -> None:
    arguments = [
        "eval",
        str(models / "grey.pt"),
        "--data",
        "fashion-mnist",
        "--limit",
        "6",
        "-b",
        "4",
        "-r",
        "4",
        "--bound",
    ]
    assert main([*arguments, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["title"].endswith("on 6 images of fashion-mnist")
    assert content["notes"][0] == "Preprocessing: not resized, mean 0.286, std 0.353 (the images' own mean and std)"
    assert content["notes"][1].startswith("WARNING: the model does not say how its images are prepared")
    assert [row["r"] for row in content["rows"]] == ["0", "4"]
    assert content["rows"][0]["over bound"] is None and content["rows"][1]["over bound"] > 0


@pytest.mark.parametrize(("flags", "pretrained"), [([], True), (["--no-pretrained"], False)])
def test_eval_asks_for_pretrained_weights_unless_told(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, flags: list[str], pretrained: bool
) -> None:
    import timm

    def create(name: str, **options: Any) -> nn.Module:
        raise OSError(f"asked for {name} with {options}")

    monkeypatch.setattr(timm, "create_model", create)
    text = f"could not be loaded: asked for vit_tiny_patch16_224 with {{'pretrained': {pretrained}}}."
    _expect_failure(capsys, ["eval", "vit_tiny_patch16_224", "--data", "fashion-mnist", *flags], text, "'reference'")


def test_doctor_on_a_healthy_model(capsys: Capture, models: Path) -> None:
    assert main(["doctor", str(models / "tiny.pt"), "-r", "6", "-b", "1"]) == 0
    out, err = capsys.readouterr()
    assert "rounds: 13/13" in err  # a large model takes minutes
    lines = out.splitlines()
    names = [
        "adapter",
        "blocks",
        "r = 0",
        "equivalence",
        "unpatch",
        "preprocessing",
        "limitations",
        "speed",
        "conclusion",
    ]
    assert [line[5:23].strip() for line in lines[:-1]] == names
    assert [line[:4] for line in lines[:-2]] == ["ok  "] * 5 + ["    ", "ok  ", "    "]
    assert lines[-2].startswith("    " if "SLOWER" in lines[-2] else "ok  ")
    assert "at r = 6 " in lines[3] and "(batch 1, r = 6)" in lines[7]
    assert lines[-1].startswith("Measured on: device ")


def test_doctor_json(capsys: Capture, models: Path) -> None:
    assert main(["doctor", str(models / "tiny.pt"), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["is_healthy"] is True and len(content["findings"]) == 9
    assert content["findings"][0][:2] == ["adapter", True] and content["environment"]["torch"] == torch.__version__


def test_doctor_on_a_configuration(capsys: Capture, models: Path, tmp_path: Path) -> None:
    model, path = torch.load(models / "tiny.pt", weights_only=False), tmp_path / "merge.json"
    with tokenmerge.patch(model, r=4) as handle:
        handle.save(path)
    command = ["doctor", str(models / "tiny.pt"), "--config", str(path)]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok   config ") and "r = 4: made for this model" in lines[0]
    assert any(line.startswith("     delivers ") and "holds no speed-up" in line for line in lines)
    _expect_failure(capsys, [*command, "-r", "8"], "the configuration has an r of its own; leave out r = 8.")
    content = json.loads(path.read_text())
    content["fingerprint"]["depth"] = 12
    path.write_text(json.dumps(content))
    assert main(command) == 1
    assert capsys.readouterr().out.startswith(
        "FAIL config             this configuration is for a model with 12 blocks"
    )
    path.write_text("{")
    _expect_failure(capsys, command, "merge.json is no JSON at line 1")


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
def test_doctor_on_an_unsupported_model(capsys: Capture, flags: list[str]) -> None:
    assert main(["doctor", "resnet18", *flags]) == 1
    out = capsys.readouterr().out
    assert (
        "no adapter for timm.models.resnet.ResNet: none of the " in out
        and "timm_vit" not in out
        and "It has no attention" in out
    )
    if flags:
        content = json.loads(out)
        assert content["is_healthy"] is False and content["findings"][0][:2] == ["adapter", False]
    else:
        assert out.startswith("FAIL adapter ")


def test_demo(capsys: Capture, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--limit", "4", "-b", "2", "-r", "8", "--json"]) == 0
    printed, err = capsys.readouterr()
    content = json.loads(printed)
    assert content["title"] == "Bundled ViT, 4 Fashion-MNIST test images"
    assert [row["r"] for row in content["rows"]] == ["0", "8"]
    assert content["rows"] == json.loads((out / "table.json").read_text())["rows"]
    assert f"Written to {out}: table.md, table.json, table.tex, plot.png, .svg, .pdf, merged.png" in err
    assert err.endswith(
        f"Open in a browser:\n  {out}/report.html (speed and accuracy)\n"
        f"  {out}/explore.html (what merged, to click through)\n"
    )
    files = ("table.md", "table.json", "table.tex", "plot.png", "plot.svg", "plot.pdf", "merged.png", "report.html")
    assert all((out / name).stat().st_size > 100 for name in files)


def _export(out: str) -> list[str]:
    return ["--to", "torch-export", "--out", out]


@pytest.mark.parametrize("command", ["bench", "eval", "export"])
def test_methods_with_options_and_saved_ones(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, models: Path, tmp_path: Path, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    MergeConfig("tofu", r=[3, 5]).save("saved.json")
    options = {"bench": ["-b", "1", "--rounds", "1"], "eval": ["--data", "fashion-mnist", "--limit", "4"]}
    line = [command, str(models / "grey.pt"), *options.get(command, _export("grey.pt2")), "--json"]

    def tokens(*more: str) -> list[int]:
        assert main([*line, *more]) == 0
        content = json.loads(capsys.readouterr().out)
        return content["tokens"][-1:] if command == "export" else [row["tokens"] for row in content["rows"]]

    unmerged = [50] if command == "eval" else []
    assert tokens("--method", "saved.json") == [*unmerged, 42]
    assert tokens("--method", "saved.json", "-r", "6") == [*unmerged, 38]
    # at most 24 go in the first block of tome, and all but one patch in evit's
    assert tokens("--method", "evit(fuse=False)", "-r", "48") == [*unmerged, 2]
    assert tokens("--method", "tome(metric='x')", "-r", "48") == [*unmerged, 14]


@pytest.mark.parametrize("command", ["bench", "eval", "export"])
def test_auto_says_what_it_chose(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, models: Path, tmp_path: Path, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    images = torch.randint(0, 256, (2_080, 28, 28), dtype=torch.uint8)
    given: list[torch.Tensor] = []
    fashion_mnist, choose = assets.fashion_mnist, api._choose

    def note(model: nn.Module, r: Any, calibrate: Any, options: Any) -> Any:
        given.append(calibrate)
        return choose(model, r, None, options)

    train = images, torch.zeros(len(images), dtype=torch.int64)
    monkeypatch.setattr(assets, "fashion_mnist", lambda split: fashion_mnist() if split == "test" else train)
    monkeypatch.setattr(api, "_choose", note)
    options = {"bench": ["-b", "1", "--rounds", "1"], "eval": ["--data", "fashion-mnist", "--limit", "4"]}
    line = [command, str(models / "grey.pt"), "-r", "4", *options.get(command, _export("grey.pt2")), "--method", "auto"]
    assert main(line) == 0
    assert 'tome: "auto" chooses by images, and none were given' in capsys.readouterr().out and given == [None]
    assert main([*line, "--calibrate", "fashion-mnist"]) == 0
    assert torch.equal(given[-1], normalise(images[:64]))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--method", "tme"], "no method 'tme'. Did you mean 'tome'?"),
        (["--method", "tome(metrc='x')"], "no option of tome 'metrc'. Did you mean 'metric'?"),
        (["--method", "tome(metric='x'"], "is no method: give a name (`tokenmerge list`)"),
        (["--method", "missing.json"], "cannot read the configuration missing.json: No such file or directory."),
        (["--method", "runs/missing"], "cannot read the configuration runs/missing/merge.json: No such file"),
        (["--calibrate", "fashion-mnist"], "--calibrate goes with --method auto, not with tome."),
        (["--method", "auto", "--calibrate", "missing"], "no folder missing: --calibrate takes 'fashion-mnist' or a"),
    ],
    ids=["name", "option", "syntax", "file", "folder", "calibrate", "source"],
)
@pytest.mark.parametrize("command", ["bench", "eval", "export"])
def test_methods_that_cannot_be_read_come_before_the_work(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, options: list[str], text: str
) -> None:
    _refuse_work(monkeypatch)
    monkeypatch.chdir(tmp_path)
    needed = {"eval": ["--data", "fashion-mnist"], "export": _export("x.pt2")}.get(command, [])
    _expect_failure(capsys, [command, "reference", *needed, *options], text)
    assert list(tmp_path.iterdir()) == []


def test_a_method_without_weights(capsys: Capture, models: Path) -> None:
    arguments = ["bench", str(models / "tiny.pt"), "-r", "4", "--method", "dtem"]
    _expect_failure(capsys, arguments, "dtem is learned and has no weights.")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch, models: Path, tmp_path: Path) -> list[str]:
    """A quick comparison, into `out`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare_module, "plot_pareto", _fake_plot)
    options = ["--data", "fashion-mnist", "--limit", "8", "--rounds", "1", "--out", "out"]
    return ["compare", str(models / "grey.pt"), *options]


def test_compare(capsys: Capture, models: Path, plain: list[str]) -> None:
    assert main([*plain, "--methods", "tome", "dtem", "tme", "-r", "4", "8,-1", "--wide"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == f"{models / 'grey.pt'} on 8 images of fashion-mnist"
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in lines[4:10]]
    assert cells == [
        ["unmerged", "-"],
        ["tome", "r 4"],
        ["tome", "r (8, -1)"],
        ["dtem", "r 4"],
        ["dtem", "r (8, -1)"],
        ["tme", "-"],
    ]
    assert lines[10].startswith("dtem (r 4, r (8, -1)): dtem is learned and has no weights.")
    assert lines[11].startswith("tme (-): no method 'tme'.")
    assert lines[-1].startswith("Measured on: device ") and lines[-1].endswith("rounds 1.")
    assert "rows: 0/6" in err and "rows: 6/6" in err
    assert err.endswith(
        "3 of 6 rows have no numbers; their notes say why.\n"
        "Written to out: index.html, table.md, table.csv, table.tex, plot.png, .svg, .pdf, rows.json\n"
    )
    assert {path.name for path in Path("out").iterdir()} == {
        "index.html",
        "table.md",
        "table.csv",
        "table.tex",
        "plot.png",
        "plot.svg",
        "plot.pdf",
        "rows.json",
    }


def test_compare_json_and_going_on(capsys: Capture, monkeypatch: pytest.MonkeyPatch, plain: list[str]) -> None:
    assert main([*plain, "--methods", "tome", "--macs", "0.7", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert list(content) == ["title", "environment", "rows", "notes"]
    assert content["rows"][1]["asked"] == "MACs 0.7" and content["rows"][1]["MACs share"] <= 0.7
    monkeypatch.setattr(compare_module, "Trial", lambda *args, **options: pytest.fail("it was run again"))
    assert main([*plain, "--methods", "tome", "--macs", "0.7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == content
    _expect_failure(
        capsys, [*plain, "--limit", "9"], "rows.json holds a comparison with other settings (images: asked 9"
    )


def test_compare_on_a_folder_of_images(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, models: Path, images: Path, plain: list[str]
) -> None:
    (images / "bee" / "1.png").write_bytes(b"broken")
    line = [
        "compare",
        str(models / "tiny.pt"),
        "--rounds",
        "1",
        "--workers",
        "0",
        "-r",
        "4",
        "--methods",
        "tome",
        "auto",
    ]
    assert main([*line, "--data", "images", "--calibrate", "images"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{models / 'tiny.pt'} on 5 images of images\n")
    assert "\n1 images could not be read and were left out: images/bee/1.png: cannot identify" in out
    assert Path("tokenmerge-compare/index.html").is_file()
    monkeypatch.setattr(compare_module, "Trial", lambda *args, **options: pytest.fail("it was run again"))
    # the same folder under another name
    assert main([*line, "--data", str(images), "--calibrate", "images/"]) == 0


def test_compare_without_a_single_number_fails(capsys: Capture, plain: list[str]) -> None:
    assert main([*plain, "--methods", "dtem", "-r", "4"]) == 1
    assert "1 of 2 rows have no numbers" in capsys.readouterr().err


def test_compare_that_is_interrupted(capsys: Capture, monkeypatch: pytest.MonkeyPatch, plain: list[str]) -> None:
    def interrupt(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(measure_module.Trial, "measure", interrupt)
        assert main([*plain, "--methods", "tome", "-r", "4"]) == 130
    assert capsys.readouterr().err.endswith(
        "tokenmerge: interrupted, finished rows are kept, and the same command (without --fresh) goes on.\n"
    )
    assert [path.name for path in Path("out").iterdir()] == ["rows.json"]
    assert main([*plain, "--methods", "tome", "-r", "4"]) == 0
    assert "rows: 1/2" in capsys.readouterr().err


def test_compare_hands_every_argument_on(monkeypatch: pytest.MonkeyPatch, capsys: Capture, plain: list[str]) -> None:
    given: dict[str, Any] = {}
    images = torch.zeros(2, 1, 28, 28)

    def fake(model: nn.Module, data: Any, **options: Any) -> Comparison:
        figures = {**dict.fromkeys(compare_module.FIGURES, 1.0), "note": ""}
        given.update(options, batch_size=data.batch_size, images=len(data))
        return Comparison("title", [{**figures, "method": "tome", "asked": "r 4"}], [{}], 1, 1)

    monkeypatch.setattr(compare_module, "compare", fake)
    monkeypatch.setattr(data_module, "calibration_images", lambda source, model, **options: images)
    more = ["--methods", "all", "auto", "--macs", "0.75", "0.5", "--calibrate", "fashion-mnist", "--fresh", "-b", "5"]
    assert main([*plain, *more, "--device", "cpu"]) == 0
    assert given.pop("progress") and given.pop("calibrate") is images
    assert given == {
        "methods": ["all", "auto"],
        "rs": None,
        "macs": [0.75, 0.5],
        "folder": "out",
        "restore": None,
        "device": "cpu",
        "rounds": 1,
        "fresh": True,
        "label": plain[1],
        "batch_size": 5,
        "images": 8,
    }


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--macs", "1.5"], "shares of the MACs lie between 0 and 1; got 1.5."),
        (["-r", "0"], "at least one method, and one r other than 0"),
        (["--rounds", "0"], "at least 1 timed round"),
        (["--device", "cuda:99"], "no device 'cuda:99' on this machine"),
        (["--data", "missing"], "no folder missing: --data takes"),
        (["--calibrate", "missing"], "no folder missing: --calibrate takes"),
        (["--limit", "0"], "batch size and limit must be at least 1; got 64 and 0."),
    ],
    ids=["macs", "r", "rounds", "device", "data", "calibrate", "limit"],
)
def test_compare_mistakes(capsys: Capture, plain: list[str], options: list[str], text: str) -> None:
    _expect_failure(capsys, [*plain, *options], text)
    assert not Path("out").exists()


def test_compare_takes_amounts_or_shares(capsys: Capture, plain: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main([*plain, "-r", "4", "--macs", "0.5"])
    assert raised.value.code == 2 and "not allowed with argument -r" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["bench", "eval", "doctor"])
@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("vit_tny_patch16_224", ["no model 'vit_tny_patch16_224'.", "Did you mean 'vit_tiny_patch16_224'?"]),
        (
            "missing.pt",
            ["no file or folder missing.pt: give 'reference', a name with its host (timm:NAME, hf:ID_OR_FOLDER, "],
        ),
        ("state.pt", ["state.pt holds a OrderedDict, not a module."]),
        ("text.pt", ["text.pt cannot be read as a saved module: "]),
    ],
    ids=["unknown", "missing", "state-dict", "no-pickle"],
)
def test_models_that_cannot_be_loaded(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, models: Path, command: str, name: str, texts: list[str]
) -> None:
    monkeypatch.chdir(models)
    _expect_failure(capsys, [command, name, *(["--data", "fashion-mnist"] if command == "eval" else [])], *texts)


DEVICES = [
    pytest.param(
        "cuda",
        "no device 'cuda' on this machine; there are: cpu",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there"),
    ),
    ("gpu", "no device 'gpu'; there are: cpu"),
    ("cuda:99", "no device 'cuda:99' on this machine; there are: cpu"),
]


@pytest.mark.parametrize("command", ["bench", "eval", "doctor", "demo"])
@pytest.mark.parametrize(("device", "text"), DEVICES)
def test_devices_that_are_not_there(
    capsys: Capture, models: Path, tmp_path: Path, command: str, device: str, text: str
) -> None:
    name = str(models / "grey.pt")
    options = {"eval": [name, "--data", "fashion-mnist"], "demo": ["--out", str(tmp_path)]}.get(command, [name])
    _expect_failure(capsys, [command, *options, "--device", device], text)


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        ("linear.pt", [], "no adapter for torch.nn.modules.linear.Linear: none of the "),
        ("tiny.pt", ["--dtype", "int8"], "no dtype 'int8'; there are: float32, bfloat16, float16."),
        ("tiny.pt", ["--method", "tme"], "Did you mean 'tome'?"),
        ("tiny.pt", ["-b", "0"], "at least one r, one batch size >= 1 and one round"),
        ("tiny.pt", ["--rounds", "0"], "at least one r, one batch size >= 1 and one round"),
        ("tiny.pt", ["--input-size", "3", "64", "64"], "does not take images of (3, 64, 64): Input height (64)"),
        ("tiny.pt", ["-r", "[1,1,1,1,1]", "--rounds", "1"], "r has 5 entries, the model has 4 blocks."),
    ],
    ids=["unsupported", "dtype", "method", "batch", "rounds", "input-size", "list-too-long"],
)
def test_bench_mistakes(capsys: Capture, models: Path, model: str, options: list[str], text: str) -> None:
    _expect_failure(capsys, ["bench", str(models / model), *options], text)


def test_doctor_with_a_batch_of_nothing(capsys: Capture, models: Path) -> None:
    _expect_failure(
        capsys, ["doctor", str(models / "tiny.pt"), "-b", "0"], "a batch size and rounds of at least 1; got 0"
    )


@pytest.mark.parametrize(
    ("case", "options", "text"),
    [
        ("missing", [], "no folder "),
        ("empty", [], "holds no labelled images: expected "),
        ("other-classes", [], "has 2 class folders (ant, bee, ...), the model has 3 classes"),
        ("all-corrupt", [], "none of the 6 images of "),
        ("good", ["-b", "0"], "batch size and limit must be at least 1; got 0 and None."),
        ("good", ["--limit", "0"], "batch size and limit must be at least 1; got 64 and 0."),
        ("good", ["--workers", "-1"], "the number of workers must be at least 0; got -1."),
    ],
    ids=["missing", "empty", "other-classes", "all-corrupt", "batch", "limit", "workers"],
)
def test_eval_mistakes(
    capsys: Capture, models: Path, images: Path, tmp_path: Path, case: str, options: list[str], text: str
) -> None:
    folder = images if case in ("good", "all-corrupt", "other-classes") else tmp_path / case
    if case == "empty":
        folder.mkdir()
    elif case == "all-corrupt":
        for path in images.rglob("*.png"):
            path.write_bytes(b"broken")
    elif case == "other-classes":
        for path in (images / "cat").iterdir():
            path.unlink()
        (images / "cat").rmdir()
    arguments = ["eval", str(models / "tiny.pt"), "--data", str(folder), *(options or ["--workers", "0"])]
    _expect_failure(capsys, arguments, text, "" if options else str(folder))


def test_eval_of_the_bundled_images_with_a_model_of_other_classes(capsys: Capture, models: Path) -> None:
    arguments = ["eval", str(models / "tiny.pt"), "--data", "fashion-mnist"]
    _expect_failure(
        capsys, arguments, "fashion-mnist has 10 classes, the model has 3; use the bundled model 'reference'."
    )


@pytest.mark.parametrize("command", ["bench", "eval"])
@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("missing/rows.csv", "No such file or directory."),
        ("folder.json", "Is a directory."),
        ("rows.txt", "the name must end in .json, .csv, .md, .html, .tex, .png, .svg, .pdf."),
    ],
    ids=["missing-folder", "directory", "suffix"],
)
def test_out_that_cannot_be_written_comes_before_the_work(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, out: str, reason: str
) -> None:
    _refuse_work(monkeypatch)
    (tmp_path / "folder.json").mkdir()
    data = ["--data", "fashion-mnist"] if command == "eval" else []
    path = tmp_path / out
    _expect_failure(
        capsys, [command, "reference", *data, "--out", str(path)], f"cannot write results to {path}: {reason}"
    )


def test_demo_out_that_cannot_be_written(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "demo"
    _expect_failure(capsys, ["demo", "--out", str(out)], f"cannot write to {out}: Not a directory.")


@pytest.mark.parametrize("command", ["bench", "eval", "doctor", "demo", "compare"])
@pytest.mark.parametrize(
    ("r", "text"),
    [
        ("nan", "'nan' is no r: tokens removed per block: 8, a share 0.1, a pair 16,-1"),
        ("abc", "'abc' is no r: tokens removed per block"),
        ("8,", "r is a tuple of 1 entries"),
        ("-1", "r holds -1. Allowed: an int >= 0"),
        ("1.5", "r holds 1.5. Allowed: "),
        ("1e999", "r holds inf. Allowed: "),
        ("True", "r holds True. Allowed: "),
        ("16,-2", "r has the inflection -2. Allowed: "),
        ("0.5,1", "r is the pair (0.5, 1); its first entry counts tokens, an int."),
        ("[4,-4]", "r holds -4. Allowed: "),
    ],
)
def test_invalid_r(capsys: Capture, monkeypatch: pytest.MonkeyPatch, command: str, r: str, text: str) -> None:
    _refuse_work(monkeypatch)
    with_data = ["reference", "--data", "fashion-mnist"]
    positional = {"demo": [], "eval": with_data, "compare": with_data}.get(command, ["reference"])
    with pytest.raises(SystemExit) as raised:
        main([command, *positional, "-r", r])
    assert raised.value.code == 2
    assert f"tokenmerge {command}: error: argument -r: {text}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [([], "COMMAND"), (["benchmark"], "invalid choice: 'benchmark'"), (["eval", "reference"], "--data")],
    ids=["no-command", "unknown-command", "no-data"],
)
def test_usage_errors(capsys: Capture, arguments: list[str], text: str) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert text in capsys.readouterr().err


def test_an_interruption_ends_with_130(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **options: Any) -> nn.Module:
        raise KeyboardInterrupt

    monkeypatch.setattr(models_module, "load_model", interrupt)
    assert main(["bench", "reference"]) == 130
    assert capsys.readouterr().err == "tokenmerge: interrupted, nothing more was written.\n"


def test_the_version_is_said(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--version"])
    assert raised.value.code == 0 and capsys.readouterr().out == f"tokenmerge {tokenmerge.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--input-size", "3", "-32", "32"], "input_size is (3, -32, 32); give channels, height and width"),
        (["-b", "99999999999", "-r", "0", "--rounds", "1"], "the memory is too small for this"),
        (["--method", "x" * 5000], "no method 'xxx"),
        (["--method", "tome(seed=" + "(" * 3000], "is no method"),
    ],
    ids=["size", "memory", "name", "brackets"],
)
def test_mistakes_beyond_all_measure_are_one_sentence(capsys: Capture, arguments: list[str], text: str) -> None:
    _expect_failure(capsys, ["bench", "reference", *arguments], text)


@pytest.mark.parametrize("name", ["x" * 5000, "local-dir:missing", "/dev/null"])
def test_names_that_are_no_model_are_one_sentence(capsys: Capture, name: str) -> None:
    _expect_failure(capsys, ["doctor", name])


def test_output_that_cannot_be_written_is_one_sentence_or_none() -> None:
    command = [sys.executable, "-m", "tokenmerge.cli", "list", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as done:
        assert done.stdout is not None and done.stderr is not None
        done.stdout.close()  # who reads it has gone
        assert done.stderr.read() == b""
    assert done.returncode == 141
    if Path("/dev/full").exists():
        with Path("/dev/full").open("w") as full:
            ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert (ended.returncode, ended.stderr) == (2, "tokenmerge: No space left on device.\n")


def test_rows_are_shown_though_they_cannot_be_written(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device", "rows.csv")

    monkeypatch.setattr("tokenmerge.report.table.write_file", full)
    monkeypatch.setattr(bench_module, "bench", lambda *args, **options: Bench([{"r": 0}], {"torch": "2"}))
    assert main(["bench", "reference", "--out", "rows.csv"]) == 2
    out, err = capsys.readouterr()
    assert "| r  |" in out and err.splitlines()[-1] == "tokenmerge: No space left on device (rows.csv)."
