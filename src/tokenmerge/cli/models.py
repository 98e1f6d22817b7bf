"""Open a model from the command line; say which host was found for a name without one, and what is not applied."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

__all__ = ["open_model", "unapplied"]

# the options that say how to merge, and what they are if they are not given
_PLAIN: dict[str, tuple[Any, ...]] = {"config": (None,), "method": ("tome",), "methods": (["tome"], ["all"])}


def open_model(name: str, *, pretrained: bool = False, trust_pickle: bool = False) -> Any:
    """Return the unmerged model of this name, in eval mode; raise the errors of `tokenmerge.load`."""
    from tokenmerge.tools.hosts import hosts_of
    from tokenmerge.tools.models import check_takes_images, load_unmerged

    with redirect_stdout(sys.stderr):  # what a host or a function of the user's prints is no result
        model = load_unmerged(name, pretrained=pretrained, trust_pickle=trust_pickle)
    check_takes_images(model, name)
    found = [] if ":" in name else hosts_of(name)
    if found and found != ["timm"]:
        others = f"; there is also {' and '.join(f'{one}:{name}' for one in found[1:])}" if found[1:] else ""
        print(f"Model: {found[0]}:{name}{others}.", file=sys.stderr)
    return model


@contextmanager
def unapplied(arguments: argparse.Namespace) -> Iterator[None]:
    """Say on stderr that the model's folder or repository holds a `merge.json`, unless it was told how to merge."""
    option = next((name for name, plain in _PLAIN.items() if getattr(arguments, name, "") in plain), None)
    if option is None or not hasattr(arguments, "model"):
        yield
        return
    from tokenmerge.tools.models import CONFIGURATION, configuration_beside, repository_of

    home = repository_of(arguments.model)

    def is_said() -> bool:
        if (path := configuration_beside(arguments.model)) is not None:
            where = home or path.parent
            print(f"{where} holds {CONFIGURATION}, which is not applied: --{option} {path} does.", file=sys.stderr)
        return path is not None

    was_said = is_said()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".* holds {CONFIGURATION}, which load does not apply")
        yield
    if home and not was_said:
        is_said()  # it was downloaded meanwhile
