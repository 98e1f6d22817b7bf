"""Merging models as folders: written whole, read back as they were, from a disk and from a stand-in for the hub."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tokenmerge
from helpers import answer, randomised, tiny_vit
from tokenmerge import MergeConfig, methods
from tokenmerge.cli import main
from tokenmerge.config import Fingerprint
from tokenmerge.errors import ConfigError, DataError, NotPatchedError, UnsupportedError
from tokenmerge.tools import pretrained
from tokenmerge.tools.models import configuration_beside, load_model

FIGURES = {"speed-up": 2.0125, "batch size": 4, "environment": {"device": "a | b", "torch": "2.x"}}
SMALL = {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 7}


def _timm(**options: Any) -> nn.Module:
    import timm

    torch.manual_seed(0)
    return randomised(timm.create_model("vit_tiny_patch16_224", **{**SMALL, **options})).eval()


def _hf(kind: str = "ViTForImageClassification") -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    config = transformers.ViTConfig(**sizes, image_size=64, patch_size=16, num_labels=7)
    return randomised(getattr(transformers, kind)(config)).eval()


MAKERS = {"timm": _timm, "transformers": _hf}


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("host", MAKERS)
@pytest.mark.parametrize("method", ["tome(metric='x')", methods.DynamicViT(weights="new")], ids=["tome", "learned"])
def test_a_model_comes_back_as_it_was(host: str, method: Any, tmp_path: Path, x: torch.Tensor) -> None:
    model, folder = MAKERS[host](), tmp_path / "some" / "folder"
    unmerged, keys = answer(model(x)), list(model.state_dict())
    handle = tokenmerge.patch(model, method, r=[4, 2])
    if isinstance(method, methods.DynamicViT):
        randomised(model.tokenmerge_modules)  # type: ignore[arg-type]
    merged = answer(model(x))
    assert not torch.equal(merged, unmerged)
    model.train()
    assert tokenmerge.save_pretrained(model, folder, measured=FIGURES) == folder
    assert model.training and tokenmerge.handle_of(model) is handle
    assert [path.name for path in tmp_path.rglob("*") if path.name.startswith(".")] == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin = tokenmerge.from_pretrained(folder)
    assert not twin.training and torch.equal(answer(twin(x)), merged)
    found = tokenmerge.handle_of(twin)
    assert found.remarks == [] and found.config.measured == FIGURES and found.tokens == handle.tokens
    # the host reads the folder too, without merging
    plain = load_model(str(folder))
    assert type(plain) is type(model) and list(plain.state_dict()) == keys
    assert torch.equal(answer(plain(x)), unmerged)
    tokenmerge.unpatch(twin)
    assert torch.equal(answer(twin(x)), unmerged)


def test_the_host_alone_reads_the_folder(tmp_path: Path, x: torch.Tensor) -> None:
    import timm

    for host, make in MAKERS.items():
        model = make()
        with torch.no_grad():
            expected = answer(model(x))
        tokenmerge.patch(model, r=4)
        tokenmerge.save_pretrained(model, tmp_path / host)
        if host == "timm":
            twin = timm.create_model(f"local-dir:{tmp_path / host}", pretrained=True).eval()
        else:
            twin = type(model).from_pretrained(tmp_path / host).eval()  # type: ignore[attr-defined]
        assert torch.equal(answer(twin(x)), expected)


def test_the_card_says_what_it_is_and_what_was_measured(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    model = _timm()
    tokenmerge.patch(model, "tofu", r=4)
    tokenmerge.save_pretrained(model, tmp_path / "fast", base="timm/some.tag", weights=True, measured=FIGURES)
    text = (tmp_path / "fast" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "timm",
        "base_model": "timm/some.tag",
        "tags": ["token-merging", "tokenmerge"],
    }
    assert "| speed-up | 2.0125 |\n| batch size | 4 |\n| device | a \\| b |\n| torch | 2.x |" in body
    assert "| tokens after each block | 13 9 5 (of 17) |" in body and "ToFu(metric='k'" in body
    assert 'model = tokenmerge.from_pretrained("fast")' in body


def test_the_base_model_by_reference(tmp_path: Path) -> None:
    model, x = load_model("reference"), torch.randn(2, 1, 28, 28)
    tokenmerge.patch(model, r=4)
    with pytest.raises(UnsupportedError, match=r"made neither by timm\.create_model nor .*\(base=\.\.\.\)"):
        tokenmerge.save_pretrained(model, tmp_path / "fast")
    tokenmerge.save_pretrained(model, tmp_path / "fast", base="reference")
    assert sorted(path.name for path in (tmp_path / "fast").iterdir()) == ["README.md", "merge.json"]
    assert torch.equal(tokenmerge.from_pretrained(tmp_path / "fast")(x), model(x))
    with torch.no_grad():
        model.head.weight.add_(1)  # type: ignore[operator, union-attr]
    tokenmerge.save_pretrained(model, tmp_path / "trained", base="reference")
    with pytest.warns(UserWarning, match="trained: the configuration was made with other weights than these"):
        tokenmerge.from_pretrained(tmp_path / "trained")
    tokenmerge.save_pretrained(model, tmp_path / "lost", base=str(tmp_path / "nowhere.pt"))
    with pytest.raises(DataError, match=r"the base model '.*nowhere.pt' cannot be loaded: no file or folder"):
        tokenmerge.from_pretrained(tmp_path / "lost")


class _Hub:
    """Repositories in a folder, as `huggingface_hub` has them elsewhere."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked = root, []

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id: str, folder_path: Path) -> str:
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}"

    def snapshot_download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((repo_id, revision))
        if not (self.root / repo_id).is_dir():
            raise FileNotFoundError(f"401: no {repo_id}")
        to = self.root / f"cache-{len(self.asked)}"
        to.mkdir()
        for path in (self.root / repo_id).iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, to)
        return str(to)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Hub:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    found = _Hub(tmp_path / "hub")
    for name in ("create_repo", "upload_folder", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(found, name))
    return found


