"""Scripts written for the ToMe package, run after changing only their import."""

from __future__ import annotations

import copy

import pytest
import torch

import tokenmerge
from helpers import assert_close, bound_attributes, tiny_vit
from tokenmerge.compat import tome
from tokenmerge.errors import UnsupportedError, UnsupportedModelError
from tokenmerge.testing.models.plain import MAEStandIn, SwagStandIn


def test_the_readme_script() -> None:
    model, x = tiny_vit(), torch.randn(2, 3, 32, 32)
    unmerged = model(x)
    tome.patch.timm(model)
    assert torch.equal(model(x), unmerged) and model.r == 0
    model.r = 8
    merged = model(x)
    assert not torch.equal(merged, unmerged) and model._tome_info["size"].shape == (2, 33, 1)
    assert model._tome_info["source"] is None
    assert model.forward_features(x).shape == (2, 33, 32), "merged tokens are handed out, as the ToMe package does"
    for r in ((8, -1.0), [8, 4, 2, 1], 3):
        model.r = r
        model(x)
        assert model._tome_info["r"] == tome.utils.parse_r(4, r)
    with tokenmerge.patched(tiny_vit(), r=8) as handle:
        handle.model.load_state_dict(model.state_dict())
        assert_close(handle.model(x), merged, 1e-6)


def test_of_two_ways_to_set_r_the_last_counts() -> None:
    model, x = tiny_vit(), torch.randn(2, 3, 32, 32)
    handle = tome.patch.timm(model)
    for who, r in ((handle, 4), (model, 8), (handle, 2), (model, 2), (handle, 0), (model, [3, 3])):
        who.r = r
        model(x)
        left = 59 if isinstance(r, list) else 65 - 4 * r
        assert handle.r == r and model.r == r and handle.sizes.shape[1] == left
        assert model._tome_info["r"] == tome.utils.parse_r(4, r)
    handle.r, model.r = 4, 8
    model(x)
    assert handle.sizes.shape[1] == 33
    model.r, handle.r = 8, 4
    assert model.r == 4
    model(x)
    assert handle.sizes.shape[1] == 49
    handle.track = True
    model(x)
    assert model._tome_info["trace_source"] and model._tome_info["source"].shape == (2, 49, 65)
    model._tome_info["trace_source"] = False
    model(x)
    assert not handle.track and model._tome_info["source"] is None
    other = copy.deepcopy(model)
    tokenmerge.handle_of(other).r = 1
    assert other.r == 1 and model.r == 4


def test_sources_are_traced_and_drawn() -> None:
    from PIL import Image

    model, x = tiny_vit(), torch.randn(1, 3, 32, 32)
    tome.patch.timm(model, trace_source=True)
    model.r = 12
    model(x)
    source, size = model._tome_info["source"], model._tome_info["size"]
    assert source.shape == (1, 17, 65) and torch.equal(source.sum(1), torch.ones(1, 65))
    assert torch.equal(source.sum(2, keepdim=True), size)
    image = Image.effect_noise((32, 32), 80).convert("RGB")
    drawn = tome.make_visualization(image, source, patch_size=4, class_token=True)
    assert drawn.size == image.size and drawn.mode == "RGB" and drawn.tobytes() != image.tobytes()
    model._tome_info["trace_source"] = False
    model(x)
    assert model._tome_info["source"] is None


def test_each_patch_takes_its_family() -> None:
    x = torch.randn(1, 3, 32, 32)
    for patch, model in ((tome.patch.mae, MAEStandIn()), (tome.patch.swag, SwagStandIn())):
        patch(model, prop_attn=False)
        model.r = 2
        model(x)
        assert model._tome_info["size"].shape == (1, 9, 1)
    model = SwagStandIn()
    with pytest.raises(UnsupportedModelError, match=r"this patch is for timm_vit models, the model is one of 'swag'"):
        tome.patch.timm(model)
    assert bound_attributes(model) == []


def test_it_can_be_taken_back_and_copied() -> None:
    model, x = tiny_vit(), torch.randn(1, 3, 32, 32)
    unmerged = model(x)
    handle = tome.patch.timm(model)
    model.r = 8
    merged = model(x)
    twin = copy.deepcopy(model)
    twin.r = 0
    assert torch.equal(twin(x), unmerged) and torch.equal(model(x), merged)
    handle.remove()
    assert torch.equal(model(x), unmerged) and bound_attributes(model) == []
    assert torch.equal(twin(x), unmerged)
    tokenmerge.unpatch(twin)
    assert bound_attributes(twin) == []


def test_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    speed = tome.utils.benchmark(tiny_vit(), device="cpu", input_size=(3, 32, 32), batch_size=2, runs=4, verbose=True)
    assert speed > 0 and f"Throughput: {speed:.2f} im/s" in capsys.readouterr().out
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match=r"no device 0.*there are: cpu"):
            tome.utils.benchmark(tiny_vit(), batch_size=2, input_size=(3, 32, 32))


def test_its_modules_import_by_their_names() -> None:
    from tokenmerge.compat.tome.merge import bipartite_soft_matching, merge_source, merge_wavg
    from tokenmerge.compat.tome.patch import timm as patch_timm
    from tokenmerge.compat.tome.utils import benchmark, parse_r
    from tokenmerge.compat.tome.vis import make_visualization

    assert tome.merge.bipartite_soft_matching is bipartite_soft_matching and tome.merge.merge_wavg is merge_wavg
    assert tome.merge.merge_source is merge_source and tome.patch.timm is patch_timm
    assert (tome.utils.benchmark, tome.utils.parse_r) == (benchmark, parse_r)
    assert tome.make_visualization is make_visualization
