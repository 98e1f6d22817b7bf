"""`patch(model, "auto", calibrate=images)`: what is tried, what is chosen, and that nothing else changes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tokenmerge
from helpers import bound_attributes, tiny_vit
from tokenmerge import MergeConfig, Schedule, ToMe
from tokenmerge.assets import fashion_mnist, reference_model
from tokenmerge.data.labelled import normalise
from tokenmerge.errors import ConfigError, InvalidScheduleError
from tokenmerge.measure.outputs import shared_copy
from tokenmerge.methods import TokenView
from tokenmerge.plan import Plan
from tokenmerge.tuning.alike import as_alike
from tokenmerge.tuning.parts import whole
from tokenmerge.tuning.subject import Subject


def _kl(model: nn.Module, method: Any, r: Any, images: torch.Tensor) -> float:
    with torch.no_grad():
        expected = model(images).log_softmax(dim=1)
        with tokenmerge.patched(model, method, r=r):
            got = model(images).log_softmax(dim=1)
    return nn.functional.kl_div(got, expected, log_target=True, reduction="batchmean").item()


def test_auto_on_the_bundled_model_beats_tome_at_its_macs(tmp_path: Path) -> None:
    images = normalise(fashion_mnist("test")[0])
    model, chosen_on, others = reference_model(), images[:32], images[1000:1128]
    handle = tokenmerge.patch(model, "auto", r=15, calibrate=chosen_on)
    config, found = handle.config, handle.calibration
    assert found is not None and found.images == 32
    assert found.first.method == ToMe() and found.first.r == 15
    assert config.method == found.best.method and config.r == found.best.r
    size = (1, 28, 28)
    with tokenmerge.patched(reference_model(), r=15) as tome:
        most = tokenmerge.flops(tome.model, size)
    assert 0.98 * most <= tokenmerge.flops(model, size) <= most
    assert all(candidate.macs <= most for candidate in found.tried)
    assert str(found) in str(handle.report()) and repr(config.method) in handle.report().choice
    handle.save(tmp_path / "merge.json")
    assert MergeConfig.load(tmp_path / "merge.json") == config
    handle.remove()
    with torch.no_grad():
        expected = model(chosen_on)
        with tokenmerge.patched(model, config):
            changed = (model(chosen_on) - expected).square().sum() / expected.square().sum()
    assert found.best.damage == pytest.approx(changed.item(), rel=1e-3)
    assert _kl(model, config.method, config.r, others) < 0.5 * _kl(model, "tome", 15, others)


def test_one_threshold_of_similarity_explains_the_schedule_as_alike() -> None:
    model, images = reference_model(), normalise(fashion_mnist("test")[0][:8])
    subject = Subject(shared_copy(model), whole(images, 8), torch.device("cpu"), {})
    r = as_alike(subject, ToMe(metric="x"), 0.6)
    assert r is not None and 0.57 <= subject.share(r) <= 0.6
    seen: dict[int, np.ndarray] = {}

    class Spy(ToMe):
        def plan(self, view: TokenView, r: int) -> Plan:
            metric = getattr(view, self.metric).double().numpy()
            metric = metric.mean(axis=1) if metric.ndim == 4 else metric
            metric = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
            best = np.einsum("bad,bed->bae", metric[:, 2::2], metric[:, 1::2]).max(axis=2)
            seen[view.layer] = -np.sort(-best.ravel())
            return super().plan(view, r)

    with torch.no_grad(), tokenmerge.patched(model, Spy(metric="x"), r=r):
        model(images)
    # n pairs on the average of 8 images: the threshold lies between these two of all cosines
    above = [seen[layer][math.ceil((n - 0.5) * 8) - 1] for layer, n in enumerate(r) if n]
    below = [seen[layer][math.floor((n + 0.5) * 8)] for layer, n in enumerate(r) if n]
    assert len(above) > 6 and max(below) <= min(above) + 1e-6


def test_the_least_damage_wins_unless_a_simpler_one_is_nearly_as_good() -> None:
    model, images = tiny_vit(), torch.randn(4, 3, 32, 32)
    found = tokenmerge.patch(model, "auto", r=6, calibrate=images).calibration
    assert found is not None and len({(c.method, c.shape) for c in found.tried}) == len(found.tried) >= 10
    least = min(candidate.damage for candidate in found.tried)
    earlier = found.tried[: found.tried.index(found.best)]
    assert found.best.damage * 0.9 <= least and all(candidate.damage * 0.9 > least for candidate in earlier)


def test_without_images_auto_is_tome_and_says_so() -> None:
    handle = tokenmerge.patch(tiny_vit(), "auto", r=4)
    assert handle.config.method == ToMe() and handle.config.r == 4 and handle.calibration is None
    assert "none were given" in str(handle.report())
    assert "chosen" not in str(tokenmerge.patch(tiny_vit(), r=4).report())


def test_a_model_of_features_stays_as_it_was() -> None:
    model, images = tiny_vit(num_classes=0), torch.randn(3, 3, 32, 32)
    model.train()
    model.blocks[1].eval()
    model.norm.eval()
    before, attributes = shared_copy(model), bound_attributes(model)
    handle = tokenmerge.patch(model, "auto", r=5, calibrate=images)
    assert handle.calibration is not None and len(handle.calibration.tried) > 10
    handle.remove()
    assert bound_attributes(model) == attributes
    modes = [module.training for module in before.modules()]
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.randn(0, 3, 32, 32), r"got \(0, 3, 32, 32\)"),
        ([1, 2], r"one tensor.*got list"),
        (torch.randn(4), r"got \(4,\)"),
        (torch.randn(2, 3, 20, 32), r"does not take \[3, 20, 32\] in a batch: AssertionError"),
        (torch.randn(3, 32, 32), r"does not take \[32, 32\] in a batch"),
        (torch.stack((torch.randn(3, 32, 32), torch.full((3, 32, 32), torch.nan))), r"1 of 2 images .* first image 1"),
    ],
    ids=["none", "list", "flat", "size", "one", "nan"],
)
def test_images_that_cannot_be_used(images: Any, message: str) -> None:
    model = tiny_vit()
    attributes = bound_attributes(model)
    with pytest.raises(ConfigError, match=message):
        tokenmerge.patch(model, "auto", r=4, calibrate=images)
    assert bound_attributes(model) == attributes


@pytest.mark.parametrize(
    ("seed", "r"), [(0, 5), (2, 7), (4, Schedule.of(13, depth=4, multiple_of=8))], ids=["5", "7", "schedule"]
)
def test_the_macs_are_those_of_tome_with_the_same_options(seed: int, r: Any) -> None:
    torch.manual_seed(seed)
    model, images, size = tiny_vit(), torch.randn(2, 3, 32, 32), (3, 32, 32)
    options = {} if isinstance(r, Schedule) else {"multiple_of": 8}
    with tokenmerge.patched(model, r=r, **options):
        most = tokenmerge.flops(model, size)
    with tokenmerge.patched(model, "auto", r=r, calibrate=images, **options) as handle:
        assert handle.config.multiple_of == 8 and handle.calibration is not None
        assert handle.calibration.best.macs == tokenmerge.flops(model, size) <= most


def test_one_image_chooses_too() -> None:
    found = tokenmerge.patch(tiny_vit(), "auto", r=5, calibrate=torch.randn(1, 3, 32, 32)).calibration
    assert found is not None and found.images == 1 and len(found.tried) > 10


def test_auto_without_r_asks_for_it() -> None:
    with pytest.raises(InvalidScheduleError, match="r is missing"):
        tokenmerge.patch(tiny_vit(), "auto", calibrate=torch.randn(2, 3, 32, 32))


def test_images_go_with_auto_only() -> None:
    with pytest.raises(ConfigError, match=r"calibrate=\.\.\. goes with the method \"auto\", not with 'tome'"):
        tokenmerge.patch(tiny_vit(), "tome", r=4, calibrate=torch.randn(2, 3, 32, 32))
