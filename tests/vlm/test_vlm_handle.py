"""The handle: calls in every form, what it tells, what it refuses, and taking it back."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from test_vlm_families import by_hand, generate
from tiny_vlms import CACHE, FAMILIES, IMAGE, IS_OLD, NEWER, VIDEO, doubled, encoded, squares
from torch import Tensor, nn

import tokenmerge
from tokenmerge.errors import (
    AlreadyPatchedError,
    ConfigError,
    DataError,
    NotPatchedError,
    NotTrackedError,
    UnknownNameError,
    UnsupportedError,
    UnsupportedModelError,
)
from tokenmerge.vlm import Chooser, compact, patch
from tokenmerge.vlm.methods import Merged

transformers = pytest.importorskip("transformers", minversion="4.57")

LLAVA, QWEN = FAMILIES["llava"], FAMILIES["qwen2_5_vl"]


@pytest.fixture(params=["llava", "qwen2_5_vl"])
def tiny(request: pytest.FixtureRequest) -> Any:
    return FAMILIES[request.param]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True},
        {"do_sample": True, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"repetition_penalty": 1.3},
        {"return_dict_in_generate": True, "output_scores": True},
    ],
    ids=lambda options: "-".join(options),
)
@torch.no_grad()
def test_every_way_to_generate_goes_on_from_the_short_prompt(tiny: Any, options: dict[str, Any]) -> None:
    """What follows the prompt is what the unpatched model says after the shortened one."""
    if IS_OLD and "repetition_penalty" in options:
        pytest.skip("4.57 cannot be told the ids of embeddings, so there is nothing to compare with")
    model, inputs = tiny.make(), tiny.prompts([1, 2])
    expected, m = after_the_short_prompt(model, inputs, options)
    with patch(model, 0.5):
        torch.manual_seed(3)
        got = generate(model, inputs, new=5, **options)
    if "return_dict_in_generate" in options:
        assert len(got.scores) == 5
        torch.testing.assert_close(got.scores[0], expected.scores[0], rtol=0, atol=1e-4 if IS_OLD else 0)
        got, expected = got.sequences, expected.sequences
    length = inputs["input_ids"].shape[1]
    assert m < length and got.shape == (len(expected), length + 5)
    assert got[:, length:].equal(expected[:, -5:])
    assert got[:, :length].equal(inputs["input_ids"].repeat_interleave(len(got) // 2, dim=0))


def after_the_short_prompt(model: Any, inputs: dict[str, Any], options: dict[str, Any]) -> tuple[Any, int]:
    """Return what the unpatched model generates after half of the visual tokens, and the length of that prompt."""
    if not IS_OLD:
        short = compact(model, inputs, keep=0.5)
        torch.manual_seed(3)
        return generate(model, short, new=5, **options), short["input_ids"].shape[1]
    # 4.57: the embeddings and positions that it gives its language model, at the places that are kept
    with patch(model, 0.5) as handle:
        model(**inputs)
        places, seen = handle.places, {}
    hook = model.model.language_model.register_forward_pre_hook(lambda _, args, kw: seen.update(kw), with_kwargs=True)
    model(**inputs)
    hook.remove()
    rows, m = torch.arange(2)[:, None], places.shape[1]
    short = {"inputs_embeds": seen["inputs_embeds"][rows, places.clamp_min(0)], "attention_mask": (places >= 0).long()}
    if hasattr(model.model, "get_rope_index"):
        own = seen["position_ids"][:, rows, places.clamp_min(0)]
        deltas = own.amax(dim=(0, 2))[:, None] + 1 - m
        beams = options.get("num_beams", options.get("num_return_sequences", 1))
        model.model.get_rope_index = lambda *_, **__: [x.repeat_interleave(beams, dim=-2) for x in (own, deltas)]
    torch.manual_seed(3)
    out = generate(model, short, new=5, **{**options, "use_cache": True})  # without it, embeddings are lost
    vars(model.model).pop("get_rope_index", None)
    return out, m


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_every_attention_and_padding_on_either_side(tiny: Any, attention: str) -> None:
    # in double precision transformers' own eager attention makes NaN of padding
    model = tiny.make(torch.float64 if attention == "sdpa" else torch.float32)
    model.set_attn_implementation(attention)
    for pads_right in (False, True):
        inputs = tiny.prompts([1, 2], pads_right=pads_right)
        inputs = doubled(inputs) if attention == "sdpa" else inputs
        with patch(model, 0.5) as handle:
            logits, places = model(**inputs).logits, handle.places
        for row, (expected, _) in enumerate(by_hand(model, inputs, places)):
            torch.testing.assert_close(logits[row][places[row] >= 0], expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_gaps_in_positions_do_not_cut_the_attention() -> None:
    """Without a cache and a mask, transformers reads a gap as the start of another sequence."""
    model, inputs = LLAVA.make(torch.float64), doubled(LLAVA.prompts([1]))
    del inputs["attention_mask"]
    with patch(model, 0.5, positions="keep") as handle:
        logits, places = model(**inputs, use_cache=False).logits, handle.places
        kept = model(**inputs).logits
    torch.testing.assert_close(logits, kept, rtol=0, atol=1e-10)
    assert (places[0].diff() > 1).any()
    if IS_OLD:  # nothing is compacted there
        return
    short = compact(model, inputs, keep=0.5, positions="keep")
    assert short["position_ids"].equal(places)
    # the trap itself: the same call without the mask
    del short["attention_mask"]
    assert (model(**short, use_cache=False).logits - kept).abs().max() > 1e-3


@torch.no_grad()
def test_positions_kept_or_numbered_anew(tiny: Any) -> None:
    model, inputs = tiny.make(torch.float64), doubled(tiny.prompts([1]))
    with patch(model, 0.5) as handle:
        one = model(**inputs).logits
        assert handle.positions == ("compact" if tiny is LLAVA else "keep")
    if tiny is QWEN:
        with pytest.raises(ConfigError, match="places visual tokens on the image's grid"):
            patch(model, 0.5, positions="compact")
        return
    with patch(model, 0.5, positions="keep"):
        other = model(**inputs).logits
    assert (one - other).abs().max() > 1e-4


@torch.no_grad()
def test_a_second_turn_goes_on_with_the_cache(tiny: Any) -> None:
    model, inputs = tiny.make(), tiny.prompts([1, 2])
    more = torch.tensor([[11, 12, 13], [14, 15, 16]])
    with patch(model, 0.5) as handle:
        first = generate(model, inputs, new=4, return_dict_in_generate=True)
        cache = first[CACHE]
        whole = torch.cat((first.sequences, more), dim=1)
        mask = torch.cat((inputs["attention_mask"], torch.ones(2, 7, dtype=torch.long)), dim=1)
        given: dict[str, Any] = {"input_ids": whole, "attention_mask": mask}
        if tiny is QWEN and not IS_OLD:
            given["mm_token_type_ids"] = (whole == IMAGE).long()
        second = generate(model, given, new=4, **{CACHE: cache})
        # all of it again, without the cache
        pixels = {name: inputs[name] for name in inputs if name not in given and name != "mm_token_type_ids"}
        again = generate(model, {**given, **pixels}, new=4)
        assert len(handle.visual_tokens) == 3
        # the same after a call of the model itself, and one of more rows between them
        cache = model(**inputs, use_cache=True)[CACHE]
        generate(model, tiny.prompts([1, 1, 1]), new=2)
        straight = generate(model, given, new=4, **{CACHE: cache})
    assert straight.equal(second)
    assert second[:, : whole.shape[1]].equal(whole)
    assert second.equal(again)


@torch.no_grad()
def test_decoding_by_hand_needs_no_arithmetic(tiny: Any) -> None:
    """A loop of one's own, with the mask of the whole prompt."""
    model, inputs = tiny.make(), tiny.prompts([1, 2])
    with patch(model, 0.5):
        expected = generate(model, inputs, new=4)[:, -4:]
        out = model(**inputs, use_cache=True)
        mask, tokens = inputs["attention_mask"], []
        for _ in range(4):
            # as generate leaves out the placeholders
            tokens.append(out.logits[:, -1:].index_fill(-1, torch.tensor([IMAGE, VIDEO]), -torch.inf).argmax(-1))
            mask = torch.cat((mask, mask.new_ones(2, 1)), dim=1)
            out = model(input_ids=tokens[-1], attention_mask=mask, **{CACHE: out[CACHE]})
    assert torch.cat(tokens, dim=1).equal(expected)


