"""transformers' image towers: what each family promises, and what its outputs, options and configurations may do."""

from __future__ import annotations

import copy
import inspect
import io
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from hf_models import CASES, DENSE_CASES, VISION, Case, patches, yolos
from torch import Tensor, nn

import tokenmerge
from helpers import assert_close, randomised
from promises import check_promises
from tokenmerge import adapters
from tokenmerge.errors import UnsupportedError, UnsupportedModelError

IS_5 = int(transformers.__version__.split(".")[0]) >= 5
# transformers 5 leaves hooks on the blocks of a model that was asked for hidden states, and these ask always
ASKS = ("internvl",) if IS_5 else ()


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    # transformers 4 makes text masks in the default precision
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _run(model: nn.Module, case: Case, **more: Any) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return case.output(model(**{**case.inputs(), **more})).clone()


def _simulated(model: nn.Module, case: Case, groups: list[Tensor], **more: Any) -> Any:
    torch.manual_seed(0)
    return tokenmerge.simulate(model, groups, **{**case.inputs(), **more})


@pytest.mark.parametrize("name", sorted(CASES.keys() - set(ASKS)))
def test_promises(name: str) -> None:
    case = CASES[name]
    check_promises(case.make(), output=case.output, **case.inputs())


@pytest.mark.parametrize("name", ["vit", "deit", "clip-vision", "dinov2-registers", "siglip-vision", "blip2-vision"])
def test_eager_and_sdpa_agree_and_merge_alike(name: str) -> None:
    case = CASES[name]
    model = case.make()
    with tokenmerge.patched(model, r=3, prop_attn=True):
        fused = _run(model, case)
        model.set_attn_implementation("eager")
        assert_close(_run(model, case), fused, 1e-6)
    check_promises(model, output=case.output, **case.inputs())


@pytest.mark.parametrize("name", [*DENSE_CASES, *ASKS])
def test_what_needs_the_tokens_of_several_blocks_gets_them_restored(name: str) -> None:
    case = {**DENSE_CASES, **CASES}[name]
    model = case.make()
    unmerged = _run(model, case)
    with tokenmerge.patched(model, r=0):
        assert torch.equal(_run(model, case), unmerged)
    for restore in (None, "merged", "dense"):
        with tokenmerge.patched(model, r=3, prop_attn=True, track=True, restore=restore) as handle:
            restored, groups, limits = _run(model, case), handle.groups, handle.report().limits
        assert torch.equal(_run(model, case), unmerged)
        assert_close(restored, case.output(_simulated(model, case, groups)), 1e-6)
        assert (restored - unmerged).abs().max() > 1e-3
        if name in DENSE_CASES:
            assert any("in their places after every block" in limit for limit in limits) == (restore != "dense")


@pytest.mark.parametrize("name", ["vit", "vit-classifier", "dinov2", "clip-vision", "siglip-vision", "aimv2-vision"])
def test_hidden_states(name: str) -> None:
    case = CASES[name]
    model = case.make()
    with (
        tokenmerge.patched(model, r=3),
        pytest.raises(UnsupportedError, match=r"output_hidden_states: .* restore='dense'"),
    ):
        _run(model, case, output_hidden_states=True)
    with tokenmerge.patched(model, r=3, restore="merged", prop_attn=True) as handle, torch.no_grad():
        states = model(**case.inputs(), output_hidden_states=True).hidden_states
        assert [state.shape[1] for state in states[1:4]] == handle.tokens[:3]
    with tokenmerge.patched(model, r=3, restore="dense", prop_attn=True, track=True) as handle, torch.no_grad():
        torch.manual_seed(0)
        states, groups = model(**case.inputs(), output_hidden_states=True).hidden_states, handle.groups
    expected = _simulated(model, case, groups, output_hidden_states=True).hidden_states
    assert len(states) == len(expected) == 5
    assert_close(states[0], expected[0], 1e-6)
    for got, wanted, assign in zip(states[1:], expected[1:], groups, strict=True):
        # transformers 4 notes what leaves a block before the simulation has taken its mean
        same = (assign[:, :, None] == assign[:, None, :]).double()
        assert_close(got, same @ wanted / same.sum(dim=-1, keepdim=True), 1e-6)


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
def test_options_of_the_configuration_are_refused_too(option: str) -> None:
    case = CASES["vit-classifier"]
    model = case.make(attn_implementation="eager")
    setattr(model.config, option, True)
    with tokenmerge.patched(model, r=0):
        _run(model, case)
    with tokenmerge.patched(model, r=3), pytest.raises(UnsupportedError, match=option):
        _run(model, case)


