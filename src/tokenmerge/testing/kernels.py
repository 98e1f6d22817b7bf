"""What every implementation of an operation promises: the answers of the reference, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmerge.errors import ConfigError, unknown_name
from tokenmerge.kernels import TABLE, Kernel, reference
from tokenmerge.measure.outputs import find_device
from tokenmerge.testing.comparing import TOLERANCE, assert_close, assert_equal, expect, keep_promises

__all__ = ["DTYPES", "PROMISES", "SHAPES", "check_kernel", "inputs_of", "poisoned_memory"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# B, H, N, D, prefix, r: widths that no vector divides, one head, one block of rows and more, every token absorbed
SHAPES = (
    (1, 1, 2, 5, 0, 1),
    (2, 3, 17, 8, 1, 8),
    (3, 2, 197, 64, 1, 16),
    (1, 2, 257, 33, 5, 126),
    (2, 1, 578, 80, 2, 40),
    (5, 4, 18, 16, 0, 9),
)
# which inputs of an operation gradients are asked for
_LEAVES = {"attend": (0, 1, 2), "merge": (0, 5), "reduce": (0,), "unmerge": (0,)}
_PLANS = ("bipartite", "match")  # whose answers are places: equal bit by bit
# the ways in which an operation is tried, where there are several
WAYS: dict[str, tuple[str, ...]] = {
    "attend": ("sizes", "padded", "scaled"),
    "match": ("cosine", "dot", "euclidean", "softmax", "cosine padded", "softmax padded"),
    "reduce": ("mean", "sum", "amax", "amin", "prod"),
}


def check_kernel(
    op: str,
    kernel: Kernel | Callable[..., Any],
    *,
    device: str = "cpu",
    only: Iterable[str] = (),
    skip: Mapping[str, str] | None = None,
) -> None:
    """Check an implementation of an operation against the reference, on every shape and precision that it supports.

    Args:
        op: the operation, a row of `tokenmerge.kernels.TABLE`.
        kernel: a `Kernel` with its `supports`, or the function alone, for one that supports everything.
        device: where its tensors lie.
        only: the names of some of `PROMISES`; all by default.
        skip: promises that mean nothing here, each with the reason.

    Raises `AssertionError` with the promise that is broken, the case and the numbers, also where the kernel supports
    no case of the table; `UnknownNameError` for an operation that does not exist and for a promise that means nothing
    for it, `UnsupportedError` for a device that is not there, `ConfigError` for what is no kernel.
    """
    if op not in TABLE:
        raise unknown_name("operation", str(op), TABLE)
    if not isinstance(kernel, Kernel):
        if not callable(kernel):
            raise ConfigError(f"check_kernel takes a Kernel or a function, not {kernel!r}: check_kernel({op!r}, {op}).")
        kernel = Kernel(getattr(kernel, "__name__", "kernel"), kernel, lambda x: True)
    find_device(device)
    promises = {name: check for name, check in PROMISES.items() if op in _ONLY_OF.get(name, TABLE)}
    keep_promises(f"the {kernel.name!r} version of {op!r}", promises, _Case(op, kernel, device), only, skip)


_Named = tuple[str, tuple[Any, ...]]  # a case in words, and its inputs


@dataclass(frozen=True)
class _Case:
    op: str
    kernel: Kernel
    device: str

    def cases(self, *dtypes: torch.dtype) -> Iterator[_Named]:
        """Every shape, way and precision that the kernel supports, in words and as inputs; at least one."""

        def all_cases() -> Iterator[_Named]:
            for dtype, shape, way in product(dtypes, SHAPES, WAYS.get(self.op, ("",))):
                B, H, N, D, prefix, r = shape
                what = f"B={B} H={H} N={N} D={D} prefix={prefix} r={r} {way}".rstrip()
                yield f"{what}, {dtype}", inputs_of(self.op, shape, dtype, self.device, way)

        return self.supported(all_cases(), f"{len(SHAPES)} shapes in {', '.join(map(str, dtypes))}")

    def supported(self, cases: Iterable[_Named], which: str = "cases of this promise") -> Iterator[_Named]:
        """The cases that the kernel supports; at least one."""
        count = 0
        for what, inputs in cases:
            if self.kernel.supports(inputs[0]):
                count += 1
                yield what, inputs
        expect(count, f"it supports none of the {which} on {self.device}: nothing was checked")

    def run(self, *inputs: Any) -> tuple[Any, ...]:
        return _tuple(self.kernel.run(*inputs))

    def compare(self, what: str, got: tuple[Any, ...], inputs: tuple[Any, ...]) -> None:
        expected = _tuple(getattr(reference, self.op)(*inputs))
        expect(len(got) == len(expected), f"{what}: {len(got)} outputs, the reference has {len(expected)}")
        for at, (one, other) in enumerate(zip(got, expected, strict=True)):
            label = f"{what}, output {at}"
            if self.op in _PLANS and not other.is_floating_point():
                assert_equal(one, other, label)
                continue
            expect(one.dtype == other.dtype, f"{label}: {one.dtype} is not {other.dtype}")
            expect(one.shape == other.shape, f"{label}: the shape {tuple(one.shape)} is not {tuple(other.shape)}")
            # scores of padding are infinite
            odd = ~one.isfinite() & (one != other)
            expect(not odd.any(), f"{label}: {int(odd.sum())} values are not finite")
            is_finite = other.isfinite()
            expect((is_finite | (one == other)).all(), f"{label}: {int((~is_finite).sum())} values are to be infinite")
            assert_close(one[is_finite], other[is_finite], what=label)


def _tuple(out: Any) -> tuple[Any, ...]:
    return out if isinstance(out, tuple) else (out,)


def inputs_of(
    op: str, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", way: str = ""
) -> tuple[Any, ...]:
    """Return inputs of an operation, for a shape of `SHAPES`, laid out as a model has them; `way` is one of `WAYS`."""
    B, _, N, _, prefix, r = shape
    way = way or WAYS.get(op, ("",))[0]
    if op == "bipartite":
        inputs: tuple[Any, ...] = (_keys(shape, dtype), r, prefix)
    elif op == "match":
        distance, _, padding = way.partition(" ")
        valid = torch.rand(B, N) < 0.7 if padding else None
        inputs = (_keys(shape, dtype), *reference.alternating(N, prefix), distance, valid)
    elif op == "attend":
        bias = torch.randint(1, 197, (B, N)).float().log()
        if way == "padded":
            bias[:, : N - N // 8 - 1] = float("-inf")  # more than a block of keys, before the real ones
        inputs = (*(_keys(shape, dtype) for _ in range(3)), bias, *((0.3,) if way == "scaled" else ()))
    else:
        x, size, keep, src, dst, branch = _tokens(shape, dtype)
        slots = torch.randint(-1, N - r, (B, N))
        more = {"merge": (size, keep, src, dst, branch), "reduce": (keep, src, dst, way), "unmerge": (slots,)}
        inputs = (x[:, : N - r] if op == "unmerge" else x, *more[op])
    return tuple(value.to(device) if isinstance(value, Tensor) else value for value in inputs)


def _keys(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Keys as attention has them: a view of a projection, `[B, H, N, D]`."""
    B, H, N, D = shape[:4]
    return torch.randn(B, N, 3, H, D).to(dtype)[:, :, 1].transpose(1, 2)


