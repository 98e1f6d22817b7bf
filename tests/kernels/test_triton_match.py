"""The Triton matching against a loop in float64, and at its borders."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from tokenmerge.kernels import reference, triton_match, triton_supports

Plan = tuple[Tensor, Tensor, Tensor]
# B, H, N, D, prefix, r; H = 0 is a metric without heads
SHAPES = [
    (1, 1, 2, 5, 0, 1),
    (3, 0, 5, 33, 1, 2),
    (2, 3, 5, 5, 2, 1),
    (2, 3, 17, 64, 0, 8),
    (2, 12, 17, 80, 5, 1),
    (3, 1, 18, 33, 1, 8),
    (1, 3, 197, 64, 1, 16),
    (2, 0, 197, 80, 2, 97),
    (1, 2, 257, 200, 1, 128),
]


def by_hand(metric: Tensor, r: int, prefix: int) -> Plan:
    """Match the images of a metric `[B, N, D]` one after the other."""
    unit = metric.double().cpu()
    unit = unit / unit.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    n = unit.shape[1]
    side_a, side_b = [[i for i in range(prefix, n) if i % 2 == parity] for parity in (0, 1)]
    plans = []
    for image in unit:
        score = image[side_a] @ image[side_b].T
        best = score.max(dim=1).values
        # the first of those that tie, in both choices
        partner = [int((row == top).nonzero()[0]) for row, top in zip(score, best, strict=True)]
        order = sorted(range(len(side_a)), key=lambda a, best=best: (-float(best[a]), a))
        left = sorted(order[r:])
        keep = [*range(prefix), *(side_a[a] for a in left), *side_b]
        plans.append((keep, [side_a[a] for a in order[:r]], [prefix + len(left) + partner[a] for a in order[:r]]))
    keep, src, dst = (torch.tensor([plan[part] for plan in plans]) for part in range(3))
    return keep, src, dst


def assert_same(got: Plan, expected: Plan) -> None:
    for part, mine, theirs in zip(("keep", "src", "dst"), got, expected, strict=True):
        assert mine.dtype == torch.int64
        assert torch.equal(mine.cpu(), theirs.cpu()), f"{part}: {mine.tolist()} is not {theirs.tolist()}"


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_a_loop(device: str, shape: tuple[int, ...]) -> None:
    B, H, N, D, prefix, r = shape
    # a view, as of a qkv projection
    metric = torch.randn(B, N, 3, max(H, 1), D, device=device)[:, :, 1].transpose(1, 2)
    before = metric.clone()
    plan = triton_match.bipartite(metric if H else metric[:, 0], r, prefix)
    assert_same(plan, by_hand(metric.double().mean(dim=1), r, prefix))
    assert torch.equal(metric, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_matched_in_full_precision(device: str, dtype: torch.dtype) -> None:
    metric = torch.randn(2, 3, 33, 24, device=device).to(dtype)
    assert_same(triton_match.bipartite(metric, 9, 1), by_hand(metric.double().mean(dim=1), 9, 1))


def test_any_strides(device: str) -> None:
    metric = torch.randn(24, 3, 17, 2, device=device).permute(3, 1, 2, 0)
    assert_same(triton_match.bipartite(metric, 5, 1), by_hand(metric.double().mean(dim=1), 5, 1))


@pytest.mark.parametrize(("n", "prefix", "r"), [(17, 0, 5), (65, 1, 20), (150, 3, 60)])
def test_ties_go_to_the_first(device: str, n: int, prefix: int, r: int) -> None:
    # axes of different lengths: every score is exactly 0 or 1
    axis = torch.nn.functional.one_hot(torch.randint(0, 6, (2, n)), 6)
    metric = (axis * torch.randint(1, 8, (2, n, 1))).to(device, torch.float32)
    assert_same(triton_match.bipartite(metric, r, prefix), by_hand(metric, r, prefix))
    assert_same(triton_match.bipartite(metric, r, prefix), reference.bipartite(metric, r, prefix))


def test_many_tokens_are_averaged_once_and_ranked_by_many(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    metric = torch.randn(2, 3, 150, 8, device=device)
    one = triton_match.bipartite(metric, 40, 3)
    monkeypatch.setattr(triton_match, "ONE_PROGRAM", 32)
    many = triton_match.bipartite(metric, 40, 3)
    assert_same(many, one)
    assert_same(many, by_hand(metric.double().mean(dim=1), 40, 3))


def test_many_ties_are_ranked_by_many(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_match, "ONE_PROGRAM", 32)
    metric = torch.ones(1, 2, 99, 3, device=device)
    keep, src, dst = triton_match.bipartite(metric, 40, 0)
    assert src.tolist() == [list(range(0, 80, 2))]
    assert dst.tolist() == [[10] * 40]  # the first of side B
    assert keep.tolist() == [[*range(80, 99, 2), *range(1, 99, 2)]]


@pytest.mark.usefixtures("poison")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_what_is_no_number_loses(device: str, bad: float) -> None:
    metric = torch.randn(2, 2, 21, 8, device=device)
    metric[0] = bad
    metric[1, 0, [4, 7]] = bad
    keep, src, dst = triton_match.bipartite(metric, 8, 1)
    # every token once, in both images
    assert torch.equal(torch.cat((keep, src), dim=1).sort(dim=1).values.cpu(), torch.arange(21).expand(2, -1))
    assert int(dst.min()) >= 13 - 10 and int(dst.max()) < 13
    assert src[0].tolist() == list(range(2, 18, 2))
    assert 4 not in src[1] and 7 not in keep.gather(1, dst)[1]


def test_zero_vectors_are_matched(device: str) -> None:
    metric = torch.randn(1, 20, 4, device=device)
    metric[:, ::3] = 0.0
    assert_same(triton_match.bipartite(metric, 6, 0), by_hand(metric, 6, 0))


def test_obeys_the_rules_of_custom_operators(device: str) -> None:
    metric = torch.randn(2, 3, 17, 8, device=device)
    torch.library.opcheck(torch.ops.tokenmerge.triton_bipartite, (metric, 4, 1))


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (torch.zeros(1, 2, 3, 4), True),
        (torch.zeros(2, 3, 256, dtype=torch.bfloat16), True),
        (torch.zeros(2, 3, 257), False),
        (torch.zeros(3, 4), False),
        (torch.zeros(0, 3, 4), False),
        (torch.zeros(2, 3, 4, dtype=torch.float64), False),
        (torch.zeros(2, 3, 4, dtype=torch.int64), False),
        (torch.zeros(2, 3, 4, device="meta"), False),
    ],
    ids=["heads", "one-metric", "wide", "two-dimensions", "empty", "double", "integers", "meta"],
)
def test_knows_its_borders(monkeypatch: pytest.MonkeyPatch, metric: Tensor, expected: bool) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_supports.supports_bipartite(metric) is expected
    monkeypatch.delenv("TRITON_INTERPRET")
    assert triton_supports.supports_bipartite(metric) is False


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)], ids=str)
def test_a_chip_must_be_recent(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool) -> None:
    with FakeTensorMode():
        metric = torch.empty(1, 2, 3, 4, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert triton_supports.supports_bipartite(metric) is expected
    monkeypatch.setattr(triton_supports, "HAS_TRITON", False)
    assert triton_supports.supports_bipartite(metric) is False


def test_compiles_into_one_graph(device: str) -> None:
    def run(metric: Tensor) -> Plan:
        assert triton_supports.supports_bipartite(metric)
        return triton_match.bipartite(metric, 4, 1)

    metric = torch.randn(2, 3, 17, 8, device=device)
    assert_same(torch.compile(run, fullgraph=True, backend="aot_eager")(metric), run(metric))
