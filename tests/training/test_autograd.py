"""Merging under autograd against the plain path: the unpatched model with group means, or the same in plain torch.

Beside these, `tests/conformance/test_kernels.py` compares the gradients of every fused kernel with the reference's,
`tests/kernels` Triton's, and `tests/conformance/test_adapters.py` those of checkpointed blocks with plain ones.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenmerge
from helpers import assert_close, tiny_vit
from tokenmerge import ToMe, kernels, matching
from tokenmerge import plan as plans
from tokenmerge.kernels import cpu
from tokenmerge.methods import Reduction, ToFu
from tokenmerge.methods.tofu import ToFuPlan
from tokenmerge.plan import AnyPlan, MatrixPlan, Plan, WeightedPlan

Weights = Callable[[Plan, Tensor], Tensor]  # a plan and sizes [B, N] to the share of each token in each group [B, M, N]
Pass = Callable[[nn.Module, Tensor], Tensor]
B, N, C, R = 2, 11, 5, 4
HEADS: dict[str, dict[str, Any]] = {
    "class": {"global_pool": "token"},
    "mean": {"global_pool": "avg", "class_token": False},
    "mean-prefix": {"global_pool": "avg", "reg_tokens": 2},
    "map": {"global_pool": "map"},
}
DROPS = {"drop_rate": 0.2, "pos_drop_rate": 0.2, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2}
LABELS = torch.arange(4)
needs_native = pytest.mark.skipif(cpu._LIBRARY is None, reason="the part in C++ was not built: no compiler")
on_kernels = pytest.mark.parametrize("name", ["reference", pytest.param("cpu", marks=needs_native), "matmul"])


def _vit(**options: Any) -> nn.Module:
    return tiny_vit(**{"qkv_bias": True, "init_values": 0.5, "depth": 3, **options})


def _images(count: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 3, 32, 32, dtype=dtype)


# the plain paths


def _shares(plan: Plan, size: Tensor) -> Tensor:
    """Say by a loop how much of each token is in each group's size-weighted mean, `[B, M, N]`."""
    share = size.new_zeros(size.shape[0], plan.keep.shape[1], plan.n)
    for image, groups in enumerate(plans.assignment(plan).tolist()):
        for token, slot in enumerate(groups):
            share[image, slot, token] = size[image, token]
    return share / share.sum(dim=2, keepdim=True)


class _GroupMeans:
    """Runs an unpatched timm model whose tokens become their group's mean between attention and MLP, with gradients."""

    def __init__(self, groups: Sequence[Tensor]) -> None:
        self.means = [_same(assign) for assign in groups]

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        hooks = []
        for block, mean in zip(model.blocks, self.means, strict=True):
            before = partial(lambda mean, module, args: (mean.to(args[0].dtype) @ args[0],), mean)
            after = partial(lambda mean, module, args, out: mean.to(out.dtype) @ out, mean)
            hooks += [block.norm2.register_forward_pre_hook(before), block.register_forward_hook(after)]
        try:
            return model(x)
        finally:
            for hook in hooks:
                hook.remove()


def _same(assign: Tensor) -> Tensor:  # [B, N]
    same = (assign[:, :, None] == assign[:, None, :]).double()
    return same / same.sum(dim=2, keepdim=True)


