"""What is proved of a block when a model is patched, and that it leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from helpers import assert_close, randomised, tiny_of, tiny_vit
from tokenmerge import ToMe
from tokenmerge import errors as e
from tokenmerge.adapters import ADAPTERS
from tokenmerge.adapters.generic import Generic

NAMES = {"blocks": "layers", "attn": "attn", "norm": "norm2", "mlp": "mlp"}
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Attn(nn.Module):
    """An attention of somebody's own: `masked` makes scores of a mask as this one means it."""

    def __init__(self, masked: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 4, nn.Linear(32, 96), nn.Linear(32, 32)
        self.masked = masked

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, 4, 8).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * 8**-0.5
        if attn_mask is not None and self.masked is not None:
            scores = self.masked(scores, attn_mask)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, N, C))


class Layer(nn.Module):
    def __init__(self, attn: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(32), nn.LayerNorm(32), attn or Attn(_added)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    def __init__(self, layer: Callable[[], nn.Module] = Layer, patch: int = 4) -> None:
        super().__init__()
        self.embed, self.layers = nn.Conv2d(3, 32, patch, patch), nn.ModuleList(layer() for _ in range(3))
        self.head = nn.Linear(32, 7)

    def tokens(self, x: Tensor) -> list[Tensor]:
        x, out = self.embed(x).flatten(2).mT, []
        for layer in self.layers:
            x = layer(x)
            out.append(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tokens(x)[-1].mean(1))


def _added(scores: Tensor, mask: Tensor) -> Tensor:
    return scores + mask


MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "keep": lambda scores, mask: scores.masked_fill(mask == 0, float("-inf")),
    "hide": lambda scores, mask: scores.masked_fill(mask.bool(), float("-inf")),
    "multiplied": lambda scores, mask: scores * mask,
    "per-token": lambda scores, mask: scores + mask.expand(scores.shape[0], scores.shape[-1])[:, None, None, :],
    "ignored": lambda scores, mask: scores,
    "doubled": lambda scores, mask: scores + 2 * mask,
}


def _net(layer: Callable[[], nn.Module] = Layer) -> Any:
    return randomised(Net(layer)).eval().double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", MASKS.values(), ids=MASKS)
