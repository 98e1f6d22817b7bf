"""What could go wrong without a word: each is the plain model's answer, that of a shortened prompt, or refused."""

from __future__ import annotations

import copy
import sys
import threading
from typing import Any

import pytest
import torch
from test_vlm_families import by_hand, generate
from tiny_vlms import CACHE, FAMILIES, IMAGE, IS_OLD, NEWER, doubled
from torch import Tensor

import tokenmerge
from tokenmerge.errors import AlreadyPatchedError, ConfigError, DataError, NotPatchedError, UnsupportedError
from tokenmerge.vlm import Chooser, patch
from tokenmerge.vlm.methods import Merged

transformers = pytest.importorskip("transformers", minversion="4.57")

LLAVA, QWEN = FAMILIES["llava"], FAMILIES["qwen2_5_vl"]


@pytest.fixture(params=["llava", "qwen2_5_vl"])
def tiny(request: pytest.FixtureRequest) -> Any:
    return FAMILIES[request.param]


def _first_turn(model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the cache of a first turn, and the prompt of the second."""
    first = generate(model, inputs, new=4, return_dict_in_generate=True)
    whole = torch.cat((first.sequences, torch.tensor([[11, 12, 13], [14, 15, 16]])), dim=1)
    mask = torch.cat((inputs["attention_mask"], torch.ones(2, 7, dtype=torch.long)), dim=1)
    given = {"input_ids": whole, "attention_mask": mask}
    if "mm_token_type_ids" in inputs:
        given["mm_token_type_ids"] = (whole == IMAGE).long()
    return first[CACHE], given


@torch.no_grad()
def test_padding_without_a_mask_is_inferred_as_generate_does(tiny: Any) -> None:
    model, inputs = tiny.make(), tiny.prompts([1, 2])
    bare = {name: x for name, x in inputs.items() if name != "attention_mask"}
    assert generate(model, bare, new=6).equal(generate(model, inputs, new=6))
    with patch(model, 0.5) as handle:
        expected = generate(model, inputs, new=6)
        assert generate(model, bare, new=6).equal(expected)
        config = transformers.GenerationConfig(max_new_tokens=6, do_sample=False)
        assert model.generate(**bare, generation_config=config).equal(expected)
        assert handle.places[0, 0] < 0
        # where it is also the end, padding is not known, and transformers takes all tokens as real
        generate(model, bare, new=2, eos_token_id=[0, 79])
        assert 0 in handle.places[0]


@torch.no_grad()
def test_a_shortened_prompt_goes_on_when_everything_is_kept_later(tiny: Any) -> None:
    model, inputs = tiny.make(), tiny.prompts([1, 2])
    with patch(model, 0.5) as handle:
        cache, given = _first_turn(model, inputs)
        expected = generate(model, given, new=4, **{CACHE: copy.deepcopy(cache)})
        handle.keep = 1.0
        assert generate(model, given, new=4, **{CACHE: cache}).equal(expected)


@NEWER  # 4.57 wants the whole prompt
@torch.no_grad()
def test_new_tokens_alone_with_the_mask_of_all(tiny: Any) -> None:
    model, inputs = tiny.make(), tiny.prompts([1, 2])
    for keep in (1.0, 0.5):
        with patch(model, keep):
            cache, given = _first_turn(model, inputs)
            expected = generate(model, given, new=4, **{CACHE: copy.deepcopy(cache)})[:, -4:]
            new = {"input_ids": given["input_ids"][:, -4:], "attention_mask": given["attention_mask"]}
            assert generate(model, new, new=4, **{CACHE: copy.deepcopy(cache)})[:, 4:].equal(expected)
    with patch(model, 0.5):
        for other in (
            {"input_ids": new["input_ids"]},
            {**new, "attention_mask": new["attention_mask"][:, 1:]},
            {**given, "input_ids": given["input_ids"].clamp_max(60)},
            {"inputs_embeds": torch.zeros(2, 60, 32), "attention_mask": new["attention_mask"]},
        ):
            with pytest.raises(DataError, match=r"begins with a shortened prompt of .* that do not start with it"):
                generate(model, other, new=2, **{CACHE: copy.deepcopy(cache)})


@torch.no_grad()
def test_a_new_image_behind_a_cache(tiny: Any) -> None:
    """Behind images it is refused, also when it is kept whole; behind text that was read before it is shortened."""
    model, inputs = tiny.make(), tiny.prompts([1])
    pixels = {name: x for name, x in inputs.items() if name not in ("input_ids", "attention_mask", "mm_token_type_ids")}
    for before, after in ((0.5, 0.5), (0.5, 1.0), (1.0, 0.5)):
        with patch(model, before) as handle:
            first = generate(model, inputs, new=4, return_dict_in_generate=True)
            ids = torch.cat((first.sequences, inputs["input_ids"]), dim=1)
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
            if "mm_token_type_ids" in inputs:
                given["mm_token_type_ids"] = (ids == IMAGE).long()
            handle.keep = after
            with pytest.raises(UnsupportedError, match=r"a cache that holds a prompt with images.* without the cache"):
                generate(model, given, new=2, **{CACHE: first[CACHE]})
    with patch(model, 0.5) as handle:
        expected = generate(model, inputs, new=4)
        cache = model(input_ids=inputs["input_ids"][:, :3], use_cache=True)[CACHE]
        assert cache.get_seq_length() == 3
        if IS_OLD:
            with pytest.raises(UnsupportedError, match="images behind a cache of text needs transformers 5"):
                generate(model, inputs, new=4, **{CACHE: cache})
            return
        assert generate(model, inputs, new=4, **{CACHE: cache}).equal(expected)
        assert handle.visual_tokens == [(tiny.tokens, tiny.tokens // 2)]


@NEWER
@torch.no_grad()
def test_a_new_image_behind_a_cache_inside_the_model() -> None:
    model, inputs = LLAVA.make(), LLAVA.prompts([1])
    ids = inputs["input_ids"]
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones(1, 3 + ids.shape[1]),
        "pixel_values": inputs["pixel_values"],
    }

    def text() -> Any:
        return model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True)[CACHE]

    expected = model(**given, **{CACHE: text()}).logits
    with patch(model, 0.5, method="fastv(layer=1)") as handle:
        with pytest.raises(UnsupportedError, match=r"would not be shortened.* or set handle\.keep = 1\.0"):
            model(**given, **{CACHE: text()})
        cache = model(**inputs, use_cache=True)[CACHE]
        handle.keep = 1.0
        assert model(**given, **{CACHE: text()}).logits.equal(expected)
        with pytest.raises(UnsupportedError, match=r"would not be shortened.* all of its images\.$"):
            model(**given, **{CACHE: cache})


@torch.no_grad()
def test_embeddings_behind_a_shortened_prompt(tiny: Any) -> None:
    """With the mask of the whole prompt, as ids."""
    model, inputs = tiny.make(), tiny.prompts([1, 2])
    ids = torch.tensor([[11, 12], [13, 14]])
    mask = torch.cat((inputs["attention_mask"], torch.ones(2, 2, dtype=torch.long)), dim=1)
    with patch(model, 0.5):
        cache = model(**inputs, use_cache=True)[CACHE]
        expected = model(input_ids=ids, attention_mask=mask, **{CACHE: copy.deepcopy(cache)}).logits
        embeds = model.get_input_embeddings()(ids)
        assert model(inputs_embeds=embeds, attention_mask=mask, **{CACHE: cache}).logits.equal(expected)


@torch.no_grad()
def test_embeddings_beside_ids_are_a_call_without_images(tiny: Any) -> None:
    model, inputs = tiny.make(), tiny.prompts([1])
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    given["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
    expected = generate(model, given, new=3)
    with patch(model, 0.5):
        assert generate(model, given, new=3).equal(expected)


@torch.no_grad()
def test_each_thread_notes_its_own_prompt() -> None:
    model, prompts = LLAVA.make(), [LLAVA.prompts([number], words=3 + 2 * number) for number in (1, 2, 3)]
    wrong: list[int] = []

    def run(own: dict[str, Any], expected: Tensor) -> None:
        for _ in range(20):
            cache = model(**own, use_cache=True)[CACHE]
            mask = torch.nn.functional.pad(own["attention_mask"], (0, 1), value=1)
            got = model(input_ids=torch.tensor([[5]]), attention_mask=mask, **{CACHE: cache}).logits
            wrong.extend([] if torch.allclose(got, expected, atol=1e-5) else [1])

    with patch(model, 0.5):
        answers: list[Tensor] = []
        for own in prompts:
            cache = model(**own, use_cache=True)[CACHE]
            mask = torch.nn.functional.pad(own["attention_mask"], (0, 1), value=1)
            answers.append(model(input_ids=torch.tensor([[5]]), attention_mask=mask, **{CACHE: cache}).logits)
        threads = [
            threading.Thread(target=_quietly(run, wrong), args=pair) for pair in zip(prompts, answers, strict=True)
        ]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
    assert not wrong


def _quietly(run: Any, wrong: list[int]) -> Any:
    def call(*args: Any) -> None:
        try:
            with torch.no_grad():
                run(*args)
        except Exception:
            wrong.append(1)
            raise

    return call


@torch.no_grad()
def test_positions_of_ones_own() -> None:
    model, inputs = LLAVA.make(torch.float64), doubled(LLAVA.prompts([1]))
    length = inputs["input_ids"].shape[1]
    steps = torch.arange(length)[None]
    packed = {
        "input_ids": inputs["input_ids"].repeat(1, 2),
        "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1),
        "position_ids": steps.repeat(1, 2),
    }
    # transformers itself takes them as two sequences
    torch.testing.assert_close(model(**packed, use_cache=False).logits[:, length:], model(**inputs).logits)
    for options in ({}, {"positions": "keep"}, *(() if IS_OLD else ({"method": "fastv(layer=1)"},))):
        with (
            patch(model, 0.5, **options),
            pytest.raises(UnsupportedError, match="position_ids start again inside a row"),
        ):
            model(**packed, use_cache=False)
    with patch(model, 0.5) as handle:
        expected = model(**inputs).logits
        assert model(**inputs, position_ids=steps).logits.equal(expected)
        with pytest.raises(UnsupportedError, match=r"'compact' numbers tokens anew.* positions='keep'"):
            model(**inputs, position_ids=3 * steps)
    with patch(model, 0.5, positions="keep") as handle:
        logits = model(**inputs, position_ids=3 * steps).logits
        places = handle.places
    short = {**inputs, "attention_mask": inputs["attention_mask"].gather(1, places)}
    seen: dict[str, Any] = {}
    hook = model.model.language_model.register_forward_pre_hook(lambda _, args, kw: seen.update(kw), with_kwargs=True)
    model(**inputs)
    hook.remove()
    embeds = seen["inputs_embeds"][:, places[0]]
    by_self = model(inputs_embeds=embeds, attention_mask=short["attention_mask"], position_ids=3 * places).logits
    torch.testing.assert_close(logits, by_self, rtol=0, atol=1e-10)


def test_placeholders_behind_the_mask_are_refused(tiny: Any) -> None:
    model, inputs = tiny.make(), tiny.prompts([1, 1])
    mask = inputs["attention_mask"].clone()
    mask[0][inputs["input_ids"][0] == IMAGE] = 0
    with patch(model, 0.5), pytest.raises(DataError, match="mask hides placeholders of images that are given"):
        model(**{**inputs, "attention_mask": mask})


def test_a_mask_that_is_no_tensor_and_a_prompt_given_twice() -> None:
    model, inputs = LLAVA.make(), LLAVA.prompts([1])
    with patch(model, 0.5):
        with pytest.raises(UnsupportedError, match="the attention mask is a dict"):
            model(**{**inputs, "attention_mask": {"full_attention": None}})
        with pytest.raises(ValueError, match="passed alongside"):  # transformers' own
            model.generate(inputs["input_ids"].clamp_max(60), **inputs, max_new_tokens=2)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
@torch.no_grad()
def test_limits_of_the_length_in_the_models_configuration() -> None:
    """They hold beside a configuration that says nothing of the length."""
    model, inputs = LLAVA.make(), LLAVA.prompts([1])
    length = inputs["input_ids"].shape[1]
    plain = model.generate(**inputs, do_sample=False).shape[1]
    with patch(model, 0.5):
        assert model.generate(**inputs, do_sample=False).shape[1] == plain  # the default counts new tokens
    model.generation_config.max_length = length + 7
    config = transformers.GenerationConfig(do_sample=False)
    plain = model.generate(**inputs, generation_config=config).shape[1]
    with patch(model, 0.5):
        assert model.generate(**inputs, generation_config=config).shape[1] == plain == length + 7


@torch.no_grad()
def test_r_of_the_tower() -> None:
    model, inputs = LLAVA.make(), LLAVA.prompts([1])
    with patch(model, 0.5, r=2) as handle:
        assert handle.r == 2
        handle.r = 3
        got = model(**inputs).logits
        with pytest.raises(tokenmerge.errors.InvalidScheduleError):
            handle.r = -1
        assert handle.r == 3
    with patch(model, 0.5, r=3):
        assert model(**inputs).logits.equal(got)
    with (
        patch(model, 0.5) as handle,
        pytest.raises(ConfigError, match="r cannot become 3: the tower was patched without"),
    ):
        handle.r = 3
    with patch(model, 0.5, method="tome") as handle, pytest.raises(ConfigError, match="it follows from keep"):
        handle.r = 3


@torch.no_grad()
def test_both_ways_to_patch_and_to_unpatch() -> None:
    model, inputs = LLAVA.make(), LLAVA.prompts([1])
    plain, before = model(**inputs).logits, {name: dict(vars(module)) for name, module in model.named_modules()}
    with patch(model, 0.5):
        with pytest.raises(AlreadyPatchedError, match=r"is patched by tokenmerge\.vlm\. .* merges in the tower too"):
            tokenmerge.patch(model, r=3)
        for function in (tokenmerge.unpatch, tokenmerge.handle_of):
            with pytest.raises(
                NotPatchedError, match=r"patched by tokenmerge\.vlm: its handle is model\.forward\.handle"
            ):
                function(model)
        tokenmerge.supports(model)  # patches for a moment, and would take out both
        assert model(**inputs).logits.shape[1] < plain.shape[1]
    for take_out in (tokenmerge.unpatch, lambda model: tokenmerge.handle_of(model).remove()):
        with patch(model, 0.5, r=2) as handle:
            take_out(model)
            with pytest.raises(NotPatchedError, match="removed before"):
                handle.remove()
        assert model(**inputs).logits.equal(plain)
        assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


@NEWER
@torch.no_grad()
def test_a_base_model_is_warned_of_what_generate_gives_it() -> None:
    model, inputs = LLAVA.make(), LLAVA.prompts([1])
    plain = generate(model, inputs, new=3)
    with patch(model.model, 0.5) as handle:
        with pytest.warns(UserWarning, match="the images were encoded before .* patch the whole model"):
            assert generate(model, inputs, new=3).equal(plain)
        model.model(**inputs)
        assert handle.visual_tokens == [(16, 8)]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([[1.0] * 16] * 8, "weights in a list"),
        (torch.ones(8, 16, dtype=torch.complex64), "weights of torch.complex64"),
        (torch.ones(8, 16).bool(), "weights of torch.bool"),
        (torch.full((8, 16), torch.nan), "weights that are not finite"),
    ],
    ids=range(4),
)
@torch.no_grad()
def test_weights_of_ones_own_method(weights: Any, message: str) -> None:
    class Own(Chooser):
        name = "own"

        def choose(self, visual: Any, k: int) -> Any:
            return Merged(torch.arange(k), weights)

    model, inputs = LLAVA.make(), LLAVA.prompts([1])
    with patch(model, 0.5, method=Own()), pytest.raises(DataError, match=f"own was to choose 8 .* returned {message}"):
        model(**inputs)


@pytest.mark.parametrize("method", ["divprune", "visionzip", "cdpruner", "dart", "random", "uniform"])
@torch.no_grad()
def test_saved_and_loaded_trained_and_cast(method: str, tmp_path: Any) -> None:
    """A patched model is saved as the plain one; training and another type keep the tokens."""
    model, inputs = LLAVA.make(), LLAVA.prompts([1, 2])
    plain = model(**inputs).logits
    with patch(model, 0.5, method=method) as handle:
        short, places = model(**inputs).logits, handle.places
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).eval()
        assert loaded(**inputs).logits.equal(plain) and "forward" not in vars(loaded)
        model.train()
        torch.testing.assert_close(model(**inputs).logits, short)  # there is no dropout
        model.eval().double()
        torch.testing.assert_close(model(**doubled(inputs)).logits.float(), short, rtol=0, atol=1e-4)
        assert handle.places.equal(places)
    if method != "visionzip":  # which merges
        for row, (expected, _) in enumerate(by_hand(model.float(), inputs, places)):
            torch.testing.assert_close(short[row][places[row] >= 0], expected, rtol=0, atol=2e-5)