@pytest.mark.parametrize("host", MAKERS)
def test_a_model_goes_to_the_hub_and_comes_from_there(host: str, hub: _Hub, tmp_path: Path, x: torch.Tensor) -> None:
    model = MAKERS[host]()
    tokenmerge.patch(model, methods.DynamicViT(weights="new"), r=4)
    tokenmerge.save_pretrained(model, tmp_path / "fast")
    assert pretrained.push_to_hub(tmp_path / "fast", "me/fast") == "https://hub/me/fast"
    twin = tokenmerge.from_pretrained("me/fast", revision="v1")
    assert hub.asked == [("me/fast", "v1")]
    assert torch.equal(answer(twin(x)), answer(model(x)))
    # the base by the id of a repository
    tokenmerge.save_pretrained(twin, tmp_path / "small", base="me/fast")
    assert not (tmp_path / "small" / "model.safetensors").exists()
    assert torch.equal(answer(tokenmerge.from_pretrained(tmp_path / "small")(x)), answer(model(x)))


@pytest.mark.parametrize("host", MAKERS)
def test_a_base_on_the_hub_that_never_merged(host: str, hub: _Hub, tmp_path: Path, x: torch.Tensor) -> None:
    model = MAKERS[host]()
    tokenmerge.patch(model, r=4)
    tokenmerge.save_pretrained(model, hub.root / "they" / "plain")
    for name in ("merge.json", "README.md"):
        (hub.root / "they" / "plain" / name).unlink()
    tokenmerge.save_pretrained(model, tmp_path / "fast", base="they/plain")
    twin = tokenmerge.from_pretrained(tmp_path / "fast")
    assert type(twin) is type(model) and torch.equal(answer(twin(x)), answer(model(x)))
    tokenmerge.save_pretrained(model, tmp_path / "lost", base="they/gone")
    with pytest.raises(DataError, match=r"the base model 'they/gone' cannot be loaded: there is no folder they/gone"):
        tokenmerge.from_pretrained(tmp_path / "lost")


