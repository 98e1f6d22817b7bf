"""Models by the name that a user knows: every host, names of several, of none, and hubs that do not answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import tokenmerge
from tokenmerge.data.prepare import find_preprocessing
from tokenmerge.errors import ConfigError, DataError, UnknownNameError, UnsupportedError
from tokenmerge.tools import hosts
from tokenmerge.tools.models import load_model


def _merges(model: nn.Module, size: tuple[int, ...] = (3, 224, 224)) -> bool:
    x = torch.randn(2, *size)
    with torch.no_grad():
        before = model(x)
        handle = tokenmerge.patch(model, r=0)
        assert torch.equal(model(x), before)
        handle.r = 8
        return not torch.equal(model(x), before)


def test_timm_with_and_without_its_prefix() -> None:
    one, other = (load_model(name) for name in ("timm:vit_tiny_patch16_224", "vit_tiny_patch16_224"))
    assert type(one) is type(other) is timm.models.VisionTransformer and not one.training


@pytest.mark.hosts
@pytest.mark.parametrize("name", ["torchvision:vit_b_32", "vit_b_32"])
def test_torchvision_brings_its_transforms(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    model = tokenmerge.load(name, pretrained=False)
    found, preset = find_preprocessing(model), models.ViT_B_32_Weights.DEFAULT.transforms()
    assert found.is_known and found.source == "from torchvision's ViT_B_32_Weights.IMAGENET1K_V1"
    assert found.mean == tuple(preset.mean) and found.resize == preset.resize_size[0] and found.crops
    nn.init.normal_(model.heads.head.weight)  # new weights answer with zeros
    assert _merges(model) and not any("transform" in name.lower() for name, _ in model.named_modules())


@pytest.mark.hosts
def test_open_clip_takes_an_architecture_and_a_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    open_clip = pytest.importorskip("open_clip")
    assert set(hosts.HOSTS["open_clip"].names()) == set(open_clip.list_models())
    asked: list[Any] = []
    monkeypatch.setattr(
        open_clip, "create_model", lambda *names, **options: asked.append((names, options)) or nn.ReLU()
    )
    tokenmerge.load("open_clip:ViT-B-32/openai")
    tokenmerge.load("ViT-B-32/openai", pretrained=False)
    assert asked == [(("ViT-B-32",), {"pretrained": "openai"}), (("ViT-B-32",), {"pretrained": None})]
    with pytest.raises(ConfigError, match=r"ViT-B-32 does not say which weights: give one of openai, .*ARCH/TAG"):
        tokenmerge.load("open_clip:ViT-B-32")
    with pytest.raises(ConfigError, match=r"vit_medium_patch16_gap_256 does not say .*: give a file of yours"):
        tokenmerge.load("open_clip:vit_medium_patch16_gap_256")
    with pytest.raises(UnknownNameError, match=r"no weights of ViT-B-32 in open_clip 'openay'\. Did you mean 'openai'"):
        tokenmerge.load("open_clip:ViT-B-32/openay")
    with pytest.raises(UnknownNameError, match=r"no open_clip model 'ViT-B-23'"):
        tokenmerge.load("open_clip:ViT-B-23/openai")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the hub: repositories are folders, and what was asked for is copied."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    root = tmp_path / "hub"

    def download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        if not (root / repository).is_dir():
            raise FileNotFoundError(f"404: {repository}")
        copy = tmp_path / "cache" / str(len(allow_patterns))
        copy.mkdir(parents=True, exist_ok=True)
        for pattern in allow_patterns:
            for file in (root / repository).glob(pattern):
                (copy / file.name).write_bytes(file.read_bytes())
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return root


@pytest.mark.hosts
@pytest.mark.parametrize("prefix", ["hf:", ""])
def test_a_repository_of_the_hub(hub: Path, prefix: str) -> None:
    transformers = pytest.importorskip("transformers")
    small: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**small, intermediate_size=64, image_size=32, patch_size=4, num_labels=5)
    saved = transformers.ViTForImageClassification(config).eval()
    saved.save_pretrained(hub / "me" / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(hub / "me" / "vit")
    x = torch.randn(2, 3, 32, 32)
    model = tokenmerge.load(f"{prefix}me/vit")
    assert torch.equal(model(x).logits, saved(x).logits)
    assert find_preprocessing(model).is_known
    # without weights nothing but its configuration is fetched
    new = tokenmerge.load(f"{prefix}me/vit", pretrained=False)
    assert type(new) is type(saved) and not torch.equal(new(x).logits, saved(x).logits)
    assert tokenmerge.load(f"hf:{hub}/me/vit")(x).logits.equal(saved(x).logits)


@pytest.mark.hosts
def test_a_repository_of_timm_is_a_timm_model(hub: Path) -> None:
    from timm.models._hub import save_for_hf

    saved = timm.create_model("vit_tiny_patch16_224", num_classes=7).eval()
    save_for_hf(saved, str(hub / "timm" / "tiny"), safe_serialization="both")
    x = torch.randn(1, 3, 224, 224)
    for name in ("hf:timm/tiny", "timm/tiny"):
        model = tokenmerge.load(name)
        assert type(model) is type(saved) and torch.equal(model(x), saved(x))
    new = tokenmerge.load("hf:timm/tiny", pretrained=False)
    assert type(new) is type(saved) and not torch.equal(new(x), saved(x))


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("GatedRepoError", r"Accept its terms on https://huggingface.co/me/vit, and log in: hf auth login"),
        ("RepositoryNotFoundError", r"Check the name; for a private model log in"),
        ("LocalEntryNotFoundError", r"`hf download me/vit --local-dir FOLDER` fetches it"),
    ],
)
def test_a_hub_that_does_not_give_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, error: str, remedy: str) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def refuse(*_: Any, **__: Any) -> None:
        raise type(error, (OSError,), {})("403")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for name in ("hf:me/vit", "me/vit"):
        with pytest.raises(DataError, match=rf"no folder me/vit, and the Hugging Face hub gave none .*{remedy}"):
            tokenmerge.load(name)


def test_a_name_of_a_host_and_of_a_folder_is_refused_with_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vit_tiny_patch16_224").mkdir()
    with pytest.raises(ConfigError, match=r"here and a model of timm: say \./vit_tiny\S* or timm:vit_tiny"):
        load_model("vit_tiny_patch16_224")
    assert isinstance(load_model("timm:vit_tiny_patch16_224"), nn.Module)


def test_a_name_of_two_hosts_is_timms_and_both_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenmerge.cli.models import open_model

    monkeypatch.setattr(hosts.Torchvision, "names", lambda self: ["vit_tiny_patch16_224"])
    assert isinstance(open_model("vit_tiny_patch16_224"), timm.models.VisionTransformer)
    assert capsys.readouterr().err == (
        "Model: timm:vit_tiny_patch16_224; there is also torchvision:vit_tiny_patch16_224.\n"
    )
    open_model("vit_small_patch16_224")
    assert capsys.readouterr().err == ""  # timm's alone, as ever


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("hf:./nowhere", DataError, r"\./nowhere is no folder with a config.json"),
        ("hf:a/b/c", DataError, r"a/b/c is no folder with a config.json"),
        ("torchvision:vit_b_61", UnknownNameError, r"no torchvision model 'vit_b_61'. Did you mean"),
        ("timm:vit_tny_patch16_224", UnknownNameError, r"no timm model 'vit_tny_patch16_224'. Did you mean"),
        ("absent.py:make", DataError, r"no file absent.py: give FILE.py:FUNCTION"),
    ],
)
def test_what_no_host_has(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_model(name)


@pytest.mark.parametrize("name", ["torchvision:vit_b_32", "open_clip:ViT-B-32/openai"])
def test_a_classifier_of_ones_own_is_refused_by_hosts_that_have_none(name: str) -> None:
    with pytest.raises(UnsupportedError, match=r"a new classifier for 3 classes was asked"):
        load_model(name, num_classes=3)


_FILE = """
import timm
from beside_the_model import size

def make():
    return timm.create_model("vit_tiny_patch16_224", img_size=size)

def number():
    return 3

def broken():
    raise KeyError("weights")
"""


def test_a_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    (tmp_path / "own_models.py").write_text(_FILE)
    (tmp_path / "beside_the_model.py").write_text("size = 64\n")
    model = tokenmerge.load(f"{tmp_path}/own_models.py:make")
    assert (
        isinstance(model, timm.models.VisionTransformer)
        and not model.training
        and model(torch.zeros(1, 3, 64, 64)).shape
    )
    for function, message in (
        ("number", r"returned a int"),
        ("broken", r"gave no model: KeyError"),
        ("no", r"gave no model: Att"),
    ):
        with pytest.raises(DataError, match=rf"own_models.py:{function} {message}"):
            tokenmerge.load(f"{tmp_path}/own_models.py:{function}")
