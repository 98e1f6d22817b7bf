"""What a user types becomes a model, a device, or an error that says what there is instead."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tokenmerge
from helpers import tiny_vit
from tokenmerge import MergeConfig, methods
from tokenmerge.cli import main
from tokenmerge.errors import ConfigError, DataError, InvalidScheduleError, UnknownNameError, UnsupportedError
from tokenmerge.measure.outputs import find_device, shared_copy
from tokenmerge.tools.models import Trained, apply_method, load_model, own_r, read_method
from tokenmerge.training.loop import train
from tokenmerge.training.recipe import read_recipe


@pytest.mark.parametrize(
    ("name", "hint"),
    [("vit_tny_patch16_224", "vit_tiny_patch16_224"), ("deit_smal_patch16_224", "deit_small_patch16_224")],
)
def test_unknown_timm_name_gives_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UnknownNameError, match=rf"no model '{name}'\. Did you mean '{hint}'\?") as raised:
        load_model(name)
    assert len(str(raised.value)) < 200, "the hint drowns in hundreds of names"


def test_a_timm_name_gives_that_model_in_eval_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    asked: list[tuple[str, bool, dict[str, Any]]] = []

    def create(name: str, pretrained: bool, **options: Any) -> nn.Module:
        asked.append((name, pretrained, options))
        return tiny_vit().train()

    monkeypatch.setattr(timm, "create_model", create)
    model = load_model("vit_tiny_patch16_224")
    assert not model.training
    load_model("vit_tiny_patch16_224.augreg_in21k", pretrained=True, num_classes=3)
    assert asked == [
        ("vit_tiny_patch16_224", False, {}),
        ("vit_tiny_patch16_224.augreg_in21k", True, {"num_classes": 3}),
    ]


@pytest.mark.parametrize(
    ("name", "pretrained", "what"),
    [
        ("vit_tiny_patch16_224", True, "pretrained weights of"),
        ("hf_hub:nobody/nothing", False, "model"),
    ],
    ids=["weights", "hub"],
)
def test_without_a_network(monkeypatch: pytest.MonkeyPatch, name: str, pretrained: bool, what: str) -> None:
    import timm

    def offline(*args: Any, **kwargs: Any) -> nn.Module:
        raise OSError("no route to host.")

    monkeypatch.setattr(timm, "create_model", offline)
    text = rf"the {what} '{name}' could not be loaded: no route to host\. Check .*'reference'"
    with pytest.raises(UnsupportedError, match=text) as raised:
        load_model(name, pretrained=pretrained)
    assert ("--no-pretrained" in str(raised.value)) is pretrained


@pytest.mark.parametrize("name", ["local-dir:nowhere", "vit_tiny_patch16_224.no_such_tag"])
def test_names_timm_refuses_are_no_tracebacks(name: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"'{name}' could not be loaded: .*(config.json|[Ii]nvalid)"):
        load_model(name, pretrained=True)


@pytest.mark.parametrize("name", [f"missing{suffix}" for suffix in (".pt", ".pth", ".bin")] + ["folder/model.pkl"])
def test_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"no file or folder {name}: give 'reference', a name with its host"):
        load_model(name)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder without config.json: give 'reference', a name"):
        load_model(str(tmp_path), trust_pickle=True)


def test_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(DataError, match=r"state\.pt holds a OrderedDict, not a module.*a state dict alone"):
        load_model(str(path), trust_pickle=True)


@pytest.mark.parametrize("content", [b"", b"no pickle at all", b"\x80\x04cnowhere.module\nThing\n."])
def test_no_pickle(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.pt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.pt cannot be read as a saved module: \w+: "):
        load_model(str(path), trust_pickle=True)


class _Bomb:
    """Says that it was unpickled, by a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))], ids=["torch", "plain"]
)
def test_a_pickle_runs_nothing_unless_it_is_trusted(tmp_path: Path, write: Any) -> None:
    write(_Bomb(tmp_path / "bang"), tmp_path / "model.pt")
    with pytest.raises(DataError, match=r"model\.pt is a pickle, .* would run .*: --trust-pickle .* trust_pickle=True"):
        load_model(str(tmp_path / "model.pt"))
    assert not (tmp_path / "bang").exists()
    with pytest.raises(DataError, match=r"cannot be read|not a module"):
        load_model(str(tmp_path / "model.pt"), trust_pickle=True)
    assert (tmp_path / "bang").exists(), "the test's pickle is one that would have run"


