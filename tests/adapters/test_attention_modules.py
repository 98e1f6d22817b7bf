"""What people do with a model's attentions after patching: wrap, replace, hook, prune, adapt and normalise them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from helpers import answer, assert_close, randomised, tiny_of
from tokenmerge import ToMe
from tokenmerge import errors as e
from tokenmerge.adapters import ADAPTERS
from tokenmerge.adapters.base import Adapter
from tokenmerge.adapters.generic import Generic

NAMES = {"blocks": "layers", "attn": "mix", "norm": "between", "mlp": "feed"}
BY_NAME = {adapter.name: adapter for adapter in ADAPTERS} | {"generic": Generic(**NAMES)}
# the path of the attention in a block
FAMILIES = {
    "timm_vit": "attn",
    "timm_beit": "attn",
    "timm_relpos": "attn",
    "timm_cait": "attn",
    "timm_eva": "attn",
    "timm_sam": "attn",
    "torchvision_vit": "self_attention",
    "open_clip": "attn",
    "swag": "self_attention",
    "torch_encoder": "self_attn",
    "dino": "attn",
    "dinov2": "attn",
    "mae_st": "attn",
    "vit_pytorch": "0",
    "hf_vit": "attention",
    "hf_clip": "self_attn",
    "generic": "mix",
}
every_family = pytest.mark.parametrize("name", FAMILIES)
COMPUTED = ("torchvision_vit", "open_clip", "swag", "torch_encoder", "dino", "dinov2", "mae_st", "vit_pytorch")


def _make(name: str) -> tuple[nn.Module, Tensor, dict[str, str]]:
    torch.manual_seed(0)
    model, x = tiny_of(BY_NAME[name])
    randomised(model).eval().double()
    if name == "timm_cait":  # layer scale of its own, small enough to hide what goes wrong
        for block in model.blocks:
            block.gamma_1.data.fill_(1.0)
    return model, torch.randn(2, *x.shape[1:], dtype=torch.float64), NAMES if name == "generic" else {}


def _attentions(model: nn.Module, name: str) -> list[tuple[nn.Module, str, nn.Module]]:
    """Every attention with the module that holds it and its name there."""
    adapter: Adapter = BY_NAME[name].resolve(model)
    found = []
    for _, block in adapter.blocks(model):
        parent, _, child = FAMILIES[name].rpartition(".")
        holder = block.get_submodule(parent)
        found.append((holder, child, holder.get_submodule(child)))
    return found


def _run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return answer(model(x))


class Scaled(nn.Module):
    """Wraps an attention, and changes what it puts out."""

    def __init__(self, attn: nn.Module, scale: float) -> None:
        super().__init__()
        self.attn, self.scale = attn, scale

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what hosts ask an attention for besides calling it
            return getattr(self._modules["attn"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.attn(*args, **kwargs)
        return (out[0] * self.scale, *out[1:]) if isinstance(out, tuple) else out * self.scale


class Other(nn.Module):
    """An attention that is none of those that were there."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.batch_first = getattr(attn, "batch_first", True)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return x if x.dim() == 4 else (x, None)


@every_family
def test_an_attention_that_is_wrapped_after_patching_runs_in_its_wrapper(name: str) -> None:
    model, x, names = _make(name)
    handle = tokenmerge.patch(model, r=2, **names)
    plain = _run(model, x)
    for holder, child, attn in _attentions(model, name):
        setattr(holder, child, Scaled(attn, 0.5))
    wrapped = _run(model, x)
    assert (wrapped - plain).abs().max() > 1e-3
    handle.r = 0
    unmerged = _run(model, x)
    handle.remove()
    assert_close(_run(model, x), unmerged)
    for holder, child, attn in _attentions(model, name):
        setattr(holder, child, attn.attn)
    # the same change, made by hooks on the attentions before patching
    for _, _, attn in _attentions(model, name):
        attn.register_forward_hook(_halve)
    tokenmerge.patch(model, r=2, **names)
    assert_close(_run(model, x), wrapped)


def _halve(module: nn.Module, args: Any, out: Any) -> Any:
    return (out[0] * 0.5, *out[1:]) if isinstance(out, tuple) else out * 0.5


