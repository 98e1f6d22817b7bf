"""Method `fastv`: fewer visual tokens in the later layers of the language model, against masks in the whole one."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import pytest
import torch
from test_videos import prompt as video_prompt
from test_vlm_families import _logits, _longer, generate
from tiny_vlms import FAMILIES, IMAGE, NEWER, VIDEO, doubled
from torch import Tensor

import tokenmerge
from tokenmerge.errors import AlreadyPatchedError, ConfigError, UnsupportedError
from tokenmerge.vlm import compact, patch

transformers = pytest.importorskip("transformers", minversion="4.57")

pytestmark = NEWER
REFUSED = ("qwen3_vl", "gemma3", "aya_vision", "cohere2_vision")
# norms and eager attention are in single precision; PaliGemma's plain logits of a row and of a batch differ as much
ATOL = {"paligemma": 5e-4}
FASTV = [name for name in FAMILIES if name not in REFUSED]


def deep(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a tiny model with four layers in its language model."""
    tiny = FAMILIES[family]
    text = {**tiny.settings["text_config"], "num_hidden_layers": 4}
    text |= {"sliding_window": None} if family == "mistral3" else {}
    return tiny._replace(settings={**tiny.settings, "text_config": text}).make(dtype)


class Slow:
    """A language model in eager attention that never leaves a token out: later layers do not look at some."""

    def __init__(self, model: Any, inputs: dict[str, Any], keep: float, layer: int) -> None:
        self.model, self.inputs, self.keep = copy.deepcopy(model), inputs, keep
        self.model.set_attn_implementation("eager")
        self.base = self.model.base_model
        self.language = getattr(self.base, "language_model", None) or self.base.text_model
        self.seen: dict[str, Any] = {}
        hook = self.language.register_forward_pre_hook(lambda _, args, kw: self.seen.update(kw), with_kwargs=True)
        copied = copy.deepcopy(model)  # its default attention knows padding in double precision
        other = getattr(copied.base_model, "language_model", None) or copied.base_model.text_model
        other.register_forward_pre_hook(lambda _, args, kw: self.seen.update(kw), with_kwargs=True)
        copied(**inputs)
        hook.remove()
        self.dropped: Tensor | None = None
        self.is_visual = torch.zeros(0)
        self.attention = self.language.layers[layer - 1].self_attn
        self.attention.register_forward_hook(self._choose)
        for block in self.language.layers[layer:]:
            block.register_forward_pre_hook(self._look_away, with_kwargs=True)

    def _choose(self, module: Any, args: Any, output: Any) -> None:
        if self.dropped is None:
            row = output[1][0, :, -1].mean(dim=0)
            visual = self.is_visual.nonzero().squeeze(1)
            k = max(1, round(self.keep * len(visual)))
            self.dropped = visual[row[visual].argsort(descending=True, stable=True)[k:]]

    def _look_away(self, module: Any, args: Any, kwargs: Any) -> Any:
        mask = kwargs["attention_mask"].clone()
        mask[..., self.dropped] = torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask}

    def row(self, number: int, new: int) -> tuple[Tensor, Tensor, list[int]]:
        """Return the columns that are left of one row, their logits, and the next greedy tokens."""
        columns = self.inputs["attention_mask"][number].nonzero().squeeze(1)
        ids = self.inputs["input_ids"][number, columns]
        self.is_visual, self.dropped = (ids == IMAGE) | (ids == VIDEO), None
        embeds, positions = self.seen["inputs_embeds"][number : number + 1, columns], self.seen["position_ids"]
        if positions is not None and positions.dim() == 3:
            positions = positions[-3:, number : number + 1, columns]
        else:
            positions = torch.arange(len(columns))[None]
        more = {}
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in self.inputs and positions.dim() == 2:
                more[name] = self.inputs[name][number : number + 1, columns]
        tokens: list[int] = []
        first = None
        while len(tokens) < new:
            logits = _logits(self.model, self.language, embeds, positions, more)
            first = logits if first is None else first
            tokens.append(int(logits[-1].index_fill(0, torch.tensor([IMAGE, VIDEO]), -torch.inf).argmax()))
            embeds, positions, more = _longer(self.base, embeds, positions, more, tokens[-1])
        assert first is not None
        stays = torch.ones(len(columns), dtype=torch.bool)
        stays[self.dropped] = False
        return columns[stays], first[stays], tokens


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("family", FASTV)
@torch.no_grad()
def test_later_layers_do_not_look_at_what_is_left_out(family: str, layer: int) -> None:
    """Logits and greedy tokens, of rows with one and two images, one of which is padded."""
    tiny = FAMILIES[family]
    model, inputs = deep(family, torch.float64), doubled(tiny.prompts([1, 2]))
    with patch(model, 0.25, method=f"fastv(layer={layer})") as handle:
        logits, places = model(**inputs).logits, handle.places
        tokens = generate(model, inputs, new=4)
        assert handle.places.equal(places) and handle.positions == "keep"
        assert handle.visual_tokens == [(n * tiny.tokens, round(n * tiny.tokens / 4)) for n in (1, 2)]
    slow, length = Slow(model, inputs, 0.25, layer), inputs["input_ids"].shape[1]
    for row in range(2):
        columns, expected, new = slow.row(row, 4)
        assert places[row][places[row] >= 0].equal(columns)
        torch.testing.assert_close(logits[row][places[row] >= 0], expected, rtol=0, atol=ATOL.get(family, 3e-5))
        assert tokens[row, length:].tolist() == new


