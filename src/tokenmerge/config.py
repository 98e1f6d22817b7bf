"""The configuration of one reduction as a value that can be compared, printed, saved and loaded."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from tokenmerge import methods
from tokenmerge.errors import ConfigError, InvalidScheduleError, UnknownNameError, UnsupportedError, unknown_name
from tokenmerge.fields import checked
from tokenmerge.files import write_file
from tokenmerge.methods import NEW, Reduction
from tokenmerge.schedule import R, Schedule

Restore = Literal["dense", "merged"]

if TYPE_CHECKING:
    from typing_extensions import TypedDict

    class Options(TypedDict, total=False):
        """The options of `patch`, see there; `None` is the default."""

        r: R | None
        prop_attn: bool | Literal["auto"] | None
        track: bool | None
        restore: Restore | None
        multiple_of: int | None
        blocks: str | None
        attn: str | None
        norm: str | None
        mlp: str | None
        prefix: int | None


__all__ = ["MergeConfig", "Restore", "read_method"]

_VERSION = 1


class _MethodField:
    """The field `method`: set to a name, a name with options or an object, it holds the object."""

    def __get__(self, config: Any, owner: Any = None) -> Reduction:
        # dataclasses asks the class for the default
        return methods.ToMe() if config is None else config.__dict__["method"]

    def __set__(self, config: Any, value: str | Reduction) -> None:
        if isinstance(value, str):
            value = methods.parse(value)
        if not isinstance(value, Reduction):
            raise ConfigError(
                f"the method is {value!r}; give a name ({', '.join(methods.list_methods())}) or an object."
            )
        config.__dict__["method"] = value


@dataclass(frozen=True)
class MergeConfig:
    """Everything `patch` needs besides the model. Raises `TokenMergeError` for values `patch` would not take.

    >>> MergeConfig("tome", r=(16, -1.0)).method
    ToMe(metric='k', heads='mean', distance='cosine', combine='weighted', partition='alternating', seed=0)
    """

    method: _MethodField = _MethodField()
    r: R = 0
    prop_attn: bool | Literal["auto"] = "auto"
    track: bool = False
    restore: Restore | None = None
    multiple_of: int = 1
    # a model that no adapter describes, by names: the path to its blocks, and the children of a block
    blocks: str | None = None
    attn: str | None = None
    norm: str | None = None
    mlp: str | None = None
    prefix: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.r, Schedule):
            if self.multiple_of not in (1, self.r.multiple_of):
                raise ConfigError(
                    f"r is a Schedule with multiple_of={self.r.multiple_of}, and multiple_of is {self.multiple_of}."
                )
            object.__setattr__(self, "multiple_of", self.r.multiple_of)
        object.__setattr__(self, "r", Schedule.check(self.r))
        Schedule.of(0, depth=1, multiple_of=self.multiple_of)
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
        plain = MergeConfig()
        content = {"version": _VERSION, **{name: getattr(self, name) for name in _ALWAYS}}
        content |= {name: value for name, value in vars(self).items() if value != getattr(plain, name)}
        content["method"] = {"name": self.method.name, **dataclasses.asdict(self.method)}  # type: ignore[call-overload]
        if isinstance(self.r, tuple):
            content["r"] = {"r": self.r[0], "inflection": self.r[1]}
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


# written whatever they hold
_ALWAYS = ("method", "r", "prop_attn", "track")


def read_method(method: str | Path | Reduction | MergeConfig) -> Reduction | MergeConfig:
    """Return what `patch` takes as an object: a name, a name with options, the path of a saved configuration (.json).

    Raises `UnknownNameError` for a name or an option that does not exist, with the nearest, and `ConfigError`.

    >>> read_method("tome(metric='x')")
    ToMe(metric='x', heads='mean', distance='cosine', combine='weighted', partition='alternating', seed=0)
    """
    if isinstance(method, Path) or (isinstance(method, str) and method.endswith(".json")):
        return MergeConfig.load(method)
    return methods.parse(method) if isinstance(method, str) else method


def _write(path: Path, content: str | bytes) -> None:
    try:
        write_file(path, content)
    except OSError as error:
        raise ConfigError(f"cannot write the configuration to {path}: {error.strerror}.") from error


def _checked(content: Any, path: str | Path) -> dict[str, Any]:
    known = {"version", *(field.name for field in dataclasses.fields(MergeConfig))}
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
