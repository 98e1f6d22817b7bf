"""transformers' towers that take all images as one sequence: each image is merged by itself, or the call is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from helpers import assert_close, randomised, tiny_of
from promises import check_promises
from tokenmerge.adapters.transformers.packed import HFPixtral, HFQwenVision
from tokenmerge.errors import UnsupportedError, UnsupportedModelError

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5, reason="transformers 4 writes these towers otherwise"
)

QWEN2 = {"depth": 4, "embed_dim": 32, "hidden_size": 24, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
QWEN3 = {"depth": 4, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "intermediate_size": 64, "out_hidden_size": 24}
QWEN3 |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]}
PLAIN = {name: value for name, value in QWEN3.items() if name != "deepstack_visual_indexes"}
GLM = {"depth": 4, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "intermediate_size": 64, "out_hidden_size": 24}
GLM |= {"image_size": 32}
PIXTRAL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
PIXTRAL |= {"image_size": 32, "patch_size": 4}


class Tower(NamedTuple):
    """A class of towers, its small configuration, and what it gives for images of so many patches."""

    module: str
    cls: str
    settings: dict[str, Any]

    def make(self, **more: Any) -> Any:
        cls = getattr(import_module(f"transformers.models.{self.module}.modeling_{self.module}"), self.cls)
        return randomised(cls(cls.config_class(**self.settings, **more))).eval().double()


TOWERS = {
    "qwen2_vl": Tower("qwen2_vl", "Qwen2VisionTransformerPretrainedModel", QWEN2),
    "qwen3_vl": Tower("qwen3_vl", "Qwen3VLVisionModel", QWEN3),
    "qwen3_vl_plain": Tower("qwen3_vl", "Qwen3VLVisionModel", {**QWEN3, "deepstack_visual_indexes": []}),
    "qwen3_vl_moe": Tower("qwen3_vl_moe", "Qwen3VLMoeVisionModel", QWEN3),
    "qwen3_5": Tower("qwen3_5", "Qwen3_5VisionModel", PLAIN),
    "qwen3_5_moe": Tower("qwen3_5_moe", "Qwen3_5MoeVisionModel", PLAIN),
    "qwen3_omni": Tower("qwen3_omni_moe", "Qwen3OmniMoeVisionEncoder", QWEN3),
    "glm_ocr": Tower("glm_ocr", "GlmOcrVisionModel", GLM),
    "glm4v": Tower("glm4v", "Glm4vVisionModel", GLM),
    "glm4v_moe": Tower("glm4v_moe", "Glm4vMoeVisionModel", GLM),
    "pixtral": Tower("pixtral", "PixtralVisionModel", PIXTRAL),
}
DEEP = ("qwen3_vl", "qwen3_vl_moe", "qwen3_omni")
every_tower = pytest.mark.parametrize("name", TOWERS)
Grids = list[tuple[int, int, int]]
GRIDS: Grids = [(1, 4, 6), (1, 6, 4), (2, 4, 6)]  # 24 patches in each of four images or frames


def _given(name: str, grids: Grids, seed: int = 0) -> dict[str, Any]:
    """Images of so many (frames, rows, columns) of patches; GLM and Pixtral take each frame as an image."""
    if name.startswith(("glm", "pixtral")):
        grids = [(1, rows, columns) for frames, rows, columns in grids for _ in range(frames)]
    generator = torch.Generator().manual_seed(seed)
    if name == "pixtral":
        pixels = torch.zeros(len(grids), 3, 32, 32).double()
        for image, (_, rows, columns) in zip(pixels, grids, strict=True):
            image[:, : 4 * rows, : 4 * columns] = torch.randn(3, 4 * rows, 4 * columns, generator=generator)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[4 * r, 4 * c] for _, r, c in grids])}
    count = sum(t * r * c for t, r, c in grids)
    return {
        "hidden_states": torch.randn(count, 3 * 2 * 4 * 4, generator=generator).double(),
        "grid_thw": torch.tensor(grids),
    }


def _answer(out: Any) -> Tensor:
    """What a language model is given: the merger's tokens, those of DeepStack too; of Pixtral all tokens."""
    if out.get("pooler_output") is None:
        return out.last_hidden_state
    return torch.cat((out.pooler_output, *(out.get("deepstack_features") or ())), dim=-1)


