"""Exported files: right in their engine for other batches than the traced one, or an error and no file at all."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from helpers import answer, assert_close, bound_attributes, randomised, shortened, tiny_vit
from tokenmerge import kernels
from tokenmerge.cli import main
from tokenmerge.errors import (
    AlreadyPatchedError,
    DataError,
    InvalidScheduleError,
    UnknownNameError,
    UnsupportedError,
)
from tokenmerge.tools import export as export_module
from tokenmerge.tools import models as models_module
from tokenmerge.tools.export import TARGETS, Exported, export
from tokenmerge.tools.models import load_model

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

SIZE = (3, 32, 32)


def _tiny(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return tiny_vit(**{"depth": 2, "reg_tokens": 1, **options})


@pytest.fixture(scope="module", params=[False, True], ids=["scatter", "matmul"])
def matmul(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module", params=list(TARGETS))
def written(
    request: pytest.FixtureRequest, matmul: bool, tmp_path_factory: pytest.TempPathFactory
) -> tuple[nn.Module, Exported]:
    """A tiny model, and what was written of it with r = 6."""
    model = _tiny()
    path = tmp_path_factory.mktemp("export") / f"tiny{TARGETS[request.param].suffix}"
    return model, export(model, path, r=6, to=request.param, matmul=matmul)


def test_the_file_answers_as_eager_for_any_batch(written: tuple[nn.Module, Exported]) -> None:
    model, found = written
    run = TARGETS[found.format].load(Path(found.path))
    with tokenmerge.patched(model, r=6), torch.no_grad():
        for count in (1, 2, 5):
            images = torch.randn(count, *SIZE)
            assert_close(run(images), model(images), 1e-5)
    assert (found.batch, found.input_size, found.tokens) == (None, SIZE, [60, 54])
    assert found.scale > 0 and found.difference <= 1e-5 * max(1.0, found.scale)


def test_merging_writes_rows_by_sums_or_not_at_all(written: tuple[nn.Module, Exported], matmul: bool) -> None:
    _, found = written
    scatters = {
        "onnx": {"ScatterElements add": 2, "ScatterND add": 2},
        "openvino": {"ScatterElementsUpdate": 2, "ScatterNDUpdate": 2},
        "torch-export": {"aten.scatter_add.default": 2, "aten.index_add_.default": 2},
    }
    held = {name: count for name, count in found.operators.items() if "catter" in name or "index_" in name}
    held.pop("aten.index_select.default", None)
    assert held == ({} if matmul else scatters[found.format])
    assert ("no scatter" if matmul else ", 2 ") in str(found)


def test_only_the_file_and_what_it_refers_to_is_left(written: tuple[nn.Module, Exported]) -> None:
    _, found = written
    files = {file.name: file.stat().st_size for file in Path(found.path).parent.iterdir()}
    assert set(files) == {"tiny.xml", "tiny.bin"} if found.format == "openvino" else {Path(found.path).name}
    assert found.size == sum(files.values())
    assert found.path in str(found) and found.as_dict()["size"] == found.size


def test_the_model_is_not_touched(tmp_path: Path) -> None:
    model = _tiny().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, tmp_path / "tiny.pt2", r=6, to="torch-export")
    assert model.training and all(child.training for child in model.modules())
    assert bound_attributes(model) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["timm_relpos", "timm_eva", "hf_vit"])
def test_biases_rotary_tables_and_wrapped_answers_are_exported(name: str, tmp_path: Path) -> None:
    from tokenmerge.adapters import ADAPTERS

    adapter = next(adapter for adapter in ADAPTERS if adapter.name == name)
    model, images = adapter.tiny()
    model = shortened(randomised(model), adapter)
    found = export(model, tmp_path / "model.onnx", r=2, to="onnx")
    run = TARGETS["onnx"].load(tmp_path / "model.onnx")
    with tokenmerge.patched(model, r=2), torch.no_grad():
        assert_close(run(images), answer(model(images)), 1e-5)
    assert {name for name in found.operators if name.startswith("Scatter")} >= {"ScatterND add"}


@pytest.mark.slow
@pytest.mark.parametrize("to", TARGETS)
def test_the_command_writes_a_file_for_each_engine(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = load_model("reference")
    del model.blocks[2:]  # a graph of all its blocks takes an engine a minute
    torch.save(model, "short.pt")
    assert main(["export", "short.pt", "--trust-pickle", "-r", "8", "--to", to]) == 0
    facts, code = capsys.readouterr().out.split("\n\nTo run it:\n\n")
    assert f"short{TARGETS[to].suffix}" in code
    lines = dict(line.split(maxsplit=1) for line in facts.splitlines())
    assert lines["written"].startswith(f"short{TARGETS[to].suffix}, ")
    assert lines["input"] == "images [batch, 1, 28, 28], float32" and lines["tokens"] == "189 181"
    images = torch.randn(4, 1, 28, 28)
    run = TARGETS[to].load(Path(f"short{TARGETS[to].suffix}"))
    with tokenmerge.patched(model, r=8), torch.no_grad():
        assert_close(run(images), model(images), 1e-5)


def test_onnx_is_of_the_opset_asked_for_and_names_its_batch(tmp_path: Path) -> None:
    import onnx

    export(_tiny(depth=1), tmp_path / "tiny.onnx", r=6, to="onnx", opset=18)
    content = onnx.load(tmp_path / "tiny.onnx")
    onnx.checker.check_model(content, full_check=True)
    assert [(entry.domain, entry.version) for entry in content.opset_import] == [("", 18)]
    (given,) = content.graph.input
    sizes = [size.dim_param or size.dim_value for size in given.type.tensor_type.shape.dim]
    assert (given.name, sizes) == ("images", ["batch", *SIZE])
    assert [entry.name for entry in content.graph.output] == ["answer"]


def test_a_file_for_one_batch_size_takes_no_other(tmp_path: Path) -> None:
    model = _tiny()
    found = export(model, tmp_path / "tiny.pt2", r=6, to="torch-export", batch=3)
    assert found.batch == 3 and "[3, 3, 32, 32]" in str(found)
    run, images = TARGETS["torch-export"].load(tmp_path / "tiny.pt2"), torch.randn(3, *SIZE)
    with tokenmerge.patched(model, r=6), torch.no_grad():
        assert_close(run(images), model(images), 1e-5)
    with pytest.raises((AssertionError, RuntimeError)):
        run(images[:2])


def test_drop_and_no_merging_are_exported_as_well(tmp_path: Path) -> None:
    dropped = export(_tiny(), tmp_path / "drop.pt2", r=6, to="torch-export", method="drop")
    whole = export(_tiny(), tmp_path / "whole.pt2", r=0, to="torch-export")
    assert (dropped.tokens, whole.tokens) == ([60, 54], [66, 66])
    assert "no scatter" in str(dropped) and "no scatter" in str(whole)


class Sorted(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.argsort(dim=-1, descending=True, stable=True).float()


@pytest.mark.parametrize("to", TARGETS)
def test_of_equal_values_every_engine_takes_the_first(to: str, tmp_path: Path) -> None:
    images = torch.randint(0, 3, (3, 97)).float()
    program = torch.export.export(Sorted(), (images,), strict=False)
    file = tmp_path / f"sorted{TARGETS[to].suffix}"
    TARGETS[to].write(program, file, None)
    assert torch.equal(TARGETS[to].load(file)(images), Sorted()(images))


def _spoilt() -> nn.Module:
    model = _tiny()
    nn.init.constant_(model.head.weight, float("nan"))  # type: ignore[arg-type]
    return model


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, norm_first=True, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


REFUSED: list[tuple[str, Callable[[], nn.Module], dict[str, Any], type[Exception], str]] = [
    ("unknown-target", _tiny, {"to": "onxx"}, UnknownNameError, r"no export target 'onxx'. Did you mean 'onnx'\?"),
    ("method", _tiny, {"method": "tme"}, UnknownNameError, r"no method 'tme'. Did you mean 'tome'\?"),
    ("r", _tiny, {"r": -1}, InvalidScheduleError, "r holds -1. Allowed: "),
    ("suffix", _tiny, {"path": "tiny.onnx"}, DataError, "tiny.onnx: the name must end in .pt2."),
    ("folder", _tiny, {"path": "missing/tiny.pt2"}, DataError, "missing/tiny.pt2: No such file or directory."),
    ("batch", _tiny, {"batch": 0}, DataError, "at least 1 image; got 0. Leave it out for a file that takes any batch"),
    (
        "no-opset",
        _tiny,
        {"opset": 20},
        UnsupportedError,
        "opset 20 was asked for torch-export: torch writes ONNX in opset",
    ),
    ("opset", _tiny, {"to": "onnx", "opset": 17}, UnsupportedError, "opset 17 .* in opset 18 and later"),
    (
        "input-size",
        _tiny,
        {"input_size": (3, 48, 48)},
        DataError,
        r"does not take images of \(3, 48, 48\): Input height",
    ),
    (
        "half",
        lambda: _tiny().half(),
        {},
        UnsupportedError,
        r"only float32 models .* torch.float16. Export model.float\(\)",
    ),
    (
        "not-finite",
        _spoilt,
        {},
        UnsupportedError,
        r"cannot be compared: .* changes 10 of 10 answers by up to nan",
    ),
    (
        "no-size",
        _encoder,
        {},
        DataError,
        r"does not say which input size it takes; give input_size \(--input-",
    ),
    ("patched", lambda: tokenmerge.patch(_tiny(), r=2).model, {}, AlreadyPatchedError, "Leave out r"),
    (
        "scatter-left",
        _tiny,
        {"method": tokenmerge.ToMe(combine="average"), "matmul": True},
        UnsupportedError,
        "without scatter was asked for, and the graph holds 2 aten.scatter_reduce.two, 2 aten.scatter_add.default: "
        ".* Leave matmul out",
    ),
]


@pytest.mark.parametrize(
    ("make", "options", "error", "text"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(
    make: Callable[[], nn.Module], options: dict[str, Any], error: type[Exception], text: str, tmp_path: Path
) -> None:
    path = tmp_path / options.pop("path", "tiny.onnx" if options.get("to") == "onnx" else "tiny.pt2")
    with pytest.raises(error, match=text):
        export(make(), path, **{"r": 6, "to": "torch-export", **options})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("to", "package", "extra"),
    [
        ("onnx", "onnx", "onnx"),
        ("onnx", "onnxscript", "onnx"),
        ("onnx", "onnxruntime", "onnx"),
        ("openvino", "onnxscript", "openvino"),
        ("openvino", "openvino", "openvino"),
    ],
)
def test_a_missing_package_is_named_with_what_installs_it(
    to: str, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UnsupportedError, match=rf'^exporting to {to} needs {package}: pip install "tokenmerge\[{extra}\]"$'
    ):
        export(_tiny(), tmp_path / f"tiny{TARGETS[to].suffix}", r=6, to=to)


def test_an_input_size_that_the_model_does_not_know_can_be_given(tmp_path: Path) -> None:
    found = export(_encoder().eval(), tmp_path / "encoder.pt2", r=2, to="torch-export", input_size=(16, 32))
    assert (found.input_size, found.tokens) == ((16, 32), [14, 12])
    assert found.notes and found.notes[0] in str(found)


def test_a_batch_size_that_is_fixed_in_the_model_is_refused_with_the_reason_of_torch(tmp_path: Path) -> None:
    from timm.models.vision_transformer import VisionTransformer

    class OneByOne(VisionTransformer):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super(OneByOne, self).forward(image[None]) for image in x])

    model = OneByOne(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=4, num_classes=10)
    text = r"for batches of any size: .*batch.* constant.*\(--batch N\)\.$"
    with pytest.raises(UnsupportedError, match=text):
        export(model, tmp_path / "model.pt2", r=2, to="torch-export")
    assert list(tmp_path.iterdir()) == []
    assert export(model, tmp_path / "model.pt2", r=2, to="torch-export", batch=2).batch == 2


def _replace(monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., Any]) -> None:
    """Let the target torch-export write or load by other functions."""
    monkeypatch.setitem(TARGETS, "torch-export", TARGETS["torch-export"]._replace(**functions))


def _fail(error: Exception) -> Callable[..., Any]:
    def fail(*args: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("functions", "error", "text"),
    [
        (
            {"load": lambda file: lambda images: torch.zeros(len(images), 10)},
            UnsupportedError,
            r"tiny.pt2 answers wrongly in torch 2.*: 1 images give \(1, 10\), .* from eager's \(1, 10\), .*--matmul",
        ),
        (
            {"load": lambda file: lambda images: torch.zeros(2, 10)},
            UnsupportedError,
            r"1 images give \(2, 10\), up to inf away",
        ),
        (
            {"load": _fail(ArithmeticError("no kernel\nfor Gelu."))},
            UnsupportedError,
            "exported to torch-export: no kernel for Gelu. Nothing was written; other targets: onnx, openvino",
        ),
        ({"write": _fail(OSError(28, "No space left"))}, DataError, r"cannot write .*tiny.pt2: No space left\.$"),
    ],
    ids=["values", "shape", "engine", "disk"],
)
def test_a_file_that_is_not_right_never_replaces_one_that_is(
    functions: dict[str, Any], error: type[Exception], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.pt2"
    path.write_text("what was there before")
    _replace(monkeypatch, **functions)
    with pytest.raises(error, match=text):
        export(_tiny(depth=1), path, r=6, to="torch-export")
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.pt2"]
    assert path.read_text() == "what was there before"


def test_an_opset_that_torch_does_not_write_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="opset 99 was asked for and torch wrote 18; leave opset out"):
        export(_tiny(depth=1), tmp_path / "tiny.onnx", r=6, to="onnx", opset=99)
    assert list(tmp_path.iterdir()) == []


def test_the_command_hands_every_argument_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}

    def fake(model: nn.Module, path: Path, **options: Any) -> Exported:
        given.update(options, path=path)
        return Exported(str(path), "onnx", "engine", 4, SIZE, [3], {"Add": 1}, 0.0, 1.0, 5, [])

    monkeypatch.setattr(export_module, "export", fake)
    monkeypatch.chdir(tmp_path)
    torch.save(_tiny(), "tiny.pt")
    text = "export tiny.pt --trust-pickle -r 0.1 --to onnx --method drop --input-size 3 48 48 --batch 4 --matmul"
    text += " --opset 19 --json"
    assert main(text.split()) == 0
    assert given.pop("preprocessing").size == SIZE and given.pop("restore") is None
    assert given == {
        "path": Path("tiny.onnx"),
        "r": 0.1,
        "to": "onnx",
        "method": "drop",
        "input_size": [3, 48, 48],
        "batch": 4,
        "matmul": True,
        "opset": 19,
    }
    content = json.loads(capsys.readouterr().out)
    assert (content["path"], content["operators"], content["input_size"]) == ("tiny.onnx", {"Add": 1}, list(SIZE))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--to onxx", "no export target 'onxx'. Did you mean 'onnx'?"),
        ("--to onnx --out tiny.pt2", "tiny.pt2: the name must end in .onnx."),
        ("--to onnx --out missing/tiny.onnx", "missing/tiny.onnx: No such file or directory."),
    ],
    ids=["target", "suffix", "folder"],
)
def test_mistakes_are_found_before_the_model_is_loaded(
    arguments: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(models_module, "load_model", lambda *args, **options: pytest.fail("the work began"))
    monkeypatch.chdir(tmp_path)
    assert main(["export", "reference", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("tokenmerge: ") and text in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "r"), [(2, 1), (17, 5), (197, 98)])
@pytest.mark.parametrize("is_plain", [True, False], ids=["ones", "sizes-and-branch"])
def test_the_product_merges_as_the_reference_does(n: int, r: int, dtype: torch.dtype, is_plain: bool) -> None:
    x = torch.randn(3, n, 24, dtype=dtype)
    size = None if is_plain else torch.randint(0, 4, (3, n)).float()
    branch = None if is_plain else torch.randn_like(x)
    plan = kernels.bipartite(torch.randn(3, n, 8), r, 0)
    results, gradients = [], []
    for run in (kernels.merge, kernels.reference.merge):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, branch) if tensor is not None]
        with kernels.force("matmul"):
            merged, new_size = run(leaves[0], size, *plan, None if is_plain else leaves[1])
        results.append((merged.detach(), new_size))
        gradients.append(torch.autograd.grad(merged.double().square().sum(), leaves))
    assert results[0][0].dtype == dtype and torch.equal(results[0][1], results[1][1])
    assert_close(results[0][0], results[1][0])
    for got, expected in zip(*gradients, strict=True):
        assert_close(got, expected)


def test_a_patched_model_goes_through_torchs_own_onnx_export(tmp_path: Path) -> None:
    import onnxruntime

    model, x = tiny_vit(), torch.randn(2, 3, 32, 32)
    tokenmerge.patch(model, r=8)
    with torch.no_grad():
        torch.onnx.export(model, (x,), tmp_path / "own.onnx", dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(tmp_path / "own.onnx", providers=["CPUExecutionProvider"])
        assert_close(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), model(x), 1e-4)


def test_a_model_that_is_patched_already_is_exported_as_it_is(tmp_path: Path) -> None:
    model, x = _tiny(), torch.randn(3, *SIZE)
    tokenmerge.patch(model, "tofu", r=5)
    found = export(model, tmp_path / "tiny.pt2", to="torch-export")
    run = torch.export.load(tmp_path / "tiny.pt2").module()
    with torch.no_grad():
        assert_close(run(x), model(x), 1e-5)
    assert found.tokens == tokenmerge.handle_of(model).tokens
    with pytest.raises(AlreadyPatchedError, match=r"reduced already: .*Leave out r, method, calibrate and restore"):
        export(model, tmp_path / "tiny.pt2", r=5, to="torch-export")


def test_it_says_how_to_feed_and_to_run_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _tiny()
    model.pretrained_cfg = {"input_size": SIZE, "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 1.0}
    monkeypatch.chdir(tmp_path)
    for to in TARGETS:
        found = export(model, f"tiny{TARGETS[to].suffix}", r=6, to=to)
        text = str(found)
        assert f"output             answer [batch, {found.answers[0]}]" in text and "limitations        none" in text
        assert "mean 0.5, std 0.25 (from timm's pretrained_cfg)" in found.preprocessing
        x = torch.randn(2, *SIZE)
        code = text.split("To run it:\n\n")[1]
        space: dict[str, Any] = {"images": x if to == "torch-export" else x.numpy()}
        exec(code, space)
        with tokenmerge.patched(model, r=6), torch.no_grad():
            assert_close(torch.as_tensor(space["answer"]), model(x), 1e-4)
        # checked as it is deployed, too: the processor's own choice is no float32 on every machine
        assert ("without a hint openvino runs it in " in found.deployed) == (to == "openvino")


def test_a_precision_that_answers_otherwise_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = TARGETS["torch-export"]
    half = lambda file: ("bf16", lambda images: target.load(file)(images).bfloat16().float())  # noqa: E731
    _replace(monkeypatch, plainly=half)
    found = export(_tiny(), tmp_path / "tiny.pt2", r=6, to="torch-export")
    assert found.deployed.startswith(
        "WARNING: without a hint torch runs it in bf16 on this processor: max |difference|"
    )
    assert found.deployed in str(found)
