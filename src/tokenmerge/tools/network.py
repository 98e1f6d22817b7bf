"""Fail at once where the hub of Hugging Face cannot be reached: its client tries again for a minute, file by file."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

__all__ = ["failing_at_once", "is_reachable"]

_PATIENCE = 5.0  # seconds


@contextmanager
def failing_at_once(*, is_offline: bool = False) -> Iterator[None]:
    """Have huggingface_hub look into its cache alone meanwhile, if the hub cannot be reached, or is not to be asked."""
    try:
        from huggingface_hub import constants
    except ImportError:
        yield
        return
    known: Any = constants
    before = known.HF_HUB_OFFLINE
    if is_offline or (not before and not is_reachable(known.ENDPOINT)):
        known.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        known.HF_HUB_OFFLINE = before


def is_reachable(address: str) -> bool:
    """Return whether something answers at an address `https://host`, or at the proxy that leads to it."""
    place = urlsplit(address)
    place = urlsplit(getproxies().get(place.scheme, address)) if place.scheme else urlsplit(f"//{address}")
    if not place.hostname:
        return True  # of a form that is not known here: the client will say
    try:
        socket.create_connection((place.hostname, place.port or 443), timeout=_PATIENCE).close()
    except OSError:
        return False
    return True