@torch.no_grad()
def test_a_cache_of_ones_own_is_remembered_and_takes_no_new_images(tiny: Any) -> None:
    model, inputs = tiny.make(), tiny.prompts([1])
    with patch(model, 0.5) as handle:
        expected = generate(model, inputs, new=2)[:, -2:]
        cache = transformers.DynamicCache(config=model.config.get_text_config())
        model(**inputs, **{CACHE: cache}, use_cache=True)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        given = {"input_ids": expected[:, :1], "attention_mask": mask, CACHE: cache}
        with pytest.raises(UnsupportedError, match=r"images are given with a cache .* handle\.keep = 1\.0"):
            model(**given, pixel_values=inputs["pixel_values"])
        logits = model(**given).logits[:, -1]
        assert logits.index_fill(-1, torch.tensor([IMAGE, VIDEO]), -torch.inf).argmax(-1).equal(expected[:, 1])
        assert handle.visual_tokens


@pytest.mark.parametrize("method", ["divprune", pytest.param("fastv(layer=1)", marks=NEWER)])
@torch.no_grad()
def test_caches_that_are_copied_emptied_or_repeated(method: str) -> None:
    """A copy goes on like the cache itself, and an emptied one has forgotten its prompt."""
    model, inputs = LLAVA.make(torch.float64), doubled(LLAVA.prompts([1, 2]))
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
    turn = {"input_ids": torch.tensor([[7, 8], [9, 5]]), "attention_mask": mask}
    words = {"input_ids": torch.arange(5, 65).view(2, 30)}
    with patch(model, 0.5, method=method):
        cache = model(**inputs, use_cache=True)[CACHE]
        copied, repeated, emptied = (copy.deepcopy(cache) for _ in range(3))
        expected = model(**turn, **{CACHE: cache}).logits
        assert model(**turn, **{CACHE: copied}).logits.equal(expected)
        repeated.batch_repeat_interleave(2)
        with pytest.raises(UnsupportedError, match="the cache begins with 4 shortened prompts, and 2 rows go on"):
            model(**turn, **{CACHE: repeated})
        logits = model(**{name: x.repeat_interleave(2, dim=0) for name, x in turn.items()}, **{CACHE: repeated}).logits
        torch.testing.assert_close(logits, expected.repeat_interleave(2, dim=0))
        for layer in emptied.layers:
            layer.crop(-layer.get_seq_length())
        plain = model(**words, use_cache=True)[CACHE]
        model(**words, **{CACHE: emptied})
        for _ in range(2):
            logits = model(input_ids=turn["input_ids"], **{CACHE: emptied}).logits
            assert logits.equal(model(input_ids=turn["input_ids"], **{CACHE: plain}).logits)


