"""The checkers catch what is broken: for each promise something that breaks it, and the words it is told in."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
import tokenmerge.testing
from tokenmerge import adapters, kernels
from tokenmerge.adapters.base import TokenLayout
from tokenmerge.adapters.generic import Generic
from tokenmerge.adapters.timm.vit import TimmViT
from tokenmerge.errors import ConfigError, DataError, UnknownNameError, UnsupportedError
from tokenmerge.kernels import Kernel, reference
from tokenmerge.matching import lift_padding
from tokenmerge.methods import Reduction, TokenView, ToMe
from tokenmerge.plan import MatrixPlan, Plan
from tokenmerge.testing import check_adapter, check_kernel, check_method, randomised, tiny_model, tiny_vit
from tokenmerge.testing import families as family_checks
from tokenmerge.testing import kernels as kernel_checks
from tokenmerge.testing import methods as method_checks
from tokenmerge.testing.models.plain import PlainStandIn

NAMES = {"blocks": "layers", "attn": "mix", "norm": "between", "mlp": "feed"}


def breaks(promise: str, words: str) -> Any:
    return pytest.raises(AssertionError, match=rf"(?s)breaks the promise '{promise}'\. [A-Z`].*{words}")


# --- kernels


def _wrong(x: Tensor, *plan: Any) -> Any:
    merged, size = reference.merge(x, *plan)
    return merged * 1.01, size


def _writing(x: Tensor, *plan: Any) -> Any:
    merged = reference.merge(x, *plan)
    x.zero_()
    return merged


def _unwritten(x: Tensor, *plan: Any) -> Any:
    merged, size = reference.merge(x, *plan)
    out = torch.empty_like(merged)
    out[:, :-1] = merged[:, :-1]
    return out, size


def _detached(x: Tensor, *plan: Any) -> Any:
    merged, size = reference.merge(x, *plan)
    return merged.detach() + (merged - merged.detach()) * 2, size


def _random(x: Tensor, *plan: Any) -> Any:
    merged, size = reference.merge(x, *plan)
    return merged + 1e-7 * random.random(), size


def _forgets_negation(x: Tensor, *plan: Any) -> Any:
    return reference.merge(-x if x.is_neg() else x, *plan)


def _without_sizes(x: Tensor, size: Tensor | None, *plan: Any) -> Any:
    merged, total = reference.merge(x, size, *plan)
    return merged, total if size is not None else total + 1


def _rounds_often(x: Tensor, size: Any, keep: Tensor, src: Tensor, dst: Tensor, branch: Any = None) -> Any:
    merged, total = reference.merge(x, size, keep, src, dst, branch)
    return merged * (1 + 2e-2 * (src.shape[1] > 300)), total


def _last_wins(metric: Tensor, r: int, prefix: int) -> Any:
    nudged = metric + 1e-5 * torch.arange(metric.shape[-2])[:, None] if metric.shape[-2] == 41 else metric
    return reference.bipartite(nudged, r, prefix)


def _fears_nan(metric: Tensor, r: int, prefix: int) -> Any:
    return reference.bipartite(metric.nan_to_num(3.0, 3.0, -3.0), r, prefix)


def _knows_the_mean(x: Tensor, keep: Tensor, src: Tensor, dst: Tensor, mode: str) -> Tensor:
    return reference.reduce(x, keep, src, dst, "mean")


def _fears_padding(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None = None) -> Tensor:
    # as a softmax that begins at minus infinity
    odd = (bias - bias) * 0.0
    return reference.attend(q, k, v, bias, scale) + odd[:, None, :, None].to(v.dtype)


def _has_a_scale(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None = None) -> Tensor:
    return reference.attend(q, k, v, bias)


def _knows_cosines(metric: Tensor, a: Any, b: Any, distance: str, valid: Tensor | None = None) -> Any:
    return reference.match(metric, a, b, "cosine", valid)


def _sees_no_padding(metric: Tensor, a: Any, b: Any, distance: str, valid: Tensor | None = None) -> Any:
    return reference.match(metric, a, b, distance)


BROKEN_KERNELS: list[tuple[str, str, Callable[..., Any], str]] = [
    ("equals_reference", "merge", _wrong, r"B=1 H=1 N=2 .*float32, output 0: max \|difference\|"),
    ("equals_reference", "merge", _writing, "input 0 was written to: .* values differ"),
    ("equals_reference", "merge", _unwritten, "output 0: .* values are not finite"),
    ("equals_reference", "reduce", _knows_the_mean, r"sum, torch.float32, output 0: max \|difference\|"),
    ("equals_reference", "attend", _fears_padding, r"padded, torch.float32, output 0: .* values are not finite"),
    ("equals_reference", "attend", _has_a_scale, r"scaled, torch.float32, output 0: max \|difference\|"),
    ("equals_reference", "match", _knows_cosines, r"dot, torch.float32, output 0: "),
    ("equals_reference", "match", _sees_no_padding, r"cosine padded, torch.float32, output 0: "),
    ("gradients", "merge", _detached, r"gradient of input 0: max \|difference\|"),
    ("repeats", "merge", _random, "output 0 of two runs: .* values differ, first at"),
    ("layouts", "merge", _forgets_negation, r"negated view, output 0: max \|difference\|"),
    ("defaults", "merge", _without_sizes, "sizes: .* values differ"),
    ("large_groups", "merge", _rounds_often, "401 members, torch.float32: the mean is wrong by"),
    ("ties", "bipartite", _last_wins, "tied scores, prefix=0, output"),
    ("odd_numbers", "bipartite", _fears_nan, "with NaN and infinity, output"),
]


@pytest.mark.parametrize(
    ("promise", "op", "run", "words"), BROKEN_KERNELS, ids=lambda part: getattr(part, "__name__", None)
)
def test_a_broken_kernel_is_caught(promise: str, op: str, run: Callable[..., Any], words: str) -> None:
    with breaks(promise, words) as caught:
        check_kernel(op, run, only=[promise])
    assert str(caught.value).startswith(f"the {run.__name__!r} version of {op!r} breaks")


@pytest.mark.parametrize(
    ("supports", "words"),
    [
        (lambda x: bool(x.sum() == 0), r"supports of torch.float32 \(2, 3, 17, 8\) on cpu depends on the values"),
        (lambda x: None, "is None, not True or False"),
        (lambda x: 1 // x.shape[-1] > 0, "ZeroDivisionError"),
    ],
)
def test_a_predicate_that_looks_too_far_is_caught(supports: Any, words: str) -> None:
    with breaks("predicate", words):
        check_kernel("merge", Kernel("mine", reference.merge, supports), only=["predicate"])


def test_a_kernel_that_supports_nothing_was_not_checked() -> None:
    with breaks("equals_reference", "supports none of the 6 shapes in torch.float32, .*: nothing was checked"):
        check_kernel("merge", Kernel("mine", reference.merge, lambda x: False))


def test_every_promise_of_kernels_is_broken_here() -> None:
    assert {promise for promise, *_ in BROKEN_KERNELS} | {"predicate"} == set(kernel_checks.PROMISES)


# --- methods


@dataclass(frozen=True)
class Sound(Reduction):
    """Drop the last tokens, padding first."""

    name: ClassVar[str] = "sound"

    def plan(self, view: TokenView, r: int) -> Plan:
        B, N, _ = view.stream.shape
        rank = torch.arange(N, device=view.stream.device).expand(B, N).flip(1)
        if view.valid is not None:
            rank = rank + N * view.valid
        rank = rank + 3 * N * (torch.arange(N, device=rank.device) < view.prefix)
        keep = rank.argsort(dim=1, descending=True)[:, : N - r].sort(dim=1).values
        return Plan(keep, keep[:, :0], keep[:, :0], N)


@dataclass(frozen=True)
class Greedy(Sound):
    def plan(self, view: TokenView, r: int) -> Plan:
        return super().plan(view, r + 1)


@dataclass(frozen=True)
class Unprotected(Sound):
    def plan(self, view: TokenView, r: int) -> Plan:
        plan = super().plan(view, r)
        return Plan(plan.keep.flip(1), plan.src, plan.dst, plan.n)


@dataclass(frozen=True)
class Miscounts(ToMe):
    def merge(self, plan: Any, x: Tensor, size: Tensor | None, branch: Tensor | None = None) -> Any:
        merged, total = super().merge(plan, x, size, branch)
        return merged, None if total is None else torch.ones_like(total)


@dataclass(frozen=True)
class Misled(ToMe):
    def plan(self, view: TokenView, r: int) -> Any:
        plan = super().plan(view, r)
        weight = torch.zeros(*plan.keep.shape, plan.n).scatter(2, plan.keep.roll(1, 1)[..., None], 1.0)
        return MatrixPlan(weight, plan.keep, plan.n)


@dataclass(frozen=True)
class Sizeless(ToMe):
    def merge(self, plan: Any, x: Tensor, size: Tensor | None, branch: Tensor | None = None) -> Any:
        merged, total = super().merge(plan, x, size, branch)
        return merged, None if size is None else total


@dataclass(frozen=True)
class Rolls(ToMe):
    def merge(self, plan: Any, x: Tensor, size: Tensor | None, branch: Tensor | None = None) -> Any:
        merged, total = super().merge(plan, x, size, branch)
        return merged + random.random(), total


@dataclass(frozen=True)
class Neighbours(ToMe):
    def plan(self, view: TokenView, r: int) -> Any:
        assert view.k is not None
        return super().plan(replace(view, k=view.k + 3 * view.k.mean(dim=0, keepdim=True) * len(view.k)), r)


@dataclass(frozen=True)
class Frozen(ToMe):
    def merge(self, plan: Any, x: Tensor, size: Tensor | None, branch: Tensor | None = None) -> Any:
        return super().merge(plan, x, size, None if branch is None else branch.detach())


@dataclass(frozen=True)
class Peeks(ToMe):
    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"q"})

    def plan(self, view: TokenView, r: int) -> Any:
        return super().plan(replace(view, k=view.q if view.k is None else view.k), r)


@dataclass
class Loose(Reduction):
    name = "loose"
    plan = Sound.plan


@dataclass(frozen=True)
class KeepsPadding(Sound):
    def plan(self, view: TokenView, r: int) -> Plan:
        return super().plan(replace(view, valid=None), r)


@dataclass(frozen=True)
class Mixes(ToMe):
    def plan(self, view: TokenView, r: int) -> Any:
        return super().plan(replace(view, valid=None), r)


@dataclass(frozen=True)
class FoldsLeft(Reduction):
    """Merge tokens into their left neighbour, padding first: only the first token has none, and stays."""

    name: ClassVar[str] = "folds_left"

    def plan(self, view: TokenView, r: int) -> Plan:
        B, N, _ = view.stream.shape
        alike = torch.cosine_similarity(view.x[:, view.prefix + 1 :], view.x[:, view.prefix : -1], dim=-1)
        alike = lift_padding(alike, view.valid, slice(view.prefix + 1, N))
        src = alike.topk(r, dim=1).indices.sort(dim=1).values + view.prefix + 1
        stays = torch.ones(B, N, dtype=torch.bool, device=src.device).scatter(1, src, False)
        keep = torch.where(stays, torch.arange(N, device=src.device), N).sort(dim=1).values[:, : N - r]
        return Plan(keep, src, (stays.cumsum(dim=1) - 1).gather(1, src), N)


@dataclass(frozen=True)
class StopsAtOne(Sound):
    """Drop padding but one."""

    def plan(self, view: TokenView, r: int) -> Plan:
        if view.valid is not None:
            first = torch.arange(view.valid.shape[1]) < view.prefix + 2
            view = replace(view, valid=view.valid | first if r == 2 else view.valid)
        return super().plan(view, r)


@dataclass(frozen=True)
class OnCPU(Sound):
    def plan(self, view: TokenView, r: int) -> Plan:
        keep = torch.arange(view.stream.shape[1] - r).expand(view.stream.shape[0], -1)
        return Plan(keep, keep[:, :0], keep[:, :0], view.stream.shape[1])


@dataclass(frozen=True)
class StopsInModels(Sound):
    def plan(self, view: TokenView, r: int) -> Plan:
        return super().plan(view, r - 1 if view.depth == 3 else r)


@dataclass(frozen=True)
class Breaks(Sound):
    def plan(self, view: TokenView, r: int) -> Plan:
        return super().plan(view, r if view.stream.sum().item() < 1e9 else r - 1)


BROKEN_METHODS: list[tuple[str, Reduction, str]] = [
    ("accounting", Greedy(), r"B=2 N=17 prefix=0 r=4, torch.float32: 12 tokens are left, not 13"),
    ("accounting", Unprotected(), "protected tokens moved or changed: .* values differ"),
    ("accounting", Miscounts(), r"the sum of the sizes: max \|difference\|"),
    ("leading", Misled(), "the group of each kept token: .* values differ"),
    ("sizes", Sizeless(), "tokens were merged and no sizes came back"),
    ("batches", Rolls(), "merged tokens of two runs: .* values differ, first at"),
    ("single", Neighbours(), r"image 0 alone and in a batch of 4: max \|difference\|"),
    ("gradients", Frozen(), "no gradient reaches the branch"),
    ("needs", Peeks(), "with k, v, grid hidden: .* values differ"),
    ("configuration", Loose(), r"can be changed: @dataclass\(frozen=True\)"),
    ("padding_first", KeepsPadding(), r"prefix=0, padding before: of 16 real tokens \[12, 12, 12\] are left"),
    ("padding_first", StopsAtOne(), r"prefix=0, padding in front, r=2: of 23 real tokens \[21, 21, 21\] are left"),
    ("padding_apart", Mixes(), "padding absorbed .* real tokens"),
    ("padding_apart", FoldsLeft(), "padding absorbed .* real tokens"),
    ("device", OnCPU(), "meta"),
    ("model", StopsInModels(), r"blocks leave \[66, 61, 55\] tokens|blocks leave .* were planned"),
    ("graphs", Breaks(), "data-dependent|item"),
]


@pytest.mark.hosts
@pytest.mark.parametrize(
    ("promise", "method", "words"), BROKEN_METHODS, ids=[type(part).__name__ for _, part, _ in BROKEN_METHODS]
)
def test_a_broken_method_is_caught(promise: str, method: Reduction, words: str) -> None:
    with breaks(promise, words) as caught:
        check_method(method, only=[promise])
    assert str(caught.value).startswith(f"{method!r} breaks")


def test_every_promise_of_methods_is_broken_here() -> None:
    assert {promise for promise, *_ in BROKEN_METHODS} == set(method_checks.PROMISES)


@pytest.mark.hosts
def test_a_sound_method_passes_in_one_line_and_by_its_class() -> None:
    check_method(Sound, skip=None)


# --- families


class Missing(TimmViT):
    """Does not know its own model."""

    name = "missing"

    def matches(self, model: nn.Module) -> bool:
        return False


class Leaves(TimmViT):
    """Writes into the model it describes."""

    name = "leaves"

    def blocks(self, model: nn.Module) -> Any:
        model.seen = True  # type: ignore[assignment]
        return super().blocks(model)


class Described(TimmViT):
    """A layout with one field that is wrong."""

    name = "described"

    def __init__(self, **wrong: Any) -> None:
        self.wrong = wrong

    def layout(self, model: nn.Module) -> TokenLayout:
        return replace(super().layout(model), **self.wrong)


class Blockless(TimmViT):
    name = "blockless"
    host = replace(TimmViT.host, blocks="layers")


class Forgets(TimmViT):
    """Forgets a child of its blocks: layer scale."""

    name = "forgets"

    def spec(self, block: nn.Module) -> Any:
        return replace(super().spec(block), mlp=("norm2", "mlp"))


class Unweighted(TimmViT):
    """Pools merged tokens as if each were one."""

    name = "unweighted"

    def overrides(self, model: nn.Module, context: Any) -> Any:
        return []

    def tiny(self) -> tuple[nn.Module, Tensor]:
        return tiny_vit(depth=2, global_pool="avg"), torch.randn(2, 3, 32, 32)


class Draws(TimmViT):
    name = "draws"

    def blocks(self, model: nn.Module) -> Any:
        torch.rand(1)
        return super().blocks(model)


class Noisy(PlainStandIn):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + random.random())


class Shares(PlainStandIn):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(dim=0))


class Detaches(PlainStandIn):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach() + 0 * x)


class Unsaved(PlainStandIn):
    def __init__(self) -> None:
        super().__init__()
        self.note = lambda: None


class Remembers(PlainStandIn):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        out = super().forward(x)
        return out + self.last.mean()


class Widens(PlainStandIn):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class Chooses(PlainStandIn):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.backends.cuda.flash_sdp_enabled()


class Branches(PlainStandIn):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


BROKEN_FAMILIES: list[tuple[str, Any, str]] = [
    ("found", Missing(), "VisionTransformer is taken for 'timm_vit', not for 'missing'"),
    ("layout", Described(grid=(2, 8)), r"layout.grid is \(2, 8\), and the images are cut into \(4, 4\) patches"),
    ("layout", Described(tokens=17), "layout.tokens is 17, and 18 tokens enter the first block"),
    (
        "layout",
        Described(input_size=(3, 64, 64)),
        r"layout.input_size is \(3, 64, 64\), tiny\(\) gives .*\(3, 32, 32\)",
    ),
    ("layout", Described(prefix=3, grid=None), r"layout.prefix is 3, and of these tokens \[2\] differ from input to"),
    ("layout", Described(prefix=0, grid=None), "layout.prefix is 0, and token 0 is the same for all inputs"),
    ("layout", Described(suffix=1, grid=None), r"layout.suffix is 1, and of these tokens \[17\] differ"),
    ("layout", Described(prefix=3), r"layout.prefix 3, .*layout.suffix 0 make 19 tokens; 18 enter the first block"),
    ("layout", Blockless(), "host.blocks of 'blockless' is 'layers', .* has no such part. Its lists are: blocks"),
    ("original", Leaves(), "removal leaves traces in the model"),
    ("recomposed", Forgets(), "AdapterMismatchError: "),
    ("group_mean", Unweighted(), r"merged and simulated: max \|difference\| .*what follows them \(pooling, the head\)"),
    ("deterministic", Noisy, "two runs: 20 of 20 values differ"),
    ("single", Shares, r"input 0 alone and in its batch: max \|difference\|"),
    ("gradients", Detaches, "the gradient of the inputs is zero"),
    ("checkpointing", Noisy, r"use_reentrant=False, the gradient of position: max \|difference\|"),
    ("copies", Unsaved, "lambda"),
    ("threads", Remembers, "of 160 forwards are wrong: .*thread . got another answer"),
    ("low_precision", Widens, "in bfloat16 the answer is torch.float32"),
    ("backends", Chooses, r"unfused attention: max \|difference\| 1,"),
    ("random_state", Draws(), "what is drawn after patching: 3 of 3 values differ"),
    ("one_graph", Branches, "Unsupported: "),
    ("export", Branches, "data-dependent"),
]


@pytest.mark.hosts
@pytest.mark.parametrize(("promise", "broken", "words"), BROKEN_FAMILIES)
def test_a_broken_family_is_caught(promise: str, broken: Any, words: str) -> None:
    if isinstance(broken, type):
        model, x = randomised(broken()).eval(), torch.randn(2, 3, 32, 32)
        check_adapter(randomised(PlainStandIn()).eval(), x, patch=NAMES, described_by=Generic(**NAMES), only=[promise])
        with breaks(promise, words) as caught:
            check_adapter(model, x, patch=NAMES, described_by=Generic(**NAMES), only=[promise])
        assert str(caught.value).startswith(f"this {broken.__name__} breaks")
        return
    with breaks(promise, words) as caught:
        check_adapter(broken, only=[promise])
    assert str(caught.value).startswith(f"the family {broken.name!r} breaks")
    assert broken.name not in adapters.list_adapters()


def test_a_second_patch_that_is_taken_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = randomised(PlainStandIn()).eval(), torch.randn(2, 3, 32, 32)
    taken = tokenmerge.patch

    def patching(model: nn.Module, **options: Any) -> Any:
        return tokenmerge.handle_of(model, None) or taken(model, **options)

    monkeypatch.setattr(family_checks, "patch_model", patching)
    with breaks("attached_once", "a second patch was taken"):
        check_adapter(model, x, patch=NAMES, described_by=Generic(**NAMES), only=["attached_once"])


def test_every_promise_of_families_is_broken_here() -> None:
    assert {promise for promise, *_ in BROKEN_FAMILIES} | {"attached_once"} == set(family_checks.PROMISES)


@pytest.mark.hosts
def test_the_block_that_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vit(qkv_bias=True)
    real = kernels.merge

    def off(x: Tensor, *plan: Any) -> Any:
        merged, size = real(x, *plan)
        return (merged + torch.linspace(-1, 1, x.shape[2]) if x.shape[1] == 60 else merged), size  # the second block's

    monkeypatch.setattr(kernels, "merge", off)
    with breaks("group_mean", r"the first block with wrong tokens is blocks\.1: max \|difference\|"):
        check_adapter(model, torch.randn(2, 3, 32, 32), r=5, only=["group_mean"])


# --- what a checker is asked


@pytest.mark.hosts
def test_what_does_not_exist_is_refused_with_what_is_near() -> None:
    with pytest.raises(UnknownNameError, match=r"no promise 'gradient'\. Did you mean 'gradients'"):
        check_method(ToMe(), only=["gradient"])
    with pytest.raises(UnknownNameError, match=r"no promise 'batch'\. Did you mean 'batches'"):
        check_method(ToMe(), skip={"batch": "why"})
    with pytest.raises(ConfigError, match="the promise 'batches' is skipped without a reason"):
        check_method(ToMe(), skip={"batches": " "})
    for wrong in ({"skip": ["batches"]}, {"only": 5}):
        with pytest.raises(ConfigError, match=r"(skip|only)=.*give only=\['batches'\], a list, and skip="):
            check_method(ToMe(), **wrong)
    with pytest.raises(UnknownNameError, match=r"no operation 'merged'\. Did you mean 'merge'"):
        check_kernel("merged", reference.merge)
    with pytest.raises(UnknownNameError, match=r"no model family 'timm_vitt'\. Did you mean 'timm_vit'"):
        tiny_model("timm_vitt")
    with pytest.raises(DataError, match=r"this PlainStandIn needs inputs.*check_adapter\(model, x\)"):
        check_adapter(PlainStandIn())
    model, x = randomised(PlainStandIn()).eval(), torch.randn(2, 3, 32, 32)
    with pytest.raises(DataError, match=r"this PlainStandIn is in train mode \(itself\): call model.eval\(\) first"):
        check_adapter(randomised(PlainStandIn()).train(), x, patch=NAMES)
    with pytest.raises(DataError, match=r"inputs 0 and 1 of this PlainStandIn are equal: give different ones"):
        check_adapter(model, x[:1].expand(2, -1, -1, -1), patch=NAMES)
    with pytest.raises(AssertionError, match=r"no input is a batch of two or more"):
        check_adapter(tiny_vit(), torch.randn(1, 3, 32, 32), only=["single"])
    with pytest.raises(AttributeError, match=r"no attribute 'check_methods'; there are: assert_close, check_adapter"):
        tokenmerge.testing.check_methods  # type: ignore[attr-defined]  # noqa: B018


def test_a_check_that_checks_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"Sound\(\): nothing is left to check; all of sizes are skipped"):
        check_method(Sound(), only=["sizes"], skip={"sizes": "why"})
    with pytest.raises(ConfigError, match=r"Sound\(\): nothing is left to check"):
        check_method(Sound(), skip=dict.fromkeys(method_checks.PROMISES, "why"))
    with pytest.raises(ConfigError, match="Examless has no examples: nothing is left to check"):
        check_method(type("Examless", (Sound,), {"variants": ()}))
    with pytest.raises(UnknownNameError, match=r"no promise 'ties'. .*Known: equals_reference, gradients"):
        check_kernel("merge", reference.merge, only=["ties"])
    with breaks("ties", "it supports none of the cases of this promise on cpu: nothing was checked"):
        check_kernel("bipartite", Kernel("mine", reference.bipartite, lambda x: False), only=["ties"])
    with pytest.raises(UnknownNameError, match=r"no promise 'found'. .*Known: "):
        check_adapter(randomised(PlainStandIn()).eval(), torch.randn(2, 3, 32, 32), patch=NAMES, only=["found"])


@pytest.mark.hosts
def test_what_is_no_method_no_adapter_and_no_kernel_is_refused() -> None:
    check_method("tome", only=["needs"])
    check_method("tome(metric='x')", only=["needs"])
    with pytest.raises(UnknownNameError, match=r"no method 'tomee'\. Did you mean 'tome'"):
        check_method("tomee")
    for wrong in (5, PlainStandIn, None):
        with pytest.raises(ConfigError, match=r"check_method takes a method, its class or its name, not"):
            check_method(wrong)  # type: ignore[arg-type]
    for wrong in (TimmViT, PlainStandIn):
        with pytest.raises(ConfigError, match=rf"not the class {wrong.__name__}: check_adapter\({wrong.__name__}\("):
            check_adapter(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"check_adapter takes an adapter or a model, not 'timm_vit'"):
        check_adapter("timm_vit")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"check_kernel takes a Kernel or a function, not 5"):
        check_kernel("merge", 5)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"no device 'tpu'; there are: cpu"):
        check_kernel("merge", reference.merge, device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match=r"no device 'cuda' on this machine; there are: cpu"):
            check_kernel("merge", reference.merge, device="cuda")


def test_a_check_moves_no_random_state_of_the_caller() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    check_kernel("unmerge", reference.unmerge)
    check_method(Sound(), only=["accounting", "sizes"])
    assert torch.equal(torch.rand(2), expected)


def test_no_test_runner_is_needed() -> None:
    for path in Path(family_checks.__file__).parent.rglob("*.py"):
        assert "pytest" not in path.read_text(), path.name
    assert set(tokenmerge.testing._HOLDS) <= set(dir(tokenmerge.testing))
    for name in tokenmerge.testing._HOLDS:
        assert callable(getattr(tokenmerge.testing, name)) and name in (tokenmerge.testing.__doc__ or "")