@pytest.mark.parametrize("family", FASTV)
@torch.no_grad()
def test_keeping_everything_is_the_plain_model(family: str) -> None:
    model, inputs = deep(family), FAMILIES[family].prompts([1, 2])
    plain, tokens = model(**inputs).logits, generate(model, inputs)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with patch(model, 1.0, method="fastv") as handle:
        assert model(**inputs).logits.equal(plain) and generate(model, inputs).equal(tokens)
        handle.keep = 0.5
        assert model(**inputs).logits.shape[1] < plain.shape[1]
        assert not generate(model, inputs).equal(tokens) or family in ("internvl", "idefics3", "smolvlm")
        handle.keep = 1.0
        assert generate(model, inputs).equal(tokens)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert model(**inputs).logits.equal(plain) and generate(model, inputs).equal(tokens)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "qwen2_5_vl"])
@torch.no_grad()
def test_videos(family: str) -> None:
    model, inputs = deep(family, torch.float64), video_prompt(family)
    with patch(model, 0.5, method="fastv") as handle:
        logits, places, tokens = model(**inputs).logits, handle.places, generate(model, inputs, new=3)
    slow, length = Slow(model, inputs, 0.5, 2), inputs["input_ids"].shape[1]
    for row in range(2):
        columns, expected, new = slow.row(row, 3)
        assert places[row][places[row] >= 0].equal(columns)
        torch.testing.assert_close(logits[row][places[row] >= 0], expected, rtol=0, atol=ATOL.get(family, 3e-5))
        assert tokens[row, length:].tolist() == new


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "paligemma"])
@torch.no_grad()
def test_every_attention_and_padding_on_either_side(family: str, attention: str) -> None:
    """Rows of the same length and none at all, whose mask transformers leaves out, and rows with padding."""
    model = deep(family)
    for images in ([1], [1, 2]):
        model.set_attn_implementation(attention)
        for pads_right in (False, True):
            inputs = FAMILIES[family].prompts(images, pads_right=pads_right)
            if len(images) == 1 and family != "paligemma":
                del inputs["attention_mask"]
            with patch(model, 0.5, method="fastv") as handle:
                logits, places = model(**inputs).logits, handle.places
                without = model(**inputs, use_cache=False).logits
            assert without.equal(logits)
            inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
            slow = Slow(model, inputs, 0.5, 2)
            for row in range(len(images)):
                columns, expected, _ = slow.row(row, 1)
                assert places[row][places[row] >= 0].equal(columns)
                torch.testing.assert_close(logits[row][places[row] >= 0], expected, rtol=0, atol=ATOL.get(family, 3e-5))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_rows_of_one_length_with_different_numbers_of_images(attention: str) -> None:
    """There is no padding, so transformers leaves the mask out; the shortened rows have some."""
    model = deep("llava")
    model.set_attn_implementation(attention)
    inputs = FAMILIES["llava"].prompts([1, 2])
    inputs["input_ids"][0, inputs["attention_mask"][0] == 0] = 9
    del inputs["attention_mask"]
    with patch(model, 0.25, method="fastv") as handle:
        logits, places, tokens = model(**inputs).logits, handle.places, generate(model, inputs, new=4)
        out = model(**inputs, use_cache=True)
        step = model(input_ids=tokens[:, -4:-3], cache=out.cache).logits[:, -1]
    assert (places < 0).any()
    slow = Slow(model, {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}, 0.25, 2)
    for row in range(2):
        columns, expected, new = slow.row(row, 4)
        assert places[row][places[row] >= 0].equal(columns) and tokens[row, -4:].tolist() == new
        torch.testing.assert_close(logits[row][places[row] >= 0], expected, rtol=0, atol=3e-5)
        assert int(step[row].index_fill(0, torch.tensor([IMAGE, VIDEO]), -torch.inf).argmax()) == new[1]


