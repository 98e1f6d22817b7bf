"""What a user's editor, notebook and `with` see: names, options, reprs, and every way to say a method and an `r`."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenmerge
from helpers import bound_attributes, tiny_vit
from tokenmerge import MergeConfig, Schedule, ToMe, kernels
from tokenmerge.adapters.base import Host
from tokenmerge.adapters.timm.vit import TimmViT
from tokenmerge.adapters.within import Within
from tokenmerge.errors import ConfigError, InvalidScheduleError, UnknownNameError, UnsupportedModelError
from tokenmerge.functional import bipartite_soft_matching, merge_wavg
from tokenmerge.kernels import cpu
from tokenmerge.matching import bipartite

NAMES = {"blocks": "blocks", "attn": "attn", "norm": "norm2", "mlp": "mlp", "prefix": 1}


def test_the_package_ships_its_types() -> None:
    assert Path(tokenmerge.__file__).with_name("py.typed").is_file()


def test_help_lists_every_option() -> None:
    for function in (tokenmerge.patch, tokenmerge.patched):
        options = list(inspect.signature(function).parameters)
        assert options[:3] == ["model", "method", "calibrate"]
        # what is known of a configuration is no setting
        assert options[3:] == [field.name for field in fields(MergeConfig) if field.compare and field.name != "method"]


@pytest.mark.parametrize("r", [5, 0.1, (4, -1.0), [3, 0, 0.2]], ids=str)
def test_a_schedule_is_an_r(r: Any) -> None:
    schedule = Schedule.of(r, depth=4, multiple_of=2)
    model = tiny_vit()
    handle = tokenmerge.patch(model, r=schedule)
    assert handle.tokens == schedule.tokens(65, 1) and handle.config.multiple_of == 2
    handle.r = Schedule.of(7, depth=4)
    assert handle.tokens == [58, 51, 44, 37] and handle.config.multiple_of == 1
    handle.remove()
    with pytest.raises(InvalidScheduleError, match="r has 5 entries, the model has 4 blocks"):
        tokenmerge.patch(model, r=Schedule.of(r, depth=5))
    with pytest.raises(ConfigError, match="a Schedule with multiple_of=2, and multiple_of is 8"):
        tokenmerge.patch(model, r=schedule, multiple_of=8)
    assert not bound_attributes(model)


def test_a_schedule_of_a_callable_is_that_callable() -> None:
    assert Schedule.check(Schedule.of(_two, depth=4)) is _two
    assert tokenmerge.patch(tiny_vit(), r=Schedule.of(_two, depth=4)).tokens == [63, 61, 59, 57]


def _two(block: int, tokens: int) -> int:
    return 2


@pytest.mark.parametrize(
    ("text", "r"),
    [("8", 8), ("0.1", 0.1), ("16,-1", (16, -1.0)), ("(16, -1)", (16, -1.0)), ("[25, 25, 0.1, 0.0]", [25, 25, 0.1, 0])],
)
def test_an_r_is_read_from_text(text: str, r: Any) -> None:
    assert Schedule.parse(text) == r


@pytest.mark.parametrize("text", ["", "eight", "8 + 8", "__import__('os')", "'8'", "{}", "16,-1,3", "nan", "(" * 500])
def test_a_text_that_is_no_r_is_refused(text: str) -> None:
    with pytest.raises(InvalidScheduleError, match=r"is no r: tokens removed per block|Allowed: an int"):
        Schedule.parse(text)


def test_patch_takes_a_name_with_options_and_a_path(tmp_path: Path) -> None:
    model = tiny_vit()
    with tokenmerge.patch(model, "tome(metric='x')", r=4) as handle:
        assert handle.config == MergeConfig(ToMe(metric="x"), r=4)
        handle.save(tmp_path / "merge.json")
    for path in (tmp_path / "merge.json", str(tmp_path / "merge.json")):
        with tokenmerge.patch(model, path) as handle:
            assert handle.config == MergeConfig(ToMe(metric="x"), r=4)
    with pytest.raises(UnknownNameError, match=r"no option of tome 'metrik'. Did you mean 'metric'"):
        tokenmerge.patch(model, "tome(metrik='x')", r=4)
    with pytest.raises(ConfigError, match=r"cannot read the configuration nothing.json"):
        tokenmerge.patch(model, "nothing.json")
    assert not bound_attributes(model)


def test_a_misspelt_keyword_of_auto_is_named() -> None:
    with pytest.raises(UnknownNameError, match=r"no keyword of patch 'trak'. Did you mean 'track'"):
        tokenmerge.patch(tiny_vit(), "auto", r=8, trak=True)  # type: ignore[call-arg]


def test_auto_compares_answers_whatever_is_handed_out() -> None:
    model, images = tiny_vit(global_pool="", num_classes=0), torch.randn(2, 3, 32, 32)
    with tokenmerge.patch(model, "auto", r=8, calibrate=images, restore="merged", track=True) as handle:
        assert handle.calibration is not None and handle.config.restore == "merged" and handle.config.track


def test_the_handle_is_a_context_manager() -> None:
    model, x = tiny_vit(), torch.randn(2, 3, 32, 32)
    before = model(x)
    with pytest.raises(KeyError), tokenmerge.patch(model, r=8):
        raise KeyError
    with tokenmerge.patch(model, r=8) as handle:
        assert not torch.equal(model(x), before)
        handle.remove()
    assert torch.equal(model(x), before) and not bound_attributes(model)
    assert tokenmerge.handle_of(model, None) is None


def test_a_model_patched_by_names_is_patched_again_by_its_own_configuration(tmp_path: Path) -> None:
    model, x = tiny_vit(), torch.randn(2, 3, 32, 32)
    with tokenmerge.patch(model, r=4, **NAMES) as handle:  # type: ignore[arg-type]
        expected = model(x)
        handle.save(tmp_path / "merge.json")
    with tokenmerge.patch(model, tmp_path / "merge.json") as handle:
        assert handle.report().adapter == "generic" and handle.prefix == 1
        assert torch.equal(model(x), expected)


def test_a_configuration_is_a_value() -> None:
    config = MergeConfig("tofu", r=[4, 2], restore="dense")
    assert pickle.loads(pickle.dumps(config)) == config != MergeConfig("tofu", r=[4, 2])
    assert MergeConfig() == MergeConfig("tome", r=0) == MergeConfig(ToMe())
    assert "ToFu" in repr(config) and "restore='dense'" in repr(config)
    with pytest.raises(AttributeError):
        config.r = 3  # type: ignore[misc]


def test_the_report_prints_itself() -> None:
    report = tokenmerge.patch(tiny_vit(), "tome(metric='x')", r=8).report()
    assert repr(report) == str(report)
    page = report._repr_html_()
    assert page.startswith("<table><tr><th>model</th>") and "metric=&#x27;x&#x27;" in page


def test_the_report_names_the_kernels_that_ran() -> None:
    model, x = tiny_vit(), torch.randn(2, 3, 32, 32)
    fused = "reference" if cpu._LIBRARY is None else "cpu"
    handle = tokenmerge.patch(model, r=8)
    assert handle.report().kernels == {} and "known after a forward" in str(handle.report())
    with torch.no_grad():
        with kernels.force("matmul"):
            model(x)
        # what is forced now, and what other code runs, is not what the model ran on
        assert handle.report().kernels["merge"] == "matmul"
        with kernels.force("reference"):
            merge_wavg(bipartite_soft_matching(x.flatten(2), 1)[0], x.flatten(2))
            assert handle.report().kernels == {"bipartite": "reference", "merge": "matmul", "attend": "reference"}
        model(x)
        assert handle.report().kernels == {"bipartite": fused, "merge": fused, "attend": "reference"}
        handle.r = 0
        model(x)
    assert handle.report().kernels == {} and "nothing was merged" in str(handle.report())


def test_the_report_asks_for_no_width_but_the_model_s_own() -> None:
    model = tiny_vit(embed_dim=2 * (cpu._WIDEST + 8), num_heads=2, depth=2, mlp_ratio=0.1)
    handle = tokenmerge.patch(model, r=8)
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    report = handle.report()
    assert report.kernels["bipartite"] == "reference"
    if cpu._LIBRARY is not None:
        assert [line.split(",")[0] for line in report.fallbacks] == ["bipartite without its cpu version"]


def test_the_report_knows_what_a_method_does_not_use() -> None:
    model = tiny_vit()
    with tokenmerge.patch(model, "evit", r=8) as handle, torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
        assert "bipartite" not in handle.report().kernels


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "blocks"])
def test_the_report_names_the_kernels_in_a_graph(whole: bool) -> None:
    model, x = tiny_vit(), torch.randn(2, 3, 32, 32)
    handle = tokenmerge.patch(model, r=8)
    for part in [model] if whole else model.blocks:
        part.compile(backend="eager", fullgraph=whole)
    with torch.no_grad():
        with kernels.force("matmul"):
            model(x)
        assert handle.report().kernels["merge"] == "matmul"
        tokenmerge.patch(tiny_vit(), r=8).model(x)
        assert handle.report().kernels["merge"] == "matmul"


def test_support_says_why_not() -> None:
    model = tiny_vit()
    found, none = tokenmerge.supports(model), tokenmerge.supports(torch.nn.Linear(2, 2))
    assert found and (found.adapter, found.reason, str(found)) == ("timm_vit", "", "supported by timm_vit")
    with pytest.raises(UnsupportedModelError) as caught:
        tokenmerge.patch(torch.nn.Linear(2, 2), r=0)
    assert not none and none.reason == str(none) == str(caught.value)
    tokenmerge.patch(model, r=8)
    assert tokenmerge.supports(model).adapter == "timm_vit"


@pytest.mark.parametrize("name", tokenmerge.list_methods())
def test_a_method_is_described(name: str) -> None:
    info, method = tokenmerge.describe(name), tokenmerge.methods.find(name)
    first = (method.__doc__ or "").splitlines()[0]
    assert info.name == name and f"{info.summary} {info.paper}".strip() == first and info.summary.endswith((".", ":"))
    assert set(info.needs) == method().needs and info.is_adaptive is method.is_adaptive
    assert all(text in str(info) for text in (info.summary, info.paper, *info.options))
    assert bool(info.paper) is (name != "drop"), "the paper follows the first sentence"


def test_a_method_with_options_is_described() -> None:
    info = tokenmerge.describe("tome(metric='x')")
    assert info.needs == () and info.options["metric"] == "x"
    assert tokenmerge.describe(ToMe(metric="x")) == info != tokenmerge.describe("tome")
    with pytest.raises(UnknownNameError, match="Did you mean 'tofu'"):
        tokenmerge.describe("tofuu")
    with pytest.raises(ConfigError, match="the method is 8; give a name"):
        tokenmerge.describe(8)  # type: ignore[arg-type]


def test_a_method_without_options_or_a_paper_is_described() -> None:
    class Plain(tokenmerge.Reduction):
        name = "plain"

        def plan(self, view: Any, r: int) -> Any:
            raise NotImplementedError

    info = tokenmerge.describe(Plain())
    assert (info.name, info.options, info.paper) == ("plain", {}, "") and "options                 none" in str(info)


def test_modules_are_there_after_the_import() -> None:
    code = """if True:
        import sys, tokenmerge
        assert "tokenmerge.tools.compare" not in sys.modules
        assert set(tokenmerge.tools.__all__) <= set(dir(tokenmerge.tools))
        for name in tokenmerge.tools.__all__:
            assert getattr(tokenmerge.tools, name) is sys.modules[f"tokenmerge.tools.{name}"], name
        from tokenmerge.tools import bench
        from tokenmerge.tools.compare import compare
        assert bench.bench is tokenmerge.tools.bench.bench and tokenmerge.tools.compare.compare is compare
        assert issubclass(tokenmerge.errors.DataError, tokenmerge.TokenMergeError)
        assert tokenmerge.macs is tokenmerge.flops and tokenmerge.methods.ToFu and tokenmerge.kernels.force
        try:
            tokenmerge.tools.benhc
        except AttributeError as error:
            assert "no attribute 'benhc'; there are: bench," in str(error)
        else:
            raise AssertionError
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_methods_are_imported_when_one_is_named() -> None:
    code = """if True:
        import sys, timm, tokenmerge
        from tokenmerge import methods
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
        with tokenmerge.patched(model, r=1):
            assert methods.find("tome") is methods.ToMe is tokenmerge.ToMe
        assert "tokenmerge.methods.pitome" not in sys.modules
        assert methods.pitome.PiToMe is methods.PiToMe is methods.find("pitome")
        assert {"PiToMe", "Drop", "list_methods"} <= set(dir(methods)) and not hasattr(methods, "PiToMee")
        from tokenmerge.methods import *
        assert MCTF is methods.MCTF and parse("tofu") == ToFu()
        assert list_methods()[0] == "tome" and list_methods()[-1] == "drop"
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_plan_says_its_size_not_its_tensors() -> None:
    assert repr(bipartite(torch.randn(2, 9, 4), 3, prefix=1)) == "Plan(2 x 9 tokens, 6 left, 3 absorbed)"


def test_a_part_describes_itself_as_the_whole_does() -> None:
    class Ignoring(TimmViT):
        host = replace(TimmViT.host, ignores_rest=True)

    inner, whole = Ignoring(), Within("vision", Ignoring())
    for field in {field.name for field in fields(Host)} - {"token_methods", "restored_methods"}:
        assert getattr(whole.host, field) == getattr(inner.host, field), field
    for name in ("name", "families", "landmarks"):
        assert getattr(whole, name) == getattr(inner, name), name
    assert whole.host.token_methods == tuple(f"vision.{name}" for name in inner.host.token_methods)