def _tokens(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Tokens, sizes with one group of padding, a plan and what attention adds, in rows that are not side by side."""
    B, _, N, D, prefix, r = shape
    x, branch = torch.randn(2, B, N, 2 * D).to(dtype)[..., :D]
    size = torch.randint(1, 9, (B, N)).float()
    keep, src, dst = reference.bipartite(torch.randn(B, N, 8), r, prefix)
    size[:, src[0, 0]] = size[:, keep[0, dst[0, 0]]] = 0
    return x, size, keep, src, dst, branch


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill memory that nobody has written yet with values that nobody expects, inside the `with`."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            fresh = allocate(*args, **kwargs)
            return fresh.fill_(float("nan") if fresh.is_floating_point() else -(2**31))

        return run

    allocators: tuple[tuple[Any, str], ...] = ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty"))
    before = [(owner, name, getattr(owner, name)) for owner, name in allocators]
    try:
        for owner, name, allocate in before:
            setattr(owner, name, poisoned(allocate))
        yield
    finally:
        for owner, name, allocate in before:
            setattr(owner, name, allocate)


def equals_reference(case: _Case) -> None:
    """It answers as the reference does, leaves its inputs alone, and reads no memory that it has not written."""
    for what, inputs in case.cases(*DTYPES):
        before = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
        with torch.no_grad(), poisoned_memory():
            got = case.run(*inputs)
        for at, (value, copy) in enumerate(zip(inputs, before, strict=True)):
            if isinstance(value, Tensor):
                assert_equal(value, copy, f"{what}: input {at} was written to")
        with torch.no_grad():
            case.compare(what, got, inputs)


def gradients(case: _Case) -> None:
    """Its gradients are those of the reference."""
    leaves_at = _LEAVES[case.op]
    for what, inputs in case.cases(torch.float32):
        found = []
        for run in (case.kernel.run, getattr(reference, case.op)):
            given = [
                value.detach().clone().requires_grad_() if i in leaves_at else value for i, value in enumerate(inputs)
            ]
            out = _tuple(run(*given))[0]
            loss = (out * torch.linspace(-1, 1, out.shape[-1], device=out.device)).sum()
            found.append(torch.autograd.grad(loss, [given[i] for i in leaves_at]))
        for at, (got, expected) in enumerate(zip(*found, strict=True)):
            assert_close(got, expected, TOLERANCE[torch.float32], f"{what}, gradient of input {leaves_at[at]}")


def repeats(case: _Case) -> None:
    """The same inputs give the same answer, bit by bit."""
    for what, inputs in case.cases(torch.float32):
        for at, (one, other) in enumerate(zip(case.run(*inputs), case.run(*inputs), strict=True)):
            assert_equal(one, other, f"{what}, output {at} of two runs")


def layouts(case: _Case) -> None:
    """A tensor that is negated later, as torch's lazy views are, counts as what it stands for."""
    for what, inputs in case.cases(torch.float32):
        negated = torch._neg_view(inputs[0])
        case.compare(f"{what}, negated view", case.run(negated, *inputs[1:]), (negated, *inputs[1:]))


def defaults(case: _Case) -> None:
    """Merging without sizes counts every token as one, and without a branch adds nothing."""
    for what, (x, _, keep, src, dst, branch) in case.cases(torch.float32):
        ones = torch.ones(x.shape[:2], device=x.device)
        plain, summed = case.run(x, None, keep, src, dst, None), case.run(x, ones, keep, src, dst, branch)
        assert_close(plain[0], reference.merge(x, ones, keep, src, dst)[0], what=f"{what}, no sizes")
        assert_close(summed[0], reference.merge(x + branch, ones, keep, src, dst)[0], what=f"{what}, ones")
        assert_equal(plain[1], summed[1], f"{what}, sizes")
        expect(plain[1].sum(dim=1).eq(x.shape[1]).all(), f"{what}: sizes sum to {plain[1].sum(dim=1).tolist()}")


def large_groups(case: _Case) -> None:
    """The mean of a group of any size is rounded once."""

    def groups() -> Iterator[_Named]:
        for dtype, members in product((torch.float32, torch.bfloat16), (2, 10, 100, 401)):
            x = (torch.randn(1, 401, 64) + 2).to(dtype)[:, :members].to(case.device)
            keep, src = torch.tensor([[0]], device=case.device), torch.arange(1, members, device=case.device)[None]
            yield f"{members} members, {dtype}", (x, None, keep, src, torch.zeros_like(src), None)

    for what, inputs in case.supported(groups()):
        mean = inputs[0].double().mean(dim=1)
        error = (case.run(*inputs)[0][:, 0].double() - mean).abs().max()
        most = 1e-5 if inputs[0].dtype == torch.float32 else torch.finfo(inputs[0].dtype).eps * mean.abs().max()
        expect(error <= most, f"{what}: the mean is wrong by {error:.3g}, at most {most:.3g}")


def ties(case: _Case) -> None:
    """Of equal scores the first place wins, in the best partner and in the `r` best pairs."""
    # unit vectors of a few directions: scores are 0 and 1 without rounding, most of them tied
    metric = F.one_hot(torch.randint(0, 4, (3, 41)), 4).float().to(case.device)
    for what, inputs in case.supported((f"prefix={prefix}", (metric, 15, prefix)) for prefix in (0, 1, 2, 5)):
        case.compare(f"tied scores, {what}", case.run(*inputs), inputs)


def odd_numbers(case: _Case) -> None:
    """Tokens that hold NaN or infinity match as in the reference."""

    def oddities() -> Iterator[_Named]:
        odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -float("nan")])
        for at in range(40):
            metric = torch.randn(2, 2, 20 + 7 * at, 5 + at)
            places = [torch.randint(length, (at % 4,)) for length in metric.shape]
            metric[tuple(places)] = odd[torch.randint(4, (at % 4,))]
            yield f"case {at} with NaN and infinity", (metric.to(case.device), 5 + at, 1)
        yield "NaN everywhere", (torch.full((2, 1, 40, 8), float("nan"), device=case.device), 9, 2)

    for what, inputs in case.supported(oddities()):
        case.compare(what, case.run(*inputs), inputs)


