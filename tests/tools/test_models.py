"""What a user types becomes a model, a device, or an error that says what there is instead."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers import tiny_vit
from tokenmerge.errors import DataError, UnknownNameError, UnsupportedError
from tokenmerge.tools.models import find_device, load_model, shared_copy


@pytest.mark.parametrize(
    ("name", "hint"),
    [("vit_tny_patch16_224", "vit_tiny_patch16_224"), ("deit_smal_patch16_224", "deit_small_patch16_224")],
)
def test_unknown_timm_name_gives_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UnknownNameError, match=rf"no timm model '{name}'\. Did you mean '{hint}'\?") as raised:
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
    with pytest.raises(UnsupportedError, match=text):
        load_model(name, pretrained=pretrained)


@pytest.mark.parametrize("name", ["nowhere:model", "vit_tiny_patch16_224.no_such_tag"])
def test_names_timm_refuses_are_no_tracebacks(name: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"'{name}' could not be loaded: .*[Uu]nknown|'{name}'.*[Ii]nvalid"):
        load_model(name, pretrained=True)


@pytest.mark.parametrize("name", [f"missing{suffix}" for suffix in (".pt", ".pth", ".bin")] + ["folder/model.pkl"])
def test_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"no file {name}: give a timm name, 'reference', or a file"):
        load_model(name)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file .*: give a timm name"):
        load_model(str(tmp_path))


def test_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(DataError, match=r"state\.pt holds a OrderedDict, not a module.*a state dict alone"):
        load_model(str(path))


@pytest.mark.parametrize("content", [b"", b"no pickle at all", b"\x80\x04cnowhere.module\nThing\n."])
def test_no_pickle(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.pt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.pt cannot be read as a saved module: \w+: "):
        load_model(str(path))


@pytest.mark.parametrize("name", ["model.pt", "model"], ids=["suffix", "no-suffix"])
def test_saved_module(tmp_path: Path, name: str) -> None:
    model, x = tiny_vit(), torch.randn(2, 3, 32, 32)
    expected = model(x)
    torch.save(model.train(), tmp_path / name)
    loaded = load_model(str(tmp_path / name))
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
