"""One reduction as a value: compared, printed, saved and loaded."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenmerge import methods
from tokenmerge.errors import ConfigError, InvalidScheduleError, UnknownNameError, UnsupportedError, unknown_name
from tokenmerge.fields import checked
from tokenmerge.files import write_file
from tokenmerge.methods import NEW, Reduction
from tokenmerge.schedule import R, Schedule, plain

__all__ = ["MergeConfig"]

_VERSION = 1


@dataclass(frozen=True)
class MergeConfig:
    """Everything `patch` needs besides the model. Raises `TokenMergeError` for values `patch` would not take.

    >>> MergeConfig("tome", r=(16, -1.0)).method
    ToMe(metric='k', heads='mean', distance='cosine', combine='weighted', partition='alternating', seed=0)
    """

    method: Reduction
    r: R
    prop_attn: bool | str = "auto"
    track: bool = False
    restore: str | None = None
    multiple_of: int = 1

    def __init__(
        self,
        method: str | Reduction = "tome",
        r: R = 0,
        prop_attn: bool | str = "auto",
        track: bool = False,
        restore: str | None = None,
        multiple_of: int = 1,
    ) -> None:
        if isinstance(method, str):
            method = methods.find(method)()
        if not isinstance(method, Reduction):
            raise ConfigError(
                f"the method is {method!r}; give a name ({', '.join(methods.list_methods())}) or an object."
            )
        values = {"method": method, "r": r, "prop_attn": prop_attn, "track": track, "restore": restore}
        for name, value in {**values, "multiple_of": multiple_of}.items():
            object.__setattr__(self, name, value)
        if prop_attn not in (True, False, "auto"):
            raise ConfigError(f"prop_attn is {prop_attn!r}; allowed: True, False, 'auto'.")
        if restore not in (None, "dense", "merged"):
            raise ConfigError(f"restore is {restore!r}; allowed: 'dense', 'merged', None.")
        object.__setattr__(self, "r", plain(r))
        # any depth will do: only the form is checked here, the length against the model by `patch`
        Schedule.of(self.r, depth=len(self.r) if isinstance(self.r, list) else 1, multiple_of=multiple_of)
        try:
            fields = checked(self)
        except TypeError as error:
            name, value, kind = error.args
            raise ConfigError(f"{name} is {value!r}; it takes {kind}.") from error
        for name, value in fields.items():
            if name != "r":
                object.__setattr__(self, name, value)

    def save(self, path: str | Path, learned: Mapping[str, Tensor] | None = None) -> None:
        """Write JSON, and the tensors that were learned as .safetensors of the same name beside it.

        Raises `ConfigError` for what JSON cannot hold (a callable `r`) and for paths not writable. Warns where a
        learned method would be fresh when loaded: `handle.save` writes what it has learned, too.
        """
        path = Path(path)
        if learned:
            return self._save_learned(path, learned)
        if callable(self.r):
            raise ConfigError(
                f"r is the callable {self.r!r}, which JSON cannot hold; give its list of amounts instead."
            )
        if getattr(self.method, "weights", None) == NEW:
            warnings.warn(
                f"{path} says that {self.method.name} is new: loaded, it has fresh modules that know nothing. To keep "
                "what a patched model has learned, write it with handle.save(path).",
                stacklevel=2,
            )
        r = {"r": self.r[0], "inflection": self.r[1]} if isinstance(self.r, tuple) else self.r
        method = {"name": self.method.name, **dataclasses.asdict(self.method)}  # type: ignore[call-overload]
        content = {"version": _VERSION, "method": method, "r": r, "prop_attn": self.prop_attn, "track": self.track}
        if self.restore:
            content["restore"] = self.restore
        if self.multiple_of > 1:
            content["multiple_of"] = self.multiple_of
        _write(path, json.dumps(content, indent=2) + "\n")

    def _save_learned(self, path: Path, learned: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save

        if path.suffix == ".safetensors":
            raise ConfigError(
                f"{path} is where the weights would go; give the configuration another name, as merge.json."
            )
        # "a.v1" and "a.v2" are two configurations, with weights of their own
        weights = path.with_suffix(".safetensors") if path.suffix == ".json" else Path(f"{path}.safetensors")
        _write(weights, save({key: value.detach().cpu().contiguous().clone() for key, value in learned.items()}))
        named = dataclasses.replace(self.method, weights=weights.name)  # type: ignore[type-var]
        dataclasses.replace(self, method=named).save(path)

    @classmethod
    def load(cls, path: str | Path) -> MergeConfig:
        """Read what `save` wrote; raises `ConfigError` that names the file and what is wrong with it."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read the configuration {path}: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is no JSON: {error}.") from error
        try:
            return cls(**_checked(content, path))
        except UnknownNameError:
            raise
        except (ConfigError, InvalidScheduleError, UnsupportedError) as error:
            raise error if str(path) in str(error) else ConfigError(f"{path}: {error}") from error


def _write(path: Path, content: str | bytes) -> None:
    try:
        write_file(path, content)
    except OSError as error:
        raise ConfigError(f"cannot write the configuration to {path}: {error.strerror}.") from error


def _checked(content: Any, path: str | Path) -> dict[str, Any]:
    known = {"version", "method", "r", "prop_attn", "track", "restore", "multiple_of"}
    if not isinstance(content, dict) or not {"version", "method", "r"} <= content.keys():
        raise ConfigError(f"{path} is no tokenmerge configuration: it must hold version, method and r.")
    if type(content["version"]) is not int or content["version"] != _VERSION:
        raise ConfigError(f"{path} has version {content['version']!r}; this tokenmerge reads version {_VERSION}.")
    for name in content.keys() - known:
        raise unknown_name(f"configuration key in {path}:", name, sorted(known))
    values = {name: content[name] for name in content if name != "version"}
    options = values["method"]
    if not isinstance(options, dict) or not isinstance(options.get("name"), str):
        raise ConfigError(f"{path}: method must be an object with a name, a text; it is {options!r}.")
    method = methods.find(options["name"])
    fields = [field.name for field in dataclasses.fields(method)]  # type: ignore[arg-type]
    for name in options.keys() - {"name", *fields}:
        raise unknown_name(f"option of {options['name']} in {path}:", name, fields)
    given = {name: value for name, value in options.items() if name != "name"}
    if isinstance(given.get("weights"), str) and given["weights"] != NEW:
        given["weights"] = str(Path(path).parent / given["weights"])  # written as a name beside the configuration
    values["method"] = method(**given)
    if isinstance(values["r"], dict):
        if values["r"].keys() != {"r", "inflection"}:
            raise ConfigError(f"{path}: r is {values['r']!r}; a pair is written as {{'r': ..., 'inflection': ...}}.")
        values["r"] = (values["r"]["r"], values["r"]["inflection"])
    return values
