"""What every reduction method promises: on views of any layout, on a real model, and in graphs."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenmerge import methods
from tokenmerge import plan as plans
from tokenmerge.errors import ConfigError
from tokenmerge.methods import Learned, Reduction, TokenView
from tokenmerge.testing.comparing import assert_close, assert_equal, expect, keep_promises
from tokenmerge.testing.graphs import graphs, model
from tokenmerge.testing.models.drawn import randomised
from tokenmerge.testing.views import WIDTH, Case, Prepare, moved, view_of

__all__ = ["PROMISES", "check_method"]


def check_method(
    method: Reduction | type[Reduction] | str,
    *,
    prepare: Prepare = randomised,
    only: Iterable[str] = (),
    skip: Mapping[str, str] | None = None,
) -> None:
    """Check a reduction method, or every example of a class of them.

    Args:
        method: an instance, also as `"tome(metric='x')"`; or the class, or its name: then each of its `examples()`, one
            for each of its `variants`.
        prepare: what is done to the fresh modules of a learned method; by default every parameter is drawn.
        only: the names of some of `PROMISES`; all by default.
        skip: promises that mean nothing for this method, each with the reason.

    Raises `AssertionError` with the promise that is broken, the layout and the numbers; `ConfigError` for what is no
    method, and where nothing is left to check. One promise runs a timm model.
    """
    for example in _examples(method):
        keep_promises(repr(example), PROMISES, Case(example, prepare), only, skip)


def _examples(method: Any) -> list[Reduction]:
    """Return the instances to check; raises `ConfigError` if there are none."""
    if isinstance(method, str):
        method = methods.parse(method) if "(" in method else methods.find(method)
    if isinstance(method, Reduction):
        return [method]
    if not (isinstance(method, type) and issubclass(method, Reduction)):
        raise ConfigError(
            f"check_method takes a method, its class or its name, not {method!r}: check_method(MyMethod())."
        )
    examples = method.examples()
    if not examples:
        raise ConfigError(
            f"{method.__qualname__} has no examples: nothing is left to check. Give it variants = ({{}},)."
        )
    return examples


def _sums(size: Tensor, groups: Tensor, M: int) -> Tensor:
    """What the sizes of each group's members sum to."""
    sums = torch.zeros(size.shape[0], M)
    for image, slots in enumerate(groups):
        sums[image].index_add_(0, slots[slots >= 0], size[image, slots >= 0])
    return sums


def _rows(x: Tensor, places: Tensor) -> Tensor:
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def accounting(case: Case) -> None:
    """As many tokens go as asked, protected ones stay in front unchanged, and every size is the sum of its group's."""
    for what, view, r in case.views():
        _account(case, view, r, what)


def _account(case: Case, view: TokenView, r: int, what: str) -> None:
    (B, N, C), prefix = view.stream.shape, view.prefix
    plan, x, size = case.reduce(view, r)
    assert view.size is not None
    M = x.shape[1] if x.dim() == 3 else -1
    expect(x.shape == (B, M, C), f"{what}: the merged tokens are {tuple(x.shape)}, not (B, M, {C})")
    asked = f"from {N - r} to {N}" if case.method.is_adaptive else f"{N - r}"
    expect(N - r <= M <= N if case.method.is_adaptive else N - r == M, f"{what}: {M} tokens are left, not {asked}")
    expect(x.dtype == view.stream.dtype, f"{what}: the merged tokens are {x.dtype}")
    expect(x.isfinite().all(), f"{what}: {int((~x.isfinite()).sum())} values of the merged tokens are not finite")
    assert size is not None, f"{what}: there are no sizes, though sizes were given"
    expect(size.dtype == torch.float32 and size.shape == (B, M), f"{what}: sizes are {size.dtype} {tuple(size.shape)}")
    assert_equal(x[:, :prefix], view.x[:, :prefix], f"{what}: protected tokens moved or changed")
    assert_equal(plan.keep[:, :prefix], torch.arange(prefix).expand(B, -1), f"{what}: plan.keep of protected tokens")
    groups = plans.assignment(plan)
    assert_close(size.sum(dim=1), (view.size * (groups >= 0)).sum(dim=1), what=f"{what}: the sum of the sizes")
    if isinstance(plan, plans.Plan):
        assert_equal(size, _sums(view.size, groups, M), f"{what}: the sizes of the groups")


