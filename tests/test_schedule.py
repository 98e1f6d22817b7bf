"""Every form of r, what it removes, and every value that is none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tokenmerge import Schedule, TokenMergeError
from tokenmerge.schedule import parse_r


@pytest.mark.parametrize(
    ("r", "expected"),
    [
        (0, [197] * 4),
        (16, [181, 165, 149, 133]),
        (np.int64(16), [181, 165, 149, 133]),
        (1000, [99, 50, 26, 14]),
        ([5, 0, 3], [192, 192, 189, 189]),
        ([0.5, 4], [99, 95, 95, 95]),
        ((10, -1.0), [177, 164, 158, 158]),
        ((10, 0), [187, 177, 167, 157]),
        (0.25, [148, 112, 85, 64]),
        (lambda block, tokens: block if tokens > 194 else 0, [197, 196, 194, 194]),
    ],
    ids=lambda value: "callable" if callable(value) else str(value),
)
def test_tokens_left(r: Any, expected: list[int]) -> None:
    assert Schedule.of(r, depth=4).tokens(197, prefix=1) == expected


def test_the_prefix_is_never_counted() -> None:
    assert Schedule.of(0.5, depth=1).at(0, tokens=15, prefix=5) == 5
    assert Schedule.of(100, depth=1).at(0, tokens=15, prefix=5) == 5
    assert Schedule.of(100, depth=1).at(0, tokens=5, prefix=5) == 0
    assert Schedule.of(8, depth=1).at(0, tokens=2, prefix=2) == 0


@pytest.mark.parametrize(
    ("r", "multiple_of", "expected"),
    [
        (13, 8, [184, 168, 152, 136]),  # 13 fits; then 16 is nearer than 8
        (16, 1, [181, 165, 149, 133]),
        (2, 8, [192, 192, 192, 192]),  # of 5 and 0 that is the nearest: what is left is a multiple already
        (1000, 8, [104, 56, 32, 24]),  # no more than half can go
        (1000, 128, [128, 128, 128, 128]),
        (1000, 256, [99, 50, 26, 14]),  # no multiple within reach: as without
        (0, 8, [197] * 4),
    ],
    ids=str,
)
def test_what_is_left_is_rounded_to_a_multiple(r: int, multiple_of: int, expected: list[int]) -> None:
    assert Schedule.of(r, depth=4, multiple_of=multiple_of).tokens(197, prefix=1) == expected


@pytest.mark.parametrize("multiple_of", [0, -8, 1.5, True, "8", None], ids=repr)
def test_a_multiple_is_a_positive_int(multiple_of: Any) -> None:
    with pytest.raises(ValueError, match=r"multiple_of is .*\. Allowed: an int >= 1"):
        Schedule.of(8, depth=4, multiple_of=multiple_of)


@pytest.mark.parametrize(
    "r",
    [
        -1,
        1.0,
        1.5,
        0.0,
        -0.5,
        math.nan,
        math.inf,
        True,
        False,
        "8",
        None,
        [8, -1],
        [True],
        [1.5],
        [1] * 5,
        (8,),
        (8, 1, 1),
        (8, 1.01),
        (8, -1.01),
        (8, math.nan),
        (8, True),
        (8, "1"),
        (-8, 0.5),
        (0.5, 0.5),
        (True, 0.5),
        [None],
        {8},
        2 + 1j,
    ],
    ids=repr,
)
def test_anything_else_is_a_value_error_that_says_what_is_allowed(r: Any) -> None:
    with pytest.raises(
        ValueError, match=r"Allowed: an int >= 0 .* a float in \(0, 1\) .* a list .* a pair .* a callable"
    ):
        Schedule.of(r, depth=4)
    with pytest.raises(TokenMergeError):
        Schedule.of(r, depth=4)


@pytest.mark.parametrize("answer", [-1, 1.5, True, None, "3"], ids=repr)
def test_a_callable_is_checked_when_it_answers(answer: Any) -> None:
    schedule = Schedule.of(lambda block, tokens: answer, depth=3)
    with pytest.raises(ValueError, match=r"the callable r returned .* for block 2"):
        schedule.at(2, tokens=100, prefix=1)


@pytest.mark.parametrize("depth", [1, 2, 12, 24])
@pytest.mark.parametrize("inflection", [-1.0, -0.3, 0.0, 0.5, 1.0])
def test_a_pair_removes_what_its_mean_would(depth: int, inflection: float) -> None:
    amounts = parse_r(depth, (10, inflection))
    assert len(amounts) == depth and min(amounts) >= 0
    if depth > 1:
        assert abs(sum(amounts) - 10 * depth) <= depth  # each is rounded down
        assert amounts == sorted(amounts, reverse=inflection < 0)


def test_a_schedule_of_a_list_is_one_of_a_tuple() -> None:
    assert Schedule([2, 1]).amounts == (2, 1)  # type: ignore[arg-type]
    assert Schedule([2, 1]) == Schedule((2, 1))  # type: ignore[arg-type]


def test_a_schedule_of_one_number_says_what_makes_one() -> None:
    with pytest.raises(ValueError, match=r"not 13: Schedule.of\(r, depth\)"):
        Schedule(13)  # type: ignore[arg-type]


def test_parse_r_counts_tokens_only() -> None:
    with pytest.raises(ValueError, match=r"parse_r counts tokens; r is 0.5"):
        parse_r(4, 0.5)
