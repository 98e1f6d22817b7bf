"""Modules and names that are elsewhere since 0.6: the old name works and warns, or says what to use instead."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

__all__ = ["MOVED", "NAMES", "find_moved", "moved_names"]

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
    "adapters.multihead": "_intercept.multihead",
    "adapters.original": "_intercept.override",
    "adapters.parallel": "_intercept.parallel",
    "adapters.projections": "_intercept.projections",
    "adapters.proof": "_intercept.prove",
    "adapters.repos.mae_st": "adapters.repos.mae",
    "adapters.standins": "testing.models.plain",
    "adapters.standins_clip": "testing.models.clip",
    "adapters.standins_dino": "testing.models.dino",
    "adapters.standins_video": "testing.models.video",
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
    "adapters.transformers.aimv2": "adapters.transformers.plain",
    "adapters.transformers.clip": "adapters.transformers.plain",
    "adapters.transformers.dinov2": "adapters.transformers.plain",
    "adapters.transformers.internvl": "adapters.transformers.plain",
    "adapters.transformers.vit": "adapters.transformers.plain",
    "adapters.trust": "_intercept.trust",
    "attach": "_runtime.attach",
    "bindings": "_intercept.bindings",
    "calibrate": "tuning.auto",
    "grids": "_runtime.grids",
    "guards": "_runtime.guards",
    "hooks": "_runtime.hooked",
    "keybias": "_runtime.key_bias",
    "memory": "_torch.memory",
    "outputs": "_runtime.outputs",
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
    "tracing": "_torch.tracing",
    "training.amount": "training.step_schedule",
    "training.clips": "data.clips",
    "training.data": "data.loader",
    "training.held": "training.validate",
    "training.images": "data.images",
    "training.nets": "training.models",
    "training.output": "training.run_folder",
    "training.parts": "training.build",
    "training.preparation": "data.prepare",
    "training.sounds": "data.sounds",
    "training.sources": "data.sources",
    "training.transforms": "data.transforms",
    "training.world": "training.distributed",
    "windows": "_runtime.local",
}

# public names of 0.5 and 0.6 that their module does not hold any more: where each is now, or what to do instead
NAMES = {
    "adapters.base": {
        "Original": "adapters.base:Override",
        "Replacement": "adapters.base:Binding",
        "check_parity": "_intercept.prove:check_parity",
        "token_width": "_intercept.prove:token_width",
    },
    "adapters.heads": {"LastMean": "use OutputMean or HeadMean of tokenmerge._intercept.pooling"},
    "adapters.hf": {"MERGED_TOKENS": "write a sentence of your own into handed_out of surroundings()"},
    "adapters.hf_video": {"TINY": "adapters.transformers.base:TINY"},
    "adapters.original": {
        "Following": "use Override, which looks its original up at every call",
        "Original": "_intercept.override:Override",
        "Replacement": "_intercept.override:Binding",
    },
    "adapters.projections": {"biased_projection": "ProjectionTap(block, 'attn') finds the bias of the projection"},
    "adapters.proof": {"PROBED": "adapters.base:PROBED"},
    "adapters.taps": {"MultiheadTap": "_intercept.multihead:MultiheadTap"},
    "adapters.timm_eva": {"placed_by_rope": "call placed() of the tap"},
    "attach": {"Attachment": "_runtime.attach:Bindings"},
    "guards": {"guard_methods": "name the methods in host.token_methods of the adapter"},
    "hooks": {"HookRunner": "_runtime.hooked:HookedRunner"},
    "memory": {"carry": "call recall(x), then remember(other, thing)"},
    "methods.learned": {
        "drawn": "methods.learned:gumbel_sigmoid",
        "floored": "methods.learned:clamp_keep_grad",
        "latest": "call view.last_note(MaskNote), or another type of note",
        "note_left": "call view.note(budget(view, method, r, left)): a BudgetNote, not a dict",
        "noted": "call notes_of(memory, BudgetNote), which returns notes",
        "restricted": "methods.learned:mask_alive",
        "share_of": "methods.learned:alive_share",
    },
    "runner": {"BlockRunner": "_runtime.residual:ResidualRunner", "SEEN": "methods.base:CAPTURED"},
    "schedule": {"plain": "give numbers of numpy or torch as they are: Schedule takes them"},
    "tools.measure": {
        "FIGURES": "tools.compare:FIGURES",
        "Subject": "use tokenmerge.measure.trial.Trial, whose measure() takes a patched copy of the model",
    },
    "tools.models": {
        "answer": "measure.outputs:answer",
        "declared_classes": "measure.outputs:declared_classes",
        "find_device": "measure.outputs:find_device",
        "known_size": "measure.outputs:known_size",
        "run_images": "measure.outputs:run_images",
        "shared_copy": "measure.outputs:shared_copy",
    },
    "tools.results": {
        "Progress": "report.progress:Progress",
        "as_html": "call results_page(title, rows, environment=..., notes=...) of tokenmerge.report.results",
        "replace_text": "files:write_file",
    },
    "tools.visualize": {
        "plot_pareto": "report.plots:plot_pareto",
        "plot_tradeoff": "report.plots:plot_tradeoff",
        "require_viz": "report.plots:require_viz",
    },
    "training": {"Amount": "training.step_schedule:StepSchedule"},
    "training.amount": {"Amount": "training.step_schedule:StepSchedule"},
    "training.held": {
        "autocast": "call World(device).autocast(precision) of tokenmerge.training.distributed",
        "pixel_statistics": "call tokenmerge.data.prepare.find_preprocessing(model)",
        "shown": "training.log:format_r",
    },
    "training.nets": {
        "build": "training.models:build_model",
        "places": "training.models:position_embeddings",
    },
    "training.output": {
        "export": "call tokenmerge.training.run_folder.write_model with a Network, after setting handle.r"
    },
    "training.parts": {
        "MODULES": "tokenmerge.methods.learned.MODULES is the same without the dot at its end",
        "Parts": "build_network() of tokenmerge.training.build returns a Network, whose r is handle.r",
        "build_parts": "call build_network(recipe, size, classes, device) with the names of the classes",
        "optimizer_of": "training.optimizer:optimizer_of",
        "scheduler_of": "training.optimizer:scheduler_of",
        "set_training": "training.optimizer:set_training",
    },
    "training.preparation": {
        "preparation": "call choose_preprocessing(model, kind, size, beside=..., is_own=...) of tokenmerge.data.prepare"
    },
    "windows": {"WindowRunner": "_runtime.local:LocalRunner"},
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
        found = sys.modules[old] = importlib.import_module(new)
        if old.partition(".")[2] in NAMES:
            found.__dict__.setdefault("__getattr__", moved_names(new))


def moved_names(module: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module that names have moved out of, for those of it and of its older names."""
    own = module.partition(".")[2]
    names: dict[str, str] = {}
    for old, held in NAMES.items():
        names |= held if own in (old, MOVED.get(old)) else {}

    def find(name: str) -> Any:
        successor = names.get(name)
        if f"{own}.{name}" in MOVED:
            return importlib.import_module(f"{module}.{name}")
        if successor is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        if " " in successor:
            text = f"{module}.{name} is gone: {successor}."
            # also said as a warning: `from ... import` drops the words of the error
            warnings.warn(text, DeprecationWarning, stacklevel=2)
            raise AttributeError(text)
        home, _, attribute = successor.partition(":")
        shown = attribute if home == own else f"tokenmerge.{home}.{attribute}"
        warnings.warn(f"{module}.{name} is {shown} now.", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(f"tokenmerge.{home}"), attribute)

    return find


def find_moved() -> None:
    """Let the old names be found from now on."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