@pytest.mark.parametrize(
    "model",
    [
        {"name": "{run}/model.pt"},
        {"name": "vit_tiny_patch16_224", "options": {"checkpoint_path": "{run}/model.pt"}},
        {"name": "vit_tiny_patch16_224", "options": {"pretrained_cfg_overlay": {"file": "{run}/model.pt"}}},
    ],
    ids=["name", "checkpoint", "overlay"],
)
def test_a_runs_folder_names_no_pickle(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Any) -> None:
    run = tmp_path / "run"
    run.mkdir()
    torch.save(_Bomb(tmp_path / "bang"), run / "model.pt")
    text = json.dumps({"steps": 1, "model": model}).replace("{run}", str(run))
    (run / "recipe.json").write_text(text)
    (run / "model.json").write_text(json.dumps({"size": [3, 224, 224], "classes": ["a", "b"]}))
    (run / "model.safetensors").write_bytes(b"")
    assert main(["doctor", str(run)]) == 2
    assert "--trust-pickle" in capsys.readouterr().err
    with pytest.raises(DataError, match="trust_pickle=True"):
        train(read_recipe(run / "recipe.json"), tmp_path / "other")
    assert not (tmp_path / "bang").exists() and not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["model.pt", "model"], ids=["suffix", "no-suffix"])
def test_saved_module(tmp_path: Path, name: str) -> None:
    model, x = tiny_vit(), torch.randn(2, 3, 32, 32)
    expected = model(x)
    torch.save(model.train(), tmp_path / name)
    loaded = load_model(str(tmp_path / name), trust_pickle=True)
    assert not loaded.training
    assert torch.equal(loaded(x), expected)


@pytest.mark.parametrize("name", ["reference", "vit_tiny_patch16_224"])
def test_without_timm(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UnsupportedError, match=r'needs timm: pip install "tokenmerge\[timm\]"'):
        load_model(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_cuda_without_a_gpu(name: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"no device '{name}' on this machine; there are: cpu"):
        find_device(name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gpu", r"no device 'gpu'; there are: cpu"),
        ("", r"no device ''; there are: cpu"),
        ("cuda:x", r"no device 'cuda:x'; there are: cpu"),
        ("cuda:99", r"no device 'cuda:99' on this machine; there are: cpu"),
        ("meta", r"no device 'meta' on this machine; there are: cpu"),
    ],
)
def test_invalid_device(name: str, text: str) -> None:
    with pytest.raises(UnsupportedError, match=text):
        find_device(name)


@pytest.mark.parametrize("name", ["cpu", torch.device("cpu")], ids=["name", "device"])
def test_cpu_is_there(name: str | torch.device) -> None:
    assert find_device(name) == torch.device("cpu")


def test_shared_copy_shares_the_tensors_and_not_the_modules() -> None:
    model = tiny_vit()
    model.register_buffer("scale", torch.ones(2))
    twin = shared_copy(model)
    assert twin is not model and twin.blocks[0] is not model.blocks[0]
    pairs = [*zip(model.parameters(), twin.parameters(), strict=True), (model.scale, twin.scale)]
    assert len(pairs) > 40 and all(one is other for one, other in pairs)


@pytest.mark.parametrize("name", [*tokenmerge.list_methods(), "auto"])
def test_a_name_stays_a_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # a folder of that name is asked for as ./name
    assert read_method(name) == name and own_r(name) is None


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("tome()", methods.ToMe()),
        ("tome(metric='x', combine=\"average\")", methods.ToMe(metric="x", combine="average")),
        (" token_pooling( iterations = 3 ) ", methods.TokenPooling(iterations=3)),
        ("tofu(early=1)", methods.ToFu(early=1)),
        ("pitome(margin=-0.5)", methods.PiToMe(margin=-0.5)),
        ("evit(fuse=False)", methods.EViT(fuse=False)),
        ("ats(samples=None)", methods.ATS()),
        ("diffrate(prune=[1, 2])", methods.DiffRate(prune=(1, 2))),
        ("zero_tprune(iterations=(9, 5, 1))", methods.ZeroTPrune(iterations=(9, 5, 1))),
        ("dtem(weights='a/b.safetensors')", methods.DTEM(weights="a/b.safetensors")),
    ],
)
def test_a_name_with_options(text: str, method: tokenmerge.Reduction) -> None:
    assert read_method(text) == method
    assert hash(read_method(text)) == hash(method)
    assert own_r(method) is None


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("tme", UnknownNameError, r"no method 'tme'\. Did you mean 'tome'\?"),
        ("to-me", UnknownNameError, r"no method 'to-me'\. Did you mean 'tome'\?"),
        ("", UnknownNameError, "no method ''"),
        ("tme(metric='x')", UnknownNameError, r"no method 'tme'\. Did you mean 'tome'\?"),
        ("tome(metrics='x')", UnknownNameError, r"no option of tome 'metrics'\. Did you mean 'metric'\?"),
        ("tome(metric='z')", UnknownNameError, "no ToMe metric 'z'"),
        ("tome('x')", ConfigError, r"is no method: give a name .* each once, by its name and"),
        ("tome(**{})", ConfigError, "is no method"),
        ("tome(metric=x)", ConfigError, "is no method"),
        ("tome(metric=open('x'))", ConfigError, "is no method"),
        ("tome(metric='x'", ConfigError, "is no method"),
        ("tome(seed=1, seed=2)", ConfigError, "is no method"),
        ("tome(seed=1)(seed=2)", ConfigError, "is no method"),
        ("(1)", ConfigError, "is no method"),
        (
            "token_pooling(iterations='5')",
            ConfigError,
            r"option iterations of token_pooling is '5'; it takes int, e\.g\. .* 5",
        ),
        ("token_pooling(iterations=True)", ConfigError, "it takes int"),
        ("tofu(early='x')", ConfigError, "it takes float"),
        ("evit(fuse=1)", ConfigError, "it takes bool"),
        ("ats(samples='x')", ConfigError, r"it takes float \| None"),
        ("diffrate(prune=[1, 'x'])", ConfigError, r"it takes float \| tuple\[int, \.\.\.\]"),
        ("zero_tprune(iterations=(1, 2))", ConfigError, r"it takes tuple\[int, int, int\]"),
        ("missing.json", ConfigError, r"cannot read the configuration missing\.json: No such file"),
        ("runs/missing", ConfigError, r"cannot read the configuration runs/missing/merge\.json: No such file"),
        ("./empty", ConfigError, r"cannot read the configuration empty/merge\.json: No such file"),
    ],
)
def test_methods_that_cannot_be_read(
    text: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=message):
        read_method(text)