@pytest.mark.parametrize("restore", [None, "merged", "dense"])
@pytest.mark.parametrize("name", ["vit-classifier", "clip", "dinov2", "blip2-vision"])
def test_attention_maps_are_refused(name: str, restore: str | None) -> None:
    case = CASES[name]
    model = case.make(attn_implementation="eager")
    with tokenmerge.patched(model, r=3, restore=restore) as handle:
        with pytest.raises(UnsupportedError, match=r"output_attentions: attention maps .* set handle\.r = 0"):
            _run(model, case, output_attentions=True)
        handle.r = 0
        _run(model, case, output_attentions=True)


@pytest.mark.skipif(not IS_5, reason="transformers 4 takes no numbers")
def test_one_hidden_state_by_its_number() -> None:
    case = CASES["siglip-vision"]
    model = case.make()
    with tokenmerge.patched(model, r=3), torch.no_grad():
        assert model(**case.inputs(), output_hidden_states=-1).hidden_states[-1].shape[1] == 16
        with pytest.raises(UnsupportedError, match="output_hidden_states"):
            model(**case.inputs(), output_hidden_states=[-1, -2])


@pytest.mark.parametrize(("count", "r"), [(12, 2), (9, 4)])
@pytest.mark.parametrize("name", ["siglip2-vision", "siglip2-classifier"])
def test_padding(name: str, count: int, r: int) -> None:
    case = CASES[name]
    model, inputs = case.make(), patches()
    inputs["pixel_attention_mask"][0, count:] = 0
    inputs["spatial_shapes"][0] = torch.tensor([3, count // 3])
    expected = _run(model, case, **inputs)
    with tokenmerge.patched(model, r=r, prop_attn=True, track=True) as handle:
        merged, groups, positions = _run(model, case, **inputs), handle.groups, handle.positions
        assert handle.sizes.sum(dim=1).tolist() == [count, 16, 16]
        inputs["pixel_values"][0, count:] = 7.0
        assert_close(_run(model, case, **inputs), merged, 1e-9)
    real = groups[-1][0, :count]
    assert not set(real.tolist()) & set(groups[-1][0, count:].tolist()) or r > 2
    if r == 2:
        assert_close(merged, case.output(_simulated(model, case, groups, positions=positions, **inputs)), 1e-6)
    assert (merged - expected).abs().max() > 1e-4


def test_padding_of_idefics() -> None:
    tower = CASES["idefics3"].make().vision_model
    inputs = {"pixel_values": torch.randn(3, 3, 32, 32), "patch_attention_mask": torch.ones(3, 4, 4, dtype=torch.bool)}
    inputs["patch_attention_mask"][0, 2:] = False
    with tokenmerge.patched(tower, r=2, prop_attn=True, track=True) as handle, torch.no_grad():
        merged, groups, positions = tower(**inputs).last_hidden_state, handle.groups, handle.positions
        assert handle.sizes.sum(dim=1).tolist() == [8, 16, 16]
    simulated = tokenmerge.simulate(tower, groups, positions=positions, **inputs).last_hidden_state
    assert_close(merged[1:], simulated[1:], 1e-6)
    assert_close(merged[0, :8], simulated[0, :8], 1e-6)


@pytest.mark.skipif(not IS_5, reason="transformers 4 has no attention mask for images")
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_mask_of_patches(implementation: str) -> None:
    case = CASES["vit"]
    model = case.make(attn_implementation=implementation)
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[0, 12:] = 0
    with tokenmerge.patched(model, r=2, prop_attn=True, track=True) as handle:
        merged, groups, positions = _run(model, case, attention_mask=mask), handle.groups, handle.positions
        assert handle.sizes.sum(dim=1).tolist() == [12, 17, 17]
    assert_close(merged, case.output(_simulated(model, case, groups, positions=positions, attention_mask=mask)), 1e-6)


def test_masks_that_cannot_follow() -> None:
    model = CASES["clip-vision"].make()
    tower = model if IS_5 else model.vision_model
    x = torch.randn(2, 17, 32)
    with tokenmerge.patched(model, r=3):
        first, second = tower.encoder.layers[0], tower.encoder.layers[1]
        given = (None,) if IS_5 else (None, None)
        x = first(x, *given)
        x = x if isinstance(x, Tensor) else x[0]
        with pytest.raises(UnsupportedError, match=r"mask has the shape \(1, 5, 2\); .* can be \[2, N\]"):
            second(x, torch.ones(1, 5, 2), *given[1:])
        with pytest.raises(UnsupportedError, match=r"mask is a str, which cannot follow merged tokens"):
            second(x, "BlockMask", *given[1:])


@pytest.mark.skipif(IS_5, reason="transformers 5 has no head masks")
def test_head_masks_are_refused() -> None:
    case = CASES["vit"]
    model = case.make()
    with tokenmerge.patched(model, r=3), pytest.raises(UnsupportedError, match="called with 'head_mask' while tokens"):
        _run(model, case, head_mask=torch.ones(4))


@pytest.mark.parametrize("name", ["clip", "siglip", "altclip", "chinese-clip", "metaclip2", "blip2", "internvl"])
def test_the_rest_of_the_model_and_the_configuration_are_left_alone(name: str) -> None:
    case = CASES[name]
    model = case.make()
    config, other = copy.deepcopy(model.config.to_dict()), type(model)(model.config).eval()
    expected, implementations = _run(other, case), _implementations(model, "vision_")
    with tokenmerge.patched(model, r=3):
        path = adapters.find(model).blocks(model)[0][0]
        assert path.startswith("vision_")
        inside = path.partition(".")[0]
        touched = [name for name, module in model.named_modules() if "forward" in module.__dict__]
        assert all(name == "" or name.startswith(inside) for name in touched)
        assert torch.equal(_run(other, case), expected)
        assert model.config.to_dict() == config
        assert _implementations(model, "vision_") == implementations
    assert "tokenmerge" not in repr(vars(model.config))


def _implementations(model: nn.Module, besides: str) -> list[str]:
    modules = {name: module for name, module in model.named_modules() if not name.startswith(besides)}
    return [module.config._attn_implementation for module in modules.values() if hasattr(module, "config")]


def test_text_of_a_two_tower_model_is_bit_exact() -> None:
    case = CASES["clip"]
    model = case.make()
    with torch.no_grad():
        expected = model(**case.inputs()).text_embeds
        with tokenmerge.patched(model, r=3):
            assert torch.equal(model(**case.inputs()).text_embeds, expected)


def _fake_flash(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
    assert module.config._attn_implementation == "flash_attention_2" and not module.is_causal and mask is None
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=options["scaling"])
    return out.transpose(1, 2), None


def test_an_implementation_without_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = transformers.modeling_utils.AttentionInterface._global_mapping
    monkeypatch.setitem(mapping, "flash_attention_2", _fake_flash)
    case = CASES["vit"]
    model = case.make()
    with tokenmerge.patched(model, r=3, prop_attn=False):
        expected = _run(model, case)
    handle = tokenmerge.patch(model, r=3)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedError, match=r"now 'flash_attention_2', which takes no mask\. .* prop_attn=False"):
        _run(model, case)
    handle.remove()
    with pytest.raises(UnsupportedError, match=r"prop_attn=True, but this attention takes no mask"):
        tokenmerge.patch(model, r=3, prop_attn=True)
    with tokenmerge.patched(model, r=3) as handle:
        assert_close(_run(model, case), expected, 1e-9)
        assert any("no proportional attention" in limit for limit in handle.report().limits)


def test_an_implementation_with_block_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flex(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
        assert mask is None  # a bias goes through sdpa
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=options["scaling"])
        return out.transpose(1, 2), None

    mapping = transformers.modeling_utils.AttentionInterface._global_mapping
    monkeypatch.setitem(mapping, "flex_attention", flex)
    case = CASES["clip-vision"]
    model = case.make()
    with tokenmerge.patched(model, r=3, prop_attn=True):
        expected = _run(model, case)
        model.set_attn_implementation("flex_attention")
        assert_close(_run(model, case), expected, 1e-9)
    with pytest.raises(UnsupportedError, match=r"mask is a str, .*set_attn_implementation\('sdpa'\)"):
        adapters.find(model).host.padding["attention_mask"]("a BlockMask, which stands for no tokens")


def test_gradient_checkpointing_by_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["vit-classifier"]
    model = case.make().train()
    tokenmerge.patch(model, r=3, prop_attn=True)
    calls, grads = [], []
    checkpoint = torch.utils.checkpoint.checkpoint
    for reentrant in (None, False, True):
        if reentrant is not None:
            enable = "activation_checkpointing_enable" if IS_5 else "gradient_checkpointing_enable"
            getattr(model, enable)({"use_reentrant": reentrant})
            for module in model.modules():
                if hasattr(module, "_gradient_checkpointing_func"):
                    module._gradient_checkpointing_func = lambda run, *args: (
                        calls.append(1) or checkpoint(run, *args, use_reentrant=reentrant)  # noqa: B023
                    )
        model.zero_grad()
        torch.manual_seed(0)
        inputs = {name: value.requires_grad_() for name, value in case.inputs().items()}
        model(**inputs).logits.square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
        assert len(calls) == (0 if reentrant is None else 4)
        calls.clear()
    for again in grads[1:]:
        for got, wanted in zip(again, grads[0], strict=True):
            assert_close(got, wanted, 1e-9)


def test_a_saved_model_runs_where_nothing_was_patched_before(tmp_path: Any) -> None:
    case = CASES["vit-classifier"]
    model = case.make()
    tokenmerge.patch(model, r=3)
    expected = _run(model, case)
    torch.manual_seed(0)
    torch.save((model, case.inputs()["pixel_values"], expected), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model, x, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "# another process may have another number of threads, and sum in another order\n"
        "assert (model(x).logits.detach() - expected).abs().max() < 1e-6\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True, timeout=120)


def test_copies_follow_their_own_configuration() -> None:
    case = CASES["vit"]
    model = case.make()
    tokenmerge.patch(model, r=3, prop_attn=True)
    expected = _run(model, case)
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    tap, other = (tokenmerge.handle_of(which).runners[0].tap for which in (model, twin))
    assert (tap.implementation, other.implementation) == ("sdpa", "eager")
    assert_close(_run(twin, case), expected, 1e-6)
    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    assert_close(_run(torch.load(file, weights_only=False), case), expected, 1e-6)


def test_a_plain_tower_says_what_it_hands_out() -> None:
    case = CASES["dinov2-registers"]
    model = case.make()
    signature = inspect.signature(model.forward)
    with tokenmerge.patched(model, r=3, restore="merged") as handle, torch.no_grad():
        assert model(**case.inputs()).last_hidden_state.shape[1] == handle.tokens[-1] == 9
        assert handle.prefix == 5 and handle.grid == (4, 4) and handle.input_size == (3, 32, 32)
        assert handle.report().limits == [
            "merged tokens are handed out, weigh them with handle.sizes: last_hidden_state holds one token per place"
        ]
        assert inspect.signature(model.forward) == signature
    for restore in (None, "dense"):
        with tokenmerge.patched(model, r=3, restore=restore) as handle, torch.no_grad():
            assert model(**case.inputs()).last_hidden_state.shape[1] == 21 > handle.tokens[-1]
            assert any("after the last block" in limit for limit in handle.report().limits) == (restore is None)
    with tokenmerge.patched(CASES["dinov2-classifier"].make(), r=3) as handle:
        assert any("not known to use the class token alone" in limit for limit in handle.report().limits)


def test_mae_is_off_the_shelf() -> None:
    case = CASES["vit-mae-masked"]
    model = case.make()
    with tokenmerge.patched(model, r=3) as handle:
        assert handle.tokens == [10, 7, 4, 3] and not handle.report().prop_attn
        assert any("an MAE model trained without merging" in limit for limit in handle.report().limits)
        assert _run(model, case).shape == (3, 16, 192)
        assert handle.tokens == [10, 7, 4, 3]


@pytest.mark.parametrize("r", [3, (2, 1.0)])
def test_detection_tokens_behind_the_patches(r: Any) -> None:
    case = yolos()
    model = case.make()
    unmerged = _run(model, case)
    with tokenmerge.patched(model, r=0):
        assert torch.equal(_run(model, case), unmerged)
    for restore in (None, "dense"):
        with tokenmerge.patched(model, r=r, prop_attn=True, track=True, restore=restore) as handle:
            merged, groups = _run(model, case), handle.groups
            assert (handle.prefix, handle.protected) == (1, 4)
            assert (handle.sizes[:, [0, -3, -2, -1]] == 1).all()
        assert_close(merged, case.output(_simulated(model, case, groups)), 1e-6)
    assert (merged - unmerged).abs().max() > 1e-3
    assert torch.equal(_run(model, case), unmerged)


def test_positions_between_blocks_are_refused() -> None:
    model = yolos().make(use_mid_position_embeddings=True)
    with pytest.raises(UnsupportedModelError, match=r"use_mid_position_embeddings.*: merged tokens are fewer\. Take"):
        tokenmerge.patch(model, r=3)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # importing timm 1.0.16
@pytest.mark.parametrize("pool", ["token", "avg", "map"])
@pytest.mark.parametrize("cls", ["TimmWrapperModel", "TimmWrapperForImageClassification"])
def test_timm_models_inside_the_wrapper(cls: str, pool: str) -> None:
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "global_pool": pool}
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=settings, num_labels=10)
    model = randomised(getattr(transformers, cls)(config)).eval().double()
    x = torch.randn(3, 3, 32, 32)
    check_promises(model, x, output=lambda out: out.logits if "logits" in out else out.pooler_output)
    with tokenmerge.patched(model, r=3) as handle:
        assert handle.report().adapter == "hf_timm"
        with pytest.raises(UnsupportedError, match=r"output_hidden_states: .* restore='dense'"):
            model(x, output_hidden_states=True)
    with tokenmerge.patched(model, r=3, restore="dense"):
        assert [state.shape for state in model(x, output_hidden_states=True).hidden_states] == 4 * [(3, 32, 4, 4)]


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = CASES["vit"].make(), CASES["dinov2"].make()