@torch.no_grad()
def test_calls_without_images_are_the_original_ones(tiny: Any) -> None:
    model, words = tiny.make(), torch.tensor([[5, 6, 7, 8]])
    plain, tokens = model(input_ids=words).logits, generate(model, {"input_ids": words}, new=4)
    with patch(model, 0.5) as handle:
        assert model(input_ids=words).logits.equal(plain)
        assert model.generate(words, max_new_tokens=4, do_sample=False).equal(tokens)
        assert model(words).logits.equal(plain)
        with pytest.raises(NotTrackedError):
            print(handle.visual_tokens)


@torch.no_grad()
def test_what_the_handle_tells(tiny: Any) -> None:
    model, inputs = tiny.make(), tiny.prompts([1, 2])
    n = tiny.tokens
    with patch(model, 3) as handle:
        generate(model, inputs, new=2)
        assert handle.visual_tokens == [(n, 3)] * 3
        side = 4 if tiny is LLAVA else 3
        assert all(places.shape == (3, 3) for places in handle.kept)
        # in the row with one image, the tokens of the prompt that are its placeholders
        start = int((inputs["input_ids"][0] == IMAGE).nonzero()[0])
        columns = handle.places[0][(handle.places[0] >= start) & (handle.places[0] < start + n)]
        assert (handle.kept[0][:, 1] * side + handle.kept[0][:, 2]).equal(columns - start)
        report = handle.report()
        assert f"{3 * n} -> 9, in 3 images" in str(report) and "DivPrune()" in str(report)
        with pytest.raises(NotTrackedError, match=r"handle\.timed = True"):
            handle.report(time=True)
        handle.timed = True
        generate(model, inputs, new=2)
        seconds = handle.report(time=True).seconds
        assert seconds is not None and all(seconds[part] > 0 for part in ("tower", "choose", "prefill", "decode"))
        handle.keep = 0.25
        model(**inputs)
        assert handle.visual_tokens == [(n, round(n / 4))] * 3


