"""Outputs of the official ToMe package (commit af95e4b, timm 1.0.31, torch 2.15), matched to 1e-5 relative."""

from __future__ import annotations

import ast
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tokenmerge
from helpers import assert_close
from tokenmerge import functional
from tokenmerge.compat import tome
from tokenmerge.schedule import parse_r
from tokenmerge.testing.models.plain import MAEStandIn, SwagStandIn

GOLDEN = Path(__file__).parent / "golden"
MATCHING = np.load(GOLDEN / "matching.npz")
MODELS = np.load(GOLDEN / "models.npz")
CASES = json.loads(str(MATCHING["meta"]))
SCHEDULES = json.loads((GOLDEN / "schedules.json").read_text())
SETTINGS = [tuple(key.split("|")[:3]) for key in MODELS if key.endswith("|logits")]
CONFIG = json.loads(str(MODELS["config"]))


def _array(name: str) -> torch.Tensor:
    return torch.from_numpy(MATCHING[name])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"case{case['case']}")
def test_matching(case: dict[str, int]) -> None:
    prefix = f"{case['case']}_"
    metric, x = _array(prefix + "metric"), _array(prefix + "x")
    if "kth" in case:
        merge, unmerge = functional.kth_bipartite_soft_matching(metric, case["kth"])
    else:
        flags = {name: case[name] for name in ("class_token", "distill_token")}
        merge, unmerge = functional.bipartite_soft_matching(metric, case["r"], **flags)
    plain, plain_size = functional.merge_wavg(merge, x)
    results = {
        **{f"merge_{mode}": merge(x, mode=mode) for mode in ("sum", "mean", "amax")},
        "wavg1_x": plain,
        "wavg1_size": plain_size,
        "source": functional.merge_source(merge, x),
        "unmerge": unmerge(merge(x)),
    }
    if prefix + "size" in MATCHING:
        results["wavg_x"], results["wavg_size"] = functional.merge_wavg(merge, x, _array(prefix + "size"))
    stored = {name.removeprefix(prefix) for name in MATCHING if name.startswith(prefix)} - {"metric", "x", "size"}
    assert stored <= results.keys()
    for name in stored:
        assert_close(results[name], _array(prefix + name), 1e-5)


@pytest.mark.parametrize("row", SCHEDULES, ids=lambda row: f"{row['num_layers']}-{row['r']}")
def test_schedule(row: dict[str, object]) -> None:
    r = tuple(row["r"]) if row["kind"] == "tuple" else row["r"]
    assert parse_r(row["num_layers"], r) == row["schedule"]


def _model(name: str) -> nn.Module:
    if name == "swag_vit":
        model: nn.Module = SwagStandIn(image_size=64, patch_size=8, num_layers=6, num_heads=4, hidden_dim=48)
    elif name == "mae_global_pool":
        model = MAEStandIn(img_size=64, patch_size=8, embed_dim=48, depth=6, num_heads=4)
    else:
        from timm.models.deit import VisionTransformerDistilled
        from timm.models.vision_transformer import VisionTransformer

        cls = VisionTransformerDistilled if name == "deit_distilled" else VisionTransformer
        model = cls(**CONFIG)
    start = f"{name}|weight|"
    weights = {key.removeprefix(start): torch.from_numpy(MODELS[key]) for key in MODELS if key.startswith(start)}
    model.load_state_dict(weights)
    return model.eval()


def test_every_stored_setting_is_tested() -> None:
    assert {name for name, _, _ in SETTINGS} == {row["model"] for row in json.loads(str(MODELS["meta"]))}
    assert len(SETTINGS) >= sum(len(row["rs"]) for row in json.loads(str(MODELS["meta"])))


@pytest.mark.parametrize(("name", "prop", "r"), SETTINGS)
def test_models(name: str, prop: str, r: str) -> None:
    model = _model(name)
    x = torch.from_numpy(MODELS[f"{name}|input"])
    expected = partial(_expected, f"{name}|{prop}|{r}|")
    with torch.no_grad():
        assert_close(model(x), torch.from_numpy(MODELS[f"{name}|unpatched"]), 1e-5)
    patch = {"swag_vit": tome.patch.swag, "mae_global_pool": tome.patch.mae}.get(name, tome.patch.timm)
    patch(model, trace_source=True, prop_attn=prop == "prop=1")
    model.r = ast.literal_eval(r.removeprefix("r="))
    with torch.no_grad():
        assert_close(model(x), expected("logits"), 1e-5)
    if model.r == 0:
        assert model._tome_info["size"] is None
        return
    assert_close(model._tome_info["size"], expected("size"), 1e-5)
    assert_close(model._tome_info["source"], expected("source"), 0.0)
    handle = tokenmerge.handle_of(model)
    assert_close(handle.sizes, expected("size")[..., 0], 1e-5)


def _expected(start: str, name: str) -> torch.Tensor:
    return torch.from_numpy(MODELS[start + name])
