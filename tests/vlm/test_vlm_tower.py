"""Methods that read the vision tower, against its whole attention map, in every family."""

from __future__ import annotations

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from test_choosers import slow_visionzip
from test_videos import prompt as video_prompt
from test_vlm_families import by_hand, generate
from tiny_vlms import CLIP, FAMILIES, IMAGE, IS_OLD, SIGLIP, VISION, base_of, doubled, encoded, family_of
from torch import Tensor

import tokenmerge
from tokenmerge.errors import ConfigError, UnsupportedError
from tokenmerge.vlm import compact, patch
from tokenmerge.vlm.encode import encode
from tokenmerge.vlm.methods import VisionZip

transformers = pytest.importorskip("transformers", minversion="4.57")

VISIONZIP = VisionZip()
PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
LAYER = {"llava": -2, "llava_next": -2}  # the layer whose output the features are; the last in other families


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def hooks_of(base: Any) -> list[dict[int, Any]]:
    return [dict(hooks) for module in base.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)]


def read_slowly(
    model: Any, inputs: dict[str, Any], layer: int, monkeypatch: pytest.MonkeyPatch, kind: str = "image"
) -> tuple[Tensor, Tensor]:
    """Return attention `[V]` and keys `[V, D]` of all visual tokens: from the whole map of eager attention.

    Which of the tower's tokens make a visual token is what its gradient says. Newlines have zeros.
    """
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    base = base_of(model)
    tower = next(getattr(base, name) for name in ("vision_tower", "vision_model", "visual") if hasattr(base, name))
    name, attention = [(n, x) for n, x in tower.named_modules() if hasattr(x, "qkv") or hasattr(x, "q_proj")][layer]
    source, maps, seen = sys.modules[type(attention).__module__], [], {}
    plain = source.eager_attention_forward

    def recorded(module: Any, *args: Any, **kwargs: Any) -> Any:
        if "output_attentions" in kwargs:  # CLIP of 4.57
            kwargs["output_attentions"] = True
        out = plain(module, *args, **kwargs)
        if module is attention:
            maps.append(out[1].detach())
        return out

    monkeypatch.setattr(source, "eager_attention_forward", recorded)
    part = attention.qkv if hasattr(attention, "qkv") else getattr(attention, "k_norm", attention.k_proj)
    part.register_forward_hook(lambda _, args, out: seen.update(keys=out.detach()))
    block = tower.get_submodule(name.rpartition(".")[0])
    block.register_forward_hook(lambda _, args, out: seen.update(block=out[0] if isinstance(out, tuple) else out))
    given = {key: x for key, x in inputs.items() if key not in PER_TOKEN}
    with torch.enable_grad():
        visual = encoded(model, kind, **given)
        visual = torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in visual])
        probe = torch.randn(visual.shape[1], dtype=visual.dtype)
        rows = []
        for token in visual:
            (grad,) = torch.autograd.grad(token @ probe, seen["block"], retain_graph=True, allow_unused=True)
            rows.append(grad.flatten(0, -2).abs().sum(dim=-1) > 0)
    made_of = torch.stack(rows).double()
    made_of /= made_of.sum(dim=1, keepdim=True).clamp_min(1)
    has_class = any("class_embedding" in n or "cls_token" in n for n, _ in tower.named_parameters())
    heads = torch.cat([(m[:, :, 0] if has_class else m.sum(dim=2)).mean(dim=1).flatten() for m in maps])
    keys = seen["keys"]
    keys = keys.chunk(3, dim=-1)[1] if hasattr(attention, "qkv") else keys
    keys = keys.unflatten(-1, (4, 8)).mean(dim=-2).flatten(0, -2)
    return made_of @ heads.double(), made_of @ keys.double()


@torch.no_grad()
def mixing(model: Any, inputs: dict[str, Any], keep: float, attention: Tensor, keys: Tensor) -> tuple[Tensor, Any]:
    """Return `[B, L, L]`, of which tokens each one is the sum, and the columns that stay, by the slow VisionZip."""
    ids = inputs["input_ids"]
    mix, stays = torch.eye(ids.shape[1], dtype=torch.float64).repeat(len(ids), 1, 1), ids != IMAGE
    columns = [(row, int(column)) for row in range(len(ids)) for column in (ids[row] == IMAGE).nonzero()]
    size = len(attention) // 3  # of one image
    for start in range(0, len(attention), size):
        own = [i for i in range(start, start + size) if attention[i] > 0]
        for i in set(range(start, start + size)) - set(own):
            stays[columns[i]] = True
        k = round(keep * len(own))
        places, tokens = slow_visionzip(np.eye(len(own)), k, attention[own].numpy(), keys[own].numpy())
        for place, weights in zip(places, tokens, strict=True):
            row, column = columns[own[place]]
            stays[row, column] = True
            mix[row, column] = 0
            for other, weight in zip(own, weights, strict=True):
                mix[row, column, columns[other][1]] = weight
    return mix, [row.nonzero().squeeze(1) for row in stays & inputs["attention_mask"].bool()]


