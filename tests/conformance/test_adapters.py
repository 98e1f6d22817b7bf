"""The promises every model family keeps, each one test over all adapters and over timm's variants."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from functools import partial
from types import BuiltinFunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from helpers import answer, assert_close, bound_attributes, randomised, run_in_threads, shortened, tiny_vit
from tokenmerge.adapters import ADAPTERS
from tokenmerge.adapters.base import Adapter
from tokenmerge.errors import AlreadyPatchedError
from tokenmerge.testing.models.plain import MAEStandIn, SwagStandIn

Make = Callable[[], nn.Module]
Family = Callable[[], tuple[nn.Module, Tensor]]


def _distilled() -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled

    model = VisionTransformerDistilled(
        img_size=32, patch_size=4, embed_dim=32, depth=4, num_heads=4, num_classes=10, qkv_bias=True
    )
    return randomised(model).eval()


def _respost() -> nn.Module:
    from timm.models.vision_transformer import ResPostBlock

    return tiny_vit(block_fn=ResPostBlock, init_values=0.5)


def _unfused() -> nn.Module:
    model = tiny_vit(qkv_bias=True)
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


VARIANTS: dict[str, Make] = {
    "vit-prefix1": lambda: tiny_vit(qkv_bias=True),
    "vit-unfused": _unfused,
    "deit-distilled-prefix2": _distilled,
    "deit3-layerscale": lambda: tiny_vit(init_values=0.5, no_embed_class=True),
    "dinov2-layerscale": lambda: tiny_vit(init_values=0.5),
    "dinov2-registers-prefix5": lambda: tiny_vit(init_values=0.5, reg_tokens=4, no_embed_class=True),
    "clip-pre-norm": lambda: tiny_vit(pre_norm=True, norm_layer=nn.LayerNorm),
    "siglip-map-prefix0": lambda: tiny_vit(class_token=False, global_pool="map"),
    "map-prefix1": lambda: tiny_vit(global_pool="map"),
    "map-prefix5": lambda: tiny_vit(global_pool="map", reg_tokens=4),
    "avg-prefix0": lambda: tiny_vit(class_token=False, global_pool="avg"),
    "avg-prefix1": lambda: tiny_vit(global_pool="avg"),
    "avg-prefix1-no-fc-norm": lambda: tiny_vit(global_pool="avg", fc_norm=False),
    "avg-prefix2": lambda: tiny_vit(global_pool="avg", reg_tokens=1),
    "avg-prefix5": lambda: tiny_vit(global_pool="avg", reg_tokens=4),
    "avg-with-prefix": lambda: tiny_vit(global_pool="avg", pool_include_prefix=True),
    "avgmax-prefix1": lambda: tiny_vit(global_pool="avgmax"),
    "max-prefix1": lambda: tiny_vit(global_pool="max"),
    "respost": _respost,
    "qk-norm": lambda: tiny_vit(qk_norm=True),
    "scale-norms": lambda: tiny_vit(scale_attn_norm=True, scale_mlp_norm=True),
    "mae-global-pool": lambda: randomised(MAEStandIn(patch_size=4)).eval(),
    "mae-class-token": lambda: randomised(MAEStandIn(patch_size=4, global_pool=False)).eval(),
    "swag-token": lambda: randomised(SwagStandIn(patch_size=4)).eval(),
    "swag-gap-prefix0": lambda: randomised(SwagStandIn(patch_size=4, classifier="gap")).eval(),
}
FAMILIES: dict[str, Family] = {adapter.name: lambda adapter=adapter: _family(adapter) for adapter in ADAPTERS}
# for captures
SHORT: dict[str, Family] = {adapter.name: lambda adapter=adapter: _short(adapter) for adapter in ADAPTERS}


def _family(adapter: Adapter) -> tuple[nn.Module, Tensor]:
    """A randomised model of the family, and two different inputs of it."""
    torch.manual_seed(0)
    model, x = adapter.tiny()
    return randomised(model), torch.randn(2, *x.shape[1:])


def _short(adapter: Adapter) -> tuple[nn.Module, Tensor]:
    model, x = _family(adapter)
    return shortened(model, adapter), x


every_variant = pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)
every_family = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
every_short_family = pytest.mark.parametrize("make", SHORT.values(), ids=SHORT)
X = (3, 3, 32, 32)


def _run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return answer(model(x))


@every_variant
def test_r0_is_the_original_and_removal_is_bit_exact(make: Make) -> None:
    model, x = make(), torch.randn(X)
    keys, expected, before = list(model.state_dict()), _run(model, x), (bound_attributes(model), set(dir(model)))
    handle = tokenmerge.patch(model, r=0)
    assert len(handle.tokens) == 4
    assert list(model.state_dict()) == keys
    assert torch.equal(_run(model, x), expected)
    model.train()
    torch.manual_seed(1)
    patched_in_train = _run(model, x)
    handle.r = 3
    assert not torch.equal(_run(model.eval(), x), expected)
    handle.remove()
    assert torch.equal(_run(model, x), expected)
    model.train()
    torch.manual_seed(1)
    assert torch.equal(_run(model, x), patched_in_train)
    assert (bound_attributes(model), set(dir(model))) == before


@every_variant
def test_recomposed_blocks_equal_their_own_forward(make: Make) -> None:
    # r = 0 runs the block's own forward; this is the path that merging takes, with nothing merged
    model, x = make(), torch.randn(X)
    expected = _run(model, x)
    handle = tokenmerge.patch(model, r=0)
    for runner in handle.runners:
        runner.block.__dict__["forward"] = runner.parity
    assert_close(_run(model, x), expected, 1e-6)


@every_variant
@pytest.mark.parametrize("r", [5, (6, -1.0), 0.2])
def test_merging_equals_the_group_mean_simulation(make: Make, r: Any) -> None:
    model, x = make().double(), torch.randn(X).double()
    unmerged = _run(model, x)
    with tokenmerge.patched(model, r=r, prop_attn=True, track=True) as handle:
        merged, groups = _run(model, x), handle.groups
        sizes = handle.sizes
        assert sizes.shape[1] == handle.tokens[-1] < handle.tokens[0]
        assert torch.equal(sizes.sum(dim=1), torch.full((3,), float(groups[-1].shape[1])))
    assert_close(merged, tokenmerge.simulate(model, groups, x), 1e-6)
    assert (merged - unmerged).abs().max() > 1e-3, "merging changed nothing: the comparison would be empty"


@every_variant
def test_constant_input_without_positions_is_unchanged(make: Make) -> None:
    model = make()
    for name, parameter in model.named_parameters():
        if "pos_embed" in name:
            nn.init.zeros_(parameter)
    x = torch.randn(2, 3, 1, 1).expand(2, 3, 32, 32)
    expected = _run(model, x)
    with tokenmerge.patched(model, r=6, prop_attn=True):
        assert_close(_run(model, x), expected, 1e-4)


# a trace takes seconds: every family with what asks most of one, a few with all
COMPILED = [(name, True, True) for name in FAMILIES] + [
    (name, dynamic, track)
    for name in ("timm_vit", "hf_vit", "swag")
    for dynamic, track in ((False, False), (False, True), (True, False))
]


@pytest.mark.parametrize(("name", "dynamic", "track"), COMPILED)
def test_compile_in_one_graph(name: str, dynamic: bool, track: bool) -> None:
    torch._dynamo.reset()
    model, x = SHORT[name]()
    handle = tokenmerge.patch(model, r=2, track=track)
    expected, sizes = _run(model, x), handle.sizes
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    assert_close(_run(compiled, x), expected)
    assert_close(_run(compiled, torch.cat((x, x)))[2:], expected)
    assert_close(handle.sizes[:2], sizes)
    if not (dynamic and track):
        handle.r = 1
        changed = _run(model, x)
        assert_close(_run(compiled, x), changed)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile_with_inductor(mode: str) -> None:
    torch._dynamo.reset()
    model, x = SHORT["timm_vit"]()
    tokenmerge.patch(model, r=2)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, mode=mode)
    inputs = [x, torch.cat((x, x.flip(0)))]
    for batch in inputs:
        assert_close(_run(compiled, batch), _run(model, batch), 1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in inputs:
            batch = torch.randn_like(batch)
            assert_close(_run(compiled, batch), _run(model, batch), 1e-4)


@every_short_family
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
# strict export warns that the forward writes its sizes to the handle; the graph does not need them
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_export_and_the_eager_model_after_it(make: Family, strict: bool) -> None:
    model, x = make()
    x = torch.cat((x, x.flip(0)))
    handle = tokenmerge.patch(model, r=2)
    expected = _run(model, x)
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(model, (x,), strict=strict, dynamic_shapes=shapes)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    operators = [
        target for target in targets if not isinstance(target, BuiltinFunctionType)
    ]  # the rest: sizes, getitem
    assert {target.namespace for target in operators} == {"aten"}
    assert_close(_run(program.module(), x), expected)
    assert_close(_run(program.module(), x[:3]), expected[:3])
    assert torch.equal(_run(model, x), expected)
    assert handle.sizes.sum() == 4 * handle.sizes[0].sum() and type(handle.sizes) is Tensor


@every_family
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_gives_equal_gradients(make: Family, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = make()
    model.train()
    x.requires_grad_(True)
    tokenmerge.patch(model, r=2)
    grads = []
    for is_checkpointed in (False, True):
        model.zero_grad()
        hooks = []
        if is_checkpointed:
            for runner in tokenmerge.handle_of(model).runners:
                inner = runner.block.__dict__["forward"]
                runner.block.__dict__["forward"] = _Checkpointed(checkpoint, inner, reentrant)
                hooks.append((runner.block, inner))
        torch.manual_seed(0)
        answer(model(x)).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
        for block, inner in hooks:
            block.__dict__["forward"] = inner
    assert len(grads[0]) > 20
    # to rounding: without gradients, as in the first pass of a reentrant one, torch may attend by another kernel
    for plain, again in zip(*grads, strict=True):
        assert_close(again, plain)


class _Checkpointed:
    def __init__(self, checkpoint: Any, inner: Any, reentrant: bool) -> None:
        self.checkpoint, self.inner, self.reentrant = checkpoint, inner, reentrant

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.checkpoint(partial(self.inner, **kwargs), x, *args, use_reentrant=self.reentrant)


def test_timm_gradient_checkpointing() -> None:
    model, x = tiny_vit(init_values=0.5).train(), torch.randn(2, 3, 32, 32)
    tokenmerge.patch(model, r=3)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert_close(again, plain, 1e-6)


@every_family
def test_copies_are_independent_and_survive_saving(make: Family) -> None:
    model, x = make()
    unmerged = _run(model, x)
    handle = tokenmerge.patch(model, r=2, track=True)
    expected = _run(model, x)
    twin = copy.deepcopy(model)
    tokenmerge.handle_of(twin).r = 0
    assert torch.equal(_run(twin, x), unmerged) and torch.equal(_run(model, x), expected)
    assert tokenmerge.handle_of(twin).model is twin
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(_run(loaded, x), expected)
    assert tokenmerge.handle_of(loaded).config == handle.config
    tokenmerge.unpatch(loaded)
    assert torch.equal(_run(loaded, x), unmerged) and bound_attributes(loaded) == []
    assert torch.equal(_run(model, x), expected)


@every_family
def test_four_threads_at_once(make: Family) -> None:
    model, x = make()
    handle = tokenmerge.patch(model, r=2, track=True)
    inputs = [torch.randn(2 + i, *x.shape[1:]) for i in range(4)]
    expected = [(_run(model, x), handle.sizes, handle.groups[-1]) for x in inputs]
    wrong: list[int] = []
    start = threading.Barrier(4)

    def work(i: int) -> None:
        start.wait()
        for _ in range(40):
            out = _run(model, inputs[i])
            got = (out, handle.sizes, handle.groups[-1])
            if not all(torch.equal(a, b) for a, b in zip(got, expected[i], strict=True)):
                wrong.append(i)

    run_in_threads(work, 4)
    assert wrong == []


@every_family
def test_low_precision_and_inference_mode(make: Family) -> None:
    model, x = make()
    unmerged = _run(model, x)
    tokenmerge.patch(model, r=2)
    expected = _run(model, x)
    with torch.inference_mode():
        assert_close(answer(model(x)), expected, 1e-6)
    low = copy.deepcopy(model).bfloat16()
    out = _run(low, x.bfloat16())
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert _run(model, x).isfinite().all()
    low_unmerged = copy.deepcopy(model).bfloat16()
    tokenmerge.handle_of(low_unmerged).r = 0
    assert_close(_run(low_unmerged, x.bfloat16()).float(), unmerged, 0.1)


@every_family
def test_fused_and_unfused_attention_agree(make: Family) -> None:
    model, x = make()
    tokenmerge.patch(model, r=2)
    expected = _run(model, x)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert_close(_run(model, x), expected)


@every_family
def test_attaching_twice_raises_and_keeps_the_first(make: Family) -> None:
    model, x = make()
    tokenmerge.patch(model, r=2)
    expected = _run(model, x)
    with pytest.raises(AlreadyPatchedError, match=r"reduced already: .*ToMe.*call unpatch"):
        tokenmerge.patch(model, r=1)
    assert torch.equal(_run(model, x), expected)


@every_family
def test_attaching_does_not_move_the_random_state(make: Family) -> None:
    model, _ = make()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    tokenmerge.patch(model, r=2)
    assert torch.equal(torch.rand(3), expected)


@every_family
def test_gradients_flow_in_training(make: Family) -> None:
    model, x = make()
    model.train()
    x.requires_grad_(True)
    answer(model(x)).square().sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    x.grad = None
    tokenmerge.patch(model, r=2)
    answer(model(x)).square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert grads.keys() == trained and all(grad.isfinite().all() for grad in grads.values())


def test_every_variant_is_supported() -> None:
    for make in VARIANTS.values():
        assert tokenmerge.supports(make())