@every_family
def test_an_attention_that_is_replaced_after_patching_is_refused(name: str) -> None:
    model, x, names = _make(name)
    handle = tokenmerge.patch(model, r=2, **names)
    _run(model, x)
    holder, child, attn = _attentions(model, name)[1]
    setattr(holder, child, Other(attn))
    with pytest.raises(e.UnsupportedError, match=r"when the model was\s+patched.*Other.*handle\.remove"):
        _run(model, x)
    setattr(holder, child, attn)
    assert _run(model, x).isfinite().all()
    handle.remove()


@every_family
@pytest.mark.parametrize("r", [0, 2])
def test_hooks_of_attentions_run_and_change_what_they_put_out(name: str, r: int) -> None:
    model, x, names = _make(name)
    attns = [attn for _, _, attn in _attentions(model, name)]
    own: list[Any] = []
    seen: list[Any] = []
    hooks = [attn.register_forward_hook(lambda _, args, out: own.append(type(out))) for attn in attns]
    plain = _run(model, x)
    for hook in hooks:
        hook.remove()
    handle = tokenmerge.patch(model, r=r, **names)
    before = _run(model, x)
    hooks = [attn.register_forward_hook(lambda _, args, out: seen.append(type(out))) for attn in attns]
    assert torch.equal(_run(model, x), before)
    assert seen == own and len(seen) == len(attns)
    hooks += [attn.register_forward_hook(_halve) for attn in attns]
    assert (_run(model, x) - before).abs().max() > 1e-3
    for hook in hooks:
        hook.remove()
    handle.remove()
    assert_close(_run(model, x), plain)


@pytest.mark.parametrize("name", ["torchvision_vit", "open_clip", "torch_encoder", "generic"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["prune", "weight_norm", "parametrize"])
def test_weights_that_are_made_in_a_hook_are_those_that_attend(name: str, when: str, kind: str) -> None:
    model, x, names = _make(name)
    attn = _attentions(model, name)[1][2]
    weight = _patch_and_make(model, attn, kind, when, names)
    before = _run(model, x)
    with torch.no_grad():
        weight.mul_(-1.5)
    assert (_run(model, x) - before).abs().max() > 1e-3
    for _ in range(2):
        model.zero_grad()
        answer(model(x)).square().sum().backward()
        assert weight.grad is not None and weight.grad.abs().max() > 0


# torch's old weight norm, which people still have
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def _patch_and_make(model: nn.Module, attn: Any, kind: str, when: str, names: dict[str, str]) -> nn.Parameter:
    if when == "after":
        tokenmerge.patch(model, r=2, **names)
    if kind == "prune":
        from torch.nn.utils import prune

        prune.l1_unstructured(attn, "in_proj_weight", 0.3)
        weight: nn.Parameter = attn.in_proj_weight_orig
    elif kind == "weight_norm":
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(attn, "in_proj_weight")
        weight = attn.in_proj_weight_v
        weight = attn.in_proj_weight_g
    else:
        nn.utils.parametrize.register_parametrization(attn, "in_proj_weight", _Twice())
        weight = attn.parametrizations.in_proj_weight.original
    if when == "before":
        tokenmerge.patch(model, r=2, **names)
    return weight


class _Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("name", ["torchvision_vit", "open_clip", "generic"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_on_multihead_attention(name: str, when: str) -> None:
    peft = pytest.importorskip("peft")
    model, x, names = _make(name)
    child = FAMILIES[name]
    if when == "after":
        tokenmerge.patch(model, r=2, track=True, **names)
    lora: Any = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=[child], r=4, lora_alpha=8), model)
    for parameter_name, parameter in lora.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float64) * 0.2
    if when == "before":
        tokenmerge.patch(model, r=2, track=True, **names)
    handle = tokenmerge.handle_of(model)
    merged, groups = _run(model, x), handle.groups
    answer(model(x)).square().sum().backward()
    adapted = [p for n, p in model.named_parameters() if "lora_" in n]
    assert adapted and all(p.grad is not None and p.grad.abs().max() > 0 for p in adapted)
    handle.remove()
    adapter = BY_NAME[name] if name == "generic" else None
    assert_close(merged, tokenmerge.simulate(model, groups, x, adapter=adapter), 1e-6)
    with torch.no_grad():
        for parameter in adapted:
            parameter.zero_()
    assert (tokenmerge.simulate(model, groups, x, adapter=adapter) - merged).abs().max() > 1e-3