def leading(case: Case) -> None:
    """A token that is kept is in the group that it leads."""
    for what, view, r in case.views():
        plan = case.method.plan(replace(view, memory={}), r)
        led = plans.assignment(plan).gather(1, plan.keep)
        assert_equal(led, torch.arange(plan.keep.shape[1]).expand_as(led), f"{what}: the group of each kept token")


def sizes(case: Case) -> None:
    """Where no sizes are given every token counts as one; without sizes nothing was merged."""
    view = case.ready(replace(view_of(), size=None), 5)
    plan, x, size = case.reduce(view, 5)
    _, same, ones = case.reduce(replace(view, size=torch.ones(3, 26)), 5)
    assert_close(x, same, what="tokens without sizes and with ones")
    if size is None:
        merges = isinstance(plan, plans.MatrixPlan) or bool((plans.assignment(plan) >= 0).sum() > plan.keep.numel())
        expect(not merges, "tokens were merged and no sizes came back")
        return
    assert ones is not None, "sizes came back where none were given, and none where ones were"
    assert_close(size, ones, what="sizes of none and of ones")
    if isinstance(plan, plans.Plan):
        assert_equal(size, _sums(torch.ones(3, 26), plans.assignment(plan), x.shape[1]), "the sizes of the groups")


def batches(case: Case) -> None:
    """The same tokens give the same plan, and images in another order the same plans in that order."""
    view, order = case.ready(view_of(4), 5), torch.tensor([3, 1, 0, 2])
    first, again, permuted = (case.reduce(v, 5) for v in (view, view, moved(view, lambda part: part[order])))
    for at, name in ((1, "merged tokens"), (2, "sizes")):
        one, other, third = first[at], again[at], permuted[at]
        assert isinstance(one, Tensor) and isinstance(other, Tensor) and isinstance(third, Tensor), f"no {name}"
        assert_equal(other, one, f"{name} of two runs")
        assert_close(third, one[order], what=f"{name} of images in another order")
    for name in ("keep", "src", "dst", "weight"):
        one, other, third = (getattr(plan, name, None) for plan in (first[0], again[0], permuted[0]))
        if one is not None and other is not None and third is not None:
            assert_equal(other, one, f"plan.{name} of two runs")
            tolerance = 1e-5 if name == "weight" else 0.0
            assert_close(third.double(), one[order].double(), tolerance, f"plan.{name} of images in another order")


def single(case: Case) -> None:
    """What becomes of an image does not depend on the others in its batch, but for the count of an adaptive method."""
    view = case.ready(view_of(4), 5)
    _, whole, _ = case.reduce(view, 5)
    for image in range(4):
        _, alone, _ = case.reduce(moved(view, lambda part, image=image: part[image : image + 1]), 5)  # type: ignore[misc]
        if not (case.method.is_adaptive and alone.shape[1] != whole.shape[1]):
            assert_close(alone[0], whole[image], what=f"image {image} alone and in a batch of 4")


def gradients(case: Case) -> None:
    """Gradients reach every token that is kept, and what the attention adds to it."""
    view = case.ready(view_of(), 5)
    plan = case.method.plan(view, 5)
    x, branch = view.stream.clone().requires_grad_(), torch.randn_like(view.stream).requires_grad_()
    case.method.merge(plan, x, view.size, branch)[0].square().sum().backward()
    for name, grad in (("stream", x.grad), ("branch", branch.grad)):
        assert grad is not None, f"no gradient reaches the {name}"
        expect(grad.isfinite().all(), f"{int((~grad.isfinite()).sum())} gradients of the {name} are not finite")
        lost = (_rows(grad, plan.keep).abs().sum(dim=2) == 0).sum()
        expect(lost == 0, f"{int(lost)} of {plan.keep.numel()} kept tokens get no gradient in the {name}")