def _by_products(groups: Sequence[Tensor], model: Any, x: Tensor) -> Tensor:
    """Merge by products with matrices of group means: as few tokens as the patched model has, so equal dropout."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    held = torch.eye(x.shape[1], dtype=x.dtype).expand(x.shape[0], -1, -1)  # [B, M, N] which inputs a token holds
    for block, assign in zip(model.blocks, groups, strict=True):
        bias = held.sum(dim=2).log()[:, None, None]
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x), attn_mask=bias)))
        now = F.one_hot(assign).mT.to(x.dtype)  # [B, M, N]
        # a new token is the mean of the old ones by size: spread over the inputs, then average by the new groups
        x = (now / now.sum(dim=2, keepdim=True)) @ (held.mT @ x)
        held = now
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return model.forward_head(model.norm(x))


def _gradients(run: Pass, model: nn.Module, x: Tensor, seed: int = 0) -> list[Tensor]:
    """Return the answer and the gradients of the input and of every parameter, none of them missing."""
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = run(model, x)
    F.cross_entropy(out, LABELS[: x.shape[0]].to(x.device)).backward()
    assert x.grad is not None and all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    return [out.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def _call(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def _assert_all_close(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float | None = None) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        # relative to the largest entry of each tensor: gradients are small numbers
        scale = other.double().abs().max().clamp_min(1e-3)
        assert_close(one / scale.to(one.dtype), other / scale.to(other.dtype), tolerance)


# plans and merges


def _plan(n: int = N, r: int = R) -> Plan:
    return matching.bipartite(torch.randn(B, n, 4), r, prefix=1)


def _tofu(is_early: bool) -> ToFuPlan:
    plan = _plan()
    return ToFuPlan(plan.keep, plan.src, plan.dst, plan.n, is_early=is_early)


def _weighted() -> WeightedPlan:
    plan = _plan()
    return WeightedPlan(plan.keep, plan.src, plan.dst, plan.n, weight=torch.rand(B, N).double() + 0.5)


def _matrix() -> MatrixPlan:
    return MatrixPlan(weight=torch.rand(B, N - R, N).double(), keep=_plan().keep, n=N)


MERGES: dict[str, tuple[Reduction, Callable[[], AnyPlan]]] = {
    **{combine: (ToMe(combine=combine), _plan) for combine in ("weighted", "average", "max", "keep_one")},
    "tofu-early": (ToFu(), partial(_tofu, True)),
    "tofu-average": (ToFu(combine="average"), partial(_tofu, False)),
    "mlerp": (ToFu(), partial(_tofu, False)),
    "weights": (ToMe(), _weighted),
    "matrix": (ToMe(), _matrix),
}


@pytest.mark.parametrize("has_branch", [False, True], ids=["plain", "branch"])
@pytest.mark.parametrize("has_size", [False, True], ids=["ones", "sizes"])
@pytest.mark.parametrize("name", MERGES)
def test_gradients_of_every_combination_equal_finite_differences(name: str, has_size: bool, has_branch: bool) -> None:
    method, make = MERGES[name]
    plan, size = make(), torch.randint(1, 9, (B, N)).float() if has_size else None
    # norms are taken in single precision, so steps of a mlerp cannot be small
    steps = {"eps": 1e-2, "atol": 1e-2, "rtol": 1e-3} if name == "mlerp" else {}
    inputs = torch.randn(2 if has_branch else 1, B, N, C, dtype=torch.float64).requires_grad_().unbind()

    def merge(x: Tensor, branch: Tensor | None = None) -> Tensor:
        return method.merge(plan, x, size, branch)[0]

    assert torch.autograd.gradcheck(merge, inputs, **steps)


@on_kernels
def test_the_gradient_of_a_merge_is_that_of_average_pooling_by_groups(name: str) -> None:
    _check_pooling(name)


def _check_pooling(name: str) -> None:
    plan, size = _plan(33, 14), torch.randint(1, 9, (B, 33)).float()
    for sizes in (None, size):
        share = _shares(plan, torch.ones(B, 33) if sizes is None else sizes)
        x, branch, step = torch.randn(3, B, 33, 24)
        seed = torch.randn(B, 19, 24)
        leaves = [x.requires_grad_(), branch.requires_grad_()]
        with kernels.force(name):
            out, new_size = plans.merge_weighted(plan, x, sizes, branch)
            grads = torch.autograd.grad(out, leaves, seed)
            # merging is linear: a step of any length is exact, but for rounding
            ahead, behind = (plans.merge_weighted(plan, (x + s * step).detach(), sizes, branch)[0] for s in (1, -1))
        assert not new_size.requires_grad
        assert_close(out, share @ (x + branch))
        for grad in grads:
            assert_close(grad, share.mT @ seed)
        assert_close((grads[0] * step).sum(), (seed * (ahead - behind) / 2).sum(), 1e-4)


def test_dropped_tokens_get_no_gradient() -> None:
    plan = matching.prune(torch.randn(B, N), R, prefix=1)
    x = torch.randn(B, N, C, requires_grad=True)
    ToMe().merge(plan, x, None)[0].sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[..., 0], (plans.assignment(plan) >= 0).float())


# whole models


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("r", [5, (9, -1.0)], ids=str)
def test_gradients_of_a_model_equal_those_of_group_means(head: str, r: Any) -> None:
    model, x = _vit(**HEADS[head]).double(), _images()
    with tokenmerge.patched(model, r=r, prop_attn=True, track=True) as handle:
        got, groups = _gradients(_call, model, x), handle.groups
    _assert_all_close(got, _gradients(_GroupMeans(groups), model, x), 1e-6)
    unmerged = _gradients(_call, model, x)
    assert (
        max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(got, unmerged, strict=True))
        > 0.1
    )


@on_kernels
def test_gradients_of_a_model_on_every_kernel(name: str) -> None:
    _check_model(name)


def _check_model(name: str) -> None:
    model, x = _vit(), _images(dtype=torch.float32)
    with tokenmerge.patched(model, r=8, prop_attn=True, track=True) as handle, kernels.force(name):
        got, groups = _gradients(_call, model, x), handle.groups
    _assert_all_close(got, _gradients(_GroupMeans(groups), model, x), 1e-4)


@pytest.mark.slow
def test_gradients_on_triton_in_its_interpreter() -> None:
    pytest.importorskip("triton")
    # a process of its own: triton reads the variable when it is first imported
    settings = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); torch.manual_seed(0); torch.set_num_threads(1);"
        "import test_autograd as here; here._check_pooling('triton'); here._check_model('triton')"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], env=settings, check=True)


# training


def test_without_merging_training_is_the_originals_bit_for_bit() -> None:
    model, x = _vit(drop_path_rate=0.3, patch_drop_rate=0.25, **DROPS).train(), _images(dtype=torch.float32)
    expected = _gradients(_call, model, x, seed=3)
    assert not torch.equal(_gradients(_call, model, x, seed=4)[0], expected[0])
    tokenmerge.patch(model, r=0)
    for one, other in zip(_gradients(_call, model, x, seed=3), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("head", ["class", "mean"])
def test_stochastic_depth_drops_the_same_branches(head: str) -> None:
    model, x = _vit(drop_path_rate=0.5, **HEADS[head]).double().train(), _images()
    with tokenmerge.patched(model, r=5, prop_attn=True, track=True) as handle:
        got, groups = _gradients(_call, model, x, seed=3), handle.groups
    expected = _gradients(_GroupMeans(groups), model, x, seed=3)
    _assert_all_close(got, expected, 1e-6)
    assert (_gradients(_GroupMeans(groups), model, x, seed=4)[0] - expected[0]).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, DROPS, {"patch_drop_rate": 0.25, **DROPS}], ids=["none", "drops", "patches"])
def test_dropout_draws_as_in_a_model_of_as_few_tokens(options: dict[str, float]) -> None:
    model, x = _vit(drop_path_rate=0.3, **options).double().train(), _images()
    with tokenmerge.patched(model, r=5, prop_attn=True, track=True) as handle:
        got, groups = _gradients(_call, model, x, seed=3), handle.groups
    _assert_all_close(got, _gradients(partial(_by_products, groups), model, x, seed=3), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_with_a_scaler(dtype: torch.dtype) -> None:
    model, x = _vit().train(), _images(dtype=torch.float32)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = copy.deepcopy(model.state_dict())
    with tokenmerge.patched(model, r=5, prop_attn=True, track=True) as handle:
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(model(x), LABELS)
        groups = handle.groups
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        got = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    scaler.step(optimizer)
    scaler.update()
    for (name, value), grad in zip(model.named_parameters(), got, strict=True):
        assert_close(value.detach(), before[name] - 0.1 * grad)
    model.load_state_dict(before)
    expected = _gradients(_GroupMeans(groups), model, x)[2:]
    for one, other in zip(got, expected, strict=True):
        assert F.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.98


def _steps(
    model: nn.Module, r_of: Callable[[int], None], run: Pass = _call, after: Callable[[], None] = lambda: None
) -> None:
    """Train three steps."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step in range(3):
        r_of(step)
        torch.manual_seed(step)
        optimizer.zero_grad()
        F.cross_entropy(run(model, _images(dtype=next(model.parameters()).dtype)), LABELS).backward()
        optimizer.step()
        after()