def test_a_mask_that_does_not_add_is_found_out(masked: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    model = _net(lambda: Layer(Attn(masked))).to(dtype)
    with pytest.raises(e.UnsupportedError, match=r"prop_attn=True, but log\(size\) added to the mask .*\(Attn\)"):
        tokenmerge.patch(model, r=8, prop_attn=True, **NAMES)
    with tokenmerge.patched(model, r=8, **NAMES) as handle, torch.no_grad():
        report = handle.report()
        assert not report.prop_attn
        assert any("no proportional attention: log(size) added to the mask" in limit for limit in report.limits)
        assert model(X.to(dtype)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_mask_that_adds_is_used(dtype: torch.dtype) -> None:
    model = _net().to(dtype)
    with tokenmerge.patched(model, r=8, track=True, **NAMES) as handle, torch.no_grad():
        assert handle.report().prop_attn
        merged, groups = model(X.to(dtype)), handle.groups
    if dtype != torch.bfloat16:
        expected = tokenmerge.simulate(model, groups, X.to(dtype), adapter=Generic(**NAMES))
        assert_close(merged, expected, 1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=[adapter.name for adapter in ADAPTERS])
def test_every_family_counts_tokens_by_their_size(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenmerge._runtime.residual import ResidualRunner

    torch.manual_seed(0)
    model = randomised(tiny_of(adapter)[0]).eval()
    with tokenmerge.patched(model, r=2, prop_attn=True) as handle:
        assert handle.report().prop_attn
    # half of the bias is not the bias: the proof sees that
    honest = ResidualRunner._bias
    monkeypatch.setattr(ResidualRunner, "_bias", lambda *args: None if honest(*args) is None else honest(*args) * 0.5)
    if adapter.name != "timm_sam":  # in windows its tokens are only compared with its own forward
        with pytest.raises(e.UnsupportedError, match=r"does not make a token count as"):
            tokenmerge.patch(model, r=2, prop_attn=True)


class Gated(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.extra = nn.Parameter(torch.zeros(1)), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.gate * self.extra(x).cumsum(1)


def test_a_path_that_starts_at_zero_is_seen_by_names() -> None:
    model = Net(Gated).eval()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(e.AdapterMismatchError, match=r"with the MLP put to zero|treats a token by its place"):
        tokenmerge.patch(model, r=8, **NAMES)
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))
    assert all(parameter.grad_fn is None for parameter in model.parameters())


def test_a_block_of_a_host_with_a_forward_of_its_own_is_refused() -> None:
    from timm.models.vision_transformer import Block

    class Scaled(Block):
        def forward(self, x: Tensor, **given: Any) -> Tensor:
            return super().forward(x * (1 + 0.0))

    class Named(Block):
        """Adds nothing: its forward is the host's."""

    with pytest.raises(e.AdapterMismatchError, match=r"Scaled\) is a timm.*Block with a forward of its own.*by names"):
        tokenmerge.patch(tiny_vit(block_fn=Scaled), r=4)
    tokenmerge.patch(tiny_vit(block_fn=Named), r=4)
    names = {"blocks": "blocks", "attn": "attn", "norm": "norm2", "mlp": "mlp"}
    tokenmerge.patch(tiny_vit(block_fn=Scaled), r=4, **names)


@pytest.mark.parametrize("make", ["timm", "names"])
def test_patching_leaves_no_trace(make: str) -> None:
    torch.manual_seed(0)
    model = tiny_vit() if make == "timm" else _net()
    blocks: Any = model.blocks if make == "timm" else model.layers
    names = {} if make == "timm" else NAMES
    calls: list[Any] = []
    attention, mlp = blocks[0].attn, blocks[0].mlp
    mlp.register_forward_hook(lambda *args: calls.append("hook"))
    mlp.register_forward_pre_hook(lambda *args: calls.append("pre-hook"))
    everywhere = [
        nn.modules.module.register_module_forward_hook(lambda *args: calls.append("global")),
        nn.modules.module.register_module_forward_pre_hook(lambda *args: calls.append("global pre")),
    ]
    blocks[0].norm2 = Counting(blocks[0].norm2)
    attention.qkv.eval()
    # a scale that is one all over, and a buffer that moves
    before = copy.deepcopy(model.state_dict())
    state = [(path, dict(module.__dict__)) for path, module in model.named_modules()]
    versions = [parameter._version for parameter in model.parameters()]
    random = torch.get_rng_state()
    with tokenmerge.patched(model, r=2, **names):
        pass
    for hook in everywhere:
        hook.remove()
    assert calls == [] and torch.equal(torch.get_rng_state(), random)
    for (path, attributes), (_, module) in zip(state, model.named_modules(), strict=True):
        assert list(module.__dict__) == list(attributes), path
        assert all(module.__dict__[name] is value for name, value in attributes.items()), path
    assert blocks[0].norm2.calls == 0 and blocks[0].norm2.log == []
    assert [parameter._version for parameter in model.parameters()] == versions
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


class Counting(nn.Module):
    """Counts its calls, in an attribute, a list and a buffer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0
        self.log: list[int] = []
        self.register_buffer("total", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(self.calls)
        self.total += 1
        return self.inner(x)


def _old_spectral(layer: nn.Module) -> None:
    nn.utils.spectral_norm(layer)


def _spectral(layer: nn.Module) -> None:
    nn.utils.parametrizations.spectral_norm(layer)


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*is deprecated")
@pytest.mark.parametrize("normed", [_old_spectral, _spectral], ids=["old", "parametrized"])
@pytest.mark.parametrize("training", [False, True])
def test_power_iterations_are_not_taken_for_a_change(normed: Callable[[nn.Module], None], training: bool) -> None:
    model: Any = tiny_vit().train(training)
    for block in model.blocks:
        normed(block.mlp.fc1)
        normed(block.attn.proj)
    state = copy.deepcopy(model.state_dict())
    with tokenmerge.patched(model, r=4), torch.no_grad():
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name
        assert model(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_batch_norm_in_a_block_is_not_taken_for_a_change() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(32)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.mT).mT

    model: Any = tiny_vit()
    for block in model.blocks:
        block.norm2 = Normed().eval()
    with tokenmerge.patched(model, r=4), torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).isfinite().all()
    assert int(model.blocks[0].norm2.norm.num_batches_tracked) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_have_a_reason_of_their_own(value: float) -> None:
    model: Any = tiny_vit()
    model.blocks[0].mlp.fc1.weight.data[0, 0] = value
    with pytest.raises(e.AdapterMismatchError, match=r"gives NaN or inf .* stand in mlp\.fc1\.weight"):
        tokenmerge.patch(model, r=4)


class Near(Attn):
    """Attends to what is at most seven places away."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        n = torch.arange(x.shape[1])
        far = (n[:, None] - n).abs() > 7
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT * 8**-0.5).masked_fill(far, float("-inf"))
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Late(Attn):
    """Knows positions from the ninth token on."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        place = (torch.arange(x.shape[1], dtype=x.dtype) - 9).clamp_min(0)
        return super().forward(x + place[:, None])


class OfOneLength(Layer):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 64, "this block takes 64 tokens"
        return super().forward(x)


class OnAGrid(Layer):
    def forward(self, x: Tensor) -> Tensor:
        B, _, _, C = x.shape
        return super().forward(x.view(B, -1, C)).view(x.shape)


@pytest.mark.parametrize("attn", [Near, Late])
def test_places_that_only_long_sequences_show_are_seen(attn: Callable[[], nn.Module]) -> None:
    with pytest.raises(e.AdapterMismatchError, match=r"treats a token by its place"):
        tokenmerge.patch(_net(lambda: Layer(attn())), r=4, **NAMES)


@pytest.mark.parametrize(("layer", "reason"), [(OfOneLength, "this block takes 64 tokens"), (OnAGrid, "ValueError")])
def test_blocks_that_cannot_be_run_alone_are_refused(layer: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(e.UnsupportedModelError, match=rf"cannot be run on random tokens.*{reason}"):
        tokenmerge.patch(_net(layer), r=4, **NAMES)


def test_on_meta_nothing_is_proved_and_the_report_says_so() -> None:
    model = tiny_vit().to("meta")  # old timm builds nothing there: it reads numbers out of tensors
    report = tokenmerge.patch(model, r=4).report()
    assert any("nothing was proved" in limit for limit in report.limits)
    assert "not proved" in str(report) and "parity when attached     max" not in str(report)


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_an_offloaded_model_is_refused_with_what_to_do(name: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    adapter = next(adapter for adapter in ADAPTERS if adapter.name.startswith(name))
    torch.manual_seed(0)
    model, _ = adapter.tiny()
    randomised(model)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    with pytest.raises(e.UnsupportedError, match=r"offloaded .* patch the model first, then offload it"):
        tokenmerge.patch(offloaded, r=2)


def test_keys_are_listened_for_where_they_are_made() -> None:
    class Unused(Attn):
        def __init__(self) -> None:
            super().__init__(_added)
            self.to_k = nn.Identity()

    model = _net(lambda: Layer(Unused()))
    with tokenmerge.patched(model, r=8, track=True, **NAMES) as handle, torch.no_grad():
        model(X)
        groups = handle.groups
        assert not any("matched by features" in limit for limit in handle.report().limits)
    plain = _net()
    plain.load_state_dict(model.state_dict())
    with tokenmerge.patched(plain, ToMe(), r=8, track=True, **NAMES) as handle, torch.no_grad():
        plain(X)
        assert all(torch.equal(a, b) for a, b in zip(handle.groups, groups, strict=True))

    class NotAtAll(Unused):
        def __init__(self) -> None:
            super().__init__()
            self.mixed, self.qkv = self.qkv, nn.Identity()

        def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
            B, N, C = x.shape
            q, k, v = self.mixed(x).view(B, N, 3, 4, 8).permute(2, 0, 3, 1, 4)
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
            return self.proj(out.transpose(1, 2).reshape(B, N, C))

    with tokenmerge.patched(_net(lambda: Layer(NotAtAll())), r=8, **NAMES) as handle:
        assert any("matched by features" in limit for limit in handle.report().limits)


def test_every_block_hands_out_every_token_by_names() -> None:
    model = _net()
    with tokenmerge.patched(model, r=8, track=True, **NAMES) as handle, torch.no_grad():
        outs, groups = model.tokens(X), handle.groups
    assert [out.shape[1] for out in outs] == [64, 64, 64]
    for out, assign in zip(outs, groups, strict=True):
        for image in range(len(out)):
            for group in assign[image].unique():
                members = out[image][assign[image] == group]
                assert_close(members, members[:1].expand_as(members))
    with tokenmerge.patched(model, r=8, restore="merged", **NAMES), torch.no_grad():
        assert [out.shape[1] for out in model.tokens(X)] == [56, 48, 40]


@pytest.mark.parametrize("prefix", [-1, -8, 1.5, "1", True])
def test_a_prefix_is_a_number_of_tokens(prefix: Any) -> None:
    says = r"prefix=.*whole number from 0 on" if type(prefix) is int else r"prefix is .*; it takes int"
    with pytest.raises(e.TokenMergeError, match=says):
        tokenmerge.patch(_net(), r=8, prefix=prefix, **NAMES)


def test_a_prefix_longer_than_the_sequence_is_refused_when_it_runs() -> None:
    model = _net()
    tokenmerge.patch(model, r=8, prefix=10**6, **NAMES)
    with pytest.raises(e.UnsupportedError, match=r"prefix=1000000 .* was given 64"):
        model(X)


def test_a_class_token_in_a_part_of_the_model_is_found_and_counted_in_the_report() -> None:
    class WithToken(Net):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = nn.Module()
            self.embeddings.cls_token = nn.Parameter(torch.randn(1, 1, 32))

    handle = tokenmerge.patch(randomised(WithToken()).eval(), r=8, **NAMES)
    assert handle.prefix == 1 and "in front, 1 is protected" in "; ".join(handle.report().limits)
    assert "in front, 0 are protected" in "; ".join(tokenmerge.patch(_net(), r=8, **NAMES).report().limits)


class Stem(nn.Module):
    """A stem of the user's own, without any of timm's attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(2).mT


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_stem_of_the_users_own_is_taken(pool: str) -> None:
    model: Any = tiny_vit(global_pool=pool)
    model.patch_embed = Stem()
    x = X.float()
    with tokenmerge.patched(model, r=8, track=True) as handle, torch.no_grad():
        merged, groups = model(x), handle.groups
        assert handle.tokens == [57, 49, 41, 33]
    assert_close(merged, tokenmerge.simulate(model, groups, x))
    with pytest.raises(e.TokenMergeError, match=r"grid|rows and columns"), torch.no_grad():
        tokenmerge.patch(model, "tome2d", r=8)
        model(x)


@pytest.mark.parametrize("adapter", ADAPTERS[:6], ids=lambda adapter: adapter.name)
@torch.no_grad()
def test_patching_under_autocast_is_patching_outside_of_it(adapter: Any) -> None:
    model, x = tiny_of(adapter)
    randomised(model)
    with tokenmerge.patched(model, r=2) as handle:
        expected, prop_attn = model(x), handle.report().prop_attn
    with torch.autocast("cpu", dtype=torch.bfloat16):
        handle = tokenmerge.patch(model, r=2)
    assert_close(model(x), expected)
    assert handle.report().prop_attn == prop_attn
