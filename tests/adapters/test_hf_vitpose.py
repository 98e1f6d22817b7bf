"""ViTPose of transformers: heatmaps are read from a full grid, and blocks may choose among several MLPs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenmerge
from helpers import randomised
from promises import check_promises

transformers = pytest.importorskip("transformers", minversion="5.24")

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_ratio": 2}
SIZES |= {"image_size": [32, 24], "patch_size": [8, 8]}


def _model(**more: Any) -> Any:
    backbone = transformers.VitPoseBackboneConfig(**SIZES, **more)
    config = transformers.VitPoseConfig(backbone_config=backbone, num_labels=5)
    return randomised(transformers.VitPoseForPoseEstimation(config)).eval().double()


def _heatmaps(out: Any) -> Tensor:
    return out.heatmaps


@torch.no_grad()
@pytest.mark.parametrize("experts", [1, 3])
def test_heatmaps(experts: int) -> None:
    model = _model(num_experts=experts, part_features=8)
    given: dict[str, Any] = {"pixel_values": torch.randn(3, 3, 32, 24).double()}
    if experts > 1:
        given["dataset_index"] = torch.tensor([0, 2, 1]).view(3, 1, 1)
    own = _heatmaps(model(**given))
    with tokenmerge.patched(model, r=0):
        assert torch.equal(_heatmaps(model(**given)), own)
    with tokenmerge.patched(model, r=2) as handle:
        twin = copy.deepcopy(model)
        merged = _heatmaps(model(**given))
        assert merged.shape == own.shape and torch.equal(_heatmaps(twin(**given)), merged)
        assert handle.grid == (4, 3) and handle.prefix == 0
        assert any("VitPoseBackbone reads the tokens of several blocks" in limit for limit in handle.report().limits)
        if experts > 1:
            given["dataset_index"] = given["dataset_index"].flip(0)
            assert (_heatmaps(model(**given)) - merged).abs().max() > 1e-4
    assert check_promises(model, r=2, output=_heatmaps, **given) == [10, 8, 6, 4]


def test_the_backbone_alone() -> None:
    model = _model().backbone
    x = torch.randn(3, 3, 32, 24).double()
    check_promises(model, x, r=2, output=lambda out: out.feature_maps[-1])