def test_a_running_average_of_a_patched_model_stays_its_own() -> None:
    from timm.utils import ModelEmaV3

    model = _vit().train()
    alone = copy.deepcopy(model)
    handle = tokenmerge.patch(model, r=5)
    average = ModelEmaV3(model, decay=0.75)
    averaged = tokenmerge.handle_of(average.module)
    assert averaged.model is average.module and averaged is not handle
    expected = [p.detach().clone() for p in model.parameters()]

    def update() -> None:
        average.update(model)
        for mean, parameter in zip(expected, model.parameters(), strict=True):
            mean.lerp_(parameter.detach(), 0.25)

    _steps(model, lambda step: setattr(handle, "r", 5 - step), after=update)
    _assert_all_close(list(average.module.parameters()), expected)
    # the model trained as it would have without the average, whose settings are its own
    plain = tokenmerge.patch(alone, r=5)
    _steps(alone, lambda step: setattr(plain, "r", 5 - step))
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), alone.parameters(), strict=True))
    assert (handle.r, averaged.r) == (3, 5)
    x = _images(dtype=torch.float32)
    fresh = _vit().eval()
    fresh.load_state_dict(average.module.state_dict())
    with torch.no_grad():
        merged = average.module.eval()(x)
        averaged.remove()
        assert torch.equal(average.module(x), fresh(x))
        tokenmerge.patch(fresh, r=5)
        assert torch.equal(merged, fresh(x))


