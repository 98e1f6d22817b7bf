"""What ToMe's options mean."""

from __future__ import annotations

import pytest
import torch

from helpers import assert_close, view_of
from tokenmerge import matching
from tokenmerge import plan as plans
from tokenmerge.errors import UnknownNameError
from tokenmerge.methods import ToMe


def test_combinations_mean_what_they_say() -> None:
    view = view_of(2, 12)
    plan = ToMe().plan(view, 4)
    groups = plans.assignment(plan)
    for combine in ("weighted", "average", "max", "keep_one"):
        merged = ToMe(combine=combine).merge(plan, view.x, view.size)[0]
        for slot in range(8):
            members, size = view.x[0, groups[0] == slot], view.size[0, groups[0] == slot, None]  # type: ignore[index]
            expected = {
                "weighted": (members * size).sum(0) / size.sum(),
                "average": members.mean(0),
                "max": members.amax(0),
                "keep_one": view.x[0, plan.keep[0, slot]],
            }[combine]
            assert_close(merged[0, slot], expected, 1e-6)


@pytest.mark.parametrize("metric", ["k", "q", "v", "x", "x_pre"])
def test_a_metric_is_read_from_where_it_says(metric: str) -> None:
    view = view_of(1, 14)
    expected = getattr(view, metric)
    expected = expected.mean(1) if expected.dim() == 4 else expected
    plan, direct = ToMe(metric=metric).plan(view, 4), matching.bipartite(expected, 4, prefix=1)
    assert torch.equal(plan.keep, direct.keep) and torch.equal(plan.dst, direct.dst)
    assert ToMe(metric=metric).needs == ({metric} if metric in "qkv" else set())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "key"}, r"no ToMe metric 'key'. Known: k, q, v, x, x_pre"),
        ({"heads": "max"}, r"no ToMe heads 'max'"),
        ({"distance": "cosin"}, r"no ToMe distance 'cosin'. Did you mean 'cosine'"),
        ({"combine": "mean"}, r"no ToMe combine 'mean'"),
        ({"partition": "alternate"}, r"no ToMe partition 'alternate'. Did you mean 'alternating'"),
    ],
)
def test_a_wrong_choice_says_which_there_are(options: dict[str, str], message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        ToMe(**options)