@pytest.mark.parametrize("metric", ["k", "v", "q"])
@pytest.mark.parametrize("name", ["timm_vit", "timm_cait", "timm_relpos", "mae"])
def test_listening_follows_a_projection_that_is_wrapped_after_patching(name: str, metric: str) -> None:
    model, x, _ = _make(name) if name in FAMILIES else _make_mae()
    handle = tokenmerge.patch(model, ToMe(metric=metric), r=2, track=True)
    _run(model, x)
    for block in model.blocks:
        block.attn.qkv = Delta(block.attn.qkv)
    merged, groups = _run(model, x), handle.groups
    handle.remove()
    left = [name for name, module in model.named_modules() if "forward" in module.__dict__]
    assert left == []
    handle = tokenmerge.patch(model, ToMe(metric=metric), r=2, track=True)
    assert torch.equal(_run(model, x), merged)
    assert all(torch.equal(now, then) for now, then in zip(handle.groups, groups, strict=True))


def _make_mae() -> tuple[nn.Module, Tensor, dict[str, str]]:
    model, x = BY_NAME["mae"].tiny()
    return randomised(model).eval().double(), torch.randn(2, *x.shape[1:], dtype=torch.float64), {}


class Delta(nn.Module):
    """A projection with something added to it, as LoRA has."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.delta = base, nn.Linear(base.in_features, base.out_features).double()  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.delta(x)


SWAPS: dict[str, Callable[[], tuple[nn.Module, ToMe]]] = {
    "cait": lambda: (_make("timm_cait")[0], ToMe()),
    "vit-v": lambda: (_make("timm_vit")[0], ToMe(metric="v")),
    "relpos": lambda: (_make("timm_relpos")[0], ToMe(metric="v")),
}


@pytest.mark.parametrize("make", SWAPS.values(), ids=SWAPS)
def test_a_projection_that_is_swapped_after_patching_is_listened_to(make: Callable[[], Any]) -> None:
    model, method = make()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    handle = tokenmerge.patch(model, method, r=2)
    _run(model, x)
    for block in model.blocks:
        old = block.attn.qkv
        block.attn.qkv = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None).double()
    merged = _run(model, x)
    handle.remove()
    tokenmerge.patch(model, method, r=2)
    assert torch.equal(_run(model, x), merged)


def test_a_projection_whose_biases_the_attention_holds_cannot_be_swapped() -> None:
    from timm.models.beit import Beit

    model: Any = randomised(Beit(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, qkv_bias=True)).eval()
    x = torch.randn(2, 3, 32, 32)
    handle = tokenmerge.patch(model, r=2)
    _run(model, x)
    model.blocks[0].attn.qkv = nn.Linear(32, 96, bias=False)
    for r in (2, 0):
        handle.r = r
        with pytest.raises(e.UnsupportedError, match=r"'qkv' of a Attention was replaced.*never calls it"):
            _run(model, x)


@pytest.mark.parametrize("name", ["dino", "dinov2", "vit_pytorch"])
def test_hooks_inside_an_attention_that_is_computed_run(name: str) -> None:
    model, x, _ = _make(name)
    attn: Any = _attentions(model, name)[0][2]
    child = attn.attend if name == "vit_pytorch" else attn.attn_drop
    handle = tokenmerge.patch(model, r=2)
    before, seen = _run(model, x), []
    child.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    assert_close(_run(model, x), before)
    assert len(seen) == 1 and len(seen[0]) == 4
    handle.remove()


@pytest.mark.parametrize("name", ["timm_vit", "torchvision_vit", "vit_pytorch", "hf_vit"])
def test_a_wrapped_attention_is_compiled_and_checkpointed(name: str) -> None:
    model, x, _ = _make(name)
    tokenmerge.patch(model, r=2)
    for holder, child, attn in _attentions(model, name):
        setattr(holder, child, Scaled(attn, 0.5))
    expected = _run(model, x)
    torch._dynamo.reset()
    assert_close(_run(torch.compile(model, backend="eager"), x), expected)
