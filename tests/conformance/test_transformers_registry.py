"""Every model type of transformers that sees or hears keeps the promises, or is refused with a reason of its own."""

from __future__ import annotations

import re

import pytest
from torch import nn

import tokenmerge
from helpers import randomised
from promises import Family, check_promises, note
from tokenmerge import adapters
from tokenmerge.errors import UnsupportedModelError
from tokenmerge.report import Report

pytest.importorskip("transformers", minversion="5.24")
registry = pytest.importorskip("hf_registry")

HEADING = "transformers, by model type"
# model types that nobody has looked at yet, with what stood in the way
NOT_YET: dict[str, str] = {}
# what a refusal begins with that names no cause
_NO_CAUSE = ("no adapter for", "cannot be run on random tokens", "are not described")


@pytest.mark.parametrize("name", registry.names())
def test_a_model_type_is_supported_or_refused_with_a_reason(name: str) -> None:
    if name in NOT_YET:
        note(Family(HEADING, name), "not yet looked at", NOT_YET[name])
        pytest.skip(NOT_YET[name])
    bare = registry.build(name, "meta")
    if bare is None:
        pytest.skip("no forward of its models takes images, sound or video")
    try:
        adapters.find(bare)
    except UnsupportedModelError as error:
        towers = re.search(r" holds \d+ towers: (.+?)\. Patch those", str(error))
        if towers is None:
            _check_refusal(name, bare, str(error))
            return
        paths = towers[1].split(", ")
    else:
        paths = [""]
    model = randomised(registry.build(name)).eval().double()
    remarks = []
    for path in paths:
        part = model.get_submodule(path)
        try:
            remarks.append(_check_tower(name, part))
        except UnsupportedModelError as error:
            _check_refusal(name, part, str(error))
            return
    if len(paths) > 1:
        note(Family(HEADING, name), "supported", f"tower by tower: {', '.join(paths)}", remarks[0].adapter)


def _check_refusal(name: str, model: nn.Module, message: str) -> None:
    """Check that a refusal names its cause, and that it leaves the model alone."""
    assert not tokenmerge.supports(model)
    no_attention = re.search(r"It has no attention that could be found \(.+?\)", message)
    cause = no_attention[0] if no_attention else message
    assert no_attention or not any(words in message for words in _NO_CAUSE), message
    assert not any("_tokenmerge_handle" in vars(module) for module in model.modules())
    cause = re.sub(r"^tokens cannot be merged in \S+: |\. Take a model that keeps.*", "", cause)
    note(Family(HEADING, name), "refused", cause)


def _check_tower(name: str, model: nn.Module) -> Report:
    """Check the promises of a model that is called where its images enter; returns the report on the whole."""
    with tokenmerge.patched(model, r=3) as handle:
        report, size, first = handle.report(), handle.input_size, handle.runners[0].block
    entry = registry.entry(model, next(path for path, module in model.named_modules() if module is first))
    given = registry.inputs(model.get_submodule(entry), size)
    check_promises(model, family=Family(HEADING, name), entry=entry, output=registry.everything, **given)
    if report.untouched:
        left = "left alone: " + ", ".join(report.untouched)
        note(Family(HEADING, name), "supported", "; ".join((*report.limits, left)), report.adapter)
    return report