@torch.no_grad()
def test_what_is_read_of_the_tower_is_its_attention_map(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = FAMILIES[family].make(), FAMILIES[family].prompts([1, 2])
    kind, base = family_of(model)
    expected = read_slowly(model, inputs, LAYER.get(family, -1), monkeypatch)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        plain, hooks = encode(base, kind, "image", inputs).entries, hooks_of(base)
        found = encode(base, kind, "image", inputs, VISIONZIP).entries
        # reading changes nothing
        assert all(one.features.equal(other.features) for one, other in zip(plain, found, strict=True))
        for name, values in zip(("attention", "keys"), expected, strict=True):
            got = torch.cat([getattr(entry, name) for entry in found])
            torch.testing.assert_close(got.double(), values, rtol=0, atol=2e-5)
        assert hooks_of(base) == hooks  # transformers has hooks of its own
    spread = expected[0][expected[0] > 0]
    assert spread.max() > 1.05 * spread.min()


@torch.no_grad()
def test_visionzip_is_the_model_on_merged_embeddings(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and greedy tokens, of rows with one and two images, one of which is padded."""
    tiny, keep = FAMILIES[family], 0.75
    model, inputs = tiny.make(torch.float64), doubled(tiny.prompts([1, 2]))
    with monkeypatch.context() as context:
        read = read_slowly(model, inputs, LAYER.get(family, -1), context)
    mix, columns = mixing(model, inputs, keep, *read)
    with patch(model, keep, method="visionzip") as handle:
        logits = model(**inputs).logits
        places = handle.places
        tokens = generate(model, inputs, new=3)
    length = inputs["input_ids"].shape[1]
    for row, (expected, new) in enumerate(by_hand(model, inputs, places, new=3, mix=mix)):
        assert places[row][places[row] >= 0].equal(columns[row])
        torch.testing.assert_close(logits[row][places[row] >= 0], expected, rtol=0, atol=1e-5)
        assert tokens[row, length:].tolist() == new
    if tiny.tokens > 4:
        assert not mix.equal(torch.eye(mix.shape[1], dtype=mix.dtype).expand_as(mix))


def check_reading(
    model: Any, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch, layer: int = -1, kind: str = "image"
) -> list[Any]:
    """Compare what is read with the whole map; return the entries."""
    family, base = family_of(model)
    expected = read_slowly(model, inputs, layer, monkeypatch, kind)
    entries = encode(base, family, kind, inputs, VISIONZIP).entries
    for name, values in zip(("attention", "keys"), expected, strict=True):
        got = torch.cat([getattr(entry, name) for entry in entries])
        torch.testing.assert_close(got.double(), values, rtol=0, atol=2e-5)
    return entries


def of_settings(family: str, vision: dict[str, Any], **settings: Any) -> Any:
    """Return a tiny family with another tower."""
    tiny = FAMILIES[family]
    return tiny._replace(settings={**tiny.settings, "vision_config": vision, **settings}).make()


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_reading_videos(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each frame attends to itself. OneVision has means of 2 x 2 tokens, and a newline at the end."""
    inputs = video_prompt(family, torch.float32)
    given = {name: x for name, x in inputs.items() if "video" in name}
    entries = check_reading(FAMILIES[family].make(), given, monkeypatch, kind="video")
    assert [len(entry.attention) for entry in entries] == [13 if family == "llava_onevision" else 36] * 2
    model = FAMILIES[family].make()
    with patch(model, 0.5, method="visionzip") as handle:
        assert generate(model, inputs, new=2).shape[1] == inputs["input_ids"].shape[1] + 2
        assert len(handle.visual_tokens) == 3


@torch.no_grad()
def test_reading_other_towers_and_layers_of_llava(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = FAMILIES["llava"].prompts([1, 2])
    for layers, read in (([0, 2], 1), ([-1, 1], 2), (1, 0), (-3, 0)):
        model = of_settings("llava", CLIP, vision_feature_layer=layers)
        with monkeypatch.context() as context:
            check_reading(model, inputs, context, layer=read)
    model = of_settings("llava", CLIP, vision_feature_layer=0)
    with pytest.raises(UnsupportedError, match="are the tower's embeddings, before any attention"):
        patch(model, 0.5, method="visionzip")
    # without a class token
    with monkeypatch.context() as context:
        model = of_settings("llava", SIGLIP, vision_feature_select_strategy="full")
        check_reading(model, inputs, context, layer=-2)
    # Pixtral in LLaVA, as in pixtral-12b: images of two sizes in one sequence
    pixtral = {**VISION, "model_type": "pixtral", "head_dim": 8}
    model = of_settings("llava", pixtral, vision_feature_select_strategy="full", vision_feature_layer=-1)
    sized = {"pixel_values": torch.randn(2, 3, 32, 32), "image_sizes": torch.tensor([[32, 16], [24, 32]])}
    with monkeypatch.context() as context:
        assert [len(entry.keys) for entry in check_reading(model, sized, context)] == [8, 12]


@torch.no_grad()
def test_the_class_token_stays_where_it_is_a_visual_token() -> None:
    model = of_settings("llava", CLIP, vision_feature_select_strategy="full")
    family, base = family_of(model)
    entry = encode(base, family, "image", FAMILIES["llava"].prompts([1]), VISIONZIP).entries[0]
    assert len(entry.attention) == 17 and entry.attention.argmax() == 0


@torch.no_grad()
def test_reading_images_of_different_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    sized = {"pixel_values": torch.randn(2, 3, 32, 32), "image_sizes": torch.tensor([[32, 16], [16, 32]])}
    entries = check_reading(FAMILIES["mistral3"].make(), sized, monkeypatch)
    assert [len(entry.keys) for entry in entries] == [2, 2]


@torch.no_grad()
def test_padding_in_a_crop_neither_speaks_nor_listens() -> None:
    model, inputs = FAMILIES["smolvlm"].make(), FAMILIES["smolvlm"].prompts([1, 2])
    inputs["pixel_attention_mask"][:, :, 16:] = False
    family, base = family_of(model)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        for entry in encode(base, family, "image", inputs, VISIONZIP).entries:
            assert (entry.attention[2:] == 0).all() and (entry.attention[:2] > 0).all()
            # eight patches share what eight patches give, and units have means of four
            torch.testing.assert_close(entry.attention.sum(), torch.tensor(2.0))


@torch.no_grad()
def test_keeping_everything_with_visionzip_is_the_plain_model(family: str) -> None:
    tiny = FAMILIES[family]
    model, inputs = tiny.make(), tiny.prompts([1, 2])
    plain, tokens = model(**inputs).logits, generate(model, inputs, new=3)
    with patch(model, 1.0, method="visionzip") as handle:
        assert model(**inputs).logits.equal(plain) and generate(model, inputs, new=3).equal(tokens)
        handle.keep = tiny.tokens if tiny.tokens != 56 else 48  # so many of each image, without the newlines
        with pytest.warns(UserWarning, match="nothing was left out: visionzip kept all tokens"):
            logits = model(**inputs).logits
        assert all(before == after for before, after in handle.visual_tokens)
        assert logits[:, -1].sub(plain[:, -1]).abs().max() < 1e-4


@torch.no_grad()
def test_in_half_precision_without_a_state_and_in_threads() -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.make(torch.bfloat16), tiny.prompts([1, 2])
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with patch(model, 0.25, method="visionzip(merge='mean')") as handle:
        expected = generate(model, inputs, new=3)[:, -3:]
        assert handle.visual_tokens == [(16, 4)] * 3
    if not IS_OLD:
        short = compact(model, inputs, keep=0.25, method="visionzip(merge='mean')")
        assert generate(model, short, new=3)[:, -3:].equal(expected)
    family, base = family_of(model)
    prompts = [tiny.prompts([1]), tiny.prompts([2]), tiny.prompts([3])]
    for prompt in prompts:
        prompt["pixel_values"] = prompt["pixel_values"].bfloat16()

    def read(prompt: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            entries = encode(base, family, "image", prompt, VISIONZIP).entries
        return torch.stack([entry.attention for entry in entries])

    expected = [read(prompt) for prompt in prompts]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(10):
            got = list(pool.map(read, prompts))
            assert all(one.equal(other) for one, other in zip(got, expected, strict=True))


def test_what_reads_the_tower_is_refused_where_tokens_merge_in_it() -> None:
    model, inputs = FAMILIES["llava"].make(), FAMILIES["llava"].prompts([1])
    before = dict(vars(model))
    with pytest.raises(ConfigError, match=r"visionzip chooses by the attention of the vision tower, .* Give r=0"):
        patch(model, 0.5, method="visionzip", r=3)
    assert vars(model) == before
    with patch(model, 0.5, r=3) as handle, pytest.raises(ConfigError, match="Give r=0"):
        handle.method = "visionzip"
    if not IS_OLD:
        with tokenmerge.patched(model, r=3, restore="dense"), pytest.raises(UnsupportedError, match="merges tokens"):
            compact(model, inputs, keep=0.5, method="visionzip")
    assert vars(model) == before


def test_a_tower_that_cannot_be_read_is_refused() -> None:
    model = FAMILIES["llava"].make()
    for module in model.model.vision_tower.modules():
        if hasattr(module, "k_proj"):
            module.key = module._modules.pop("k_proj")
    with pytest.raises(UnsupportedError, match="CLIPVisionModel has no attention with projections called q_proj"):
        patch(model, 0.5, method="visionzip")
    assert "forward" not in vars(model)
