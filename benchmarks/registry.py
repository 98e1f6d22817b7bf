"""The benchmark cases (models, operations, memory) as data, and how to set each up.

Uses only the public API and `kernels`, so that the package of an older commit can run the same cases.
Shapes: B batch, N tokens in, R absorbed tokens, C channels, H heads, D head width.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tokenmerge
from tokenmerge import kernels, matching
from tokenmerge.errors import UnsupportedError, unknown_name


class Bar(NamedTuple):
    """A limit for a column: at most or at least a value."""

    column: str
    sign: str  # "<=" or ">="
    value: float

    def __str__(self) -> str:
        return f"{self.column} {self.sign} {self.value:g}"

    def is_met(self, figure: float) -> bool:
        return figure <= self.value if self.sign == "<=" else figure >= self.value


@dataclass(frozen=True)
class ModelCase:
    """A model with random weights, merged."""

    name: str
    group: str
    model: str  # timm name
    side: int  # the input is [batch, 3, side, side]
    batch: int
    r: int
    dtype: str = "float32"
    device: str = "cpu"
    compiled: bool | str = False  # True, or a mode of torch.compile
    bars: tuple[Bar, ...] = ()


@dataclass(frozen=True)
class OpCase:
    """One operation of `tokenmerge.kernels` on `[B, H, N, D]`; C = H * D."""

    name: str
    group: str
    op: str
    B: int
    H: int
    N: int
    D: int
    r: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    bars: tuple[Bar, ...] = ()


Case = ModelCase | OpCase

# model, side, batch, r, largest time over the free bound: eager, compiled
CPU = (
    ("vit_base_patch16_224", 224, 8, 16, 1.02, 1.03),
    ("vit_large_patch16_384", 384, 2, 23, 1.02, 1.03),
    ("vit_small_patch16_224", 224, 16, 13, 1.04, 1.03),
    ("deit_tiny_patch16_224", 224, 32, 13, 1.06, 1.03),
)
# model, side, batch, r
GPU = (
    ("vit_base_patch16_224", 224, 256, 13),
    ("vit_large_patch16_224", 224, 128, 8),
    ("vit_large_patch16_384", 384, 64, 23),
    ("vit_huge_patch14_224", 224, 64, 7),
)
# B, H, N, D, r of the first block of models above
CPU_SHAPES = ((8, 12, 197, 64, 16), (2, 16, 577, 64, 23), (32, 3, 197, 64, 13))
GPU_SHAPES = ((256, 12, 197, 64, 13), (64, 16, 577, 64, 23), (1, 12, 197, 64, 13))
# B, H, N, D for proportional attention, compared with attention without a bias
GPU_ATTENTION = ((256, 12, 197, 64), (64, 16, 577, 64), (16, 16, 1025, 64), (2, 16, 4097, 64))
LONG = (2, 1, 16384, 64, 4096)

NOT_SLOWER = Bar("reference / merged", ">=", 1.0)
FAST_OP = Bar("reference / ours", ">=", 1.0)


def _over(most: float) -> tuple[Bar, ...]:
    return (Bar("over bound", "<=", most), NOT_SLOWER)


def _models() -> list[ModelCase]:
    rows = []
    for name, side, batch, r, eager, compiled in CPU:
        for group, dtype, is_compiled, bars in (
            ("cpu-eager", "float32", False, _over(eager)),
            ("cpu-compiled", "float32", True, _over(compiled)),
            ("cpu-bf16", "bfloat16", False, (NOT_SLOWER,)),
            ("memory", "float32", False, (Bar("merged / unmerged", "<=", 1.0),)),
        ):
            case = f"{group}-{name}"
            rows.append(ModelCase(case, group, name, side, batch, r, dtype, compiled=is_compiled, bars=bars))
    for name, side, batch, r in GPU:
        for group, is_compiled, most in (("gpu-eager", False, 1.12), ("gpu-compiled", True, 1.05)):
            given = (f"{group}-{name}", group, name, side, batch, r, "bfloat16", "cuda", is_compiled, _over(most))
            rows.append(ModelCase(*given))
        for few in (1, 8):
            group, bars = "gpu-graphs", (Bar("speed-up", ">=", 1.0),)
            given = (f"{group}-{name}-b{few}", group, name, side, few, r, "bfloat16", "cuda", "reduce-overhead", bars)
            rows.append(ModelCase(*given))
        bars = (Bar("merged / unmerged", "<=", 1.0),)
        rows.append(
            ModelCase(f"gpu-memory-{name}", "gpu-memory", name, side, batch // 4, r, "bfloat16", "cuda", bars=bars)
        )
    return rows


def _ops() -> list[OpCase]:
    rows = []
    for op, shape in itertools.product(("bipartite", "merge", "attend"), CPU_SHAPES):
        rows.append(_op("ops", op, shape, "float32", "cpu", (FAST_OP,)))
    for op, shape in itertools.product(("bipartite", "merge"), GPU_SHAPES):
        rows.append(_op("gpu-ops", op, shape, "bfloat16", "cuda", (FAST_OP,)))
    for shape in GPU_ATTENTION:
        bars = (Bar("over no bias", "<=", 1.05), FAST_OP)
        rows.append(_op("gpu-ops", "attend", shape, "bfloat16", "cuda", bars))
    for group, device in (("memory", "cpu"), ("gpu-memory", "cuda")):
        rows.append(_op(group, "bipartite", LONG, "float32", device, (Bar("peak MB", "<=", 64.0),)))
    return rows


def _op(group: str, op: str, shape: Sequence[int], dtype: str, device: str, bars: tuple[Bar, ...]) -> OpCase:
    B, H, N, D, *r = shape
    return OpCase(f"{group}-{op}-b{B}-h{H}-n{N}", group, op, B, H, N, D, *r, dtype=dtype, device=device, bars=bars)


CASES: dict[str, Case] = {case.name: case for case in (*_models(), *_ops())}
GROUPS = tuple(dict.fromkeys(case.group for case in CASES.values()))


def choose(names: Sequence[str] = (), group: str | None = None) -> list[Case]:
    """Return the cases with these names, or of a group, or all; raise `UnknownNameError` with the nearest name."""
    for name in names:
        if name not in CASES:
            raise unknown_name("benchmark case", name, CASES)
    if group is not None and group not in GROUPS:
        raise unknown_name("group of benchmark cases", group, GROUPS)
    return [CASES[name] for name in names] or [case for case in CASES.values() if group in (None, case.group)]


def pack(case: Case) -> dict[str, Any]:
    """Return a case as plain data for another process; see `unpack`."""
    return asdict(case)


def unpack(data: dict[str, Any]) -> Case:
    """Build the case that `pack` described."""
    bars = tuple(Bar(*bar) for bar in data["bars"])
    return (OpCase if "op" in data else ModelCase)(**{**data, "bars": bars})


def build_model(case: ModelCase) -> torch.nn.Module:
    """Build the unmerged model with random weights, in eval mode, on the device of the case."""
    import timm

    torch.manual_seed(0)
    # initialising a large model on a CPU takes half a minute
    with torch.device(case.device):
        model: torch.nn.Module = timm.create_model(case.model).eval()
    return model


def images(case: ModelCase) -> Tensor:
    """Return random images `[batch, 3, side, side]` on the device of the case."""
    return torch.randn(case.batch, 3, case.side, case.side, device=case.device, dtype=getattr(torch, case.dtype))


def operation(case: OpCase) -> Callable[..., Any]:
    """Return the public function of an operation; raise `UnsupportedError` if this version of tokenmerge lacks it."""
    found: Callable[..., Any] | None = getattr(kernels, case.op, None)
    if found is None:
        raise UnsupportedError(f"{case.name} needs kernels.{case.op}; tokenmerge {tokenmerge.__version__} has none.")
    return found


def arguments(case: OpCase) -> tuple[Any, ...]:
    """Return random arguments of an operation, laid out as in a model: views of one qkv projection."""
    torch.manual_seed(0)
    B, H, N, D = case.B, case.H, case.N, case.D
    qkv = torch.randn(B, N, 3, H, D, device=case.device, dtype=getattr(torch, case.dtype))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # [B, H, N, D]
    return _ARGUMENTS[case.op](case, q, k, v)


def _bipartite(case: OpCase, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    return k, case.r, 1


def _merge(case: OpCase, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    x, branch = (part.transpose(1, 2).flatten(2) for part in (q, v))  # [B, N, C]
    plan = matching.bipartite(k.mean(dim=1), case.r, prefix=1)
    return x, _sizes(case), plan.keep, plan.src, plan.dst, branch


def _attend(case: OpCase, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    return q, k, v, _sizes(case).log(), None


def _sizes(case: OpCase) -> Tensor:
    return torch.randint(1, 5, (case.B, case.N), device=case.device).float()


_ARGUMENTS = {"bipartite": _bipartite, "merge": _merge, "attend": _attend}


def merged_call(case: Case) -> Callable[[], Any]:
    """Return the call to time for a comparison of commits: the merged model or the operation, without arguments.

    Raises `UnsupportedError` if this version of tokenmerge lacks the operation or gives it other arguments.
    """
    if isinstance(case, ModelCase):
        x = images(case)
        model: Any = build_model(case).to(x.device, x.dtype)
        tokenmerge.patch(model, r=case.r)
        if case.compiled:
            model = torch.compile(model, mode=None if case.compiled is True else case.compiled)
        return lambda: model(x)
    run, given = operation(case), arguments(case)
    try:
        inspect.signature(run).bind(*given)
    except TypeError as error:
        raise UnsupportedError(
            f"{case.name} calls kernels.{case.op} with {len(given)} arguments; that of tokenmerge "
            f"{tokenmerge.__version__} does not take them: {error}."
        ) from error
    return lambda: run(*given)