def test_two_towers_are_not_chosen_from() -> None:
    model = _Two()
    with pytest.raises(UnsupportedModelError, match=r"holds 2 towers: left, right\. Patch those .* patch\(model\.left"):
        tokenmerge.patch(model, r=3)
    with tokenmerge.patched(model.left, r=3):
        assert tokenmerge.supports(model.right)


def test_a_subclass_may_use_every_token() -> None:
    class Averaged(transformers.ViTModel):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return super().forward(pixel_values).last_hidden_state[:, 1:].mean(dim=1)

    model = randomised(Averaged(transformers.ViTConfig(**VISION))).eval()
    check_promises(model, **CASES["vit"].inputs())


@pytest.mark.filterwarnings("ignore")  # the host's, about generation settings
def test_a_patched_model_generates_text() -> None:
    case = CASES["blip2"]
    config = getattr(transformers, case.config)(**case.settings)
    model = randomised(transformers.Blip2ForConditionalGeneration(config)).eval()
    inputs = case.inputs()
    with tokenmerge.patched(model, r=3) as handle:
        words = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert words.shape[0] == 3 and handle.has_merged


def test_a_tower_inside_a_module_of_the_users_own() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = CASES["vit"].make()

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.trunk(pixel_values).last_hidden_state[:, 1:].mean(dim=1)

    check_promises(Pooled().eval(), **CASES["vit"].inputs())


