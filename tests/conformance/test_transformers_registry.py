"""Every model type of transformers that sees or hears keeps the promises, or is refused with a reason of its own."""

from __future__ import annotations

import re

import pytest
from torch import nn

import tokenmerge
from helpers import randomised
from promises import MODEL_TYPES, Family, check_promises, note
from tokenmerge import adapters
from tokenmerge.errors import UnsupportedModelError
from tokenmerge.report import Report

pytest.importorskip("transformers", minversion="5.24")
registry = pytest.importorskip("hf_registry")

# model types that nobody has looked at yet, with what stood in the way
NOT_YET = {
    **dict.fromkeys(("dinat", "layoutlmv2", "higgs_audio_v2_tokenizer"), "needs a library that is not installed here"),
    **dict.fromkeys(
        (
            *("cohere_compass", "deepseek_ocr2", "diffusion_gemma", "emu3", "granite4_vision", "hunyuan_vl"),
            *("moonshine_streaming", "perception_lm", "pp_ocrv5_server_det", "pp_ocrv6_medium_det"),
            *("t5gemma2_encoder", "vitmatte"),
        ),
        "its default configuration builds no model",
    ),
    **dict.fromkeys(
        (
            *("cosmos3_edge", "cosmos3_edge_vision", "hunyuan_vl_vision", "hy_v4_vl", "hy_v4_vl_vision", "glm_image"),
            *("glm_image_vision", "inkling2_vision", "minicpm_ocr", "minicpm_ocr_vision", "minicpmv4_6"),
            *("minicpmv4_6_vision", "minicpmv4_7", "minicpmv4_7_vision", "minimax_m3_vl", "minimax_m3_vl_vision"),
        ),
        "images in one sequence, in blocks that no family describes yet",
    ),
    **dict.fromkeys(("step3p7", "step3p5_vision", "sapiens2"), "rotary tables that all images share"),
    **dict.fromkeys(
        ("bridgetower", "bridgetower_vision_model", "mllama", "mllama_vision_model", "molmo2", "molmo2_vision"),
        "a plain tower of which several blocks are read",
    ),
    **dict.fromkeys(
        (
            *("flava", "flava_image_model", "mgp-str", "pix2struct", "pix2struct_vision_model", "kosmos-2.5"),
            *("kosmos_2_5_vision_model", "unlimited_ocr_vision_encoder", "deepseek_ocr2_vision"),
        ),
        "a plain tower whose attention or inputs no family describes yet",
    ),
    **dict.fromkeys(
        ("dots3_note_audio_encoder", "speech_to_text", "pop2piano", "clvp"),
        "a speech encoder that no family describes yet",
    ),
    **dict.fromkeys(("radio", "nemotron_h_omni"), "merges in tests/adapters; its patches are not built small here yet"),
}
# what a refusal begins with that names no cause
_NO_CAUSE = ("no adapter for", "cannot be run on random tokens", "are not described")


@pytest.mark.parametrize("name", registry.names())
def test_a_model_type_is_supported_or_refused_with_a_reason(name: str) -> None:
    if name in NOT_YET:
        note(Family(MODEL_TYPES, name), "not yet looked at", NOT_YET[name])
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
        note(Family(MODEL_TYPES, name), "supported", f"tower by tower: {', '.join(paths)}", remarks[0].adapter)


def _check_refusal(name: str, model: nn.Module, message: str) -> None:
    """Check that a refusal names its cause, and that it leaves the model alone."""
    assert not tokenmerge.supports(model)
    no_attention = re.search(r"It has no attention that could be found \(.+?\)", message)
    cause = no_attention[0] if no_attention else message
    assert no_attention or not any(words in message for words in _NO_CAUSE), message
    assert not any("_tokenmerge_handle" in vars(module) for module in model.modules())
    cause = re.sub(r"^tokens cannot be merged in \S+: |\. Take a model that keeps.*", "", cause)
    note(Family(MODEL_TYPES, name), "refused", cause)


def _check_tower(name: str, model: nn.Module) -> Report:
    """Check the promises of a model that is called where its images enter; returns the report on the whole."""
    with tokenmerge.patched(model, r=3) as handle:
        report, size, first = handle.report(), handle.input_size, handle.runners[0].block
    entry = registry.entry(model, next(path for path, module in model.named_modules() if module is first))
    given = registry.inputs(model.get_submodule(entry), size)
    check_promises(model, family=Family(MODEL_TYPES, name), entry=entry, output=registry.everything, **given)
    if report.untouched:
        left = "left alone: " + ", ".join(report.untouched)
        note(Family(MODEL_TYPES, name), "supported", "; ".join((*report.limits, left)), report.adapter)
    return report
