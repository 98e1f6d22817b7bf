"""Calls that every checker takes: what a user's editor completes, and the types it shows. Never run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import tokenmerge
from tokenmerge import Handle, MergeConfig, Schedule, ToMe
from tokenmerge.about import MethodInfo
from tokenmerge.api import Report, Support
from tokenmerge.config import Fingerprint
from tokenmerge.data.labelled import open_data
from tokenmerge.functional import merge_wavg
from tokenmerge.kernels import reference
from tokenmerge.report.columns import Column
from tokenmerge.testing import check_kernel, check_method
from tokenmerge.tools import bench as bench_module
from tokenmerge.tools import compare as compare_module
from tokenmerge.tools.bench import Bench, BenchRow, bench
from tokenmerge.tools.compare import Comparison, ComparisonRow, compare
from tokenmerge.tools.doctor import Finding, examine
from tokenmerge.tools.evaluate import EvaluationRow, evaluate
from tokenmerge.vlm import VLMHandle, VLMReport


def patches(model: nn.Module, images: Tensor) -> None:
    assert_type(tokenmerge.patch(model, r=8), Handle)
    for method in ("tome", "tome(metric='x')", Path("merge.json"), ToMe(metric="x"), MergeConfig("tofu", r=4)):
        tokenmerge.patch(model, method)
    tokenmerge.patch(model, "auto", r=0.1, calibrate=images)
    tokenmerge.patch(model, r=[8, 8, 0.1])
    tokenmerge.patch(model, r=(16, -1.0), prop_attn="auto", track=True, restore="dense", multiple_of=8)
    tokenmerge.patch(model, r=lambda block, tokens: tokens // 8)
    tokenmerge.patch(model, r=Schedule.of(8, depth=12), prop_attn=False, restore="merged")
    tokenmerge.patch(model, r=8, blocks="encoder.layers", attn="attn", norm="norm2", mlp="mlp", prefix=1)
    tokenmerge.patch(model, r=8, prop_attn=None, track=None, restore=None, multiple_of=None, prefix=None)
    with tokenmerge.patched(model, "tofu", r=8, track=True) as handle:
        assert_type(handle, Handle)
    with tokenmerge.patch(model, r=8) as handle:
        assert_type(handle, Handle)
    tokenmerge.unpatch(model)


def vision_language(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    with tokenmerge.vlm.patch(model, keep=0.25, method="divprune", r=8, positions="keep") as handle:
        assert_type(handle, VLMHandle)
        handle.keep = 64
        assert_type(handle.visual_tokens, list[tuple[int, int]])
        assert_type(handle.report(time=True), VLMReport)
    assert_type(tokenmerge.vlm.compact(model, inputs, keep=64), dict[str, Any])
    assert_type(tokenmerge.vlm.methods.divprune(inputs["x"], 8), Tensor)


def travels(model: nn.Module) -> None:
    assert_type(tokenmerge.save_pretrained(model, "fast", base="timm/vit", measured={"speed-up": 2.0}), Path)
    assert_type(tokenmerge.from_pretrained(Path("fast")), nn.Module)
    replace(MergeConfig("tome", r=8), fingerprint=Fingerprint.of(model), measured={"speed-up": 2.0}).save("merge.json")
    examine(model, config="merge.json")
    examine(model, config=MergeConfig.load(Path("merge.json")))


def handles(model: nn.Module, y: Tensor) -> None:
    handle = tokenmerge.handle_of(model)
    assert_type(handle, Handle)
    assert_type(tokenmerge.handle_of(model, None), Handle | None)
    handle.r = 16
    handle.r = (16, -1.0)
    handle.track = True
    assert_type(handle.tokens, list[int])
    assert_type(handle.sizes, Tensor)
    assert_type(handle.groups, list[Tensor])
    assert_type(handle.dense(y), Tensor)
    assert_type(handle.report(), Report)
    assert_type(handle.report().kernels, dict[str, str])
    assert_type(handle.config, MergeConfig)
    assert_type(MergeConfig.load("merge.json"), MergeConfig)
    with handle.disabled():
        handle.config.save("merge.json")
    handle.remove()


def questions(model: nn.Module) -> None:
    assert_type(tokenmerge.supports(model), Support)
    assert_type(tokenmerge.supports(model).reason, str)
    assert_type(tokenmerge.describe("tofu"), MethodInfo)
    assert_type(tokenmerge.describe(ToMe()).needs, tuple[str, ...])
    assert_type(tokenmerge.flops(model, (3, 224, 224)), int)
    assert_type(tokenmerge.macs(model, (3, 224, 224)), int)
    assert_type(tokenmerge.list_methods(), list[str])


def modules(model: nn.Module) -> None:
    assert_type(tokenmerge.tools.bench.bench(model, rs=[8]), Bench)
    assert_type(bench_module.bench(model), Bench)
    assert_type(tokenmerge.testing.check_adapter(model, torch.zeros(2, 3, 224, 224)), Report | None)
    assert_type(tokenmerge.testing.tiny_model("timm_vit"), tuple[nn.Module, Tensor])
    check_method(tokenmerge.methods.ToFu)
    check_kernel("merge", reference.merge, device="cuda")
    assert_type(compare_module.compare(model, open_data("images", model, batch_size=8), methods=["tome"]), Comparison)
    tokenmerge.patch(model, tokenmerge.methods.ToFu(early=0.5), r=8)
    try:
        tokenmerge.patch(model, r=8)
    except tokenmerge.errors.UnsupportedModelError as error:
        assert_type(error, tokenmerge.errors.UnsupportedModelError)
    with tokenmerge.kernels.force("reference"):
        tokenmerge.unpatch(model)


def results(model: nn.Module) -> None:
    times = bench(model, rs=[0, 8, 0.1, (16, -1.0)], batches=(1, 8), restore="dense", compare=True)
    row = times.rows[0]
    assert_type(row, BenchRow)
    assert_type(row.speed_up, float)
    assert_type(row.batch, int)
    assert_type(row.noise, float | None)
    assert_type(row.reference_ms, float | None)
    assert_type(BenchRow.speed_up, Column[float])
    print(times, row["speed-up"], row.get("training peak MB"), {**row})
    times.to_pandas()
    data = open_data("images", model, batch_size=8)
    accuracy = evaluate(model, data, rs=[8], method="tofu", bound=True)
    assert_type(accuracy.rows, list[EvaluationRow])
    assert_type(accuracy.rows[0].top1, float | None)
    assert_type(accuracy.rows[0].tokens, int)
    found = compare(model, data, methods=["all", ToMe(metric="x")], macs=[0.5])
    assert_type(found.rows[0], ComparisonRow)
    assert_type(found.rows[0].speed_up, float | None)
    assert_type(found.rows[0].note, str)
    assert_type(examine(model).findings, list[Finding])
    assert_type(examine(model).findings[0].good, bool | None)


def functions(metric: Tensor, x: Tensor) -> None:
    merge, unmerge = tokenmerge.functional.bipartite_soft_matching(metric, 8)
    merged, size = merge_wavg(merge, x)
    assert_type(merged, Tensor)
    assert_type(size, Tensor)
    unmerge(merged)
    torch.testing.assert_close(merged, x)
