"""Configurations: every field is checked by its type, what is written is read back, and nothing else is overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tokenmerge
from helpers import tiny_vit
from tokenmerge import MergeConfig, methods
from tokenmerge.errors import ConfigError, InvalidScheduleError, TokenMergeError, UnknownNameError

PLAIN = {"version": 1, "method": {"name": "tome"}, "r": 8, "prop_attn": "auto", "track": False}
NAN = float("nan")


def _file(folder: Path, **changes: Any) -> Path:
    path = folder / "merge.json"
    path.write_text(json.dumps({**PLAIN, **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"track": "false"}, "track is 'false'; it takes True, False, 'pairs'"),
        ({"track": 1}, "track is 1; it takes True, False, 'pairs'"),
        ({"prop_attn": 1}, r"prop_attn is 1; it takes True, False, 'auto'"),
        ({"prop_attn": "on"}, "prop_attn is 'on'; it takes True, False, 'auto'"),
        ({"prop_attn": []}, r"prop_attn is \[\]"),
        ({"restore": ["dense"]}, r"restore is \['dense'\]"),
        ({"multiple_of": "8"}, "multiple_of is '8'"),
        ({"multiple_of": True}, "multiple_of is True"),
        ({"version": "1"}, "version '1'"),
        ({"version": True}, "version True"),
        ({"r": None}, "r holds None"),
        ({"r": "8"}, "r holds '8'"),
        ({"r": [8, "8"]}, "r holds '8'"),
        ({"r": {"r": "16", "inflection": -1}}, "r holds '16'"),
        ({"r": {"r": 16, "inflection": None}}, "inflection None"),
        ({"r": {"r": 16}}, "a pair is written as"),
        *(({"method": {"name": name}}, "method must be an object with a name") for name in ([], {}, None, 5)),
        ({"method": "tome"}, "method must be an object"),
        ({"method": {"name": "tome", "combine": None}}, "option combine of tome is None; it takes str"),
        ({"method": {"name": "tome", "heads": None}}, "option heads of tome is None"),
        ({"method": {"name": "tome", "seed": "abc"}}, "option seed of tome is 'abc'; it takes int, e.g. its default 0"),
        ({"method": {"name": "tofu", "early": "0.5"}}, "option early of tofu is '0.5'; it takes float"),
        ({"method": {"name": "tofu", "early": NAN}}, "option early of tofu is nan"),
        ({"method": {"name": "pitome", "margin": NAN}}, "option margin of pitome is nan"),
        ({"method": {"name": "tomecis", "damping": NAN}}, "option damping of tomecis is nan"),
        ({"method": {"name": "mctf", "tau_sim": 0}}, "option tau_sim of mctf is 0.0; it must be more than 0"),
        ({"method": {"name": "evit", "fuse": "no"}}, "option fuse of evit is 'no'; it takes bool"),
        ({"method": {"name": "gtp", "alpha": -1}}, "option alpha of gtp is -1.0; it must be 0 or more"),
        ({"method": {"name": "gtp", "neighbours": 0}}, "option neighbours of gtp is 0; it must be 1 or more"),
        ({"method": {"name": "zero_tprune", "iterations": [1]}}, r"option iterations of zero_tprune is \[1\]"),
        ({"method": {"name": "tome2d", "stride": 2.5}}, "option stride of tome2d is 2.5; it takes int"),
        ({"method": {"name": "evit", "score": None}}, "option score of evit is None; it takes str"),
        ({"method": {"name": "dynamicvit", "weights": 5}}, "option weights of dynamicvit is 5"),
        ({"method": {"name": "dynamicvit", "weights": []}}, r"option weights of dynamicvit is \[\]"),
    ],
    ids=str,
)
def test_a_field_of_another_type_is_named_with_its_file(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    path = _file(tmp_path, **changes)
    with pytest.raises(ConfigError, match=says) as caught:
        MergeConfig.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "text", ["[" * 5000, "{" * 5000, '{"version": 1, "method"', "", "\x00", "[1]", "null", "\ufeff{}"]
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str) -> None:
    path = tmp_path / "merge.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"merge\.json is no"):
        MergeConfig.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"merge\.json is no JSON"):
        MergeConfig.load(path)


def test_names_that_do_not_exist_say_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'tome'"):
        MergeConfig.load(_file(tmp_path, method={"name": "tomee"}))
    with pytest.raises(UnknownNameError, match=r"combine 'meen'"):
        MergeConfig.load(_file(tmp_path, method={"name": "tome", "combine": "meen"}))


@pytest.mark.parametrize("name", methods.list_methods())
@pytest.mark.parametrize("value", [None, NAN, "no", [], {}, -1, 1.5, True], ids=repr)
def test_an_option_takes_a_value_of_its_type_or_refuses_it_at_once(name: str, value: Any) -> None:
    import dataclasses

    kind = methods.find(name)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        try:
            method = kind(**{field.name: value})
        except TokenMergeError as error:
            assert repr(value) in str(error) or str(value) in str(error)
            continue
        held = getattr(method, field.name)
        assert (value is None) <= ("None" in str(field.type)), "None only where it is a value"
        assert (held == value and (type(held) is bool) == ("bool" in str(field.type))) or held == tuple(value)
        assert method == eval(repr(method), vars(methods.catalog))


NUMBERS: list[tuple[Any, Any]] = [
    (np.int64(8), 8),
    (np.float32(0.25), 0.25),
    ([np.int32(8), np.float64(0.5), 0.0, -0.0], [8, 0.5, 0, 0]),
    ((np.int64(16), np.float32(-1)), (16, -1.0)),
    (range(3), [0, 1, 2]),
]


@pytest.mark.parametrize(("r", "plain"), NUMBERS, ids=repr)
def test_numbers_of_numpy_are_saved_as_pythons(tmp_path: Path, r: Any, plain: Any) -> None:
    config = MergeConfig("tome", r=r)
    assert config.r == plain and repr(config.r) == repr(plain)
    config.save(tmp_path / "merge.json")
    assert MergeConfig.load(tmp_path / "merge.json") == config
    handle = tokenmerge.patch(tiny_vit(), r=0)
    handle.r = r
    assert handle.config.r == plain


def test_a_list_is_the_librarys_own() -> None:
    amounts = [8, 4]
    handle = tokenmerge.patch(tiny_vit(), r=amounts)
    amounts[0] = 999
    handle.r[1] = 999  # type: ignore[index]
    assert handle.r == [8, 4] == handle.config.r
    with pytest.raises(InvalidScheduleError, match=r"r holds 0\.0"):
        MergeConfig("tome", r=0.0)


def test_two_configurations_have_weights_of_their_own(tmp_path: Path) -> None:
    for name in ("a.v1", "a.v2"):
        handle = tokenmerge.patch(tiny_vit(), methods.DynamicViT(weights="new"), r=4)
        handle.save(tmp_path / name)
        loaded = tokenmerge.patch(tiny_vit(), MergeConfig.load(tmp_path / name))
        for key, value in handle.model.state_dict().items():
            if key.startswith("tokenmerge_modules"):
                assert torch.equal(value, loaded.model.state_dict()[key])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.v1",
        "a.v1.safetensors",
        "a.v2",
        "a.v2.safetensors",
    ]


def test_a_configuration_is_not_written_over_its_weights_or_without_them(tmp_path: Path) -> None:
    handle = tokenmerge.patch(tiny_vit(), methods.DynamicViT(weights="new"), r=4)
    with pytest.raises(ConfigError, match=r"x\.safetensors is where the weights would go"):
        handle.save(tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="cannot write the configuration to"):
        handle.save(tmp_path / "missing" / "x.json")
    assert not list(tmp_path.iterdir())
    with pytest.warns(UserWarning, match=r"dynamicvit is new: loaded, .* handle\.save"):
        handle.config.save(tmp_path / "x.json")


def test_saving_follows_no_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "merge.json").symlink_to(victim)
    MergeConfig("tome", r=8).save(tmp_path / "merge.json")
    assert victim.read_text() == "mine" and MergeConfig.load(tmp_path / "merge.json").r == 8


def test_an_action_that_fails_leaves_the_model_free_and_fails_once() -> None:
    model, done = tiny_vit(), []
    handle = tokenmerge.patch(model, r=4)

    def fail() -> None:
        raise ValueError("mine")

    handle.on_remove(fail)
    handle.on_remove(lambda: done.append(1))
    with pytest.raises(ValueError, match="mine"):
        handle.remove()
    assert done == [1]
    tokenmerge.patch(model, r=4).remove()


def test_a_configuration_is_printed_with_what_differs_from_the_defaults() -> None:
    assert str(MergeConfig()) == "tome, r = 0"
    assert str(MergeConfig("tofu", r=[4, 2], prop_attn=False, blocks="layers")) == (
        "tofu, r = [4, 2], prop_attn = False, blocks = 'layers'"
    )
    config = MergeConfig(methods.ToMe(metric="x", seed=3), r=8)
    assert str(config) == "tome(metric='x', seed=3), r = 8"
    method, _, r = str(config).partition(", r = ")
    with tokenmerge.patched(tiny_vit(), method, r=int(r)) as handle:  # `patch` takes what is printed
        assert handle.config == config
