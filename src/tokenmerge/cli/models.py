"""Open a model from the command line, and say which host was found for a name without one."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Any

__all__ = ["open_model"]


def open_model(name: str, *, pretrained: bool = False, trust_pickle: bool = False) -> Any:
    """Return the unmerged model of this name, in eval mode; raise the errors of `tokenmerge.load`."""
    from tokenmerge.tools.hosts import hosts_of
    from tokenmerge.tools.models import check_takes_images, load

    with redirect_stdout(sys.stderr):  # what a host or a function of the user's prints is no result
        model = load(name, pretrained=pretrained, trust_pickle=trust_pickle)
    check_takes_images(model, name)
    found = [] if ":" in name else hosts_of(name)
    if found and found != ["timm"]:
        others = f"; there is also {' and '.join(f'{one}:{name}' for one in found[1:])}" if found[1:] else ""
        print(f"Model: {found[0]}:{name}{others}.", file=sys.stderr)
    return model
