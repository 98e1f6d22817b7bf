"""Models by the name that a user knows: every host, names of several, of none, and hubs that do not answer."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import nn

import tokenmerge
from helpers import randomised
from tokenmerge.cli import main
from tokenmerge.data.prepare import find_preprocessing
from tokenmerge.errors import ConfigError, DataError, UnknownNameError, UnsupportedError
from tokenmerge.tools import hosts, network
from tokenmerge.tools.models import configuration_beside, file_name, has_weights, load_model
from tokenmerge.tuning import clock


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
@pytest.mark.parametrize("kind", ["state dict", "checkpoint", "safetensors"])
def test_timm_with_weights_of_a_file(kind: str, tmp_path: Path) -> None:
    trained = randomised(timm.create_model("vit_tiny_patch16_224", num_classes=7)).eval()
    state, file = trained.state_dict(), tmp_path / "my_vit.pt"
    if kind == "safetensors":
        file = file.with_suffix(".safetensors")
        safetensors.torch.save_file(state, file)
    else:
        # as timm's training script saves it: with its arguments, and weights of an exponential mean
        whole = {"state_dict": {}, "state_dict_ema": state, "args": argparse.Namespace(lr=1.0), "epoch": 3}
        torch.save(state if kind == "state dict" else whole, file)
    name = f"timm:vit_tiny_patch16_224/{file}"
    for pretrained in (True, False):  # a file is no download
        model = tokenmerge.load(name, pretrained=pretrained)
        assert not model.training and model.num_classes == 7
        assert all(torch.equal(mine, state[key]) for key, mine in model.state_dict().items())
    assert has_weights(name) and file_name(name) == "my_vit"
    assert find_preprocessing(model).is_known
    assert load_model(name, num_classes=3).head.weight.shape[0] == 3


@pytest.mark.hosts
def test_weights_of_another_model_and_files_without_any(tmp_path: Path) -> None:
    torch.save(timm.create_model("vit_tiny_patch16_224", depth=2).state_dict(), tmp_path / "other.pt")
    (tmp_path / "notes.pt").write_text("no weights")
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    for file, text in (
        ("other.pt", r"other.pt holds other weights than timm's vit_tiny_patch16_224 has: 120 tensors differ \(blocks"),
        ("notes.pt", r"notes.pt holds no weights that timm reads"),
        ("numbers.pt", r"numbers.pt holds no weights that timm reads"),
        ("none.pt", r"no file .*none.pt of weights for timm's vit_tiny_patch16_224"),
    ):
        with pytest.raises(DataError, match=text):
            tokenmerge.load(f"timm:vit_tiny_patch16_224/{tmp_path / file}")
    with pytest.raises(UnknownNameError, match=r"no timm model 'vit_tinny_patch16_224'\. Did you mean"):
        tokenmerge.load(f"timm:vit_tinny_patch16_224/{tmp_path}/other.pt")


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
    with pytest.raises(ConfigError, match=r"several weights of ViT-B-32: give one of openai, .*ViT-B-32/FILE"):
        tokenmerge.load("open_clip:ViT-B-32")
    with pytest.raises(ConfigError, match=r"no weights of vit_medium_patch16_gap_256: give a file as"):
        tokenmerge.load("open_clip:vit_medium_patch16_gap_256")
    with pytest.raises(
        UnknownNameError, match=r"no file and no weights of ViT-B-32 in open_clip 'openay'\. Did you mean 'openai'"
    ):
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


@pytest.mark.hosts
@pytest.mark.parametrize("prefix", ["hf:", ""])
def test_a_repository_that_merges_is_told_as_a_folder_is(
    hub: Path, prefix: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, depth=2).eval()
    tokenmerge.patch(model, r=[4, 2])
    tokenmerge.save_pretrained(model, hub / "me" / "fast", model_args={"depth": 2})
    said = (
        r"^me/fast holds merge\.json, which load does not apply. By it merges tokenmerge\.from_pretrained\('me/fast'\)"
    )
    with pytest.warns(UserWarning, match=said) as seen:
        plain = tokenmerge.load(f"{prefix}me/fast")
    assert tokenmerge.handle_of(plain, None) is None
    path = re.findall(r"patch\(model, '(.*)'\)", str(seen[0].message))[0]
    assert tokenmerge.patch(plain, path).r == [4, 2]
    with pytest.warns(UserWarning, match=said):
        assert tokenmerge.Embedder(f"{prefix}me/fast").merging == ""
    assert "r=[4, 2]" in tokenmerge.Embedder(f"{prefix}me/fast", path).merging
    words = ["doctor", f"{prefix}me/fast", "-b", "1"]
    line = f"me/fast holds merge.json, which is not applied: --config {path} does.\n"
    for options, count in ((["-r", "2"], 1), (["--config", path], 0)):
        assert main([*words, *options]) in (0, 1)
        assert capsys.readouterr().err.count(line) == count
    # the second look asks no network, and costs nothing where it finds nothing
    huggingface_hub, constants = (
        pytest.importorskip("huggingface_hub"),
        pytest.importorskip("huggingface_hub.constants"),
    )
    download, asked = huggingface_hub.snapshot_download, []

    def once(*words: Any, **options: Any) -> str:
        asked.append(constants.HF_HUB_OFFLINE)
        if len(asked) > 1:
            raise OSError("the cache is gone")
        return str(download(*words, **options))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network, "is_reachable", lambda address: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", once)
    assert isinstance(tokenmerge.load(f"{prefix}me/fast"), nn.Module)  # a warning would be an error here
    assert asked == [False, True] and constants.HF_HUB_OFFLINE is False


def test_what_is_downloaded_is_found_in_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    repository = tmp_path / "models--me--fast"
    (repository / "snapshots/abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    (repository / "snapshots/abc/merge.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hub = pytest.importorskip("huggingface_hub")
    download = hub.snapshot_download
    monkeypatch.setattr(
        hub, "snapshot_download", lambda *words, **options: download(*words, cache_dir=tmp_path, **options)
    )
    for name in ("hf:me/fast", "me/fast"):
        assert configuration_beside(name) == repository / "snapshots/abc/merge.json"
    for name in (
        "hf:me/other",
        "me/other",
        "vit_tiny_patch16_224",
        "open_clip:ViT-B-32/openai",
        "ViT-B-32/openai",
        " ",
    ):
        assert configuration_beside(name) is None


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
        text = rf"no folder me/vit, and the Hugging Face hub (gave none|cannot be).*{remedy}"
        with pytest.raises(DataError, match=text):
            tokenmerge.load(name)


def test_a_hub_that_cannot_be_reached_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    timm, constants = pytest.importorskip("timm"), pytest.importorskip("huggingface_hub.constants")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setattr(network, "getproxies", dict)
        seen: list[bool] = []

        def refuse(*_: Any, **__: Any) -> nn.Module:
            seen.append(constants.HF_HUB_OFFLINE)
            raise OSError("offline")

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(timm, "create_model", refuse)
        with pytest.raises(UnsupportedError, match=r"pretrained weights of 'vit_tiny_patch16_224' could not be loaded"):
            tokenmerge.load("timm:vit_tiny_patch16_224")
        with pytest.raises(UnsupportedError):
            tokenmerge.load("timm:vit_tiny_patch16_224", pretrained=False)
        assert seen == [True, False] and constants.HF_HUB_OFFLINE is False
        closed.listen()
        assert network.is_reachable(constants.ENDPOINT)
        with pytest.raises(UnsupportedError):
            tokenmerge.load("timm:vit_tiny_patch16_224")
    assert seen[-1] is False


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
        ("", DataError, r"the name of the model is empty: give 'reference', a name with its host \(timm:NAME, hf:ID"),
        ("  ", DataError, r"the name of the model is empty"),
        ("timm:", ConfigError, r"'timm:' names no model behind its host: give timm:NAME"),
        ("hf:", ConfigError, r"'hf:' names no model behind its host: give hf:ID_OR_FOLDER"),
        ("open_clip: ", ConfigError, r"'open_clip: ' names no model behind its host: give open_clip:ARCH/TAG"),
        ("torchvision:", ConfigError, r"'torchvision:' names no model behind its host: give torchvision:NAME"),
        (":", UnknownNameError, r"no host of models ''. Known: timm, hf, open_clip, torchvision"),
        ("tim:vit_tiny_patch16_224", UnknownNameError, r"no host of models 'tim'. Did you mean 'timm'"),
        ("own.py", ConfigError, r"own.py is a file alone: say which .* returns the model, own.py:FUNCTION"),
        ("own.py:", ConfigError, r"own.py: is a file alone: say which .* own.py:FUNCTION"),
        ("vit_größe 16", UnknownNameError, r"no model 'vit_größe 16'"),
        ("timm:vit tiny", UnknownNameError, r"no timm model 'vit tiny'"),
    ],
)
def test_what_no_host_has(
    name: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")  # of a folder that nobody named
    monkeypatch.chdir(tmp_path)
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

def leaving():
    raise SystemExit(3)

def several():
    return make(), None

def telling():
    print("built")
    return make()
"""


