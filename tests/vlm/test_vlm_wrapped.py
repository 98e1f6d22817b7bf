"""Models that other libraries changed or wrapped: LoRA, quantised weights, replaced layers, a compiler."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_vlm_families import by_hand, generate
from tiny_vlms import FAMILIES, doubled
from torch import nn

import tokenmerge
from tokenmerge.errors import AlreadyPatchedError, UnsupportedError
from tokenmerge.vlm import compact, patch

transformers = pytest.importorskip("transformers", minversion="5.24")

LLAVA = FAMILIES["llava"]
PARTS = {"language": r".*language_model.*\.[qv]_proj", "tower": r".*vision_tower.*\.[qv]_proj"}
# PEFT asks transformers for an old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def lora(part: str, task: str | None = None, name: str = "llava") -> Any:
    """A model with LoRA, whose weights do something, on one part."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(len(part))
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=PARTS[part], init_lora_weights=False, task_type=task)
    return peft.get_peft_model(FAMILIES[name].make(torch.float64), config).eval().double()


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_lora(part: str, name: str) -> None:
    """The wrapped model is given, and called; the adapter stays at work."""
    if (name, part) == ("qwen2_vl", "tower"):
        pytest.skip("its tower has one projection for queries, keys and values")
    model, inputs = lora(part, name=name), doubled(FAMILIES[name].prompts([1, 2]))
    inner, state = model.get_base_model(), {key: value.clone() for key, value in model.state_dict().items()}
    plain, tokens = model(**inputs).logits, generate(model, inputs, new=4)
    short = compact(model, inputs, keep=0.25)
    with patch(model, keep=1.0) as handle:
        assert handle.model is inner
        assert model(**inputs).logits.equal(plain) and generate(model, inputs, new=4).equal(tokens)
        handle.keep = 0.25
        logits, places, answer = model(**inputs).logits, handle.places, generate(model, inputs, new=3)
        assert logits.equal(inner(**inputs).logits) and model(**short).logits.equal(logits)
        with model.disable_adapter():
            assert (model(**inputs).logits - logits).abs().max() > 1e-3
        with pytest.raises(AlreadyPatchedError):
            patch(model, 0.5)
    for row, (expected, new) in enumerate(by_hand(inner, inputs, places, new=3)):
        torch.testing.assert_close(logits[row][places[row] >= 0], expected, rtol=0, atol=1e-5)
        assert answer[row, inputs["input_ids"].shape[1] :].tolist() == new
    assert model(**inputs).logits.equal(plain) and "forward" not in vars(inner) and "generate" not in vars(inner)
    assert all(value.equal(state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "options", [{"r": 2}, {"method": "fastv(layer=1)"}, {"method": "visionzip"}, {"method": "tome"}]
)
@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_lora_with_what_works_inside_the_model(part: str, options: dict[str, Any]) -> None:
    """As with the adapter merged into the weights; also through the class that PEFT has for a task."""
    model, inputs = lora(part, task="CAUSAL_LM"), doubled(LLAVA.prompts([1, 2]))
    with patch(model, 0.5, **options):
        logits, answer = model(**inputs).logits, generate(model, inputs, new=3)
    merged = model.merge_and_unload()
    with patch(merged, 0.5, **options):
        torch.testing.assert_close(merged(**inputs).logits, logits, rtol=0, atol=1e-9)
        assert generate(merged, inputs, new=3).equal(answer)


@torch.no_grad()
def test_lora_on_a_patched_model() -> None:
    peft = pytest.importorskip("peft")
    inputs = doubled(LLAVA.prompts([1, 2]))
    first = lora("language")
    expected = first(**compact(first, inputs, keep=0.25)).logits
    model = LLAVA.make(torch.float64)
    model.load_state_dict(_plain_state(first))
    with patch(model, 0.25):
        wrapped = peft.get_peft_model(model, first.peft_config["default"]).eval().double()
        wrapped.load_state_dict(first.state_dict())
        assert wrapped(**inputs).logits.equal(expected)


def _plain_state(model: Any) -> dict[str, Any]:
    inner = model.get_base_model().state_dict()
    return {key.replace(".base_layer", ""): value for key, value in inner.items() if "lora_" not in key}


def test_prompts_that_peft_learns_are_refused() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, num_layers=2, token_dim=32, num_attention_heads=4
    )
    model = peft.get_peft_model(LLAVA.make(), config)
    with pytest.raises(UnsupportedError, match="'default' puts learned tokens in front"):
        patch(model, 0.5)
    with pytest.raises(UnsupportedError, match="'default' puts learned tokens in front"):
        compact(model, {}, keep=0.5)
    assert tokenmerge.handle_of(model.get_base_model(), None) is None