def test_an_older_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CASES["vit"].make()
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.49.0")
    with pytest.raises(UnsupportedModelError, match=r"transformers 4\.49\.0 is installed; .* from 4\.57 on\. Install"):
        tokenmerge.patch(model, r=3)


def test_other_blocks_are_named() -> None:
    model = CASES["vit"].make()
    tower_blocks = model.layers if IS_5 else model.encoder.layer
    del tower_blocks[2].layernorm_after
    with pytest.raises(UnsupportedModelError, match=r"ViTLayer with the children .* are not described"):
        tokenmerge.patch(model, r=3)


def test_a_subclass_with_a_step_of_its_own_is_caught() -> None:
    from transformers.models.vit.modeling_vit import ViTLayer

    class Doubled(ViTLayer):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().forward(*args, **kwargs)

    model = CASES["vit"].make()
    (model.layers if IS_5 else model.encoder.layer)[1].__class__ = Doubled
    with pytest.raises(tokenmerge.TokenMergeError, match=r"is a transformers.*ViTLayer with a forward of its own"):
        tokenmerge.patch(model, r=3)
    assert VISION["hidden_size"] == model.config.hidden_size


BARE = {
    **{name: CASES[name] for name in ("vit", "deit", "ijepa", "vit-mae", "dinov2", "dinov2-registers", "clip-vision")},
    **{name: CASES[name] for name in ("siglip-vision", "blip2-vision", "internvl-vision", "aimv2-vision")},
    **{name: CASES[name] for name in ("aimv2-pooled", "clip-projection", "janus-vision")},
}