@torch.no_grad()
def test_the_handle_holds_no_features(tiny: Any) -> None:
    """A tower's outputs of all layers are larger than all the rest."""
    model, inputs = tiny.make(), tiny.prompts([1, 2])
    with patch(model, 0.5) as handle:
        out = model(**inputs)
        assert handle._last is not None and "mm_encoder_outputs" not in handle._last.inputs
        held = {value.data_ptr() for value in handle._last.inputs.values()}
        assert held and all(value.dtype == torch.int64 for value in handle._last.inputs.values())
        assert IS_OLD or out.image_outputs is not None


@torch.no_grad()
def test_labels_follow_the_tokens() -> None:
    model, inputs = LLAVA.make(), LLAVA.prompts([1, 2])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    with patch(model, 0.5) as handle:
        out, places = model(**inputs, labels=labels), handle.places
    own = labels.gather(1, places.clamp_min(0)).masked_fill(places < 0, -100)
    expected = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), own[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss, expected)


def test_removing_leaves_nothing_behind(tiny: Any) -> None:
    model = tiny.make()
    before, state = dict(vars(model)), copy.deepcopy(model.state_dict())
    handle = patch(model, 0.5)
    handle.remove()
    assert vars(model) == before and all(value.equal(state[key]) for key, value in model.state_dict().items())
    with pytest.raises(NotPatchedError):
        handle.remove()


@torch.no_grad()
def test_merging_in_the_tower_too() -> None:
    model, inputs = LLAVA.make(), LLAVA.prompts([1, 2])
    twin = copy.deepcopy(model)
    tokenmerge.patch(twin, r=3, restore="dense")
    features = torch.stack(list(encoded(twin, pixel_values=inputs["pixel_values"])))
    plain = torch.stack(list(encoded(model, pixel_values=inputs["pixel_values"])))
    assert (features - plain).abs().max() > 1e-3
    with patch(model, 0.5, r=3) as handle:
        assert handle.tower is not None and handle.tower.r == 3
        got = torch.stack(list(encoded(model, pixel_values=inputs["pixel_values"])))
        assert got.equal(features)
        generate(model, inputs, new=2)
        assert "in the tower" in str(handle.report())
    with patch(model, 1.0, r=3):
        merged = model(**inputs).logits
    torch.testing.assert_close(merged, twin(**inputs).logits)
    assert model(**inputs).logits.ne(merged).any() and tokenmerge.handle_of(model, None) is None


@torch.no_grad()
def test_copies_and_pickles_of_a_patched_model_are_patched(tiny: Any) -> None:
    model, inputs = tiny.make(), tiny.prompts([1, 2])
    with patch(model, 0.5):
        # after a call transformers' own hooks cannot be pickled
        others = [pickle.loads(pickle.dumps(model))]
        expected = generate(model, inputs, new=4)
        others.append(copy.deepcopy(model))
        for other in others:
            assert generate(other, inputs, new=4).equal(expected)
            handle = other.forward.handle
            assert handle.model is other and handle.visual_tokens
            handle.remove()
            assert "forward" not in vars(other) and "generate" not in vars(other)
        assert generate(model, inputs, new=4).equal(expected)