def test_a_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [*sys.path])
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
        ("several", r"returned a tuple, not a torch module: return the model alone"),
        ("leaving", r"gave no model: SystemExit: 3"),
        ("broken", r"gave no model: KeyError"),
        ("no", r"gave no model: Att"),
    ):
        with pytest.raises(DataError, match=rf"own_models.py:{function} {message}"):
            tokenmerge.load(f"{tmp_path}/own_models.py:{function}")


def test_a_file_that_failed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [*sys.path])
    file = tmp_path / "mended_models.py"
    file.write_text("raise ValueError('not yet')\n")
    with pytest.raises(DataError, match=r"mended_models.py:make gave no model: ValueError: not yet"):
        tokenmerge.load(f"{file}:make")
    assert "mended_models" not in sys.modules
    file.write_text("import torch\nclass Own(torch.nn.Linear): pass\ndef make(): return Own(2, 2)\n")
    assert type(tokenmerge.load(f"{file}:make")) is sys.modules["mended_models"].Own


def test_what_a_function_prints_is_no_result_of_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "telling_models.py").write_text(_FILE)
    (tmp_path / "beside_the_model.py").write_text("size = 64\n")
    assert (
        main(["bench", f"{tmp_path}/telling_models.py:telling", "-r", "2", "-b", "1", "--rounds", "1", "--json"]) == 0
    )
    out, err = capsys.readouterr()
    assert json.loads(out)["rows"] and "built" in err and "Random weights" not in out