def needs(case: Case) -> None:
    """The method looks at nothing of the attention and the model that `needs` does not name."""
    method, view = case.method, case.ready(view_of(), 5)
    expect(method.needs == method.captures | method.requires, f"needs {set(method.needs)} are not all known")
    hidden: dict[str, Any] = {name: None for name in ("q", "k", "v") if name not in method.captures}
    if "places" not in method.requires:
        hidden["grid"] = None
    seen = f"with {', '.join(hidden)} hidden" if hidden else "with nothing hidden"
    assert_equal(case.reduce(replace(view, **hidden), 5)[1], case.reduce(view, 5)[1], seen)


def configuration(case: Case) -> None:
    """A method is its own configuration: a frozen dataclass that its repr, a copy, JSON and its name give back."""
    method, kind = case.method, type(case.method)
    expect(is_dataclass(method), f"{kind.__name__} is no dataclass")
    frozen = kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    expect(frozen, "its options can be changed: @dataclass(frozen=True)")
    text = repr(method).replace(kind.__qualname__, kind.__name__, 1)
    twins = {
        "a deep copy": copy.deepcopy(method),
        "its pickle": pickle.loads(pickle.dumps(method)),
        "its repr": eval(text, {kind.__name__: kind}),
    }
    options = json.loads(json.dumps(asdict(method)))  # type: ignore[call-overload]
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    twins["its options in JSON"] = kind(**options)
    if method.name in methods.list_methods():
        found = methods.find(method.name)
        expect(found is kind, f"the name {method.name!r} is that of {found.__name__}")
        written = ", ".join(f"{name}={value!r}" for name, value in options.items())
        twins["its name with options"] = methods.parse(f"{method.name}({written})")
    for name, twin in twins.items():
        expect(twin == method and hash(twin) == hash(method), f"{name} gives {twin!r}")


# where padding lies: behind the real tokens, before them, and as many as r at even places
_PADDED: dict[str, Callable[[int, int], Iterable[int]]] = {
    "behind": lambda N, prefix: range(N - 9, N),
    "before": lambda N, prefix: range(prefix, prefix + 9),
    "scattered": lambda N, prefix: (3, 6, 7, 10, 11, 14, 15, 18, 19),
}
# two of padding, which r = 2 leaves at most one of: in front, behind, and the first token and another
_PAIRS: dict[str, Callable[[int, int], Iterable[int]]] = {
    "in front": lambda N, prefix: (prefix, prefix + 1),
    "at the end": lambda N, prefix: (N - 2, N - 1),
    "apart": lambda N, prefix: (prefix, prefix + 5),
}


def padding_first(case: Case) -> None:
    """Padding goes before any real token, and real tokens stay as they are while padding is left."""
    for prefix in (0, 1):
        N = 25 + prefix
        for where, places in (*_PADDED.items(), *_PAIRS.items()):
            valid = torch.ones(3, N, dtype=torch.bool)
            valid[:, list(places(N, prefix))] = False
            check = _check_padded if where in _PADDED else _check_pair
            check(case, view_of(N=N, prefix=prefix), valid, f"prefix={prefix}, padding {where}")


