"""What the golden data does not cover of the ToMe package's functions."""

from __future__ import annotations

import pytest
import torch

from tokenmerge import functional


@pytest.mark.parametrize("r", [0, -3])
def test_nothing_to_merge_returns_the_input(r: int) -> None:
    x = torch.randn(2, 9, 4)
    for matcher in (functional.bipartite_soft_matching, functional.random_bipartite_soft_matching):
        merge, unmerge = matcher(torch.randn(2, 9, 4), r)
        assert merge(x, mode="sum") is x and unmerge(x) is x
    merge, unmerge = functional.kth_bipartite_soft_matching(torch.randn(2, 9, 4), 1)
    assert merge(x) is x and unmerge(x) is x
    merge, _ = functional.bipartite_soft_matching(torch.randn(2, 2, 4), 5, class_token=True)
    assert merge(x) is x, "two tokens, one of them protected: nothing to merge"


def test_unmerge_undoes_merge_with_a_distillation_token_too() -> None:
    merge, unmerge = functional.bipartite_soft_matching(torch.randn(2, 20, 4), 6, class_token=True, distill_token=True)
    y = merge(torch.randn(2, 20, 3))
    assert torch.equal(merge(unmerge(y)), y) and unmerge(y).shape == (2, 20, 3)


def test_kth_unmerge_keeps_the_length_with_zeros_for_the_dropped_tail() -> None:
    merge, unmerge = functional.kth_bipartite_soft_matching(torch.randn(1, 50, 4), 4)
    spread = unmerge(merge(torch.randn(1, 50, 3)))
    assert spread.shape == (1, 50, 3) and spread[:, 48:].eq(0).all()


def test_random_matching_merges_r_tokens() -> None:
    merge, _ = functional.random_bipartite_soft_matching(torch.randn(2, 30, 4), 11)
    source = functional.merge_source(merge, torch.randn(2, 30, 3))
    assert source.shape == (2, 19, 30) and torch.equal(source.sum(1), torch.ones(2, 30))
    x, size = functional.merge_wavg(merge, torch.ones(2, 30, 3))
    assert torch.allclose(x, torch.ones_like(x)) and torch.equal(size[..., 0], source.sum(2))


def test_sources_compose_over_two_merges() -> None:
    first, _ = functional.bipartite_soft_matching(torch.randn(1, 12, 4), 4)
    x = first(torch.randn(1, 12, 3))
    source = functional.merge_source(first, torch.randn(1, 12, 3))
    second, _ = functional.bipartite_soft_matching(torch.randn(1, 8, 4), 3)
    source = functional.merge_source(second, x, source)
    assert source.shape == (1, 5, 12) and torch.equal(source.sum(1), torch.ones(1, 12))


def test_a_distillation_token_needs_a_class_token() -> None:
    with pytest.raises(ValueError, match=r"pass class_token=True too"):
        functional.bipartite_soft_matching(torch.randn(1, 8, 2), 2, distill_token=True)
