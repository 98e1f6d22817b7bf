"""A model nobody has described, patched by names: right where it fits, refused with a reason where it does not."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from helpers import assert_close, randomised, run_in_threads
from promises import Family, check_promises
from tokenmerge import ToMe
from tokenmerge import errors as e
from tokenmerge.adapters.generic import Generic
from tokenmerge.testing.models.plain import PlainStandIn

NAMES = {"blocks": "layers", "attn": "mix", "norm": "between", "mlp": "feed"}
X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Masked(nn.Module):
    """An attention with projections of its own and an `attn_mask`."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.num_heads = heads
        self.to_qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.to_qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out(out.transpose(1, 2).reshape(B, N, C))


class Hidden(Masked):
    """The same, with nothing to take hold of: no mask, no projection of a known name."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed, self.to_qkv = self.to_qkv, nn.Identity()
        del self.to_qkv

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        B, N, C = x.shape
        q, k, v = self.mixed(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(out.transpose(1, 2).reshape(B, N, C))


class Layer(nn.Module):
    """A pre-norm block that scales its branches, passes arguments around and returns a tuple."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.before, self.mix, self.between = nn.LayerNorm(32), attention, nn.LayerNorm(32)
        self.scale = nn.Parameter(torch.ones(32))
        self.feed = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, unused: None, flag: bool = False) -> tuple[Tensor, None]:
        x = x + self.drop(self.scale * self.mix(self.before(x)))
        return x + self.drop(self.scale * self.feed(self.between(x))), None


class Own(nn.Module):
    def __init__(self, layer: Callable[[], nn.Module], classes: int = 2) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, classes, 32))
        self.layers = nn.ModuleList(layer() for _ in range(3))
        self.head = nn.Linear(32, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), self.embed(x).flatten(2).mT), dim=1)
        for layer in self.layers:
            x = layer(x, None) if isinstance(layer, Layer) else layer(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(x.mean(dim=1) + x[:, 0])


def _model(model: nn.Module) -> nn.Module:
    return randomised(model).eval().double()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "nn.MultiheadAttention": lambda: PlainStandIn(patch_size=4),
    "own-attention-tuple-scale-prefix2": lambda: Own(lambda: Layer(Masked())),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("method", [ToMe(), ToMe(metric="x"), ToMe(metric="v", combine="max")], ids=["k", "x", "max"])
def test_a_model_known_by_names_keeps_the_promises(make: Callable[[], nn.Module], method: ToMe) -> None:
    model = _model(make())
    family = Family("by names (blocks=, attn=, norm=, mlp=)", "any pre-norm model")
    with tokenmerge.patched(model, method, r=5, track=True, **NAMES) as handle, torch.no_grad():
        assert model(X).isfinite().all() and handle.report().limits[-1].startswith("tokens are put back")
        groups = handle.groups
        merged = model(X)
    if method.combine == "weighted":
        assert_close(merged, tokenmerge.simulate(model, groups, X, adapter=Generic(**NAMES)), 1e-6)
    check_promises(model, X, patch=NAMES, adapter=Generic(**NAMES), family=family)


def test_hooks_give_what_a_described_block_gives() -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=3, init_values=0.5, global_pool="avg")
    model = randomised(model).eval().double()
    x = torch.randn(2, 3, 96, 96).double()
    outs = []
    for names in ({}, {"blocks": "blocks", "attn": "attn", "norm": "norm2", "mlp": "mlp"}):
        for combine in ("weighted", "max", "keep_one"):
            with tokenmerge.patched(model, ToMe(combine=combine), r=7, **names) as handle, torch.no_grad():
                outs.append(model(x))
                assert handle.prefix == 1 and handle.tokens == [30, 23, 16]
    for described, hooked in zip(outs[:3], outs[3:], strict=True):
        assert_close(hooked, described, 1e-6)


def test_prefix_tokens_are_found_or_told() -> None:
    model = _model(MODELS["own-attention-tuple-scale-prefix2"]())
    with tokenmerge.patched(model, r=1, **NAMES) as handle:
        assert handle.prefix == 2
    with tokenmerge.patched(model, r=40, prefix=5, **NAMES) as handle, torch.no_grad():
        model(X)
        assert handle.prefix == 5 and handle.tokens == [36, 21, 13]


def test_an_attention_with_nothing_to_listen_to_is_matched_by_features_and_says_so() -> None:
    model = _model(Own(lambda: Layer(Hidden())))
    handle = tokenmerge.patch(model, r=5, **NAMES)
    limits = "; ".join(handle.report().limits)
    assert "no proportional attention: this attention takes no mask" in limits and "matched by features" in limits
    assert not handle.report().prop_attn
    with torch.no_grad():
        assert model(X).isfinite().all()
    handle.remove()
    with pytest.raises(e.UnsupportedError, match=r"prop_attn=True, but this attention takes no mask"):
        tokenmerge.patch(model, r=5, prop_attn=True, **NAMES)
    with pytest.raises(e.NotTrackedError, match="known after a forward"):
        _ = tokenmerge.patch(model, r=5, **NAMES).tokens


