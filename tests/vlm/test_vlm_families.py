"""Every family: the plain model when everything is kept, the model on spliced embeddings when it is not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tiny_vlms import FAMILIES, IMAGE, IS_OLD, VIDEO, base_of
from torch import Tensor

import tokenmerge

transformers = pytest.importorskip("transformers", minversion="4.57")


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def generate(model: Any, inputs: dict[str, Any], new: int = 16, **options: Any) -> Tensor:
    out: Tensor = model.generate(**inputs, **{"max_new_tokens": new, "do_sample": False, **options})
    return out


def by_hand(
    model: Any, inputs: dict[str, Any], places: Tensor, new: int = 0, mix: Tensor | None = None
) -> list[tuple[Tensor, list[int]]]:
    """For each row alone: the logits `[m, V]` of the tokens at these places, and the next greedy tokens.

    The embeddings are those that the plain model hands to its language model, where columns are cut out. A `mix`
    `[B, L, L]` says of which tokens each one is the sum before.
    """
    base, seen = base_of(model), {}
    language = getattr(base, "language_model", None) or base.text_model
    hook = language.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model(**inputs)
    hook.remove()
    mask = inputs["attention_mask"]
    mixed = (lambda x: x) if mix is None else (lambda x: mix @ x)
    whole = mixed(seen["inputs_embeds"])
    found = []
    for row in range(len(mask)):
        columns = places[row][places[row] >= 0]
        embeds = whole[row : row + 1, columns]
        positions = seen["position_ids"]
        if positions is not None and positions.dim() == 3:
            positions = positions[-3:, row : row + 1, columns]
        else:  # families without places on a grid are numbered anew
            positions = torch.arange(len(columns))[None]
        more = {}
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in inputs and positions.dim() == 2:
                more[name] = inputs[name][row : row + 1, columns]
        if seen.get("visual_pos_masks") is not None:
            is_visual = seen["visual_pos_masks"]
            planes = [torch.zeros_like(seen["inputs_embeds"]) for _ in seen["deepstack_visual_embeds"]]
            for plane, values in zip(planes, seen["deepstack_visual_embeds"], strict=True):
                plane[is_visual] = values
            planes = [mixed(plane) for plane in planes]
            more["visual_pos_masks"] = is_visual[row : row + 1, columns]
            more["deepstack_visual_embeds"] = [plane[row, columns][more["visual_pos_masks"][0]] for plane in planes]
        tokens: list[int] = []
        for _ in range(new + 1):
            logits = _logits(model, language, embeds, positions, more)
            if len(tokens) == new:
                break
            tokens.append(int(logits[-1].index_fill(0, torch.tensor([IMAGE, VIDEO]), -torch.inf).argmax()))
            embeds, positions, more = _longer(base, embeds, positions, more, tokens[-1])
            if len(tokens) == 1:
                first = logits
        found.append((first if new else logits, tokens))
    return found


def _logits(model: Any, language: Any, embeds: Tensor, positions: Tensor, more: dict[str, Any]) -> Tensor:
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    given = {"inputs_embeds": embeds, "attention_mask": mask, "use_cache": False, **more}
    if positions.dim() == 3:
        text = torch.arange(embeds.shape[1])[None, None]
        rows = (positions,) if IS_OLD and type(language).__name__.startswith("Glm") else (text, positions)
        hidden = language(**given, position_ids=torch.cat(rows))[0]
        logits: Tensor = model.lm_head(hidden)[0]
        return logits
    if IS_OLD and type(language).__name__ == "GemmaModel":  # each token would see those behind it
        is_seen = (more["token_type_ids"] == 0) | torch.ones(embeds.shape[1], embeds.shape[1]).tril().bool()
        given["attention_mask"] = embeds.new_zeros(is_seen.shape).masked_fill(~is_seen, -torch.inf)[None, None]
    return model(**given, position_ids=positions).logits[0]  # type: ignore[no-any-return]


def _longer(base: Any, embeds: Tensor, positions: Tensor, more: dict[str, Any], token: int) -> Any:
    embeds = torch.cat((embeds, base.get_input_embeddings()(torch.tensor([[token]]))), dim=1)
    following = positions.amax() + 1
    positions = torch.cat((positions, following.expand_as(positions[..., -1:])), dim=-1)
    more = dict(more)
    for name in ("token_type_ids", "mm_token_type_ids", "visual_pos_masks"):
        if name in more:
            # to PaliGemma 0 is the prefix, which attends to all of itself
            is_prefix = type(base).__name__ == "PaliGemmaModel"
            more[name] = torch.nn.functional.pad(more[name], (0, 1), value=1 if is_prefix else 0)
    return embeds, positions, more


@torch.no_grad()
def test_keeping_everything_is_the_plain_model(family: str) -> None:
    """Bit for bit: logits and 16 greedy tokens, of rows with one and two images."""
    tiny = FAMILIES[family]
    model, inputs = tiny.make(), tiny.prompts([1, 2])
    plain, tokens = model(**inputs).logits, generate(model, inputs)
    with tokenmerge.vlm.patch(model, keep=1.0) as handle:
        assert model(**inputs).logits.equal(plain)
        assert generate(model, inputs).equal(tokens)
        handle.keep = 0.5
        assert model(**inputs).logits.shape[1] < plain.shape[1]
    assert "generate" not in vars(model) and "forward" not in vars(model)
    assert model(**inputs).logits.equal(plain) and generate(model, inputs).equal(tokens)


@torch.no_grad()
def test_shortening_by_nothing_is_the_plain_model(family: str) -> None:
    """All tokens are chosen, and what works on a shortened prompt works on the same one."""
    tiny = FAMILIES[family]
    model, inputs = tiny.make(), tiny.prompts([1, 1])
    ways: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"do_sample": True}, {"cache_implementation": "static"}]
    plain, expected = model(**inputs).logits, []
    for way in ways:
        torch.manual_seed(1)
        expected.append(generate(model, inputs, new=4, **way))
    with tokenmerge.vlm.patch(model, keep=0.9999), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing was left out
        short = model(**inputs).logits
        own = inputs["attention_mask"].bool()
        torch.testing.assert_close(short[own], plain[own], rtol=0, atol=2e-4)
        for way, tokens in zip(ways, expected, strict=True):
            torch.manual_seed(1)
            assert generate(model, inputs, new=4, **way).equal(tokens), way


@pytest.mark.parametrize("method", ["divprune", "random"])
@torch.no_grad()
def test_fewer_tokens_are_the_model_on_spliced_embeddings(family: str, method: str) -> None:
    """Logits and greedy tokens, of rows with one and two images, one of which is padded."""
    tiny = FAMILIES[family]
    model, inputs = tiny.make(torch.float64), tiny.prompts([1, 2])
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    with tokenmerge.vlm.patch(model, keep=0.5, method=method) as handle:
        logits = model(**inputs).logits
        places = handle.places
        tokens = generate(model, inputs, new=3)
        assert handle.places.equal(places)
        before, after = zip(*handle.visual_tokens, strict=True)
    assert sum(before) == 3 * tiny.tokens and sum(after) < sum(before)
    length = inputs["input_ids"].shape[1]
    assert tokens[:, :length].equal(inputs["input_ids"]) and tokens.shape[1] == length + 3
    for row, (expected, new) in enumerate(by_hand(model, inputs, places, new=3)):
        got = logits[row][places[row] >= 0]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        assert tokens[row, length:].tolist() == new
