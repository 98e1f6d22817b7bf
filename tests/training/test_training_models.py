"""Models to train: every name, every kind of input, and weights from another run."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import tokenmerge
from helpers import assert_close, randomised
from tokenmerge import assets
from tokenmerge.errors import ConfigError, DataError, UnknownNameError
from tokenmerge.measure.counting import flops
from tokenmerge.measure.simulate import simulate
from tokenmerge.training.models import TubeletEmbed, build_model, load_weights
from tokenmerge.training.recipe import Model

TINY: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 4}
SIZES = {
    "image": ((3, 16, 16), 4, 16),
    "spectrogram": ((1, 16, 32), (4, 8), 16),
    "clip": ((1, 4, 16, 16), [2, 4, 8], 16),
}
POOLS: dict[str, dict[str, Any]] = {
    "token": {"global_pool": "token"},
    "token-registers": {"global_pool": "token", "reg_tokens": 2},
    "avg": {"global_pool": "avg", "class_token": False},
    "avg-class": {"global_pool": "avg"},
}


def vit(kind: str, classes: int = 5, **options: Any) -> nn.Module:
    size, patch, _ = SIZES[kind]
    return build_model(Model(name="vit", options={**TINY, "patch_size": patch, **options}), size, classes)


def inputs(kind: str, count: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, *SIZES[kind][0], dtype=dtype)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kind", SIZES)
def test_a_transformer_is_built_merged_and_means_its_groups(kind: str, pool: str) -> None:
    model: Any = vit(kind, **POOLS[pool])
    assert model.training
    model = randomised(model).eval().double()
    x, tokens = inputs(kind, dtype=torch.float64), SIZES[kind][2]
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        plain = model(x)
        assert plain.shape == (2, 5)
        handle = tokenmerge.patch(model, r=3, track=True)
        merged = model(x)
        assert handle.tokens[-1] == prefix + tokens - 9 and handle.prefix == prefix
        groups = [group.clone() for group in handle.groups]
        tokenmerge.unpatch(model)
        assert_close(merged, simulate(model, groups, x), 1e-6)
        assert_close(model(x), plain, 0.0)
    assert (merged - plain).abs().max() > 1e-3


def test_a_clip_model_says_its_size_and_counts_its_work() -> None:
    model = vit("clip")
    full = flops(model, (1, 4, 16, 16))
    with tokenmerge.patched(model, r=3) as handle:
        assert handle.input_size == (1, 4, 16, 16) and handle.grid is None
        assert flops(model, (1, 4, 16, 16)) < full


def test_tubelets_are_cut_in_the_order_time_rows_columns() -> None:
    embed = TubeletEmbed((4, 4, 6), (2, 2, 3), in_chans=1, embed_dim=1)
    assert embed.grid_size == (2, 2, 2) and embed.num_patches == 8
    nn.init.constant_(embed.proj.weight, 1 / 12)
    nn.init.zeros_(embed.proj.bias)
    x = torch.arange(8.0).view(2, 2, 2).repeat_interleave(2, 0).repeat_interleave(2, 1).repeat_interleave(3, 2)
    assert_close(embed(x[None, None]), torch.arange(8.0).view(1, 8, 1))
    with pytest.raises(ValueError, match=r"\(4, 4, 6\).*\(4, 4, 4\)"):
        embed(torch.zeros(1, 1, 4, 4, 4))


def test_the_bundled_model_with_its_weights_and_without() -> None:
    bundled = assets.reference_model()
    trained = build_model(Model(), (1, 28, 28), 10)
    fresh = build_model(Model(pretrained=False), (1, 28, 28), 10)
    assert trained.training and all(map(torch.equal, trained.state_dict().values(), bundled.state_dict().values()))
    assert fresh.state_dict().keys() == bundled.state_dict().keys()
    assert not torch.equal(fresh.state_dict()["head.weight"], bundled.state_dict()["head.weight"])


def test_other_classes_get_a_new_classifier_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tokenmerge")
    model: Any = build_model(Model(), (1, 28, 28), 7)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 7)
    assert "10 classes, the data 7" in caplog.text


@pytest.mark.parametrize("size", [(3, 224, 224), (1, 32, 48)])
def test_a_model_of_timm_is_fitted_to_the_size(size: tuple[int, ...]) -> None:
    options = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    model: Any = build_model(Model(name="vit_tiny_patch16_224", pretrained=False, options=options), size, 4)
    assert tuple(model.patch_embed.img_size) == size[1:] and model(torch.randn(1, *size)).shape == (1, 4)
    # what other commands read
    assert model.pretrained_cfg["input_size"] == size


def test_a_model_of_timm_that_takes_any_size() -> None:
    model = build_model(Model(name="resnet10t", pretrained=False), (1, 32, 32), 4)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 4)


def test_a_saved_module(tmp_path: Path) -> None:
    torch.save(vit("image"), tmp_path / "net.pt")
    saved = build_model(Model(name=str(tmp_path / "net.pt")), (3, 16, 16), 6, trust_pickle=True)
    assert saved(inputs("image")).shape == (2, 6)
    with pytest.raises(ConfigError, match="saved model"):
        build_model(Model(name=str(tmp_path / "net.pt"), options={"depth": 2}), (3, 16, 16), 6, trust_pickle=True)
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), tmp_path / "plain.pt")
    with pytest.raises(DataError, match=r"6 classes.*\(5,\).*reset_classifier"):
        build_model(Model(name=str(tmp_path / "plain.pt")), (3, 16, 16), 6, trust_pickle=True)


@pytest.mark.parametrize(
    ("model", "size", "error", "says"),
    [
        (Model(name="vit", options={"embed_dmi": 32}), (3, 16, 16), UnknownNameError, "embed_dim"),
        (Model(name="vit", options={"img_size": 32}), (3, 16, 16), UnknownNameError, "img_size"),
        (Model(name="vit", options={"patch_size": 5}), (3, 16, 16), ConfigError, "patch_size is 5"),
        (Model(name="vit", options={"patch_size": [4, 4]}), (1, 4, 16, 16), ConfigError, "frames, rows"),
        (Model(name="vit", options={"class_token": False}), (3, 16, 16), ConfigError, "class token"),
        (
            Model(name="vit", options={**TINY, "dynamic_img_size": True, "patch_size": 2}),
            (1, 4, 16, 16),
            ConfigError,
            "dynamic_img_size",
        ),
        (Model(options={"depth": 2}), (1, 28, 28), ConfigError, "has none"),
        (Model(), (3, 224, 224), DataError, r"\(3, 224, 224\)"),
        (Model(name="vit_tinny_patch16_224"), (3, 224, 224), UnknownNameError, "vit_tiny_patch16_224"),
        (Model(name="vit_tiny_patch16_224", pretrained=False, options={"dept": 2}), (3, 224, 224), ConfigError, "dept"),
        (Model(name="nowhere.pt"), (3, 224, 224), DataError, "no file"),
    ],
)
def test_what_cannot_be_built_is_said(model: Model, size: tuple[int, ...], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        build_model(model, size, 5)


def test_weights_of_another_run_are_loaded(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source, model = randomised(vit("clip")), vit("clip")
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    sentence = load_weights(model, tmp_path)
    assert "new" not in sentence and f"{len(model.state_dict())} of {len(model.state_dict())}" in sentence
    assert all(map(torch.equal, model.state_dict().values(), source.state_dict().values()))
    other = vit("clip", classes=9)
    head = copy.deepcopy(other.state_dict()["head.weight"])
    sentence = load_weights(other, tmp_path / "model.safetensors")
    assert "new: head.bias, head.weight" in sentence
    assert torch.equal(other.state_dict()["head.weight"], head)
    assert torch.equal(other.state_dict()["pos_embed"], source.state_dict()["pos_embed"])


def test_weights_of_a_model_that_pools_differently(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(vit("image").state_dict(), tmp_path / "model.safetensors")
    sentence = load_weights(vit("image", global_pool="avg"), tmp_path)
    assert "new: fc_norm.bias, fc_norm.weight;" in sentence and "not used: norm.bias, norm.weight." in sentence


def test_weights_of_another_model_change_nothing(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = vit("image", depth=2).state_dict()
    state["patch_embed.proj.weight"] = torch.zeros(32, 3, 2, 2)
    save_file(state, tmp_path / "model.safetensors")
    model = vit("image")
    before = copy.deepcopy(model.state_dict())
    count = 1 + len([key for key in before if key.startswith("blocks.2.")])
    with pytest.raises(DataError, match=rf"{count} tensors differ \(blocks\.2.* None for"):
        load_weights(model, tmp_path)
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
    with pytest.raises(DataError, match=r"cannot read.*nowhere"):
        load_weights(model, tmp_path / "nowhere.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    with pytest.raises(DataError, match="cannot read"):
        load_weights(model, tmp_path / "broken.safetensors")


def test_a_classifier_of_timm_is_found_by_its_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    def small(classes: int) -> nn.Module:
        made: nn.Module = timm.create_model("resnet10t", num_classes=classes)
        return made

    save_file(small(3).state_dict(), tmp_path / "model.safetensors")
    assert "new: fc.bias, fc.weight" in load_weights(small(4), tmp_path)


def test_every_parameter_of_a_clip_model_learns() -> None:
    model = vit("clip", reg_tokens=1)
    nn.functional.cross_entropy(model(inputs("clip", 4)), torch.arange(4)).backward()
    assert all(p.grad is not None and math.isfinite(p.grad.norm()) for p in model.parameters())