@pytest.mark.parametrize("name", sorted(BARE.keys() - set(ASKS)))
def test_bare_models_hand_out_every_token(name: str) -> None:
    case = BARE[name]
    model = case.make()
    with torch.no_grad():
        shape = model(**case.inputs()).last_hidden_state.shape
    with tokenmerge.patched(model, r=3, prop_attn=True, track=True) as handle, torch.no_grad():
        torch.manual_seed(0)
        out, groups, left = model(**case.inputs()), handle.groups, handle.tokens[-1]
        assert any("after the last block" in limit for limit in handle.report().limits)
    expected = _simulated(model, case, groups)
    assert out.last_hidden_state.shape == shape and left < shape[1]
    assert_close(out.last_hidden_state, expected.last_hidden_state, 1e-6)
    assert_close(case.output(out), case.output(expected), 1e-6)
    with tokenmerge.patched(model, r=3, prop_attn=True, track=True, restore="merged") as handle, torch.no_grad():
        torch.manual_seed(0)
        merged = model(**case.inputs()).last_hidden_state
        # a pool that looks at every token has them put back all the same, and the report says so
        is_pooled = any("after the last block" in limit for limit in handle.report().limits)
        assert_close(merged if is_pooled else handle.dense(merged), out.last_hidden_state, 1e-9)
        assert is_pooled == (name in ("siglip-vision", "aimv2-vision", "aimv2-pooled", "janus-vision"))