@torch.no_grad()
def test_two_conversations_keep_their_own_prompts(tiny: Any) -> None:
    """Prompts of two prefills, decoded in turn, and a call without images between them."""
    model, one, two = tiny.make(), tiny.prompts([1]), tiny.prompts([2])
    with patch(model, 0.5):
        expected = [generate(model, inputs, new=2)[:, -2:] for inputs in (one, two)]
        outs = [model(**inputs, use_cache=True) for inputs in (one, two)]
        model(input_ids=torch.tensor([[5, 6, 7]]))
        for inputs, out, tokens in zip((one, two), outs, expected, strict=True):
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
            logits = model(input_ids=tokens[:, :1], attention_mask=mask, **{CACHE: out[CACHE]}).logits[:, -1]
            assert logits.index_fill(-1, torch.tensor([IMAGE, VIDEO]), -torch.inf).argmax(-1).equal(tokens[:, 1])


def test_an_unsupported_tower_changes_nothing() -> None:
    model = QWEN.make()
    before = dict(vars(model))
    with pytest.raises(UnsupportedModelError):
        patch(model, 0.5, r=3)
    assert vars(model) == before


@pytest.mark.parametrize("keep", [0, 0.0, -1, 1.5, True, "all", None, float("nan")])
def test_a_keep_that_is_none(keep: Any) -> None:
    model = LLAVA.make()
    with pytest.raises(ConfigError, match="Give a share of the visual tokens"):
        patch(model, keep)
    with pytest.raises(ConfigError, match="Give a share of the visual tokens"):
        compact(model, {}, keep=keep)
    with patch(model, 0.5) as handle, pytest.raises(ConfigError):
        handle.keep = keep


def _without(name: str) -> Any:
    return lambda inputs: {key: value for key, value in inputs.items() if key != name}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_without("pixel_values"), DataError, "placeholders of images, and no images are given"),
        (lambda x: {**x, "input_ids": x["input_ids"].clamp_max(60)}, DataError, "has 0 placeholders .* 3 images"),
        (
            lambda x: {**x, **squares([1, 1])},
            DataError,
            "has 48 placeholders for images, and the 2 images .* 32 tokens",
        ),
        (
            lambda x: {**_without("input_ids")(x), "inputs_embeds": torch.zeros(2, 9, 32)},
            UnsupportedError,
            "inputs_embeds",
        ),
        (lambda x: {**x, "attention_mask": torch.ones(2, 1, 40, 40)}, UnsupportedError, "4 dimensions"),
        (lambda x: {**x, "attention_mask": x["attention_mask"][:, 1:]}, DataError, "they must be equal"),
        (lambda x: {**x, "mm_encoder_outputs": {"image": object()}}, UnsupportedError, "encoded already"),
    ],
    ids=["no-images", "no-places", "other-number", "embeds", "mask", "mask-length", "encoded"],
)
def test_inputs_that_do_not_fit(change: Any, error: type[Exception], message: str) -> None:
    model, inputs = LLAVA.make(), LLAVA.prompts([1, 2])
    with patch(model, 0.5) as handle:
        for call in (model, lambda **given: model.generate(**given, max_new_tokens=2)):
            with pytest.raises(error, match=message):
                call(**change(inputs))
        model(**inputs)
        assert len(handle.visual_tokens) == 3


def test_more_tokens_than_there_are() -> None:
    model, inputs = LLAVA.make(), LLAVA.prompts([1])
    with patch(model, 17), pytest.raises(DataError, match="keep is 17, and an image has 16 tokens"):
        model(**inputs)