class Parallel(Layer):
    def forward(self, x: Tensor, unused: None, flag: bool = False) -> tuple[Tensor, None]:
        return x + self.mix(self.before(x)) + self.feed(self.between(x)), None


class PostNorm(Layer):
    def forward(self, x: Tensor, unused: None, flag: bool = False) -> tuple[Tensor, None]:
        x = self.before(x + self.mix(x))
        return self.between(x + self.feed(x)), None


class ThirdBranch(Layer):
    def forward(self, x: Tensor, unused: None, flag: bool = False) -> tuple[Tensor, None]:
        return super().forward(x, unused)[0] + x.cumsum(dim=1), None


class Convolution(Layer):
    def __init__(self) -> None:
        super().__init__(Masked())
        self.feed = nn.Sequential(nn.LayerNorm(32), _Neighbours())


class _Neighbours(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.roll(1, dims=1)


class Causal(Masked):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        N = x.shape[1]
        causal = torch.full((N, N), float("-inf"), dtype=x.dtype).triu(1)
        return super().forward(x, causal if attn_mask is None else causal + attn_mask)


class NotCalled(Layer):
    def forward(self, x: Tensor, unused: None, flag: bool = False) -> tuple[Tensor, None]:
        x = x + self.mix(self.before(x))
        return x + nn.functional.layer_norm(x, (32,)), None


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "parallel": (lambda: Parallel(Masked()), r"with the MLP put to zero it should return what enters the norm"),
    "post-norm": (lambda: PostNorm(Masked()), r"with the MLP put to zero .* post-norm blocks cannot"),
    "third-branch": (lambda: ThirdBranch(Masked()), r"with the MLP put to zero"),
    "convolution-in-the-mlp": (Convolution, r"treats a token by its place in the sequence"),
    "causal-attention": (lambda: Layer(Causal()), r"treats a token by its place in the sequence"),
    "norm-never-called": (lambda: NotCalled(Masked()), r"did not call 'between' before 'feed'"),
}


@pytest.mark.parametrize(("layer", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_and_left_alone(layer: Callable[[], nn.Module], message: str) -> None:
    model = _model(Own(layer))
    before = {path: set(module.__dict__) for path, module in model.named_modules()}
    with pytest.raises(e.AdapterMismatchError, match=message):
        tokenmerge.patch(model, r=5, **NAMES)
    assert {path: set(module.__dict__) for path, module in model.named_modules()} == before


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "blocks": ({"blocks": "encoder.layers"}, r"blocks='encoder.layers': PlainStandIn has no child 'encoder'.*embed"),
    "attn": ({"attn": "attention"}, r"attn='attention': the block .* has no child 'attention'.*before, mix, between"),
    "deep": ({"mlp": "feed.fc"}, r"mlp='feed.fc': .* at 'feed' has no child 'fc'. Its children are: 0, 1, 2"),
    "no-list": ({"blocks": "classify"}, r"blocks='classify' is one Linear, not a list of blocks"),
    "missing": ({"mlp": None}, r"needs blocks, attn, norm and mlp; missing: mlp"),
    "prefix-alone": (dict.fromkeys(NAMES) | {"prefix": 1}, r"missing: blocks, attn, norm, mlp"),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_names_that_do_not_exist_list_those_that_do(change: dict[str, Any], message: str) -> None:
    with pytest.raises(e.TokenMergeError, match=message):
        tokenmerge.patch(PlainStandIn(), r=2, **{**NAMES, **change})


def test_arguments_made_for_unmerged_tokens_are_refused() -> None:
    model = _model(Own(lambda: Layer(Masked())))
    tokenmerge.patch(model, r=5, **NAMES)
    with pytest.raises(e.UnsupportedError, match=r"block 0 was called with 'flag' while tokens are merged"):
        model.layers[0](torch.randn(1, 9, 32).double(), None, flag=True)


def test_a_hooked_model_is_compiled_exported_copied_saved_and_shared_by_threads() -> None:
    model = randomised(PlainStandIn(patch_size=4)).eval()
    handle = tokenmerge.patch(model, r=5, track=True, **NAMES)
    x = X.float()
    with torch.no_grad():
        expected = model(x)
        assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
        shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
        program = torch.export.export(model, (x,), strict=False, dynamic_shapes=shapes)
        assert_close(program.module()(x[:2]), expected[:2])
        assert torch.equal(model(x), expected)
        file = io.BytesIO()
        torch.save(copy.deepcopy(model), file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), expected)
        inputs = [torch.randn(i + 1, 3, 32, 32) for i in range(4)]
        answers = [model(each) for each in inputs]
        wrong: list[int] = []

        def work(i: int) -> None:
            with torch.no_grad():
                wrong.extend(i for _ in range(20) if not torch.equal(model(inputs[i]), answers[i]))

        run_in_threads(work, 4)
        assert wrong == []
    model.train()
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    handle.remove()