class Int8Linear(nn.Module):
    """A layer as bitsandbytes and its kind put it in the place of `nn.Linear`: no subclass, weights of 8 bits."""

    def __init__(self, of: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = of.in_features, of.out_features, of.bias
        self.scale = nn.Parameter(of.weight.abs().amax(dim=1, keepdim=True) / 127, requires_grad=False)
        self.weight = nn.Parameter((of.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def _replaced(part: nn.Module) -> None:
    for module in list(part.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Int8Linear(child))


def _torchao(part: nn.Module) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(part, torchao.Int8WeightOnlyConfig())


def _weights(part: nn.Module) -> list[Any]:
    return [module.weight for module in part.modules() if hasattr(module, "weight")]


@pytest.fixture(params=[_replaced, _torchao])
def quantised(request: pytest.FixtureRequest) -> Any:
    """A model whose language model has weights of 8 bits."""
    model = LLAVA.make()
    request.param(model.model.language_model)
    assert not all(type(x) is nn.Parameter and x.is_floating_point() for x in _weights(model.model.language_model))
    return model


@torch.no_grad()
def test_a_quantised_language_model_is_left_as_it_is(quantised: Any) -> None:
    model, inputs = quantised, LLAVA.prompts([1, 2])
    weights = _weights(model)
    plain, tokens = model(**inputs).logits, generate(model, inputs, new=4)
    with patch(model, keep=1.0) as handle:
        assert model(**inputs).logits.equal(plain) and generate(model, inputs, new=4).equal(tokens)
        handle.keep = 0.25
        logits, places, answer = model(**inputs).logits, handle.places, generate(model, inputs, new=3)
    assert model(**compact(model, inputs, keep=0.25)).logits.equal(logits)
    for row, (expected, new) in enumerate(by_hand(model, inputs, places, new=3)):
        torch.testing.assert_close(logits[row][places[row] >= 0], expected, rtol=0, atol=1e-4)
        assert answer[row, inputs["input_ids"].shape[1] :].tolist() == new
    assert all(one is other for one, other in zip(weights, _weights(model), strict=True))
    assert model(**inputs).logits.equal(plain) and generate(model, inputs, new=4).equal(tokens)


@pytest.mark.parametrize("method", ["fastv(layer=1)", "visionzip", "tome"])
@torch.no_grad()
def test_what_works_inside_a_quantised_model(quantised: Any, method: str) -> None:
    """As with the same weights in floating point."""
    model, inputs = quantised, LLAVA.prompts([1, 2])
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, Int8Linear) or type(getattr(child, "weight", None)) not in (nn.Parameter, type(None)):
                setattr(module, name, _floating(child))
    outputs = []
    for one in (model, twin):
        with patch(one, 0.5, method=method) as handle:
            outputs.append(one(**inputs).logits)
            assert all(after < before for before, after in handle.visual_tokens)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-4)


def _floating(layer: Any) -> nn.Linear:
    own = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    own.weight = nn.Parameter(
        layer(torch.eye(layer.in_features)).t() - (0 if layer.bias is None else layer.bias[:, None])
    )
    own.bias = layer.bias
    return own
