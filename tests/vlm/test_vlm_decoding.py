"""Ways to decode that give the model several tokens at once, or compile it: the greedy tokens of the plain way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_vlm_families import generate
from tiny_vlms import FAMILIES, IMAGE, doubled

from tokenmerge.vlm import patch

transformers = pytest.importorskip("transformers", minversion="5.24")

# transformers hands its own default options on to itself
pytestmark = pytest.mark.filterwarnings("ignore:.*generation_config")


@pytest.fixture(params=["llava", "qwen2_5_vl"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _other(model: Any) -> Any:
    """A model with other weights, whose guesses are partly wrong."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.model.language_model.parameters():
            weight += 0.05 * weight.std() * torch.randn_like(weight) if weight.dim() > 1 else 0
    return other


def _accepted(model: Any, calls: list[int]) -> Any:
    """Note how many tokens each call of the language model had."""
    return model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )


@pytest.mark.parametrize("assistant", ["same", "other", "patched", "words"])
@torch.no_grad()
def test_an_assistant(name: str, assistant: str) -> None:
    """It is a copy that agrees, one that is often wrong, a patched one, or a language model that sees no image."""
    model, inputs = FAMILIES[name].make(torch.float64), doubled(FAMILIES[name].prompts([1]))
    if assistant == "words" and name != "llava":
        pytest.skip("transformers gives the assistant mm_token_type_ids, which a language model refuses")
    helper = copy.deepcopy(model) if assistant in ("same", "patched") else _other(model)
    if assistant == "words":
        torch.manual_seed(0)
        helper = transformers.LlamaForCausalLM(model.config.text_config).eval().double()
        helper.generation_config = copy.deepcopy(model.generation_config)
    whole = generate(model, inputs, new=12)
    with patch(model, 0.25) as handle:
        expected, calls = generate(model, inputs, new=12), []
        hook = _accepted(model, calls)
        if assistant == "patched":
            with patch(helper, 0.25):
                got = generate(model, inputs, new=12, assistant_model=helper)
        else:
            got = generate(model, inputs, new=12, assistant_model=helper)
        hook.remove()
        assert got.equal(expected) and not got.equal(whole)
        assert handle.visual_tokens[0][1] < handle.visual_tokens[0][0] and max(calls[1:]) > 1
        if assistant == "same":
            assert len(calls) < 12  # guesses were taken over
        handle.keep = 1.0
        assert generate(model, inputs, new=12, assistant_model=helper).equal(whole)


@torch.no_grad()
def test_guesses_from_the_prompt(name: str) -> None:
    """The prompt repeats itself, so that there is something to find."""
    model, inputs = FAMILIES[name].make(torch.float64), doubled(FAMILIES[name].prompts([1], words=12))
    with patch(model, 0.25):
        expected = generate(model, inputs, new=24)
        calls: list[int] = []
        hook = _accepted(model, calls)
        assert generate(model, inputs, new=24, prompt_lookup_num_tokens=3).equal(expected)
        hook.remove()
        assert max(calls[1:]) > 1


@torch.no_grad()
def test_a_second_turn_after_an_assistant(name: str) -> None:
    """Guesses that were wrong are cut off the cache."""
    model, inputs = FAMILIES[name].make(torch.float64), doubled(FAMILIES[name].prompts([1]))
    with patch(model, 0.25):
        first = generate(model, inputs, new=6, assistant_model=_other(model), return_dict_in_generate=True)
        whole = torch.cat((first.sequences, torch.tensor([[11, 12, 13]])), dim=1)
        given: dict[str, Any] = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
        if name != "llava":
            given["mm_token_type_ids"] = (whole == IMAGE).long()
        pixels = {key: x for key, x in inputs.items() if key.startswith(("pixel", "image"))}
        expected = generate(model, {**given, **pixels}, new=4)
        assert generate(model, given, new=4, cache=first.cache).equal(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "when"), [("llava", "generate"), ("qwen2_5_vl", "generate"), ("llava", "before"), ("llava", "forward")]
)
@torch.no_grad()
def test_compiled(name: str, when: str) -> None:
    """By `generate` itself with a static cache, and by the user: the model, or its forward, before it is patched."""
    torch._dynamo.reset()
    model, inputs = FAMILIES[name].make(torch.float64), doubled(FAMILIES[name].prompts([1]))
    options: dict[str, Any] = {"new": 3, "cache_implementation": "static"}
    with patch(model, 0.5):
        expected = generate(model, inputs, new=3)
    if when == "generate":
        options["compile_config"] = transformers.CompileConfig(backend="eager", mode=None)
        options["compile_config"]._compile_all_devices = True
    if when == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    called = torch.compile(model, backend="eager") if when == "before" else model
    with patch(called, 0.5) as handle:
        assert handle.model is model and generate(called, inputs, **options).equal(expected)
        assert handle.visual_tokens == [(FAMILIES[name].tokens, FAMILIES[name].tokens // 2)]


@torch.no_grad()
def test_what_positions_are(name: str) -> None:
    """`keep`: those of the whole prompt; `compact`: 0, 1, ... of each row; what follows comes after the largest."""
    model, inputs = FAMILIES[name].make(torch.float64), doubled(FAMILIES[name].prompts([1, 2]))
    seen: list[torch.Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    model(**inputs)
    plain = seen[-1]
    for positions in ("keep", "compact") if name == "llava" else ("keep",):
        with patch(model, 0.5, positions=positions) as handle:
            out = model(**inputs, use_cache=True)
            places, prompt = handle.places, seen[-1]
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
            model(input_ids=torch.tensor([[7], [9]]), attention_mask=mask, cache=out.cache)
        is_real = places >= 0
        mask, numbers = inputs["attention_mask"], is_real.cumsum(dim=1) - 1
        whole = (mask.cumsum(dim=1) - 1) if name == "llava" else plain[-3:]  # a plain LLaVA counts padding too
        index = places.clamp_min(0).expand(*whole.shape[:-1], -1)
        expected = numbers if positions == "compact" else whole.gather(-1, index)
        own = prompt if name == "llava" else prompt[-3:]
        assert own[..., is_real].equal(expected[..., is_real])
        following = seen[-1] if name == "llava" else seen[-1][-3:]
        largest = expected.masked_fill(~is_real, 0).amax(dim=-1, keepdim=True)
        if name != "llava":  # after the largest of time, row and column
            largest = largest.amax(dim=0, keepdim=True)
        assert following.equal((largest + 1).expand_as(following))
    hook.remove()


@torch.no_grad()
def test_what_follows_an_image_that_ends_the_prompt() -> None:
    """It stands behind all of the image, as in the plain model: behind the largest of time, row and column."""
    model, inputs = FAMILIES["qwen2_5_vl"].make(torch.float64), FAMILIES["qwen2_5_vl"].prompts([1])
    end = int((inputs["input_ids"] == IMAGE).nonzero()[-1, 1]) + 1
    of_text = ("input_ids", "attention_mask", "mm_token_type_ids")
    inputs = {key: value[:, :end] if key in of_text else value for key, value in inputs.items()}
    seen: list[torch.Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"][-3:]), with_kwargs=True
    )
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    with patch(model, 0.5) as handle:
        out = model(**inputs, use_cache=True)
        prompt = seen[-1]
        assert len(set(prompt.amax(dim=(1, 2)).tolist())) > 1  # an axis ends before another
        model(input_ids=torch.tensor([[7]]), attention_mask=mask, cache=out.cache)
        assert handle.visual_tokens == [(12, 6)]
    hook.remove()
    assert (seen[-1] == prompt.max() + 1).all() and seen[-1].shape == (3, 1, 1)
