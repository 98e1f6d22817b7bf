"""What users ask for, and how sure a loss is."""

from __future__ import annotations

import pytest
import torch

from tokenmerge import ToMe
from tokenmerge.config import MergeConfig
from tokenmerge.errors import ConfigError
from tokenmerge.tuning.losses import interval, loss_of
from tokenmerge.tuning.subject import Outcome
from tokenmerge.tuning.target import Target, read_targets


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("2x", "speed", 2.0),
        ("1.5x", "speed", 1.5),
        ("12ms", "ms", 12.0),
        ("macs=.5", "macs", 0.5),
        ("memory=0.7", "memory", 0.7),
        ("drop=0", "drop", 0.0),
        ("drop=0.5%", "drop", 0.5),
        ("2X", "speed", 2.0),
        ("MACs=0.5", "macs", 0.5),
        ("agreement=99", "agreement", 99.0),
    ],
)
def test_a_target_is_read(text: str, kind: str, value: float) -> None:
    (target,) = read_targets(text)
    assert (target.kind, target.value) == (kind, value)
    assert read_targets(str(target)) == (target,)


def test_several_targets_are_one_text_or_a_list() -> None:
    expected = (Target("speed", 2.0), Target("drop", 0.5))
    assert read_targets("2x drop=0.5") == read_targets(["2x", "drop=0.5"]) == expected
    assert [target.is_cost for target in expected] == [True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", "'fast' is no target; give 2x"),
        ("", "target is ''; give 2x"),
        (None, "'None' is no target; give 2x"),
        (2, "'2' is no target; give 2x"),
        ("2x,drop=1", "Several with spaces between"),
        ("2x 3x", "2x and 3x ask for the same thing twice: keep one"),
        ("drop=1 2x drop=0.5", "drop=1 and drop=0.5 ask for the same thing twice"),
        ("1x", "'1x': the number must be more than 1"),
        ("macs=1.5", "more than 0, at most 1"),
        ("macs=50%", "more than 0, at most 1"),
        ("0ms", "more than 0"),
        ("speed=2", "'speed=2' is no target|the number"),
        ("agreement=101", "at most 100"),
        ("-2x", "'-2x': the number must be more than 1, at most 100"),
        ("-1ms", "'-1ms': the number must be more than 0"),
        ("drop=-1", "'drop=-1': the number must be at least 0, at most 100"),
    ],
)
def test_what_is_no_target_is_refused_with_the_forms(text: str, message: str) -> None:
    if text == "speed=2":
        assert read_targets(text) == (Target("speed", 2.0),)
        return
    with pytest.raises(ConfigError, match=message):
        read_targets(text)


def _outcome(same: list[bool], hits: list[bool]) -> Outcome:
    return Outcome(MergeConfig(ToMe(), r=1), torch.zeros(len(same)), tuple(same), tuple(hits))


def test_a_loss_counts_what_other_images_may_show() -> None:
    before, after = (
        _outcome([True] * 100, [True] * 90 + [False] * 10),
        _outcome([True] * 98 + [False] * 2, [True] * 88 + [False] * 12),
    )
    drop, agreement = (loss_of(kind, [before], [after], 100) for kind in ("drop", "agreement"))
    assert drop.points == pytest.approx(2.0) and agreement.points == pytest.approx(2.0)
    # two changes and a half of 101, on 100 images seen and 100 others
    assert drop.error == pytest.approx(100 * (2.5 / 101 * (1 / 100 + 1 / 100)) ** 0.5)
    assert drop.most > 4.0
    few, many = (loss_of("drop", [before], [before], others) for others in (10, 10**6))
    assert few.points == many.points == 0.0 and few.most > many.most > 0.0


def test_gains_and_losses_cancel_in_the_drop_and_not_in_its_error() -> None:
    before, after = _outcome([], [True, False] * 50), _outcome([], [False, True] + [True, False] * 49)
    loss = loss_of("drop", [before], [after], 100)
    assert loss.points == 0.0 and loss.error == pytest.approx(100 * (2.5 / 101 * 0.02) ** 0.5)


def test_the_interval_of_a_share() -> None:
    low, high = interval(100, 100)
    assert high == pytest.approx(100.0) and low == pytest.approx(96.3, abs=0.05)
    low, high = interval(50, 100)
    assert (low + high) / 2 == pytest.approx(50.0) and high - low == pytest.approx(19.2, abs=0.1)
