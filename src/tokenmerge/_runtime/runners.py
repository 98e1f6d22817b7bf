"""The runner for each kind of block."""

from __future__ import annotations

from tokenmerge._runtime.hooked import HookedRunner
from tokenmerge._runtime.local import LocalRunner
from tokenmerge._runtime.packed import PackedRunner
from tokenmerge._runtime.residual import ResidualRunner
from tokenmerge.adapters.base import BlockSpec, HookSpec, PackedSpec, WindowSpec

__all__ = ["RUNNERS"]

RUNNERS: dict[type, type[ResidualRunner]] = {
    BlockSpec: ResidualRunner,
    PackedSpec: PackedRunner,
    HookSpec: HookedRunner,
    WindowSpec: LocalRunner,
}
