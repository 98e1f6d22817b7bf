"""Recipes: the settings of a training run, read from TOML, changed by `key=value`, checked on construction."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from tokenmerge.data.settings import Augment, Data
from tokenmerge.errors import ConfigError, InvalidScheduleError, UnsupportedError, unknown_name
from tokenmerge.fields import fitted, named
from tokenmerge.schedule import PlainR, R, Schedule
from tokenmerge.training.step_schedule import StepSchedule

__all__ = [
    "Augment",
    "Data",
    "Distill",
    "Masked",
    "Merge",
    "Model",
    "Optimizer",
    "Recipe",
    "Save",
    "differences",
    "list_recipes",
    "read_recipe",
]

FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Model:
    name: str = "reference"  # see models.build_model
    options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the model class
    pretrained: bool = True
    weights: str | None = None  # initial weights: a .safetensors file or the folder of another run
    only_modules: bool = False  # train only the modules of the method
    freeze_batch_norm: bool = False  # keep the statistics, which depend on how a batch is split
    checkpointing: bool = False  # recompute blocks in the backward: less memory, more time
    compile: bool = False


@dataclass(frozen=True)
class Optimizer:
    name: str = "adamw"  # timm's name
    lr: float = 1e-3
    lr_modules: float | None = None  # learning rate of a learned method's modules; None: lr
    weight_decay: float = 0.05
    layer_decay: float | None = None
    schedule: str = "cosine"  # cosine, tanh, poly, or none (no schedule and no warm-up)
    warmup: float = 0.05  # share of all steps
    min_lr: float = 1e-6


@dataclass(frozen=True)
class Merge:
    method: str = "tome"  # as on the command line: a name, with options, or a saved configuration
    r: Any = 0  # any form that `patch` takes
    prop_attn: bool | str = "auto"
    warmup: float = 0.0  # share of all steps in which r grows from 0
    draw: bool = False  # draw the r of each step from 0 to r
    off: float = 0.0  # share of all steps, at the end, without merging

    @property
    def amount(self) -> PlainR:
        """The r as `patch` takes it. TOML has no tuples: a pair is written "16,-1"."""
        try:
            return Schedule.parse(self.r) if isinstance(self.r, str) else Schedule.check(self.r)
        except InvalidScheduleError as error:
            if not isinstance(self.r, str):
                raise
            raise ConfigError(f"merge.r: {error}") from error

    def schedule(self, r: R, steps: int, seed: int) -> StepSchedule:
        """Return the r of each step of a run whose model merges `r`; raises `InvalidScheduleError`."""
        return StepSchedule(r, steps, warmup=self.warmup, draw=self.draw, off=self.off, seed=seed)


@dataclass(frozen=True)
class Distill:
    weight: float = 0.0  # weight of the KL divergence to the unmerged model's logits; 0: no teacher
    temperature: float = 1.0


@dataclass(frozen=True)
class Masked:
    ratio: float = 0.75  # share of patches to hide
    width: int = 64  # of the decoder
    depth: int = 2
    heads: int = 2
    normalise: bool = True  # normalise the target pixels by the mean and deviation of their patch


@dataclass(frozen=True)
class Save:
    every: int = 200  # steps between checkpoints
    keep: int = 2  # number of checkpoints to keep
    evaluate: int = 0  # steps between validations; 0: only at the end
    log: int = 20  # steps between rows of metrics
    tensorboard: bool = False


@dataclass(frozen=True)
class Recipe:
    """One training run as a value. Raises `ConfigError` for invalid values."""

    about: str = ""
    task: str = "classify"  # or mae: predict masked patches
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 128  # samples per optimiser step, over all processes and accumulated parts
    accumulate: int = 1  # parts that the batch of a step is split into
    seed: int = 0
    precision: str = "fp32"
    parallel: str = "ddp"  # or fsdp: parameters sharded over the processes
    clip: float | None = 1.0  # largest norm of the gradients
    ema: float = 0.0  # decay of the running average of the weights, which is exported; 0: none
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    optimizer: Optimizer = field(default_factory=Optimizer)
    merge: Merge = field(default_factory=Merge)
    distill: Distill = field(default_factory=Distill)
    mae: Masked = field(default_factory=Masked)
    save: Save = field(default_factory=Save)

    def __post_init__(self) -> None:
        flat = flatten(self)
        for key, allowed in _CHOICES.items():
            if flat[key] not in allowed:
                raise ConfigError(f"{key} is {flat[key]!r}; allowed: {', '.join(allowed)}.")
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError(
                f"give steps or epochs, one of them; got steps {self.steps} and epochs {self.epochs}; the "
                "other is none."
            )
        # the comparison also rejects NaN
        for key in _POSITIVE:
            if flat[key] is not None and not flat[key] > 0:
                raise ConfigError(f"{key} is {flat[key]}; it must be more than 0.")
        for key in _NOT_NEGATIVE:
            if flat[key] is not None and not flat[key] >= 0:
                raise ConfigError(f"{key} is {flat[key]}; it must not be less than 0.")
        for key in _SHARES:
            if not 0 <= flat[key] <= 1:
                raise ConfigError(f"{key} is {flat[key]}; it is a share, from 0 to 1.")
        if self.ema == 1:
            raise ConfigError("ema is 1: a running average that never moves. Give a decay below 1, as 0.9998.")
        low_high = self.augment.scale
        if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1] <= 1:
            raise ConfigError(f"augment.scale is {list(low_high)}; give two shares, the smaller first, as [0.35, 1.0].")
        if self.batch_size % self.accumulate:
            raise ConfigError(f"a batch of {self.batch_size} cannot be split into {self.accumulate} equal parts.")
        # `patch` checks what depends on the model
        self.merge.schedule(self.merge.amount, 1, self.seed)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for a TOML or JSON file."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain


# allowed values; other settings are checked where they are used
_CHOICES = {
    "task": ("classify", "mae"),
    "precision": ("fp32", "bf16", "fp16"),
    "parallel": ("ddp", "fsdp"),
    "augment.crop": ("shift", "resize", "none"),
    "optimizer.schedule": ("cosine", "tanh", "poly", "none"),
}
_POSITIVE: tuple[str, ...] = ("batch_size", "accumulate", "steps", "epochs", "clip", "data.limit", "data.held")
_POSITIVE += ("save.every", "save.keep", "save.log", "distill.temperature", "mae.width", "mae.heads")
_NOT_NEGATIVE: tuple[str, ...] = ("data.workers", "data.shuffle", "save.evaluate", "distill.weight", "mae.depth")
_NOT_NEGATIVE += ("augment.shift", "augment.mixup", "augment.cutmix")
_NOT_NEGATIVE += ("optimizer.lr", "optimizer.lr_modules", "optimizer.min_lr", "optimizer.weight_decay")
_SHARES: tuple[str, ...] = ("optimizer.warmup", "merge.warmup", "merge.off", "mae.ratio", "ema")
_SHARES += ("augment.flip", "augment.erase", "augment.smoothing")


def list_recipes() -> dict[str, str]:
    """Return the name and description of every built-in recipe."""
    return {path.stem: str(_load(path).get("about", "")) for path in sorted(FOLDER.glob("*.toml"))}


def read_recipe(name: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a built-in recipe by name, or a recipe file (.toml, .json), and apply `key=value` changes.

    Raises `UnknownNameError` (with the nearest name) for a recipe or key that does not exist, `ConfigError` for a file
    that cannot be read or a value that does not fit.
    """
    path = Path(name)
    if path.suffix not in (".toml", ".json"):
        path = FOLDER / f"{name}.toml"
        if not path.is_file():
            raise unknown_name("recipe", str(name), list_recipes())
    content = _load(path)
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ConfigError(f"{change!r} is no change of a recipe: give key=value, as merge.r=13.")
        part = content
        *parents, last = key.strip().split(".")
        for parent in parents:
            part = part.setdefault(parent, {})
            if not isinstance(part, dict):
                raise ConfigError(f"{change!r}: {parent} is {part!r}, no table of settings.")
        part[last] = _value(text.strip())
    return from_dict(content)