def _run(model: nn.Module, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return _answer(model(**given))


@every_tower
@pytest.mark.parametrize("r", [3, [0, 4, 0, 4]])
def test_a_tower_keeps_its_promises(name: str, r: Any) -> None:
    model, given = TOWERS[name].make(), _given(name, GRIDS)
    own = _run(model, given)
    with tokenmerge.patched(model, r=0):
        assert torch.equal(_run(model, given), own)
    check_promises(model, r=r, output=_answer, **given)
    assert torch.equal(_run(model, given), own)


@every_tower
def test_images_do_not_see_each_other(name: str) -> None:
    model, grids = TOWERS[name].make(), GRIDS[:2]
    both = _given(name, grids)
    with tokenmerge.patched(model, r=5, track=True, prop_attn=True) as handle:
        merged, groups = _run(model, both), handle.groups[-1]
        assert groups.shape == (2, 24) and handle.sizes.sum(dim=1).tolist() == [24, 24]
        halves = merged.flatten(0, -2).chunk(2)
        for at in range(2):
            half = {key: value.chunk(2)[at] for key, value in both.items()}
            assert_close(_run(model, half).flatten(0, -2), halves[at], 1e-9)
            assert torch.equal(handle.groups[-1][0], groups[at])


def _alone(name: str, given: dict[str, Any]) -> list[dict[str, Any]]:
    """Each image or video of a call as a call of its own."""
    if name == "pixtral":
        return [{key: value[i : i + 1] for key, value in given.items()} for i in range(len(given["pixel_values"]))]
    grids = given["grid_thw"]
    parts = given["hidden_states"].split(grids.prod(dim=1).tolist())
    return [{"hidden_states": part, "grid_thw": grid[None]} for part, grid in zip(parts, grids, strict=True)]


@every_tower
@pytest.mark.parametrize("restore", [None, "merged", "dense"])
@pytest.mark.parametrize("r", [5, 0.3, [0, 4, 0, 4]])
def test_images_of_different_sizes_are_merged_as_each_alone(name: str, restore: str | None, r: Any) -> None:
    """In any order, and a video of several frames among them."""
    grids = [(1, 4, 6), (1, 2, 4), (2, 4, 4), (1, 6, 4), (1, 4, 8), (1, 4, 2)]
    model, given = TOWERS[name].make(), _given(name, grids)
    own, alone = _run(model, given), _alone(name, given)
    with tokenmerge.patched(model, r=r, restore=restore) as handle:
        merged = _run(model, given)
        assert merged.shape == own.shape and (merged - own).abs().max() > 1e-4
        assert_close(merged, torch.cat([_run(model, one) for one in alone], dim=-2), 1e-9)
        handle.r = 0
        assert torch.equal(_run(model, given), own)
        with handle.disabled():
            assert torch.equal(_run(model, given), own)


@every_tower
def test_switched_on_between_two_blocks(name: str) -> None:
    """Lengths that add up to a multiple of the number of images are no way in."""
    model, given = TOWERS[name].make(), _given(name, [(1, 4, 6), (1, 4, 4)])
    equal = _given(name, GRIDS[:2])
    with tokenmerge.patched(model, r=0) as handle:

        def switch_on(module: nn.Module, args: Any, kwargs: Any) -> None:
            handle.r = 3

        hook = handle.runners[2].block.register_forward_pre_hook(switch_on, with_kwargs=True)
        with pytest.raises(UnsupportedError, match=r"images of one size|which says where each image ends"):
            _run(model, given)
        handle.r = 0
        if name == "pixtral":  # its blocks are told where images end by the tower, which did not know
            return
        got = _run(model, equal)
        hook.remove()
        handle.r = [0, 0, 3, 3]
        assert_close(got, _run(model, equal), 1e-9)


@every_tower
def test_every_token_comes_back(name: str) -> None:
    model, given = TOWERS[name].make(), _given(name, GRIDS)
    shape, outs = _run(model, given).shape, []
    for restore in (None, "merged", "dense"):
        with tokenmerge.patched(model, r=3, restore=restore) as handle:
            outs.append(_run(model, given))
            assert outs[-1].shape == shape and handle.tokens == [21, 18, 15, 12]
            limits = " ".join(handle.report().limits)
        if restore != "dense":
            assert ("after every block" if name in DEEP else "after the last block") in limits
    assert_close(outs[1], outs[0], 1e-9)
    assert_close(outs[2], outs[0], 1e-9)


@every_tower
def test_hidden_states_and_attention_maps(name: str) -> None:
    model, given = TOWERS[name].make(attn_implementation="eager"), _given(name, GRIDS)
    with tokenmerge.patched(model, r=3) as handle, torch.no_grad():
        # DeepStack has all tokens put back after every block
        for option in ("output_attentions", "output_hidden_states")[: 1 if name in DEEP else 2]:
            with pytest.raises(UnsupportedError, match=option):
                model(**given, **{option: True})
        handle.r = 0
        assert len(model(**given, output_hidden_states=True).hidden_states) == 5
    with torch.no_grad(), tokenmerge.patched(model, r=3, restore="dense"):
        states = model(**given, output_hidden_states=True).hidden_states
        assert len(states) == 5 and {state.shape for state in states[:4]} == {states[0].shape}


@every_tower
def test_implementations_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def flash(module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **options: Any) -> tuple[Tensor, None]:
        """Attention that cuts one sequence where it is told to, as flash attention does."""
        assert attention_mask is None
        ends = options.get("cu_seq_lens_q")
        seen.append({"batch": q.shape[0], "ends": ends, "name": module.config._attn_implementation})
        lengths = [q.shape[2]] if ends is None else ends.diff().tolist()
        parts = zip(*(part.split(lengths, dim=2) for part in (q, k, v)), strict=True)
        attend: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention
        out = torch.cat([attend(*part, scale=options["scaling"]) for part in parts], dim=2)
        return out.transpose(1, 2), None

    mapping = transformers.modeling_utils.AttentionInterface._global_mapping
    monkeypatch.setitem(mapping, "flash_of_a_test", flash)
    model, given = TOWERS[name].make(), _given(name, GRIDS[:2])
    answers: dict[str, list[Tensor]] = {}
    for implementation in ("sdpa", "eager", "flash_of_a_test"):
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation_internal = implementation
        seen.clear()
        own = _run(model, given)
        plain = list(seen)
        with tokenmerge.patched(model, r=0, prop_attn=False) as handle:
            seen.clear()
            assert torch.equal(_run(model, given), own)
            if implementation.startswith("flash"):
                assert [call["batch"] for call in seen] == [call["batch"] for call in plain] == [1] * 4
                assert all(torch.equal(call["ends"].long(), torch.tensor([0, 24, 48])) for call in seen)
            handle.r = 3
            seen.clear()
            answers[implementation] = [own, _run(model, given)]
            if implementation.startswith("flash"):
                # block by block a batch of images, which needs no cuts; the name is the model's own
                assert [(call["batch"], call["ends"]) for call in seen] == [(2, None)] * 4
                assert {call["name"] for call in seen} == {"flash_of_a_test"}
    for got in answers.values():
        assert_close(got[0], answers["sdpa"][0], 1e-6)
        assert_close(got[1], answers["sdpa"][1], 1e-6)
    with pytest.raises(UnsupportedError, match="prop_attn"):
        tokenmerge.patch(model, r=3, prop_attn=True)


@every_tower
def test_gradient_checkpointing(name: str) -> None:
    model, given = TOWERS[name].make().train(), _given(name, GRIDS)
    grads = []
    for enable in (False, True):
        twin = copy.deepcopy(model)
        if enable:
            twin.activation_checkpointing_enable({"use_reentrant": False})
        tokenmerge.patch(twin, r=3, prop_attn=True)
        _answer(twin(**given)).square().sum().backward()
        grads.append([p.grad for p in twin.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 20
    for plain, again in zip(*grads, strict=True):
        assert_close(again, plain, 1e-9)


@pytest.mark.parametrize("family", [HFQwenVision, HFPixtral])
def test_compiled(family: type) -> None:
    torch._dynamo.reset()
    model, x = tiny_of(family())
    with tokenmerge.patched(model, r=2), torch.no_grad():
        expected = model(x)
        # Qwen's own attention reads the lengths off a tensor: its graph breaks there
        compiled: Any = torch.compile(model, backend="eager", fullgraph=family is HFPixtral)
        assert_close(compiled(x), expected, 1e-5)
        assert_close(compiled(torch.cat((x, x)))[2:], expected, 1e-5)
        if family is HFPixtral:
            assert_close(torch.export.export(model, (x,)).module()(x), expected, 1e-5)


def test_blocks_that_are_not_told_where_images_end_do_not_merge() -> None:
    model, given = TOWERS["pixtral"].make(), _given("pixtral", GRIDS[:2])
    inside: dict[str, Any] = {}
    hook = model.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: inside.update(kwargs, inputs_embeds=args[0]), with_kwargs=True
    )
    own = _run(model, given)
    hook.remove()
    with tokenmerge.patched(model, r=2) as handle, torch.no_grad():
        with pytest.raises(UnsupportedError, match=r"without 'cu_seq_lens_q', which says where each image ends"):
            model.transformer(**inside)
        handle.r = 0
        assert torch.equal(model.transformer(**inside).last_hidden_state, own)


@every_tower
def test_ends_that_do_not_add_up_to_the_sequence_are_refused(name: str) -> None:
    model, given = TOWERS[name].make(), _given(name, GRIDS)
    own = _run(model, given)
    ends = torch.tensor([0, 24, 48], dtype=torch.int32)
    # Pixtral leaves out sizes for which there is no image
    wrong = {"image_sizes": given["image_sizes"].repeat(2, 1)} if name == "pixtral" else {"cu_seqlens": ends}
    with tokenmerge.patched(model, r=3) as handle:
        with pytest.raises(UnsupportedError, match=r"told of \d images \(or frames\) .* the sequence has 96"):
            _run(model, {**given, **wrong})
        handle.r = 0
        assert torch.equal(_run(model, given), own)


def test_windows_of_qwen_are_refused() -> None:
    cls = transformers.Qwen2_5_VLForConditionalGeneration
    with torch.device("meta"):
        tower = cls(cls.config_class(vision_config={"depth": 2}, text_config={"num_hidden_layers": 1})).model.visual
    with pytest.raises(UnsupportedModelError, match="inside windows"):
        tokenmerge.patch(tower, r=2)
