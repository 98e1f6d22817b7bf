"""Write what every command takes into docs/commands.md, from the parser itself: `python scripts/commands.py`.

tests/test_docs_site.py fails where the page says anything else than the parser.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from pathlib import Path

from tokenmerge.cli import _parser

PAGE = Path(__file__).parent.parent / "docs/commands.md"
START, END = "<!-- what follows is written by scripts/commands.py -->\n", "<!-- until here -->\n"


def commands() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command."""
    (found,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def reference() -> str:
    """Return synopsis, what it does and the options of every command, in Markdown."""
    return "\n".join(_section(name, parser) for name, parser in commands().items())


def written(page: str) -> str:
    """Return the page with its part between the marks written anew."""
    before, _, rest = page.partition(START)
    return f"{before}{START}\n{reference()}\n{END}{rest.partition(END)[2]}"


def _section(name: str, parser: argparse.ArgumentParser) -> str:
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    actions.sort(key=lambda action: bool(action.option_strings))
    words = [_synopsis(action) for action in actions]
    # what belongs together stays on one line
    line = " ".join(word.replace(" ", "\0") for word in [f"tokenmerge {name}", *words])
    usage = textwrap.fill(line, 100, subsequent_indent=" " * 4, break_long_words=False, break_on_hyphens=False)
    rows = [f"| `{_names(action)}` | {_help(action, parser)} |" for action in actions]
    text = (parser.description or "").strip()
    return "\n".join(
        [f"### tokenmerge {name}\n", f"{text[:1].upper()}{text[1:]}.\n", "```", usage.replace("\0", " "), "```\n"]
        + (["| argument | meaning |", "| --- | --- |", *rows, ""] if rows else [])
    )


def _value(action: argparse.Action) -> str:
    """Return what stands for the values of an argument."""
    if action.nargs == 0:
        return ""
    name = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper())
    if isinstance(name, tuple):
        return " ".join(name)
    return f"{name} [{name} ...]" if action.nargs == "+" else name


def _synopsis(action: argparse.Action) -> str:
    if not action.option_strings:
        return _value(action)
    text = f"{action.option_strings[0]} {_value(action)}".strip()
    return text if action.required else f"[{text}]"


def _names(action: argparse.Action) -> str:
    text = f"{', '.join(action.option_strings)} {_value(action)}" if action.option_strings else _value(action)
    return text.strip().replace("|", "\\|")


def _help(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    text = (action.help or "") % (vars(action) | {"prog": parser.prog})
    if not text:
        text = "-" if action.default is None else f"({action.default})"
    return re.sub(r"([|<>*])", r"\\\1", text)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