def from_dict(content: Mapping[str, Any]) -> Recipe:
    """Build a recipe from plain values; raises the errors of `read_recipe`."""
    recipe: Recipe = _build(Recipe, content, "")
    return recipe


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return every setting under its dotted key."""
    found: dict[str, Any] = {}
    for part in dataclasses.fields(value):
        inner = getattr(value, part.name)
        is_part = dataclasses.is_dataclass(inner)
        found |= flatten(inner, f"{prefix}{part.name}.") if is_part else {prefix + part.name: inner}
    return found


# settings that change the speed and the output of a run, but not its result
_FREE = {"about", "data.workers", "model.compile"}
_FREE |= {"data.held", "save.every", "save.keep", "save.evaluate", "save.log", "save.tensorboard"}


def differences(before: Recipe, now: Recipe) -> list[str]:
    """Describe each changed setting that affects the result of a run: old and new value."""
    # compare the values as a file stores them, where a pair and a list of two are equal
    old, new = (flatten(from_dict(recipe.as_dict())) for recipe in (before, now))
    return [f"{key}: {old[key]!r} before, {new[key]!r} now" for key in old if key not in _FREE and old[key] != new[key]]


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else _toml(text)
    except (OSError, ValueError, RecursionError) as error:  # the errors of both parsers derive from ValueError
        raise ConfigError(f"cannot read the recipe {path}: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"the recipe {path} holds a {type(content).__name__}, not a table of settings.")
    return content


def _toml(text: str) -> dict[str, Any]:
    try:
        import tomllib  # type: ignore[import-not-found,unused-ignore]
    except ImportError:  # before Python 3.11
        try:
            import tomli as tomllib
        except ImportError as error:
            raise UnsupportedError('recipes need tomli on Python 3.10: pip install "tokenmerge[train]"') from error
    content: dict[str, Any] = tomllib.loads(text)
    return content


def _value(text: str) -> Any:
    """Parse the value after `key=` as TOML; a bare word is a string."""
    try:
        return _toml(f"value = {text}")["value"]
    except ValueError:
        return text


def _build(kind: type, content: Mapping[str, Any], prefix: str) -> Any:
    hints = get_type_hints(kind)
    for key, value in content.items():
        if key not in hints:
            raise unknown_name("setting", prefix + key, [prefix + name for name in hints])
        if dataclasses.is_dataclass(hints[key]) and not isinstance(value, Mapping):
            raise ConfigError(
                f"{prefix}{key} is {value!r}; it is a table of settings, as {prefix}{key}.{_first(hints[key])}."
            )
    values = {
        key: _build(hints[key], value, f"{prefix}{key}.")
        if dataclasses.is_dataclass(hints[key])
        else _fitted(value, hints[key], prefix + key)
        for key, value in content.items()
    }
    return kind(**values)


def _first(kind: Any) -> str:
    return dataclasses.fields(kind)[0].name


def _fitted(value: Any, hint: Any, key: str) -> Any:
    """Convert a value to the type of its setting; raise `ConfigError` if it does not fit."""
    # TOML has no null
    if value in ("none", "None") and type(None) in get_args(hint):
        return None
    try:
        return fitted(value, hint)
    except TypeError as error:
        raise ConfigError(f"{key} is {value!r}; it takes {named(hint, value)}.") from error
