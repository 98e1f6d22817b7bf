"""The doctor: every finding on a healthy model, and each one false on a model made ill for it."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import bound_attributes, randomised, tiny_vit
from tokenmerge import MergeConfig, methods
from tokenmerge.config import Fingerprint
from tokenmerge.errors import ConfigError, DataError, InvalidScheduleError, UnsupportedError
from tokenmerge.measure.timing import Timing, environment
from tokenmerge.tools import doctor as module
from tokenmerge.tools.doctor import Diagnosis, examine

CHECKS = ["adapter", "blocks", "r = 0", "equivalence", "unpatch"]
FINDINGS = [*CHECKS, "preprocessing", "limitations", "speed", "conclusion"]


def _found(diagnosis: Diagnosis) -> dict[str, tuple[bool | None, str]]:
    return {name: (good, sentence) for name, good, sentence in diagnosis.findings}


def _subclass(**methods: Any) -> nn.Module:
    """A tiny timm VisionTransformer of a subclass with the methods replaced."""
    from timm.models.vision_transformer import VisionTransformer

    cls = types.new_class("Changed", (VisionTransformer,), exec_body=lambda space: space.update(methods))
    settings = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 10}
    return randomised(cls(**settings)).eval()


def test_healthy_model() -> None:
    diagnosis = examine(tiny_vit(), r=8, rounds=1)
    found = _found(diagnosis)
    assert list(found) == FINDINGS
    assert {name: good for name, (good, _) in found.items()} == {
        **dict.fromkeys(FINDINGS, True),
        "preprocessing": None,
        "speed": None,
    }
    assert diagnosis.is_healthy
    assert found["adapter"][1] == "timm_vit: 4 blocks, attention seen by seam"
    assert "at r = 8 (33 tokens left)" in found["equivalence"][1]
    assert "the free bound" in found["speed"][1] and "(batch 2, r = 8)" in found["speed"][1]
    assert found["speed"][1].endswith("; 1 rounds are too few to tell")
    assert found["limitations"][1] == "none"
    assert found["preprocessing"][1].startswith("WARNING: the model does not say how its images are prepared")
    assert found["conclusion"][1] == "Merging computes on this model what it should."


def test_as_dict() -> None:
    diagnosis = Diagnosis([("adapter", True, "fine"), ("overhead", None, "some")], {"torch": "2.x"})
    assert diagnosis.as_dict() == {
        "findings": [("adapter", True, "fine"), ("overhead", None, "some")],
        "environment": {"torch": "2.x"},
        "is_healthy": True,
    }


@pytest.mark.parametrize(("good", "is_healthy"), [(True, True), (None, True), (False, False)])
def test_only_a_failed_finding_is_unhealthy(good: bool | None, is_healthy: bool) -> None:
    assert Diagnosis([("a", True, ""), ("b", good, ""), ("c", None, "")], {}).is_healthy is is_healthy


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_model_itself_is_not_changed(training: bool) -> None:
    model, x = tiny_vit(), torch.randn(2, 3, 32, 32)
    expected, before = model(x), (bound_attributes(model), set(dir(model)))
    examine(model.train(training), rounds=1)
    assert model.training is training
    assert torch.equal(model.eval()(x), expected)
    assert (bound_attributes(model), set(dir(model))) == before


def test_a_block_subclass_with_a_step_of_its_own() -> None:
    from timm.models.vision_transformer import Block

    class Scaled(Block):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return 1.01 * super().forward(x, *args, **kwargs)

    diagnosis = examine(tiny_vit(block_fn=Scaled), rounds=1)
    (name, good, sentence), last = diagnosis.findings
    assert last[:2] == ("conclusion", False)  # and an advice
    assert (name, good, diagnosis.is_healthy) == ("adapter", False, False)
    assert "Scaled) is a timm.models.vision_transformer.Block with a forward of its own" in sentence
    assert "Patch the model by names" in sentence


def test_a_block_whose_forward_was_replaced_on_the_instance() -> None:
    model = tiny_vit()
    model.blocks[0].forward = _no_mlp.__get__(model.blocks[0])
    (name, good, sentence), _ = examine(model, rounds=1).findings
    assert (name, good) == ("adapter", False)
    assert sentence.startswith("blocks.0 (timm.models.vision_transformer.Block) does not behave as its adapter")


def _no_mlp(self: Any, x: Tensor) -> Tensor:
    return x + self.attn(self.norm1(x))


def test_a_head_that_does_not_weigh_the_tokens_gets_them_all() -> None:
    def forward_head(self: Any, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x[:, 1:].mean(dim=1))

    diagnosis = examine(_subclass(forward_head=forward_head), rounds=1)
    found = _found(diagnosis)
    assert diagnosis.is_healthy and found["equivalence"][0] is True
    good, sentence = found["limitations"]
    assert good is None and sentence.startswith(
        "tokens are put back in their places after the last block: forward_head"
    )


def test_a_model_that_is_random() -> None:
    def forward_head(self: Any, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x[:, 0]) + torch.rand(1)

    found = _found(examine(_subclass(forward_head=forward_head), rounds=1))
    assert [name for name, (good, _) in found.items() if good is False] == [
        "r = 0",
        "equivalence",
        "unpatch",
        "conclusion",
    ]
    # nothing is said of the speed of a wrong answer, nor that nothing is amiss
    assert list(found) == [*CHECKS, "preprocessing", "conclusion"]
    assert found["conclusion"][1].startswith(
        "Do not merge this model as it is: r = 0 and equivalence and unpatch failed"
    )


def test_a_model_that_computes_nan() -> None:
    model = tiny_vit()
    nn.init.constant_(model.head.bias, float("nan"))
    found = _found(examine(model, rounds=1))
    assert [name for name, (good, _) in found.items() if good is False] == [
        "r = 0",
        "equivalence",
        "unpatch",
        "conclusion",
    ]


def test_merging_nothing_is_no_judgement() -> None:
    diagnosis = examine(tiny_vit(), r=0, rounds=1)
    assert _found(diagnosis)["equivalence"] == (None, "not checked: r = 0 merges nothing in this model")
    assert _found(diagnosis)["unpatch"][0] is True and diagnosis.is_healthy
    assert _found(diagnosis)["conclusion"][1].startswith("Nothing is merged at r = 0, so nothing is gained")


def test_what_could_not_be_done_is_told_and_no_failure() -> None:
    model = tiny_vit()
    model.pretrained_cfg = {"tag": "mae"}
    diagnosis = examine(model, rounds=1)
    found = _found(diagnosis)
    assert found["equivalence"] == (None, "not checked: it does not hold without proportional attention")
    good, sentence = found["limitations"]
    assert good is None and sentence.startswith("no proportional attention: an MAE model")
    assert diagnosis.is_healthy


def _swin() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(img_size=32, patch_size=4, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 1))


def _near() -> nn.Module:
    near = nn.Module()
    near.blocks = tiny_vit().blocks
    return near


@pytest.mark.parametrize(
    ("make", "texts"),
    [
        (lambda: nn.Linear(2, 2), ["no adapter for torch.nn.modules.linear.Linear", "It has no attention"]),
        (_swin, ["SwinTransformer", "its attention runs inside windows that partition the full grid"]),
        (_near, ["no adapter for torch.nn.modules.module.Module", "Nearest is '", "missing are"]),
    ],
    ids=["linear", "swin", "near"],
)
def test_an_unsupported_model_is_a_finding_with_the_nearest_family(make: Any, texts: list[str]) -> None:
    diagnosis = examine(make())
    (name, good, sentence), last = diagnosis.findings
    assert last[:2] == ("conclusion", False)  # and an advice
    assert (name, good, diagnosis.is_healthy) == ("adapter", False, False)
    for text in texts:
        assert text in sentence
    assert diagnosis.environment["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"device": "cuda:99"}, UnsupportedError, "no device 'cuda:99' on this machine"),
        ({"batch": 0}, DataError, "a batch size and rounds of at least 1; got 0 and 10"),
        ({"rounds": 0}, DataError, "a batch size and rounds of at least 1; got 2 and 0"),
        ({"r": [1] * 5}, InvalidScheduleError, "r has 5 entries, the model has 4 blocks"),
    ],
    ids=["device", "batch", "rounds", "r"],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        examine(tiny_vit(), **options)


def test_bfloat16_is_judged_by_its_own_precision() -> None:
    found = _found(examine(tiny_vit().bfloat16(), rounds=1))
    assert found["adapter"][0] and found["r = 0"][0] and found["unpatch"][0]


@pytest.mark.parametrize(
    ("merged", "noise", "text"),
    [
        (0.5, 0.0, "It is 2.00 x as fast here (batch 2, r = 8); tokenmerge eval"),
        (2.0, 0.0, "It is SLOWER here (batch 2, r = 8): take a larger r"),
        (0.97, 0.4, "No difference in speed was measured (batch 2, r = 8): try a larger r"),
    ],
    ids=["faster", "slower", "noise"],
)
def test_the_conclusion_follows_from_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, merged: float, noise: float, text: str
) -> None:
    def timed(variants: dict[str, Any], device: torch.device, rounds: int, progress: None) -> dict[str, Timing]:
        wave = [1 + noise * (-1) ** i for i in range(rounds)]
        each = {"unmerged": 1.0, "merged": merged, "bound": merged, "again": 1.0}
        return {name: Timing(tuple(each[name] * (w if name == "merged" else 1.0) for w in wave)) for name in variants}

    monkeypatch.setattr(module, "interleave", timed)
    found = _found(examine(tiny_vit(), rounds=8))
    assert text in found["conclusion"][1]
    assert found["conclusion"][0] is (None if merged > 1 else True)  # what is slower is not well
    assert ("other programs are running" in found["speed"][1]) == (noise > 0.1)


def _timed(monkeypatch: pytest.MonkeyPatch, gain: float) -> list[dict[str, Any]]:
    """Let merging be `gain` times as fast; return what was timed."""
    seen: list[dict[str, Any]] = []

    def timed(variants: dict[str, Any], device: torch.device, rounds: int, progress: None) -> dict[str, Timing]:
        seen.append({name: variant() for name, variant in variants.items()})
        each = {"unmerged": 1.0, "merged": 1 / gain, "bound": 1 / gain, "again": 1.0}
        return {name: Timing((each[name],) * rounds) for name in variants}

    monkeypatch.setattr(module, "interleave", timed)
    return seen


def _config(model: nn.Module, method: Any = "tome(metric='x')", **measured: Any) -> MergeConfig:
    here = environment(torch.device("cpu"))
    figures = {"speed-up": 2.01, "batch size": 6, "dtype": "bfloat16", "environment": here} | measured
    return MergeConfig(method, r=[8, 6], fingerprint=Fingerprint.of(model), measured=figures)


@pytest.mark.parametrize(
    ("gain", "changes", "good", "text"),
    [
        (1.97, {}, True, "2.01x as written, measured 1.97x here (batch 6, bfloat16)"),
        (1.82, {}, True, "2.01x as written, measured 1.82x here"),
        (1.80, {}, False, "2.01x as written, measured 1.80x here (batch 6, bfloat16)"),
        (1.10, {"device": "another chip"}, None, "1.10x here (batch 6, bfloat16); written on another machine (another"),
        (1.10, {"threads": "99"}, None, "another machine ("),
        (1.97, {"torch": "2.6.0"}, True, "here (batch 6, bfloat16); written with torch 2.6.0"),
    ],
    ids=["as-written", "nearly", "slower", "machine", "threads", "version"],
)
def test_a_configuration_delivers_what_it_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gain: float, changes: dict[str, str], good: Any, text: str
) -> None:
    model, seen = tiny_vit(), _timed(monkeypatch, gain)
    config = _config(model, environment={**environment(torch.device("cpu")), **changes})
    config.save(tmp_path / "merge.json")
    diagnosis = examine(model, config=tmp_path / "merge.json")
    found = _found(diagnosis)
    assert list(found) == ["config", *FINDINGS[:-1], "delivers", "conclusion"]
    assert found["config"][0] is True and "made for this model (timm.models" in found["config"][1]
    assert found["equivalence"][0] is True and "at r = [8, 6] (51 tokens left)" in found["equivalence"][1]
    assert found["delivers"][0] is good and text in found["delivers"][1]
    assert diagnosis.is_healthy is (good is not False)
    assert ("not as fast here as the configuration says" in found["conclusion"][1]) is (good is False)
    assert all(y.shape == (6, 10) and y.dtype == torch.bfloat16 for y in seen[0].values())
    # it is this configuration that was timed, not ToMe's defaults
    y = seen[0]["merged"]
    assert not torch.equal(y, seen[0]["unmerged"]) and torch.equal(seen[0]["unmerged"], seen[0]["again"])


@pytest.mark.parametrize(
    ("measured", "text"),
    [
        (None, "the configuration holds no speed-up; measured 1.50x here"),
        ({"batch size": 2}, "the configuration holds no speed-up; measured 1.50x here"),
        ({"speed-up": 2.0}, "(batch 2, float32); on which machine it was written, it does not say"),
    ],
    ids=["nothing", "no-figure", "no-machine"],
)
def test_what_the_file_does_not_say_is_no_judgement(monkeypatch: pytest.MonkeyPatch, measured: Any, text: str) -> None:
    _timed(monkeypatch, 1.5)
    diagnosis = examine(tiny_vit(), config=MergeConfig("tome", r=6, measured=measured))
    found = _found(diagnosis)
    assert diagnosis.is_healthy and found["config"][0] is None and "does not say which model" in found["config"][1]
    assert found["delivers"][0] is None and text in found["delivers"][1]


@pytest.mark.parametrize(
    ("measured", "text"),
    [({"batch size": 0}, r"measured\['batch size'\] is 0"), ({"dtype": "int8"}, r"measured\['dtype'\] is 'int8'")],
    ids=["batch", "dtype"],
)
def test_what_cannot_be_measured_again_is_an_error(measured: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        examine(tiny_vit(), config=MergeConfig("tome", r=6, measured=measured))
    with pytest.raises(ConfigError, match=r"an r of its own; leave out r = 4"):
        examine(tiny_vit(), r=4, config=MergeConfig("tome", r=6))


def test_a_configuration_for_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    _timed(monkeypatch, 2.0)
    config = _config(tiny_vit())
    diagnosis = examine(tiny_vit(depth=6), config=config)
    (name, good, sentence), last = diagnosis.findings
    assert last[:2] == ("conclusion", False)  # and an advice
    assert (name, good, diagnosis.is_healthy) == ("config", False, False)
    assert "for a model with 4 blocks" in sentence and "this one has 6" in sentence
    found = _found(examine(tiny_vit(), config=config))
    assert (
        found["config"][0] is None
        and "it fits, but the configuration was made with other weights" in found["config"][1]
    )
    assert found["limitations"] == (True, "none")
    (name, good, _), _ = examine(nn.Linear(2, 2), config=config).findings
    assert (name, good) == ("adapter", False)


@pytest.mark.parametrize("name", methods.list_methods())
def test_no_method_is_found_wrong_for_not_being_a_mean(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _timed(monkeypatch, 2.0)
    for method in methods.find(name).examples():
        found = _found(examine(tiny_vit(), config=MergeConfig(method, r=6), batch=2))
        assert [what for what, (good, _) in found.items() if good is False] == [], (method, found)


def test_a_compiled_configuration_is_timed_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model, compiled = tiny_vit(), []
    _timed(monkeypatch, 2.0)
    monkeypatch.setattr(torch, "compile", lambda variant: compiled.append(variant) or variant)
    examine(model, config=_config(model, compiled=True))
    assert len(compiled) == 4
    examine(model, config=_config(model, compiled=False))
    assert len(compiled) == 4
