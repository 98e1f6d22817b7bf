"""The configuration of one reduction as a value that can be compared, printed, saved and loaded."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from tokenmerge import methods
from tokenmerge.config import file
from tokenmerge.config.fingerprint import Fingerprint
from tokenmerge.errors import ConfigError
from tokenmerge.fields import checked
from tokenmerge.methods import NEW, Reduction
from tokenmerge.schedule import R, Schedule

Restore = Literal["dense", "merged"]

if TYPE_CHECKING:
    from typing_extensions import TypedDict

    class Options(TypedDict, total=False):
        """The options of `patch`, see there; `None` is the default."""

        r: R | None
        prop_attn: bool | Literal["auto"] | None
        track: bool | Literal["pairs"] | None
        restore: Restore | None
        multiple_of: int | None
        blocks: str | None
        attn: str | None
        norm: str | None
        mlp: str | None
        prefix: int | None


__all__ = ["Fingerprint", "MergeConfig", "Restore", "read_method"]

# written whatever they hold
_ALWAYS = ("method", "r", "prop_attn", "track")
# what is known of the configuration, beside its settings
_KNOWN = ("fingerprint", "measured")


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

    `fingerprint` says which model it was made for, and `patch` checks it; `measured` what was measured with it, and
    where: figures by name. `tokenmerge doctor --config` reads "speed-up", "batch size", "dtype", "compiled" and
    "environment" (of `measure.timing.environment`). Two configurations with the same settings are equal.

    >>> MergeConfig("tome", r=(16, -1.0)).method
    ToMe(metric='k', heads='mean', distance='cosine', combine='weighted', partition='alternating', seed=0)
    >>> print(MergeConfig(methods.ToMe(metric="x"), r=8, restore="dense"))
    tome(metric='x'), r = 8, restore = 'dense'
    """

    method: _MethodField = _MethodField()
    r: R = 0
    prop_attn: bool | Literal["auto"] = "auto"
    track: bool | Literal["pairs"] = False
    restore: Restore | None = None
    multiple_of: int = 1
    # a model that no adapter describes, by names: the path to its blocks, and the children of a block
    blocks: str | None = None
    attn: str | None = None
    norm: str | None = None
    mlp: str | None = None
    prefix: int | None = None
    fingerprint: Fingerprint | None = field(default=None, compare=False, repr=False, kw_only=True)
    measured: dict[str, Any] | None = field(default=None, compare=False, repr=False, kw_only=True)

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
        if self.fingerprint is not None and not isinstance(self.fingerprint, Fingerprint):
            raise ConfigError(
                f"fingerprint is {self.fingerprint!r}; it takes a Fingerprint, as of Fingerprint.of(model)."
            )
        if self.measured is not None:
            object.__setattr__(self, "measured", file.as_plain(self.measured, "measured"))

    def __str__(self) -> str:
        """In one line for people: what differs from the defaults."""
        plain: Any = MergeConfig()
        own: Any = dataclasses.fields(self.method) if dataclasses.is_dataclass(self.method) else ()
        method = {one.name: value for one in own if (value := getattr(self.method, one.name)) != one.default}
        name = f"{self.method.name}({', '.join(f'{key}={value!r}' for key, value in method.items())})"
        others = [one.name for one in dataclasses.fields(self) if one.compare and one.name not in ("method", "r")]
        changed = {key: value for key in others if (value := getattr(self, key)) != getattr(plain, key)}
        return ", ".join([name.removesuffix("()"), f"r = {self.r}", *(f"{k} = {v!r}" for k, v in changed.items())])

    def changed(self, **settings: Any) -> MergeConfig:
        """Return the configuration with other settings; what was measured is left out where they are others."""
        other = dataclasses.replace(self, **settings)
        return other if other == self else dataclasses.replace(other, measured=None)

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
        given = {name: value for name, value in vars(self).items() if value != getattr(plain, name)}
        known = {name: given.pop(name) for name in _KNOWN if name in given}
        file.write_settings(path, {**{name: getattr(self, name) for name in _ALWAYS}, **given, **known})

    def _save_learned(self, path: Path, learned: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save

        if path.suffix == ".safetensors":
            raise ConfigError(
                f"{path} is where the weights would go; give the configuration another name, as merge.json."
            )
        # "a.v1" and "a.v2" are two configurations, with weights of their own
        weights = path.with_suffix(".safetensors") if path.suffix == ".json" else Path(f"{path}.safetensors")
        file.write(weights, save({key: value.detach().cpu().contiguous().clone() for key, value in learned.items()}))
        named = dataclasses.replace(self.method, weights=weights.name)  # type: ignore[type-var]
        dataclasses.replace(self, method=named).save(path)

    @classmethod
    def load(cls, path: str | Path) -> MergeConfig:
        """Read what `save` wrote, of this release or an older one.

        Raises `ConfigError` that names the file, the line and the key, and `UnknownNameError` with the nearest name.
        """
        loaded: MergeConfig = file.read(path, [part.name for part in dataclasses.fields(cls)], cls)
        return loaded


def read_method(method: str | Path | Reduction | MergeConfig) -> Reduction | MergeConfig:
    """Return what `patch` takes as an object: a name, a name with options, the path of a saved configuration (.json).

    Raises `UnknownNameError` for a name or an option that does not exist, with the nearest, and `ConfigError`.

    >>> read_method("tome(metric='x')")
    ToMe(metric='x', heads='mean', distance='cosine', combine='weighted', partition='alternating', seed=0)
    """
    if isinstance(method, Path) or (isinstance(method, str) and method.endswith(".json")):
        return MergeConfig.load(method)
    return methods.parse(method) if isinstance(method, str) else method
