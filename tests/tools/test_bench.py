"""The benchmark: its columns, figures that follow from the seconds, sentences, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tokenmerge
from helpers import assert_close, bound_attributes, tiny_vit
from tokenmerge import kernels
from tokenmerge.cli import main
from tokenmerge.errors import (
    AlreadyPatchedError,
    DataError,
    InvalidScheduleError,
    UnknownNameError,
    UnsupportedError,
    UnsupportedModelError,
)
from tokenmerge.measure import timing
from tokenmerge.measure.timing import Timing
from tokenmerge.tools import bench as module
from tokenmerge.tools.bench import _figures, _verdicts, bench
from tokenmerge.tools.models import load_model

COLUMNS = [
    "model", "r", "batch", "ms", "spread %", "images/s", "unmerged ms", "speed-up", "noise %", "bound ms", "over bound",
    "GMACs",
    "matching GMACs", "tokens", "peak MB", "unmerged peak MB", "attention", "unmerged attention",
]  # fmt: skip


def _model() -> nn.Module:
    # large enough for its GMACs to have three digits
    return tiny_vit(img_size=64, embed_dim=96, depth=2)


def test_rows_of_a_saved_model(tmp_path: Path) -> None:
    torch.save(_model(), tmp_path / "tiny.pt")
    model = load_model(str(tmp_path / "tiny.pt"), trust_pickle=True)
    result = bench(model, rs=(0, 32, (16, -1.0)), batches=(1, 2), rounds=1, label="tiny")
    assert [list(row) for row in result.rows] == [COLUMNS] * 6
    assert [(row["batch"], row["r"]) for row in result.rows] == [
        (b, r) for b in (1, 2) for r in ("0", "32", "(16, -1.0)")
    ]
    for row in result.rows:
        assert row["model"] == "tiny"
        assert row["tokens"] == {"0": 257, "32": 193, "(16, -1.0)": 225}[row["r"]]
        assert all(row[name] > 0 for name in ("ms", "images/s", "speed-up", "over bound", "peak MB"))
        assert "attention" in row["attention"] and row["attention"] == row["unmerged attention"]
        assert row["unmerged peak MB"] == result.rows[0 if row["batch"] == 1 else 3]["unmerged peak MB"]
    unmerged, merged, inflected = result.rows[:3]
    assert unmerged["GMACs"] == round(tokenmerge.flops(model, (3, 64, 64)) / 1e9, 3) > merged["GMACs"] > 0.05
    assert unmerged["matching GMACs"] == 0 < inflected["matching GMACs"] < merged["matching GMACs"]
    with tokenmerge.patched(model, r=32):
        assert merged["GMACs"] == round(tokenmerge.flops(model, (3, 64, 64)) / 1e9, 3)
    assert result.rows[3]["GMACs"] == unmerged["GMACs"], "MACs are those of one image"
    assert {name: result.environment[name] for name in ("dtype", "compiled", "rounds", "torch")} == {
        "dtype": "float32",
        "compiled": "False",
        "rounds": "1",
        "torch": torch.__version__,
    }
    assert len(result.verdicts) == 1 and result.verdicts[0].startswith("Too few rounds")


def test_an_interruption_keeps_the_finished_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(_model(), tmp_path / "tiny.pt")
    calls: list[int] = []

    def interleave(*given: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return timing.interleave(*given, **options)

    monkeypatch.setattr(module, "interleave", interleave)
    asked = ["bench", f"{tmp_path}/tiny.pt", "--trust-pickle", "-r", "0", "8", "16", "-b", "1", "--rounds", "1"]
    assert main([*asked, "--json", "--out", f"{tmp_path}/rows.csv"]) == 130
    seen = capsys.readouterr()
    assert [row["r"] for row in json.loads(seen.out)["rows"]] == ["0", "8"]
    assert "interrupted, 2 rows were finished" in seen.err
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 3
    calls[:] = [1, 1]
    assert main([*asked, "--json"]) == 130
    assert capsys.readouterr().out == "", "no row was finished"


def test_figures_follow_from_the_seconds() -> None:
    timings = {
        "merged": Timing((0.02, 0.02, 0.02, 0.03, 0.01)),
        "unmerged": Timing((0.04, 0.04, 0.04, 0.06, 0.02)),
        "bound": Timing((0.016, 0.016, 0.016, 0.024, 0.008)),
    }
    assert _figures(timings, 8) == {
        "ms": 20.0,
        "spread %": 25.0,
        "images/s": 400.0,
        "unmerged ms": 40.0,
        "speed-up": 2.0,
        "noise %": 0.0,
        "bound ms": 16.0,
        "over bound": 1.25,
    }


def test_three_variants_run_interleaved_on_the_same_input(monkeypatch: pytest.MonkeyPatch) -> None:
    model, outputs = tiny_vit(), []

    def fake(calls: dict[str, Any], device: torch.device, **options: Any) -> dict[str, Timing]:
        assert list(calls) == ["unmerged", "merged", "bound"] and options["rounds"] == 7
        with torch.no_grad():
            outputs.append({name: call() for name, call in calls.items()})
        return {name: Timing((1.0,)) for name in calls}

    monkeypatch.setattr(module, "interleave", fake)
    bench(model, rs=(0, 6), batches=(3,), rounds=7)
    unmerged, merged = outputs
    assert unmerged["unmerged"].shape == (3, 10)
    assert torch.equal(unmerged["merged"], unmerged["unmerged"]) and torch.equal(
        merged["unmerged"], unmerged["unmerged"]
    )
    assert not torch.equal(merged["merged"], merged["unmerged"])
    assert not torch.equal(merged["merged"], merged["bound"])


def test_compare_runs_the_merged_model_on_the_reference_kernels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[list[str]] = []

    def fake(calls: dict[str, Any], device: torch.device, **options: Any) -> dict[str, Timing]:
        assert list(calls) == ["unmerged", "merged", "bound", "reference"]
        with torch.no_grad():
            for name in ("merged", "reference"):
                used.append([])
                outputs[name] = calls[name]()
        used.append([])  # what else runs in the row
        return {name: Timing((2.0 if name == "reference" else 1.0,)) for name in calls}

    outputs: dict[str, torch.Tensor] = {}
    select = kernels.select
    monkeypatch.setattr(kernels, "select", lambda *args: used[-1].append(select(*args).name) or select(*args))
    monkeypatch.setattr(module, "interleave", fake)
    (row,) = bench(tiny_vit(), rs=(6,), batches=(2,), compare=True).rows
    after_bound = COLUMNS.index("over bound") + 1
    assert list(row) == [*COLUMNS[:after_bound], "reference ms", "reference / merged", *COLUMNS[after_bound:]]
    assert (row["reference ms"], row["reference / merged"]) == (2000.0, 2.0)
    automatic, forced = (set(names) for names in used[:2])
    assert forced == {"reference"} and automatic
    assert_close(outputs["merged"], outputs["reference"], 1e-4)


def test_training_adds_the_peaks_of_a_step() -> None:
    model = tiny_vit().requires_grad_(False)
    zero, merged = bench(model, rs=(0, 16), batches=(2,), rounds=1, training=True).rows
    names = ["training peak MB", "unmerged training peak MB"]
    assert list(zero) == COLUMNS + names
    # r = 16 leaves 49, 33, 17 and 9 of 65 tokens
    assert merged[names[0]] < 0.8 * merged[names[1]] == 0.8 * zero[names[1]]
    assert zero[names[0]] == zero[names[1]] > zero["unmerged peak MB"]
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


NEVER = "it pays at no batch size up to the largest measured."
SLOWER = "r = 8: SLOWER than the unmerged model at"


@pytest.mark.parametrize(
    ("speeds", "sentence"),
    [
        ({1: 0.8, 8: 0.9}, f"{SLOWER} batch 1 (0.80x, noise 3.0 %), batch 8 (0.90x, noise 3.0 %); {NEVER}"),
        ({1: 0.9, 8: 1.1, 32: 1.5}, f"{SLOWER} batch 1 (0.90x, noise 3.0 %); it pays from batch 8 on."),
        ({32: 1.5, 1: 1.2, 8: 0.7}, f"{SLOWER} batch 8 (0.70x, noise 3.0 %); it pays from batch 32 on."),
        ({1: 1.2, 8: 0.7}, f"{SLOWER} batch 8 (0.70x, noise 3.0 %); {NEVER}"),
        (
            {8: 1.5, 1: 1.1},
            "r = 8: faster at batch 1 (1.10x, noise 3.0 %), batch 8 (1.50x, noise 3.0 %): at every batch size "
            "measured.",
        ),
        (
            {1: 1.02, 8: 1.5},
            "r = 8: no difference measured at batch 1 (1.02x, noise 3.0 %); it pays from batch 8 on.",
        ),
        (
            {1: 0.9, 2: 0.98, 8: 1.5},
            f"{SLOWER} batch 1 (0.90x, noise 3.0 %); no difference measured at batch 2 (0.98x, noise 3.0 %); it pays "
            "from batch 8 on.",
        ),
        ({1: 1.01}, "r = 8: no difference measured at batch 1 (1.01x, noise 3.0 %)."),
    ],
    ids=["slower", "pays-from-8", "dip-unsorted", "slower-at-largest", "faster", "equal-at-1", "slower-equal", "equal"],
)
def test_verdict(speeds: dict[int, float], sentence: str) -> None:
    rows = [{"r": "8", "batch": batch, "speed-up": speed, "noise %": 3.0} for batch, speed in speeds.items()]
    assert _verdicts(rows) == [sentence]


def test_the_row_that_merges_nothing_tells_the_noise_of_its_batch() -> None:
    control = {"r": "0", "batch": 1, "speed-up": 0.73, "noise %": 2.0}
    rows = [{"r": "8", "batch": b, "speed-up": 1.2, "noise %": 2.0} for b in (1, 4)]
    assert _verdicts([control, *rows]) == [
        "r = 8: no difference measured at batch 1 (1.20x, noise 27.0 %); it pays from batch 4 on.",
        "Noisy (27 %; the r = 0 row, which merges nothing, says 0.73x instead of 1): close other programs, or take "
        "more rounds (--rounds).",
    ]


def test_a_few_rounds_give_no_verdict() -> None:
    rows = [{"r": r, "batch": 1, "speed-up": 1.007, "noise %": None} for r in ("0", "16")]
    assert _verdicts(rows) == ["Too few rounds to tell faster from slower: at least 5 are needed (--rounds)."]
    assert Timing((1.0, 2.0, 1.0, 2.0)).noise(Timing((1.0,) * 4)) is None
    assert Timing((1.0, 2.0, 1.0, 2.0, 1.0)).noise(Timing((1.0,) * 5)) == 0.5
    # what slows down both in the same round is no noise
    assert Timing((1.0, 2.0, 1.0, 2.0, 1.0)).noise(Timing((2.0, 4.0, 2.0, 4.0, 2.0))) == 0.0


def test_one_verdict_for_every_r() -> None:
    speeds = (("0", 1.0), ("16", 1.5), ("8", 0.5))
    rows = [{"r": r, "batch": b, "speed-up": s, "noise %": 1.0} for b in (1, 2) for r, s in speeds]
    sixteen, eight = _verdicts(rows)
    assert sixteen.startswith("r = 16: faster") and eight.startswith("r = 8: SLOWER")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_model_given_is_not_changed(training: bool) -> None:
    model, x = tiny_vit(), torch.randn(2, 3, 32, 32)
    expected, before = model(x), (bound_attributes(model), set(dir(model)))
    result = bench(model.train(training), rs=(4,), batches=(1,), rounds=1, dtype="bfloat16")
    assert result.environment["dtype"] == "bfloat16"
    assert all(m.training is training for m in model.modules())
    assert torch.equal(model.eval()(x), expected)
    assert (bound_attributes(model), set(dir(model))) == before


def test_dtype_and_input_size_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs: list[torch.Tensor] = []
    row = module._row
    monkeypatch.setattr(module, "_row", lambda *args: inputs.append(args[4]) or row(*args))
    model = tiny_vit(dynamic_img_size=True)
    result = bench(model, rs=(4,), batches=(2,), rounds=1, dtype="bfloat16", input_size=(3, 48, 48))
    assert [(x.shape, x.dtype) for x in inputs] == [((2, 3, 48, 48), torch.bfloat16)]
    assert result.rows[0]["tokens"] == 145 - 4 * 4


def test_compiled_compiles_every_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    modes: list[str | None] = []

    def fake(model: nn.Module, *, mode: str | None) -> nn.Module:
        compiled.append(model)
        modes.append(mode)
        return model

    monkeypatch.setattr(torch, "compile", fake)
    result = bench(tiny_vit(), rs=(4,), batches=(1,), rounds=1, compiled=True)
    assert [getattr(model.__dict__.get("_tokenmerge_handle"), "r", None) for model in compiled] == [None, 4, 4]
    assert result.environment["compiled"] == "True"
    bench(tiny_vit(), rs=(4,), batches=(1,), rounds=1)
    assert len(compiled) == 3
    result = bench(tiny_vit(), rs=(4,), batches=(1,), rounds=1, compiled="reduce-overhead")
    assert (modes, result.environment["compiled"]) == ([None] * 3 + ["reduce-overhead"] * 3, "reduce-overhead")


def test_progress_runs_through_all_rows() -> None:
    seen: list[tuple[int, int]] = []
    bench(tiny_vit(), rs=(0, 4), batches=(1, 2), rounds=1, progress=lambda done, total: seen.append((done, total)))
    # four rows of three rounds to warm up and one timed
    assert seen == [(i, 16) for i in range(1, 17)]


def test_unfused_attention_is_told() -> None:
    model = tiny_vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    (row,) = bench(model, rs=(4,), batches=(1,), rounds=1).rows
    assert (row["attention"], row["unmerged attention"]) == ("math", "math")


def test_another_method() -> None:
    (row,) = bench(tiny_vit(), rs=(4,), batches=(1,), rounds=1, method="drop").rows
    assert row["tokens"] == 49 and row["matching GMACs"] == 0


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"device": "cuda:99"}, UnsupportedError, "no device 'cuda:99' on this machine; there are: cpu"),
        ({"device": "gpu"}, UnsupportedError, "no device 'gpu'; there are: cpu"),
        ({"dtype": "int8"}, UnsupportedError, "no dtype 'int8'; there are: float32, bfloat16, float16"),
        ({"method": "tme"}, UnknownNameError, "no .*'tme'. Did you mean 'tome'"),
        ({"rs": (-1,)}, InvalidScheduleError, "r holds -1. Allowed"),
        ({"rs": ()}, DataError, "at least one r, one batch size >= 1 and one round"),
        ({"batches": ()}, DataError, "at least one r, one batch size >= 1 and one round"),
        ({"batches": (1, 0)}, DataError, "at least one r, one batch size >= 1 and one round"),
        ({"rounds": 0}, DataError, "at least one r, one batch size >= 1 and one round"),
        (
            {"input_size": (3, 64, 64)},
            DataError,
            r"does not take images of \(3, 64, 64\): Input height \(64\).*\(32\)\.$",
        ),
        ({"input_size": (1, 32, 32)}, DataError, r"does not take images of \(1, 32, 32\): .*to have 3 channels"),
    ],
    ids=lambda value: "-".join(f"{k}-{v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_wrong_options_come_before_the_timing(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    monkeypatch.setattr(module, "interleave", lambda *args, **options: pytest.fail("the timing began"))
    with pytest.raises(error, match=text):
        bench(tiny_vit(), **options)


def test_an_unsupported_model() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no adapter for torch\.nn\.modules\.linear\.Linear"):
        bench(nn.Linear(2, 2))


def test_a_model_reduced_already_is_refused_and_keeps_its_reduction() -> None:
    model, x = tiny_vit(), torch.randn(1, 3, 32, 32)
    tokenmerge.patch(model, r=4)
    expected = model(x)
    with pytest.raises(AlreadyPatchedError, match=r"reduced already.*unpatch"):
        bench(model, rs=(4,), rounds=1)
    assert_close(model(x), expected, 0.0)
