"""The help of every command ends with examples that the command reads."""

from __future__ import annotations

import argparse
import shlex

import pytest

from tokenmerge.cli import _parser
from tokenmerge.cli.examples import EXAMPLES


def _commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found.choices)


def test_every_command_has_examples_and_no_other() -> None:
    assert set(_commands()) == set(EXAMPLES)


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_ends_with_examples_that_are_read(command: str) -> None:
    head, _, last = _commands()[command].format_help().partition("\nexamples:\n")
    lines = last.splitlines()
    assert head and 1 <= len(lines) <= 2 and [line.strip() for line in lines] == [*EXAMPLES[command]]
    for line in lines:
        program, *words = shlex.split(line)
        assert (program, words[0]) == ("tokenmerge", command) and len(line) <= 100
        assert callable(_parser().parse_args(words).run)
