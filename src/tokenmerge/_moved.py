"""Modules that have another name since 0.6: the old one works and warns."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

__all__ = ["MOVED", "find_moved"]

MOVED = {
    "adapters.bias": "_intercept.pair_bias",
    "adapters.dino": "adapters.repos.dino",
    "adapters.follow": "_intercept.follow",
    "adapters.heads": "_intercept.pooling",
    "adapters.hf": "adapters.transformers.base",
    "adapters.hf_aimv2": "adapters.transformers.plain",
    "adapters.hf_audio": "adapters.transformers.audio",
    "adapters.hf_beit": "adapters.transformers.beit",
    "adapters.hf_clip": "adapters.transformers.plain",
    "adapters.hf_dinov2": "adapters.transformers.plain",
    "adapters.hf_interface": "adapters.transformers.interface",
    "adapters.hf_internvl": "adapters.transformers.plain",
    "adapters.hf_options": "adapters.transformers.options",
    "adapters.hf_rotary": "adapters.transformers.rotary",
    "adapters.hf_timm": "adapters.transformers.timm_wrapper",
    "adapters.hf_video": "adapters.transformers.video",
    "adapters.hf_vit": "adapters.transformers.plain",
    "adapters.hf_yolos": "adapters.transformers.yolos",
    "adapters.mae": "adapters.repos.mae",
    "adapters.mae_st": "adapters.repos.mae",
    "adapters.original": "_intercept.override",
    "adapters.parallel": "_intercept.parallel",
    "adapters.projections": "_intercept.projections",
    "adapters.repos.mae_st": "adapters.repos.mae",
    "adapters.swag": "adapters.repos.swag",
    "adapters.taps": "_intercept.taps",
    "adapters.timm_beit": "adapters.timm.beit",
    "adapters.timm_cait": "adapters.timm.cait",
    "adapters.timm_eva": "adapters.timm.eva",
    "adapters.timm_naflex": "adapters.timm.naflex",
    "adapters.timm_relpos": "adapters.timm.relpos",
    "adapters.timm_sam": "adapters.timm.sam",
    "adapters.timm_vit": "adapters.timm.vit",
    "adapters.timm_vlm": "adapters.timm.vlm",
    "adapters.transformers.clip": "adapters.transformers.plain",
    "adapters.transformers.dinov2": "adapters.transformers.plain",
    "adapters.transformers.internvl": "adapters.transformers.plain",
    "adapters.transformers.aimv2": "adapters.transformers.plain",
    "adapters.transformers.vit": "adapters.transformers.plain",
    "attach": "_runtime.attach",
    "calibrate": "tuning.auto",
    "guards": "_runtime.guards",
    "hooks": "_runtime.hooked",
    "keybias": "_runtime.key_bias",
    "runner": "_runtime.residual",
    "state": "_runtime.state",
    "tools.columns": "report.columns",
    "tools.data": "data.labelled",
    "tools.flops": "measure.counting",
    "tools.measure": "measure.trial",
    "tools.plots": "report.plots",
    "tools.prepare": "data.prepare",
    "tools.preprocessing": "data.preprocessing",
    "tools.quality": "measure.quality",
    "tools.results": "report.table",
    "tools.simulate": "measure.simulate",
    "tools.timing": "measure.timing",
    "training.clips": "data.clips",
    "training.data": "data.loader",
    "training.images": "data.images",
    "training.sounds": "data.sounds",
    "training.sources": "data.sources",
    "training.transforms": "data.transforms",
    "windows": "_runtime.local",
}


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked last, for what no file was found of."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return importlib.machinery.ModuleSpec(fullname, self) if package == "tokenmerge" and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = f"tokenmerge.{MOVED[old.partition('.')[2]]}"
        warnings.warn(f"{old} is {new} now.", DeprecationWarning, stacklevel=2)
        # what is imported is the one module itself: its classes are the same under both names
        sys.modules[old] = importlib.import_module(new)


def find_moved() -> None:
    """Let the old names be found from now on."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