def predicate(case: _Case) -> None:
    """`supports` looks at device, type and shape alone, and says yes or no to any tensor."""
    shapes = ((2, 3, 17, 8), (2, 17, 8), (0, 3, 17, 8), (2, 3, 0, 8), (2, 3, 17, 0), (2, 3, 17, 4097))
    kinds: tuple[tuple[torch.dtype, str], ...] = (
        *((dtype, case.device) for dtype in DTYPES),
        (torch.float32, "meta"),
        (torch.int64, case.device),
    )
    for shape in shapes:
        for dtype, device in kinds:
            x = torch.zeros(shape, dtype=dtype, device=device)
            first, again = case.kernel.supports(x), case.kernel.supports(x + 1)
            what = f"supports of {dtype} {shape} on {device}"
            expect(isinstance(first, bool), f"{what} is {first!r}, not True or False")
            expect(first == again, f"{what} depends on the values")


# the operations that a promise means something for; places have no gradients
_ONLY_OF: dict[str, Collection[str]] = {
    "gradients": _LEAVES,
    "defaults": ("merge",),
    "large_groups": ("merge",),
    "ties": ("bipartite",),
    "odd_numbers": ("bipartite",),
}
PROMISES: dict[str, Callable[[_Case], None]] = {
    check.__name__: check
    for check in (
        equals_reference,
        gradients,
        repeats,
        layouts,
        defaults,
        large_groups,
        ties,
        odd_numbers,
        predicate,
    )
}