def test_models_that_are_none_of_them() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, MllamaConfig

    with pytest.raises(
        UnsupportedModelError, match=r"'llama'.* is no vision-language model of a known family. Known: llava"
    ):
        patch(LlamaForCausalLM(LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)))
    with pytest.raises(UnsupportedModelError, match="is no vision-language model"):
        patch(nn.Linear(2, 2))
    model = nn.Linear(2, 2)
    model.config = MllamaConfig()  # type: ignore[assignment]
    with pytest.raises(UnsupportedModelError, match=r"'mllama' .* cross-attention"):
        patch(model)


def test_an_older_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old(nn.Module):
        """As a LLaVA of transformers before 5.24."""

        config = transformers.LlavaConfig()
        base_model = None

        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            return input_ids

    monkeypatch.setattr("tokenmerge.vlm.releases._version", lambda: "5.20.1")
    with pytest.raises(
        UnsupportedModelError, match=r"transformers 5\.20\.1 takes no encoded .* 5\.24 or newer, or 4\.57"
    ):
        patch(Old())


@pytest.mark.skipif(not IS_OLD, reason="works on transformers 5.24")
def test_what_needs_a_newer_transformers_is_refused(tiny: Any) -> None:
    """By name, with the reason and both versions; nothing is changed."""
    model, inputs, versions = (
        tiny.make(),
        tiny.prompts([1]),
        r"needs transformers 5\.24 or newer, and this is 4\.57\.\d+",
    )
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(UnsupportedError, match=rf"fastv, which works inside the language model, {versions}"):
        patch(model, 0.5, method="fastv(layer=1)")
    with pytest.raises(UnsupportedError, match=rf"takes encoded images .* {versions}. Use tokenmerge\.vlm\.patch"):
        compact(model, inputs, keep=0.5)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    with patch(model, 0.5):
        for name, value in (("assistant_model", copy.deepcopy(model)), ("prefill_chunk_size", 4)):
            with pytest.raises(UnsupportedError, match=rf"{name} with fewer visual tokens {versions}"):
                generate(model, inputs, new=2, **{name: value})
        # guesses from the prompt are no trouble
        assert generate(model, inputs, new=4, prompt_lookup_num_tokens=2).equal(generate(model, inputs, new=4))


def test_patching_twice_and_unknown_methods() -> None:
    model = LLAVA.make()
    with pytest.raises(UnknownNameError, match=r"'divprun'.* Did you mean 'divprune'"):
        patch(model, 0.5, method="divprun")
    with pytest.raises(ConfigError, match="positions is 'new'; allowed: keep, compact"):
        patch(model, 0.5, positions="new")
    with patch(model, 0.5), pytest.raises(AlreadyPatchedError):
        patch(model, 0.5)
    with tokenmerge.patched(model, r=2), pytest.raises(AlreadyPatchedError):
        patch(model, 0.5)


@torch.no_grad()
def test_a_call_in_which_nothing_was_left_out_says_so() -> None:
    model, inputs = LLAVA.make(), LLAVA.prompts([1])
    for method in ("evs", *(() if IS_OLD else ("fastv(layer=1)",))):
        _says_so(model, inputs, method)


def _says_so(model: Any, inputs: dict[str, Any], method: str) -> None:
    keep = 0.5 if method == "evs" else 0.99
    with patch(model, keep, method=method) as handle, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model(**inputs)
        assert handle.visual_tokens == [(16, 16)]
        assert any(
            f"nothing was left out: {handle.method.name} kept all tokens" in str(warning.message) for warning in seen
        )
        assert "nothing was left out" in str(handle.report())


@NEWER
@torch.no_grad()
def test_images_that_were_encoded_before_are_left_as_they_are_and_it_is_said(tiny: Any) -> None:
    model, inputs = tiny.make(), tiny.prompts([1])
    short = compact(model, inputs, keep=0.5)
    expected = model(**short).logits
    with patch(model, 0.25) as handle:
        assert model(**short).logits.equal(expected)
        assert "the images were encoded before (mm_encoder_outputs)" in str(handle.report())