def test_the_hub_refuses(hub: _Hub, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no folder me/nothing, and the Hugging Face hub gave none .*401: no me/nothing"
    ):
        tokenmerge.from_pretrained("me/nothing")
    with pytest.raises(DataError, match=r"holds no merge\.json: write it with tokenmerge\.save_pretrained first"):
        pretrained.push_to_hub(tmp_path, "me/fast")
    assert not (tmp_path / "hub").exists()
    model = load_model("reference")
    tokenmerge.patch(model, r=4)
    tokenmerge.save_pretrained(model, tmp_path / "fast", base="reference")
    (tmp_path / "hub").write_text("no folder")
    with pytest.raises(DataError, match=r"the hub did not take .*fast as me/fast: NotADirectoryError"):
        pretrained.push_to_hub(tmp_path / "fast", "me/fast")


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(NotPatchedError, match=r"this VisionTransformer is not patched: call tokenmerge\.patch"):
        tokenmerge.save_pretrained(_timm(), tmp_path / "x")
    own = tiny_vit()
    tokenmerge.patch(own, r=4)
    with pytest.raises(UnsupportedError, match=r"VisionTransformer was made neither by timm\.create_model nor by"):
        tokenmerge.save_pretrained(own, tmp_path / "x")
    model = _timm()
    handle = tokenmerge.patch(model, r=lambda block, tokens: 2)
    with pytest.raises(ConfigError, match=r"callable .*JSON cannot hold"):
        tokenmerge.save_pretrained(model, tmp_path / "x")
    handle.r = 4
    with pytest.raises(ConfigError, match=r"measured\['ms'\] is nan"):
        tokenmerge.save_pretrained(model, tmp_path / "x", measured={"ms": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path, x: torch.Tensor) -> None:
    folder = tmp_path / "fast"
    folder.mkdir()
    model = _timm()
    handle = tokenmerge.patch(model, methods.DynamicViT(weights="new"), r=4)
    tokenmerge.save_pretrained(model, folder)  # an empty one is filled
    (folder / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(DataError, match=r"fast exists and is not empty; nothing was changed there\. .* force=True"):
        tokenmerge.save_pretrained(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    handle.remove()
    tokenmerge.patch(model, r=2)
    tokenmerge.save_pretrained(model, folder, force=True)
    names = ["README.md", "config.json", "merge.json", "model.safetensors", "notes.txt"]
    assert sorted(path.name for path in folder.iterdir()) == names, "what an earlier save left gave way, the rest stays"
    assert torch.equal(tokenmerge.from_pretrained(folder)(x), model(x))
    with pytest.raises(DataError, match=r"notes\.txt exists and is not empty|cannot write to .*notes\.txt"):
        tokenmerge.save_pretrained(model, folder / "notes.txt", force=False)
    with pytest.raises(DataError, match=r"cannot write to .*notes\.txt"):
        tokenmerge.save_pretrained(model, folder / "notes.txt" / "below")


@pytest.mark.parametrize("exists", [False, True])
def test_a_cut_off_leaves_nothing_half(exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = _timm(), tmp_path / "fast"
    tokenmerge.patch(model, r=4)
    if exists:
        tokenmerge.save_pretrained(model, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()} if exists else None

    def cut(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "_check_written", cut)
    with pytest.raises(KeyboardInterrupt):
        tokenmerge.save_pretrained(model, folder, force=True)
    assert [path.name for path in tmp_path.iterdir()] == (["fast"] if exists else [])
    assert before is None or {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_model_that_would_come_back_as_another_is_not_written(tmp_path: Path) -> None:
    model: Any = _timm()
    model.norm = nn.Identity()  # what nothing in a configuration of timm says
    tokenmerge.patch(model, r=4)
    with pytest.raises(
        UnsupportedError, match=r"what timm wrote of this VisionTransformer comes back as another model"
    ):
        tokenmerge.save_pretrained(model, tmp_path / "x")
    model = _timm()
    model.blocks[0].mlp.act = nn.Identity()  # the weights are the same
    tokenmerge.patch(model, r=4)
    with pytest.raises(UnsupportedError, match=r"comes back as another model: its answers differ by .*model_args="):
        tokenmerge.save_pretrained(model, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_loaded(tmp_path: Path) -> None:
    model, folder = _timm(), tmp_path / "fast"
    tokenmerge.patch(model, r=4)
    tokenmerge.save_pretrained(model, folder)
    text = (folder / "merge.json").read_text()
    with pytest.raises(DataError, match=r"holds no merge\.json: it is no folder of tokenmerge\.save_pretrained"):
        tokenmerge.from_pretrained(tmp_path)
    (folder / "merge.json").write_text(text.replace('"tokens": 17', '"tokens": 197'))
    with pytest.raises(ConfigError, match=r"for 197 tokens .*, and this model has 17"):
        tokenmerge.from_pretrained(folder)
    (folder / "merge.json").write_text(text[:200])
    with pytest.raises(ConfigError, match=r"merge\.json is no JSON at line"):
        tokenmerge.from_pretrained(folder)
    (folder / "merge.json").write_text(text)
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**about, "num_classes": 9, "model_args": {**SMALL, "num_classes": 9}})
    )
    with pytest.raises(DataError, match=r"fast cannot be read as a timm model: .*head\.weight"):
        tokenmerge.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(
        DataError, match=r"holds neither weights \(config\.json, model\.safetensors\) nor the name of a"
    ):
        tokenmerge.from_pretrained(folder)


def test_other_weights_in_the_folder_are_told(tmp_path: Path) -> None:
    model, other = _timm(), _timm()
    with torch.no_grad():
        other.head.weight.add_(1)  # type: ignore[operator, union-attr]
    for name, one in (("a", model), ("b", other)):
        tokenmerge.patch(one, r=4)
        tokenmerge.save_pretrained(one, tmp_path / name)
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "a")
    with pytest.warns(UserWarning, match=r"a: the configuration was made with other weights than these"):
        tokenmerge.from_pretrained(tmp_path / "a")


def test_half_precision_is_compared_by_its_own(tmp_path: Path) -> None:
    model = _timm().bfloat16()
    tokenmerge.patch(model, r=4)
    tokenmerge.save_pretrained(model, tmp_path / "fast")
    with pytest.warns(UserWarning, match="with weights in bfloat16, these are float32: not compared"):
        tokenmerge.from_pretrained(tmp_path / "fast")


def test_what_was_measured_goes_on(tmp_path: Path) -> None:
    model = _timm()
    config = replace(MergeConfig("tome", r=4), fingerprint=Fingerprint.of(model), measured=FIGURES)
    tokenmerge.patch(model, config)
    tokenmerge.save_pretrained(model, tmp_path / "fast")
    assert MergeConfig.load(tmp_path / "fast" / "merge.json").measured == FIGURES


def test_what_load_does_not_apply_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = _timm()
    tokenmerge.patch(model, r=[4, 2])
    tokenmerge.save_pretrained(model, "fast")
    said = (
        r"^fast holds merge\.json, which load does not apply. By it merges tokenmerge\.from_pretrained\('fast'\), or "
    )
    with pytest.warns(UserWarning, match=said):
        plain = tokenmerge.load("fast")
    assert tokenmerge.handle_of(plain, None) is None
    with pytest.warns(UserWarning, match=said):
        assert tokenmerge.Embedder("fast").merging == ""
    assert "r=[4, 2]" in tokenmerge.Embedder("fast", "fast/merge.json").merging  # a warning would be an error here
    line = "fast holds merge.json, which is not applied: --config fast/merge.json does.\n"
    for options, is_said in (([], True), (["--config", "fast/merge.json"], False)):
        assert main(["doctor", "fast", "-b", "1", *([] if options else ["-r", "2"]), *options]) in (0, 1)
        assert (line in capsys.readouterr().err) is is_said
    (tmp_path / "fast/recipe.json").write_text("{}")
    assert configuration_beside("fast") == Path("fast/merge.json") and configuration_beside("reference") is None