@pytest.mark.parametrize("name", ["vit-classifier", "deit-distilled", "vit-msn"])
def test_the_inside_of_a_classifier_hands_out_every_token(name: str) -> None:
    case = CASES[name]
    model = case.make()
    inside = getattr(model, model.base_model_prefix)
    with tokenmerge.patched(model, r=3, track=True, prop_attn=True) as handle, torch.no_grad():
        assert not any("put back" in limit for limit in handle.report().limits)
        model(**case.inputs())
        torch.manual_seed(0)
        got, groups = inside(**case.inputs()).last_hidden_state, handle.groups
        assert handle.tokens[-1] < got.shape[1]
    assert_close(got, _simulated(inside, case, groups).last_hidden_state, 1e-6)
    for restore, tokens in (("dense", got.shape[1]), ("merged", got.shape[1] - 12)):
        with tokenmerge.patched(model, r=3, restore=restore) as handle, torch.no_grad():
            assert inside(**case.inputs()).last_hidden_state.shape[1] == max(tokens, handle.tokens[-1])


def test_the_inside_of_a_wrapped_timm_classifier_is_guarded_too() -> None:
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4}
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=settings, num_labels=10)
    model = randomised(transformers.TimmWrapperForImageClassification(config)).eval().double()
    x = torch.randn(3, 3, 32, 32)
    with tokenmerge.patched(model, r=3), torch.no_grad():
        assert model(x).logits.shape == (3, 10) and model.timm_model(x).shape == (3, 10)
        with pytest.raises(UnsupportedError, match=r"forward_features\(\) hands out"):
            model.timm_model.forward_features(x)


def test_a_wrapped_timm_model_hands_out_every_token() -> None:
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "global_pool": "avg"}
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=settings)
    model = randomised(transformers.TimmWrapperModel(config)).eval().double()
    x = torch.randn(3, 3, 32, 32)
    outs = {}
    for restore in (None, "dense", "merged"):
        with tokenmerge.patched(model, r=3, restore=restore, track=True) as handle, torch.no_grad():
            out = model(x)
            tokens = handle.dense(out.last_hidden_state) if restore == "merged" else out.last_hidden_state
            outs[restore] = (tokens, out.pooler_output)
    for restore in (None, "merged"):
        for got, expected in zip(outs[restore], outs["dense"], strict=True):
            assert_close(got, expected, 1e-9)