def test_accumulated_and_checkpointed_parts_add_up_to_the_batch() -> None:
    found = []
    for parts, is_checkpointed in ((1, False), (2, False), (2, True)):
        torch.manual_seed(0)
        model = _vit().double().train()
        handle = tokenmerge.patch(model, r=5)
        model.set_grad_checkpointing(is_checkpointed)
        x = _images()
        for part, labels in zip(x.chunk(parts), LABELS.chunk(parts), strict=True):
            (F.cross_entropy(model(part), labels) / parts).backward()
        assert handle.tokens == [60, 55, 50]
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for other in found[1:]:
        _assert_all_close(other, found[0], 1e-9)


def test_r_may_change_every_step() -> None:
    model = _vit().double().train()
    twin = copy.deepcopy(model)
    handle = tokenmerge.patch(model, r=0)
    amounts: list[Any] = [5, (8, 0.0), 0]

    def patched_anew(step: int) -> None:
        if "_tokenmerge_handle" in twin.__dict__:
            tokenmerge.unpatch(twin)
        tokenmerge.patch(twin, r=amounts[step])

    _steps(model, lambda step: setattr(handle, "r", amounts[step]))
    _steps(twin, patched_anew)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(
    ("backend", "amounts"), [("aot_eager", [5, 3, 0]), pytest.param("inductor", [4, 4, 2], marks=pytest.mark.slow)]
)
def test_compiled_steps_equal_eager_ones(backend: str, amounts: list[int]) -> None:
    torch._dynamo.reset()
    model = _vit(depth=1).train()
    twin = copy.deepcopy(model)
    handle, other = (tokenmerge.patch(each, r=0) for each in (model, twin))
    compiled = torch.compile(twin, backend=backend, fullgraph=True)
    _steps(model, lambda step: setattr(handle, "r", amounts[step]))
    _steps(twin, lambda step: setattr(other, "r", amounts[step]), run=lambda _, x: compiled(x))
    _assert_all_close(list(twin.parameters()), list(model.parameters()), 1e-3)
    assert other.tokens == [65 - amounts[-1]]


@pytest.mark.parametrize("every", [1, 2, 3], ids=lambda every: f"segments-of-{every}")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointed_forwards_before_one_backward_keep_their_own_sizes(every: int, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model: Any = _vit(global_pool="avg").double().train()
    handle = tokenmerge.patch(model, r=5)
    views = torch.randn(3, 4, 3, 32, 32, dtype=torch.float64)

    def run(x: Tensor) -> Tensor:
        if every == 3:
            return checkpoint(model, x, use_reentrant=reentrant)  # the model as a whole
        x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        for start in range(0, 3, every):
            x = checkpoint(nn.Sequential(*model.blocks[start : start + every]), x, use_reentrant=reentrant)
        return model.forward_head(model.norm(x))

    found = []
    for forward in (model, run):
        model.zero_grad()
        torch.cat([forward(x.clone().requires_grad_()) for x in views]).square().mean().backward()
        with handle.disabled(), torch.no_grad():
            model(views[0])
        found.append([p.grad.clone() for p in model.parameters()])
    _assert_all_close(found[1], found[0], 1e-9)