@NEWER
@torch.no_grad()
def test_compacting_changes_neither_the_model_nor_the_inputs(tiny: Any) -> None:
    model, inputs = tiny.make(), tiny.prompts([1, 2])
    before = {name: x.clone() for name, x in inputs.items()}
    model(**inputs)  # transformers hooks its tower at the first call
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    short = compact(model, inputs, keep=0.5)
    assert all(x.equal(before[name]) for name, x in inputs.items()) and inputs.keys() == before.keys()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == attributes
    assert "pixel_values" not in short
    with patch(model, 0.5):
        expected = generate(model, inputs, new=4)[:, -4:]
    assert generate(model, short, new=4)[:, -4:].equal(expected)


@pytest.mark.parametrize("layer", [0, pytest.param(1, marks=NEWER)])
@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "returned NoneType"),
        (torch.arange(16) < 8, r"returned torch.bool \[16\]"),
        (torch.arange(0), r"returned \[\]"),
        (torch.tensor([1, 1, 2]), r"returned \[1, 1, 2\]"),
        (torch.tensor([2, 1]), r"returned \[2, 1\]"),
        (torch.tensor([-1, 3]), r"returned \[-1, 3\]"),
        (torch.tensor([3, 16]), r"returned \[3, 16\]"),
        (Merged(torch.tensor([3, 5]), torch.ones(2, 3)), r"returned weights \[2, 3\] for 2 of 16 tokens"),
    ],
    ids=range(8),
)
@torch.no_grad()
def test_a_method_of_ones_own_that_returns_something_else(found: Any, message: str, layer: int) -> None:
    class Own(Chooser):
        name = "own"
        inside = layer

        def choose(self, visual: Any, k: int) -> Any:
            return found

    model, inputs = LLAVA.make(), LLAVA.prompts([1])
    with patch(model, 0.5, method=Own()), pytest.raises(DataError, match=f"own was to choose 8 of 16 .* {message}"):
        model(**inputs)


@pytest.mark.parametrize("method", ["divprune", pytest.param("fastv(layer=1)", marks=NEWER)])
@torch.no_grad()
def test_logits_at_places_are_refused(method: str) -> None:
    """The places are those of the whole prompt, and others come out."""
    model, inputs = LLAVA.make(torch.float64), doubled(LLAVA.prompts([1, 2]))
    with patch(model, 0.5, method=method):
        whole = model(**inputs).logits
        torch.testing.assert_close(model(**inputs, logits_to_keep=3).logits, whole[:, -3:])
        with pytest.raises(UnsupportedError, match="logits_to_keep names places in the prompt, which is shortened"):
            model(**inputs, logits_to_keep=torch.tensor([10]))


@pytest.mark.parametrize("method", ["divprune", "visionzip"])
def test_generating_keeps_no_graph_of_the_tower(method: str) -> None:
    """Also for an assistant, which gets a copy of the encoded images: a tensor with a graph cannot be copied."""
    model, inputs = LLAVA.make(torch.float64), doubled(LLAVA.prompts([1]))
    with patch(model, 0.5, method=method):
        expected = generate(model, inputs, new=6)
        if not IS_OLD:
            assert generate(model, inputs, new=6, assistant_model=copy.deepcopy(model)).equal(expected)


@torch.no_grad()
def test_limits_of_the_length_count_the_whole_prompt() -> None:
    model, inputs = LLAVA.make(), LLAVA.prompts([1])
    length = inputs["input_ids"].shape[1]
    with patch(model, 0.5):
        assert model.generate(**inputs, max_length=length + 3, do_sample=False).shape[1] == length + 3
        config = transformers.GenerationConfig(max_length=length + 5, do_sample=False)
        assert model.generate(**inputs, generation_config=config).shape[1] == length + 5


@torch.no_grad()
def test_one_image_or_prompt_with_text_after_it_only(tiny: Any) -> None:
    model, inputs = tiny.make(), tiny.prompts([0, 1])
    with patch(model, 1) as handle:
        tokens: Tensor = generate(model, inputs, new=2)
        assert handle.visual_tokens == [(tiny.tokens, 1)] and tokens.shape[1] == inputs["input_ids"].shape[1] + 2