def _trained(folder: Path, model: nn.Module, r: Any = 6) -> Trained:
    """Write what the recipe writes, in half precision."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    MergeConfig("tome", r=r, prop_attn=False).save(folder / "merge.json")
    save_file(
        {key: value.half().contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors"
    )
    found = read_method(str(folder))
    assert isinstance(found, Trained)
    return found


def test_saved_configurations(tmp_path: Path) -> None:
    config = MergeConfig("tofu", r=(8, -1.0))
    config.save(tmp_path / "merge.json")
    assert read_method(str(tmp_path / "merge.json")) == read_method(str(tmp_path)) == config
    assert own_r(config) == (8, -1.0)
    handle = apply_method(tiny_vit(), str(tmp_path))
    assert handle.config == config
    assert apply_method(tiny_vit(), str(tmp_path), r=3, prop_attn=False).config == MergeConfig("tofu", 3, False)


def test_a_trained_model_replaces_the_tensors_of_one_copy(tmp_path: Path) -> None:
    model, other, x = tiny_vit(), tiny_vit(), torch.randn(2, 3, 32, 32)
    found = _trained(tmp_path / "run", other)
    assert own_r(found) == 6
    other.load_state_dict({key: value.half() for key, value in other.state_dict().items()})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    twin = shared_copy(model)
    handle = apply_method(twin, found)
    assert handle.config == MergeConfig("tome", r=6, prop_attn=False)
    assert all(parameter.dtype == torch.float32 for parameter in twin.parameters())
    with tokenmerge.patched(other, found.config):
        assert torch.equal(twin(x), other(x))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not torch.equal(twin.head.weight, model.head.weight)


def test_a_trained_model_of_another_architecture(tmp_path: Path) -> None:
    found = _trained(tmp_path / "run", tiny_vit(depth=2))
    text = (
        r"model\.safetensors are of another model: 24 tensors differ \(blocks\.2\.attn\.proj\.bias None for \(32,\), "
    )
    with pytest.raises(DataError, match=text):
        apply_method(tiny_vit(depth=4), found)
    wide = _trained(tmp_path / "wide", tiny_vit(num_classes=3))
    with pytest.raises(DataError, match=r"2 tensors differ \(head\.bias \(3,\) for \(10,\), head\.weight"):
        apply_method(tiny_vit(), wide)
    (tmp_path / "wide" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"cannot read the weights .*model\.safetensors: "):
        apply_method(tiny_vit(), str(tmp_path / "wide"))


def test_auto_gets_the_images_and_others_do_not_look_at_them() -> None:
    images = torch.randn(4, 3, 32, 32)
    handle = apply_method(tiny_vit(depth=2), "auto", r=4, calibrate=images)
    assert handle.calibration is not None and handle.calibration.images == 4
    assert apply_method(tiny_vit(), "tome", r=4, calibrate=images).calibration is None
    with pytest.raises(InvalidScheduleError, match="r is missing"):
        apply_method(tiny_vit(), "auto", calibrate=images)