@torch.no_grad()
def test_merging_in_the_tower_too() -> None:
    model, inputs = deep("llava", torch.float64), doubled(FAMILIES["llava"].prompts([1, 2]))
    with patch(model, 0.5, method="fastv", r=3) as handle:
        logits, places = model(**inputs).logits, handle.places
    with tokenmerge.patched(model, r=3, restore="dense"):
        slow = Slow(model, inputs, 0.5, 2)
        for row in range(2):
            columns, expected, _ = slow.row(row, 1)
            assert places[row][places[row] >= 0].equal(columns)
            torch.testing.assert_close(logits[row][places[row] >= 0], expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"return_dict_in_generate": True, "output_scores": True},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_ways_to_generate(family: str, options: dict[str, Any]) -> None:
    """Each row of a batch says what it says alone."""
    model = deep(family, torch.float64)
    both = doubled(FAMILIES[family].prompts([1, 1], words=3))
    one = {name: x[:1] if len(x) == 2 else x[: len(x) // 2] for name, x in both.items()}
    is_real = one["attention_mask"][0].bool()
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in one:
            one[name] = one[name][:, is_real]
    with patch(model, 0.5, method="fastv"):
        torch.manual_seed(0)
        got = generate(model, both, new=5, **options)
        if "do_sample" in options:
            assert got.shape == (4, both["input_ids"].shape[1] + 5)
            return
        alone = generate(model, one, new=5, **options)
    if "output_scores" in options:
        torch.testing.assert_close(got.scores[3][0], alone.scores[3][0], rtol=0, atol=1e-8)
        got, alone = got.sequences, alone.sequences
    count = len(got) // 2
    assert got[:count, -5:].equal(alone[:, -5:])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_a_second_turn_and_decoding_by_hand(family: str) -> None:
    """Several tokens at once after the cache are the same as one after the other."""
    model, inputs = deep(family, torch.float64), doubled(FAMILIES[family].prompts([1, 2]))
    more = torch.tensor([[11, 12, 13], [14, 15, 16]])
    with patch(model, 0.5, method="fastv") as handle:
        first = generate(model, inputs, new=3, return_dict_in_generate=True)
        whole = torch.cat((first.sequences, more), dim=1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 6), value=1)
        given: dict[str, Any] = {"input_ids": whole, "attention_mask": mask}
        if family != "llava":
            given["mm_token_type_ids"] = (whole == IMAGE).long()
        handle.keep = 1.0  # the prompt in the cache stays short
        second = generate(model, given, new=3, cache=first.cache)
        assert second[:, : whole.shape[1]].equal(whole)
        with pytest.raises(UnsupportedError, match="images are given with a cache that holds a prompt"):
            model(**given, pixel_values=inputs["pixel_values"], cache=first.cache)
        handle.keep = 0.5
        out = model(**inputs, use_cache=True)
        cache, mask = out.cache, inputs["attention_mask"]
        lengths = [cache.get_seq_length(layer) for layer in range(4)]
        assert lengths == [mask.shape[1]] * 2 + [handle.places.shape[1]] * 2
        if family != "llava":
            return  # a plain Qwen takes no tokens after a cache without their positions
        other = copy.deepcopy(cache)
        mask = torch.nn.functional.pad(mask, (0, 3), value=1)
        at_once = model(input_ids=more, attention_mask=mask, cache=cache).logits
        for step in range(3):
            one = model(
                input_ids=more[:, step : step + 1], attention_mask=mask[:, : mask.shape[1] - 2 + step], cache=other
            ).logits
            torch.testing.assert_close(one[:, 0], at_once[:, step], rtol=0, atol=1e-8)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    """Every parameter has the gradient that it has without, also with the older way to checkpoint."""
    model, inputs = deep("llava"), FAMILIES["llava"].prompts([1, 2])
    found = []
    with patch(model, 0.5, method="fastv"):
        for step in range(2):
            model.zero_grad()
            model(**inputs, use_cache=False).logits.square().mean().backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            if step == 0:
                model.train()
                model.enable_input_require_grads()
                model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert found[0].keys() == found[1].keys() and "model.language_model.embed_tokens.weight" in found[0]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@torch.no_grad()
def test_copies_pickles_and_text_alone() -> None:
    model, inputs = deep("llava"), FAMILIES["llava"].prompts([1, 2])
    words = torch.tensor([[5, 6, 7, 8]])
    plain, said = model(input_ids=words).logits, generate(model, {"input_ids": words}, new=3)
    with patch(model, 0.5, method="fastv") as handle:
        pickled = pickle.loads(pickle.dumps(model))  # after a call transformers' own hooks cannot be
        expected = generate(model, inputs, new=4)
        handle.timed = True
        assert generate(model, inputs, new=4).equal(expected)
        seconds = handle.report(time=True).seconds
        assert seconds is not None and seconds["prefill"] > 0 and seconds["decode"] > 0
        assert "FastV(layer=2)" in str(handle.report()) and "48 -> 24" in str(handle.report())
        for other in (copy.deepcopy(model), pickled):
            assert generate(other, inputs, new=4).equal(expected)
            other.forward.handle.remove()
            assert not any("forward" in vars(module) for module in other.modules())
        assert model(input_ids=words).logits.equal(plain)
        assert generate(model, {"input_ids": words}, new=3).equal(said)


def test_what_fastv_cannot_do_is_refused() -> None:
    model, inputs = deep("llava"), FAMILIES["llava"].prompts([1])
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    for options, message in (
        ({"keep": 5}, "fastv ranks all visual tokens of a prompt. Give a share"),
        ({"method": "fastv(layer=4)"}, "after 4 layers, and the language model has 4. Give a layer from 1 to 3"),
        ({"positions": "compact"}, "the first layers have all tokens in fastv"),
    ):
        with pytest.raises(ConfigError, match=message):
            patch(model, **{"keep": 0.5, "method": "fastv", **options})
    with pytest.raises(UnsupportedError, match="leaves tokens out inside the language model, and shorter inputs"):
        compact(model, inputs, keep=0.5, method="fastv")
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    other = copy.deepcopy(model)
    with patch(other, 0.5, method="fastv"):
        other.model.language_model.layers[3] = model.model.language_model.layers[3]
        with pytest.raises(UnsupportedError, match="layers of the LlamaModel were replaced"):
            other(**inputs)
    other.model.language_model = model.model.language_model
    with patch(model, 0.5, method="fastv") as handle:
        attributes = {name: set(vars(module)) for name, module in other.named_modules()}
        with pytest.raises(AlreadyPatchedError, match="in another model that has the same"):
            patch(other, 0.5, method="fastv", r=2)
        assert {name: set(vars(module)) for name, module in other.named_modules()} == attributes
        with pytest.raises(ConfigError, match=r"FastV\(layer=2\) cannot become FastV\(layer=3\): where in the model"):
            handle.method = "fastv(layer=3)"
        with pytest.raises(ConfigError, match="Give a share"):
            handle.keep = 3
        with pytest.raises(UnsupportedError, match="labels are for all tokens of the prompt"):
            model(**inputs, labels=inputs["input_ids"])
        with pytest.raises(UnsupportedError, match="layers may have different lengths, and this one has a Static"):
            generate(model, inputs, new=2, cache_implementation="static")
        with pytest.raises(UnsupportedError, match="goes on with the cache: give use_cache=True"):
            generate(model, inputs, new=2, use_cache=False)
        with pytest.raises(UnsupportedError, match="4 dimensions"):
            model(**{**inputs, "attention_mask": torch.ones(1, 1, 27, 27)})
        for name in ("prefill_chunk_size", "prompt_lookup_num_tokens"):
            with pytest.raises(UnsupportedError, match=f"{name} gives the model the prompt in pieces, or with guesses"):
                generate(model, inputs, new=2, **{name: 3})
        words = {"input_ids": torch.tensor([[5, 6, 7, 5, 6]])}
        assert generate(model, words, new=2, prompt_lookup_num_tokens=2).equal(generate(model, words, new=2))
        assert generate(model, inputs, new=2).shape[1] == inputs["input_ids"].shape[1] + 2
        cache = model(**inputs, use_cache=True).cache
        cache.crop(-3)
        with pytest.raises(UnsupportedError, match="the cache was cut inside the prompt"):
            model(input_ids=torch.tensor([[5]]), cache=cache)
        cache = model(**inputs, use_cache=True).cache
    with patch(model, 0.5), pytest.raises(UnsupportedError, match="shortened after 2 layers of the language model"):
        model(input_ids=torch.tensor([[5]]), cache=cache)


@pytest.mark.parametrize("family", REFUSED)
def test_language_models_that_cannot_are_refused(family: str) -> None:
    model = deep(family) if family != "gemma3" else FAMILIES[family].make()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(UnsupportedError, match=r"fastv cannot work in a \w+: it (has layers with a window|is given)"):
        patch(model, 0.5, method="fastv(layer=1)", r=0)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert "apply_rotary_pos_emb" in vars(sys.modules[type(FAMILIES["llava"].make().model.language_model).__module__])
