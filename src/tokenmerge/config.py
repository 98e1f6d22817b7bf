"""One reduction as a value: compared, printed, saved and loaded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenmerge import methods
from tokenmerge.errors import ConfigError, unknown_name
from tokenmerge.methods import NEW, Reduction
from tokenmerge.schedule import R, Schedule

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
        if prop_attn not in (True, False, "auto"):
            raise ConfigError(f"prop_attn is {prop_attn!r}; allowed: True, False, 'auto'.")
        if restore not in (None, "dense", "merged"):
            raise ConfigError(f"restore is {restore!r}; allowed: 'dense', 'merged', None.")
        # any depth will do: only the form is checked here, the length against the model by `patch`
        Schedule.of(r, depth=len(r) if isinstance(r, list) else 1, multiple_of=multiple_of)
        values = {"method": method, "r": r, "prop_attn": prop_attn, "track": bool(track), "restore": restore}
        values["multiple_of"] = multiple_of
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def save(self, path: str | Path, learned: Mapping[str, Tensor] | None = None) -> None:
        """Write JSON, and the tensors that were learned as .safetensors of the same name beside it.

        Raises `ConfigError` for what JSON cannot hold (a callable `r`) and for paths not writable.
        """
        if learned:
            from safetensors.torch import save_file

            weights = Path(path).with_suffix(".safetensors")
            save_file({key: value.detach().contiguous().clone() for key, value in learned.items()}, weights)
            named = dataclasses.replace(self.method, weights=weights.name)  # type: ignore[type-var]
            return dataclasses.replace(self, method=named).save(path)
        if callable(self.r):
            raise ConfigError(
                f"r is the callable {self.r!r}, which JSON cannot hold; give its list of amounts instead."
            )
        r = {"r": self.r[0], "inflection": self.r[1]} if isinstance(self.r, tuple) else self.r
        method = {"name": self.method.name, **dataclasses.asdict(self.method)}  # type: ignore[call-overload]
        content = {"version": _VERSION, "method": method, "r": r, "prop_attn": self.prop_attn, "track": self.track}
        if self.restore:
            content["restore"] = self.restore
        if self.multiple_of > 1:
            content["multiple_of"] = self.multiple_of
        try:
            Path(path).write_text(json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"cannot write the configuration to {path}: {error.strerror}.") from error

    @classmethod
    def load(cls, path: str | Path) -> MergeConfig:
        """Read what `save` wrote; raises `ConfigError` that names the file and what is wrong with it."""
        try:
            content = json.loads(Path(path).read_text())
        except OSError as error:
            raise ConfigError(f"cannot read the configuration {path}: {error.strerror}.") from error
        except ValueError as error:
            raise ConfigError(f"{path} is no JSON: {error}.") from error
        return cls(**_checked(content, path))


def _checked(content: Any, path: str | Path) -> dict[str, Any]:
    known = {"version", "method", "r", "prop_attn", "track", "restore", "multiple_of"}
    if not isinstance(content, dict) or not {"version", "method", "r"} <= content.keys():
        raise ConfigError(f"{path} is no tokenmerge configuration: it must hold version, method and r.")
    if content["version"] != _VERSION:
        raise ConfigError(f"{path} has version {content['version']!r}; this tokenmerge reads version {_VERSION}.")
    for name in content.keys() - known:
        raise unknown_name(f"configuration key in {path}:", name, sorted(known))
    values = {name: content[name] for name in content if name != "version"}
    options = values["method"]
    if not isinstance(options, dict) or "name" not in options:
        raise ConfigError(f"{path}: method must be an object with a name, it is {options!r}.")
    method = methods.find(options["name"])
    fields = [field.name for field in dataclasses.fields(method)]  # type: ignore[arg-type]
    for name in options.keys() - {"name", *fields}:
        raise unknown_name(f"option of {options['name']} in {path}:", name, fields)
    given = {name: value for name, value in options.items() if name != "name"}
    if given.get("weights") not in (None, NEW):
        given["weights"] = str(Path(path).parent / given["weights"])  # written as a name beside the configuration
    # lists were tuples: methods are hashable
    values["method"] = method(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    )
    if isinstance(values["r"], dict):
        if values["r"].keys() != {"r", "inflection"}:
            raise ConfigError(f"{path}: r is {values['r']!r}; a pair is written as {{'r': ..., 'inflection': ...}}.")
        values["r"] = (values["r"]["r"], values["r"]["inflection"])
    return values