def test_a_processor_beside_the_file_of_a_function_prepares_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("sys.path", [*sys.path])
    small = (
        "hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8"
    )
    text = f"from transformers import ViTConfig, ViTModel\ndef make(): return ViTModel(ViTConfig({small}))\n"
    (tmp_path / "prepared_models.py").write_text(text)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    assert main(["doctor", f"{tmp_path}/prepared_models.py:make", "-r", "2"]) == 0
    assert f"(from {tmp_path}/preprocessor_config.json)" in capsys.readouterr().out


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def _text(transformers: Any) -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=64))  # type: ignore[no-any-return]


def _text_and_images(transformers: Any) -> nn.Module:
    towers = {"text_config": {**SMALL, "vocab_size": 64}, "vision_config": {**SMALL, "image_size": 32, "patch_size": 8}}
    return transformers.CLIPModel(transformers.CLIPConfig(**towers))  # type: ignore[no-any-return]


def _photos(folder: Path, count: int = 1) -> Path:
    for name in ("ant", "bee", "cat"):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = torch.randint(0, 255, (40, 40, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.hosts
@pytest.mark.parametrize("make", [_text, _text_and_images])
def test_models_that_take_text_are_refused_by_commands(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(pytest.importorskip("transformers")).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    _photos(tmp_path / "photos")
    kind = make.__name__.replace("_text_and_images", "CLIPModel").replace("_text", "BertModel")
    commands = ["doctor model", "bench model", "export model --to torch-export -r 2"]
    commands += [f"{name} model --data photos" for name in ("eval", "compare", "tune")]
    if make is _text:  # of CLIP, train takes the image tower with a new classifier
        commands += ["train finetune --set model.name=model data.source=folder:photos data.size=[3,32,32]"]
    for command in commands:
        assert main(command.split()) == 2, command
        err = capsys.readouterr().err
        assert f"tokenmerge: model is a {kind}: it takes text (input_ids)" in err, f"{command}: {err}"
    assert isinstance(tokenmerge.load("model"), nn.Module)  # in Python it may be patched, and given both


@pytest.mark.hosts
def test_a_model_of_sounds_is_examined_and_takes_no_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ASTConfig(**SMALL, max_length=64, num_mel_bins=32)
    transformers.ASTForAudioClassification(config).save_pretrained(tmp_path / "sound")
    monkeypatch.chdir(tmp_path)
    _photos(tmp_path / "photos")
    assert main(["doctor", "sound", "-r", "2"]) == 0
    assert "unknown" in capsys.readouterr().out
    assert main(["eval", "sound", "--data", "photos", "-r", "2"]) == 2
    assert "ASTForAudioClassification takes inputs of (64, 32), no images" in capsys.readouterr().err


@pytest.fixture
def tiny_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small two-tower model of open_clip and a file of its weights, as a name."""
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16}
    text = {"context_length": 6, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    tiny = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", tiny)
    torch.save(randomised(open_clip.create_model("tiny-clip")).state_dict(), tmp_path / "clip.pt")
    return f"open_clip:tiny-clip/{tmp_path}/clip.pt"


@pytest.mark.hosts
def test_weights_of_open_clip_in_a_file(tiny_clip: str) -> None:
    one, other = (tokenmerge.load(tiny_clip, pretrained=pretrained) for pretrained in (True, False))
    states = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(mine, its) for mine, its in states), "a file is no download"
    with pytest.raises(
        ConfigError, match=r"open_clip has no weights of tiny-clip: give a file as open_clip:tiny-clip/"
    ):
        tokenmerge.load("open_clip:tiny-clip")
    with pytest.raises(UnknownNameError, match=r"no file and no weights of tiny-clip in open_clip 'none.pt'"):
        tokenmerge.load("open_clip:tiny-clip/none.pt")


@pytest.mark.hosts
def test_every_command_on_a_model_of_two_towers(
    tiny_clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(clock, "_ROUNDS", (2,))
    _photos(tmp_path / "photos", 24)
    data = ["--data", "photos", "--workers", "0"]

    def run(name: str, *options: str) -> Any:
        code = main([name, tiny_clip, *options, "--json"])
        assert code == 0 or name == "doctor", capsys.readouterr().err  # which judges a speed too
        return json.loads(capsys.readouterr().out)

    tuned = run("tune", *data, "--target", "macs=0.7", "--budget", "1", "-o", "merge.json")
    # 24 numbers are no classes, although the labels are smaller
    assert not any("top-1" in name or "agreement" in name for name in tuned["figures"])
    assert any("answers with 24 numbers, the data has 3 classes" in one for one in tuned["remarks"])
    assert main(["tune", tiny_clip, *data, "--target", "drop=5", "-o", "other.json"]) == 2
    assert "which needs labels of the images (the model answers with 24 numbers" in capsys.readouterr().err
    unmerged, merged = run("eval", *data, "--method", "merge.json")["rows"]
    assert unmerged["cosine"] == 1.0 and 0 < merged["error %"] < 100 and "top-1 %" not in merged
    assert run("compare", *data, "-r", "2", "--methods", "tome", "--rounds", "1")["rows"][1]["cosine"]
    assert run("bench", "-r", "2", "-b", "1", "--rounds", "1")["rows"][0]["tokens"] == 17 - 3 * 2
    found = {name: (good, text) for name, good, text in run("doctor", "--config", "merge.json")["findings"]}
    assert found["config"][0] and "weights" not in found, "the weights of the file"
    exported = run("export", "--method", "merge.json", "--to", "torch-export")
    assert exported["path"] == "clip.pt2" and exported["answers"] == [24]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("timm:vit_a.b", "vit_a.b"), ("hf:me/vit", "vit"), ("me/vit", "vit"), ("reference", "reference")],
)
def test_what_is_written_of_a_model_is_called_by_its_name_alone(name: str, expected: str) -> None:
    assert file_name(name) == expected


def test_a_function_of_ones_own_is_trained_and_a_wrong_prefix_is_none_of_timms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    _photos(tmp_path / "photos", 8)
    (tmp_path / "trained_models.py").write_text(
        "import timm\ndef make(): return timm.create_model('vit_tiny_patch16_224', img_size=32, depth=2)\n"
    )
    rest = [
        "data.source=folder:photos",
        "data.size=[3,32,32]",
        "steps=1",
        "batch_size=4",
        "merge.r=1",
        "optimizer.warmup=0",
    ]
    start = ["train", "finetune", "--out", "run", "--set"]
    assert main([*start, "model.name=tim:vit_tiny_patch16_224", *rest]) == 2
    assert "no host of models 'tim'. Did you mean 'timm'" in capsys.readouterr().err
    assert main([*start, "model.name=trained_models.py:make", *rest]) == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.hosts
def test_a_run_from_a_folder_with_its_prefix_needs_that_folder_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    _photos(tmp_path / "photos", 8)
    config = transformers.ViTConfig(**SMALL, image_size=32, patch_size=8)
    transformers.ViTForImageClassification(config).save_pretrained("model")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained("model")
    rest = ["data.source=folder:photos", "steps=1", "batch_size=4", "merge.r=1", "optimizer.warmup=0"]
    assert main(["train", "finetune", "--out", "run", "--set", "model.name=hf:model", *rest]) == 0
    assert f"(from {Path('model') / 'preprocessor_config.json'})" in capsys.readouterr().err
    shutil.rmtree("model")
    assert main(["doctor", "run", "-r", "2"]) == 0, capsys.readouterr().err