def _check_padded(case: Case, view: TokenView, valid: Tensor, what: str) -> None:
    N, r = valid.shape[1], 4
    assert view.size is not None
    view = case.ready(replace(view, valid=valid, size=view.size * valid), r)
    assert view.size is not None
    plan = plans.lead_by_real(case.method.plan(view, r), valid)
    x, size = case.method.merge(plan, view.stream, view.size, view.branch)
    assert size is not None, f"{what}: there are no sizes, though sizes were given"
    M, real = x.shape[1], valid.gather(1, plan.keep)
    adaptive = case.method.is_adaptive
    expect(N - r <= M and (adaptive or N - r == M), f"{what}: {M} of {N} tokens are left with r={r}")
    left = real.sum(dim=1)
    expect((left == N - 9).all(), f"{what}: of {N - 9} real tokens {left.tolist()} are left, and padding stayed")
    expect(N - r == M or not isinstance(case.method, Learned), f"{what}: {M - N + r} paddings stayed")
    assert_close(size[real], view.size.gather(1, plan.keep)[real], what=f"{what}: sizes of real tokens")
    if adaptive and N - r < M:
        return  # thresholds may have merged some real tokens too
    assert_close(x[real], _rows(view.stream, plan.keep)[real], what=f"{what}: real tokens")


def _check_pair(case: Case, view: TokenView, valid: Tensor, what: str) -> None:
    """With r = 2 both paddings go, or one absorbs the other and one real token goes."""
    assert view.size is not None
    view = case.ready(replace(view, valid=valid, size=view.size * valid), 2)
    plan = plans.lead_by_real(case.method.plan(view, 2), valid)
    real, left = valid.shape[1] - 2, valid.gather(1, plan.keep).sum(dim=1)
    expect((left >= real - 1).all(), f"{what}, r=2: of {real} real tokens {left.tolist()} are left")


# where padding lies in three images: none at the first place that is not protected, and there
_APART = (([4, 9, 15], [2, 4, 11], [13, 23]), ([1, 2, 3], [1, 4, 11], [1]))


def padding_apart(case: Case) -> None:
    """Padding absorbs no real token and is mixed into none."""
    for draw in range(8):  # by chance no token looks most like padding in one
        for places in _APART:
            view, valid = view_of(), torch.ones(3, 26, dtype=torch.bool)
            for image, padding in enumerate(places):
                valid[image, padding] = False
            assert view.size is not None
            view = replace(view, valid=valid, size=view.size * valid)
            for r in (3, 9):
                _check_apart(case, view, r, valid, f"draw {draw}, r={r}, padding at {places}")


def _check_apart(case: Case, view: TokenView, r: int, valid: Tensor, what: str) -> None:
    plan = case.method.plan(case.ready(view, r), r)
    if isinstance(plan, plans.MatrixPlan):
        mixes = (plan.weight > 0) & valid[:, None] & ~valid.gather(1, plan.keep)[..., None]
        expect(not mixes.any(), f"{what}: {int(mixes.sum())} parts of real tokens went into padding")
        return
    is_absorbed = plans.assignment(plan).gather(1, plan.src) >= 0
    is_mixed = valid.gather(1, plan.src) & ~valid.gather(1, plan.keep.gather(1, plan.dst)) & is_absorbed
    expect(not is_mixed.any(), f"{what}: padding absorbed {int(is_mixed.sum())} real tokens")
    led = plans.lead_by_real(plan, valid)
    assert isinstance(led, plans.Plan)
    assert_equal(led.keep, plan.keep, f"{what}: padding leads a group of real tokens: plan.keep")
    assert_equal(led.dst, plan.dst, f"{what}: padding leads a group of real tokens: plan.dst")


def device(case: Case) -> None:
    """Plans are made where the tokens are, without a look at their values where they have none."""
    view = case.ready(view_of(), 6)
    view = replace(moved(view, lambda part: part.to("meta")), module=view.module and view.module.to("meta"))
    _, x, size = case.reduce(view, 6)
    assert size is not None, "there are no sizes, though sizes were given"
    for name, got, shape in (("tokens", x, (3, 20, WIDTH)), ("sizes", size, (3, 20))):
        expect(got.device.type == "meta", f"the {name} of meta tensors are on {got.device}")
        expect(got.shape == shape, f"the {name} of meta tensors are {tuple(got.shape)}, not {shape}")


PROMISES: dict[str, Callable[[Case], None]] = {
    check.__name__: check
    for check in (
        *(accounting, leading, sizes, batches, single, gradients, needs, configuration),
        *(padding_first, padding_apart, device, model, graphs),
    )
}
