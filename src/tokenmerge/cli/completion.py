"""Tab completion: `tokenmerge --print-completion SHELL` writes a script for the shell, made by shtab of the parser."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from tokenmerge.errors import UnsupportedError, unknown_name

__all__ = ["PrintCompletion"]

SHELLS = ("bash", "zsh")
_FILES = ("out", "data", "calibrate", "config", "journal", "image")  # what names a file or a folder
_METHODS = ("method", "methods")
# a word alone or a file: names of models, methods and recipes may be either
_FUNCTIONS = {
    "bash": '{name}() {{\n  compgen -W "{words}" -- "$1"\n  compgen -f -- "$1"\n}}',
    "zsh": "{name}() {{\n  compadd -- {words}\n  _files\n}}",
}


class PrintCompletion(argparse.Action):
    """Print the script and end; needs shtab."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        print(script(parser, str(values)))
        parser.exit()


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script that completes commands, options, names of models, of methods and of files.

    Nothing of it is Python, so that a Tab waits for no import. Raises `UnknownNameError` for another shell,
    `UnsupportedError` without shtab.
    """
    if shell not in SHELLS:
        raise unknown_name("shell with completion", shell, SHELLS)
    try:
        import shtab
    except ImportError as error:
        raise UnsupportedError("tab completion needs shtab: pip install shtab") from error
    functions = []
    for kind, words in _words().items():
        name = f"_tokenmerge_{kind}"
        functions.append(_FUNCTIONS[shell].format(name=name, words=" ".join(words)))
        for action in _actions(parser):
            if action.dest == kind or (kind == "method" and action.dest in _METHODS):
                action.complete = {shell: name}  # type: ignore[attr-defined]
    for action in _actions(parser):
        if action.dest in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell=shell, preamble={shell: "\n".join(functions)}))


def _words() -> dict[str, list[str]]:
    """Return the names of what an argument takes, by the argument."""
    from tokenmerge import list_methods
    from tokenmerge.tools.hosts import known_names
    from tokenmerge.tools.models import AUTO, BUNDLED
    from tokenmerge.training.recipe import list_recipes

    models = sorted({BUNDLED, *known_names()})
    return {"model": models, "method": [*list_methods(), AUTO], "recipe": [*list_recipes()]}


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the arguments of all commands."""
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return [action for command in commands.choices.values() for action in command._actions]
