"""Configurations that travel: which model they are for, what was measured with them, and files that were damaged."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tokenmerge
from helpers import bound_attributes, tiny_vit
from tokenmerge import MergeConfig, methods
from tokenmerge.config import Fingerprint
from tokenmerge.errors import ConfigError, TokenMergeError, UnknownNameError

NAMES = {"blocks": "blocks", "attn": "attn", "norm": "norm2", "mlp": "mlp", "prefix": 1}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return tiny_vit()


def test_a_fingerprint_is_of_the_model_whether_it_is_patched_or_not(model: nn.Module) -> None:
    found = Fingerprint.of(model)
    assert found.architecture == "timm.models.vision_transformer.VisionTransformer"
    assert (found.depth, found.tokens, found.protected, found.width) == (4, 65, 1, 32)
    assert found.input_size == (3, 32, 32) and found.weights is not None and found.weights.startswith("float32:")
    with tokenmerge.patch(model, methods.DynamicViT(weights="new"), r=4) as handle:
        assert Fingerprint.of(model) == found == handle.described().fingerprint
    assert Fingerprint.of(copy.deepcopy(model)) == found
    for name, parameter in model.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.flatten()[0] += 1
        assert Fingerprint.of(model).weights != found.weights, name
        with torch.no_grad():
            parameter.copy_(before)
    assert Fingerprint.of(model.to("meta")).weights is None


def test_a_timm_model_is_known_by_its_name() -> None:
    import timm

    assert Fingerprint.of(timm.create_model("vit_tiny_patch16_224")).architecture == "vit_tiny_patch16_224"


def test_what_is_known_of_a_configuration_is_no_part_of_its_value(model: nn.Module) -> None:
    bare = MergeConfig("tofu", r=4)
    config = replace(bare, fingerprint=Fingerprint.of(model), measured={"speed-up": 2.0})
    assert config == bare and hash(config) == hash(bare) and "measured" not in repr(config)
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), replace(config)):
        assert (twin.fingerprint, twin.measured) == (config.fingerprint, config.measured)
    assert config.changed(r=4).measured == {"speed-up": 2.0} and config.changed(r=5).measured is None
    with tokenmerge.patch(model, config, r=5) as handle:
        assert handle.config.measured is None and handle.config.fingerprint == config.fingerprint
    with tokenmerge.patch(model, config) as handle:
        assert handle.config.measured == {"speed-up": 2.0}
        handle.r = 5
        assert handle.config.measured is None


def test_a_file_holds_the_model_and_what_was_measured(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "merge.json"
    figures = {"speed-up": 2.01, "batch size": 32, "front": [[1.0, 0.5]], "environment": {"device": "a chip"}}
    base = replace(Fingerprint.of(model), base="timm/somewhere")
    replace(MergeConfig("tome", r=[8, 4]), fingerprint=base, measured=figures).save(path)
    content = json.loads(path.read_text())
    assert content["version"] == 2 and content["tokenmerge"] == tokenmerge.__version__
    assert content["fingerprint"]["tokens"] == 65 and content["measured"] == figures
    loaded = MergeConfig.load(path)
    assert loaded == MergeConfig("tome", r=[8, 4]) and loaded.measured == figures
    assert loaded.fingerprint == base and loaded.fingerprint.base == "timm/somewhere"
    with tokenmerge.patch(model, path) as handle:
        assert handle.remarks == [] == handle.report().limits
        handle.save(path)
        assert MergeConfig.load(path).measured == figures
        assert MergeConfig.load(path).fingerprint.base == "timm/somewhere"  # type: ignore[union-attr]
        with torch.no_grad():
            model.head.weight.add_(1)  # type: ignore[operator, union-attr]
        handle.save(path)
    again = MergeConfig.load(path)
    assert again.measured is None and again.fingerprint == Fingerprint.of(model) != base


def test_a_file_without_a_fingerprint_is_as_it_was(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "merge.json"
    MergeConfig("tome", r=4).save(path)
    assert {"fingerprint", "measured"}.isdisjoint(json.loads(path.read_text()))
    path.write_text(json.dumps({"version": 1, "method": {"name": "tome"}, "r": 4, "track": True}))
    loaded = MergeConfig.load(path)
    assert loaded == MergeConfig("tome", r=4, track=True) and loaded.fingerprint is None
    with tokenmerge.patch(model, path) as handle:
        assert handle.report().limits == []


def test_another_depth_or_number_of_tokens_is_an_error_that_names_both(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "merge.json"
    with tokenmerge.patch(model, r=4) as handle:
        handle.save(path)
    deeper, larger = tiny_vit(depth=6), tiny_vit(img_size=48)
    with pytest.raises(ConfigError, match=r"for a model with 4 blocks \(timm.*\), and this one has 6 .* tune this one"):
        tokenmerge.patch(deeper, path)
    says = r"for 65 tokens \(.*, input 3 x 32 x 32\), and this model has 145 \(.*3 x 48 x 48\)\. Build .* input size"
    with pytest.raises(ConfigError, match=says):
        tokenmerge.patch(larger, MergeConfig.load(path))
    assert not bound_attributes(deeper) and not bound_attributes(larger)
    # the way out that both name
    for other in (deeper, larger):
        tokenmerge.patch(other, replace(MergeConfig.load(path), fingerprint=None)).remove()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: tiny_vit(embed_dim=64), r"made for another model \(.* 32 wide, 1 protected; this is .* 64 wide"),
        (tiny_vit, "made with other weights than these"),
        (lambda: tiny_vit().bfloat16(), "with weights in float32, these are bfloat16: not compared"),
    ],
    ids=["architecture", "weights", "dtype"],
)
def test_another_model_of_that_depth_is_told_in_the_report(
    model: nn.Module, make: Any, says: str, tmp_path: Path
) -> None:
    with tokenmerge.patch(model, r=4) as handle:
        handle.save(tmp_path / "merge.json")
    torch.manual_seed(1)
    with tokenmerge.patch(make(), tmp_path / "merge.json") as handle:
        (remark,) = handle.remarks
        assert remark in str(handle.report())
        with pytest.raises(AssertionError, match=says):
            raise AssertionError(remark)


def test_a_fingerprint_without_weights_compares_none(model: nn.Module) -> None:
    config = replace(MergeConfig("tome", r=4), fingerprint=Fingerprint.of(model, weights=False))
    with tokenmerge.patch(tiny_vit(), config) as handle:
        assert handle.remarks == []


def test_a_model_patched_by_names_has_a_fingerprint(model: nn.Module, tmp_path: Path) -> None:
    with tokenmerge.patch(model, r=4, **NAMES) as handle:  # type: ignore[arg-type]
        handle.save(tmp_path / "merge.json")
    with tokenmerge.patch(model, tmp_path / "merge.json") as handle:
        assert handle.remarks == [] and handle.report().adapter == "generic"


TEXT = """{
  "version": 2,
  "method": {
    "name": "tome",
    "heads": "mean"
  },
  "r": 8,
  "fingerprint": {
    "architecture": "a",
    "depth": 4,
    "weights": "float32:0"
  },
  "measured": {
    "speed-up": 2.0,
    "environment": {"device": "x"}
  }
}
"""


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"heads": "mean"', '"haeds": "mean"', r", line 5: no option of tome 'haeds'\. Did you mean 'heads'"),
        ('"heads": "mean"', '"heads": 8', r", line 5: option heads of tome is 8; it takes str"),
        ('"r": 8', '"r": "8"', r", line 7: r holds '8'"),
        ('"r": 8', '"r": 8,\n  "r": 9', r", line 8: r is there twice in one object"),
        ('"r": 8', '"r": 8, "restor": null', r", line 7: no configuration key 'restor'. Did you mean 'restore'"),
        ('"depth": 4', '"depth": "4"', r", line 10: depth of the fingerprint is '4'; it takes int"),
        ('"depth": 4', '"dept": 4', r", line 10: no key of the fingerprint 'dept'\. Did you mean 'depth'"),
        ('    "depth": 4,\n', "", r", line 8: fingerprint must be an object with .*; it holds architecture, weights\."),
        (
            '"fingerprint": {',
            '"fingerprint": 5, "track": {',
            r", line 8: fingerprint must be an object with .* holds 5",
        ),
        ('"weights"', '"wieghts"', r", line 11: no key of the fingerprint 'wieghts'\. Did you mean 'weights'"),
        ('"speed-up": 2.0', '"speed-up": NaN', r", line 14: measured\['speed-up'\] is nan; .*NaN and infinity are"),
        ('"speed-up": 2.0', '"speed-up": -Infinity', r", line 14: measured\['speed-up'\] is -inf"),
        ('{"device": "x"}', '{"device": [1, NaN]}', r", line 15: measured\['environment'\]\['device'\]\[1\] is nan"),
        ('"version": 2', '"version": 3', r" has version 3; .* reads versions 1 to 2\. .*: upgrade tokenmerge"),
        ('"version": 2', '"version": 0', r" has version 0; .* reads versions 1 to 2\.$"),
        ('"r": 8,', '"r": 8', r" is no JSON at line 8, after the key 'r': Expecting ',' delimiter\."),
        ('"name": "tome",', '"name": tome,', r" is no JSON at line 4, after the key 'name': Expecting value\."),
    ],
    ids=str,
)
def test_a_file_edited_by_hand_names_the_line_and_the_key(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "merge.json"
    path.write_text(TEXT)
    assert MergeConfig.load(path).r == 8
    assert old in TEXT
    path.write_text(TEXT.replace(old, new))
    with pytest.raises(TokenMergeError, match=f"merge.json{says}") as caught:
        tokenmerge.patch(tiny_vit(), path)
    assert isinstance(caught.value, UnknownNameError if "Did you mean" in says else ConfigError)


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path, whole = tmp_path / "merge.json", TEXT.rstrip()
    for length in range(len(whole)):
        path.write_text(whole[:length])
        with pytest.raises(ConfigError, match=r"merge\.json is no JSON at line \d+"):
            MergeConfig.load(path)
    path.write_text(whole[: whole.index('"mean"') + 3])
    with pytest.raises(ConfigError, match=r"line 5, after the key 'heads': .*; the file ends there, it was cut off"):
        MergeConfig.load(path)


@pytest.mark.parametrize(
    ("known", "says"),
    [
        ({"measured": {"speed-up": float("nan")}}, r"measured\['speed-up'\] is nan"),
        ({"measured": {"a": torch.ones(1)}}, r"measured\['a'\] is tensor"),
        ({"measured": {1: 2}}, "measured has the key 1; keys are texts"),
        ({"measured": 2.0}, "measured is 2.0; it takes"),
        ({"fingerprint": {"depth": 4}}, r"fingerprint is \{'depth': 4\}; it takes a Fingerprint"),
    ],
    ids=str,
)
def test_figures_that_are_none_are_refused_before_a_file_is_written(known: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        MergeConfig("tome", r=4, **known)
