"""The JSON of a saved configuration: written whole, and read with errors that name the file, the line and the key."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from tokenmerge import methods
from tokenmerge._version import __version__
from tokenmerge.config.fingerprint import Fingerprint
from tokenmerge.errors import ConfigError, TokenMergeError, UnknownNameError, unknown_name
from tokenmerge.files import write_file
from tokenmerge.methods import NEW

__all__ = ["as_plain", "read", "write", "write_settings"]

_VERSION = 2  # 1: without a fingerprint and what was measured
_NEEDED = ("version", "method", "r")


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; raises `ConfigError`."""
    try:
        write_file(path, content)
    except OSError as error:
        raise ConfigError(f"cannot write the configuration to {path}: {error.strerror}.") from error


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write fields of a configuration as JSON; raises `ConfigError`."""
    content = {"version": _VERSION, "tokenmerge": __version__, **settings}
    method = settings["method"]
    content["method"] = {"name": method.name, **dataclasses.asdict(method)}
    if isinstance(settings["r"], tuple):
        content["r"] = {"r": settings["r"][0], "inflection": settings["r"][1]}
    if "fingerprint" in settings:
        found = dataclasses.asdict(settings["fingerprint"])
        content["fingerprint"] = {name: value for name, value in found.items() if value is not None}
    write(path, json.dumps(content, indent=2) + "\n")


def read(path: str | Path, known: Collection[str], make: Any) -> Any:
    """Return what `make` makes of the fields in a file; raises `ConfigError` that names the file, the line and the key.

    A name that does not exist raises `UnknownNameError`, with the nearest.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}.") from error
    try:
        content = json.loads(text, object_pairs_hook=_without_twins)
        _check_version(content)
        return make(**_fields(content, known, Path(path).parent))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is no JSON {_cut(text, error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is no JSON: {error}.") from error
    except _NoConfiguration as error:
        raise ConfigError(f"{path} {error}") from error
    except TokenMergeError as error:
        kind = UnknownNameError if isinstance(error, UnknownNameError) else ConfigError
        raise kind(f"{path}{_line_of(str(error), text)}: {error}") from error


class _NoConfiguration(ConfigError):
    """A file that is another thing, or of another version: no line of it is to blame."""


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object with a key twice, of which JSON would take the last without a word."""
    names = [name for name, _ in pairs]
    twins = [name for name in names if names.count(name) > 1]
    if twins:
        raise ConfigError(f"{twins[0]} is there twice in one object; keep one.")
    return dict(pairs)


def _check_version(content: Any) -> None:
    if not isinstance(content, dict) or not {*_NEEDED} <= content.keys():
        raise _NoConfiguration("is no tokenmerge configuration: it must hold version, method and r.")
    version = content["version"]
    if type(version) is int and 1 <= version <= _VERSION:
        return
    newer = type(version) is int and version > _VERSION
    raise _NoConfiguration(
        f"has version {version!r}; this tokenmerge ({__version__}) reads versions 1 to {_VERSION}."
        + (f" {content.get('tokenmerge', 'A later one')} wrote it: upgrade tokenmerge." if newer else "")
    )


def _fields(content: dict[str, Any], known: Collection[str], folder: Path) -> dict[str, Any]:
    values = {name: value for name, value in content.items() if name not in ("version", "tokenmerge")}
    for name in values.keys() - {*known}:
        raise unknown_name("configuration key", name, sorted({*known, "version", "tokenmerge"}))
    options = values["method"]
    if not isinstance(options, dict) or not isinstance(options.get("name"), str):
        raise ConfigError(f"method must be an object with a name, a text; it is {options!r}.")
    method = methods.find(options["name"])
    fields = [field.name for field in dataclasses.fields(method)]  # type: ignore[arg-type]
    for name in options.keys() - {"name", *fields}:
        raise unknown_name(f"option of {options['name']}", name, fields)
    given = {name: value for name, value in options.items() if name != "name"}
    if isinstance(given.get("weights"), str) and given["weights"] != NEW:
        given["weights"] = str(folder / given["weights"])  # written as a name beside the configuration
    values["method"] = method(**given)
    if isinstance(values["r"], dict):
        if values["r"].keys() != {"r", "inflection"}:
            raise ConfigError(f"r is {values['r']!r}; a pair is written as {{'r': ..., 'inflection': ...}}.")
        values["r"] = (values["r"]["r"], values["r"]["inflection"])
    if values.get("fingerprint") is not None:
        values["fingerprint"] = Fingerprint.read(values["fingerprint"])
    return values


def _cut(text: str, error: json.JSONDecodeError) -> str:
    """Say where a text stops being JSON: the line, and the last key before it."""
    keys = re.findall(r'"(\w+)"\s*:', text[: error.pos])
    after = f", after the key {keys[-1]!r}" if keys else ""
    is_cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
    return f"at line {error.lineno}{after}: {error.msg}{'; the file ends there, it was cut off' if is_cut else ''}."


def _line_of(message: str, text: str) -> str:
    """Return the line of the key that a message speaks of: the first name in quotes, else word, that the text has."""
    for word in re.findall(r"'([^']+)'", message) + re.findall(r"\w+", message):
        places = [found.start() for found in re.finditer(rf'"{re.escape(word)}"\s*:', text)]
        if places:
            return f", line {text.count(chr(10), 0, places[-1]) + 1}"
    return ""


def as_plain(value: Any, name: str) -> Any:
    """Return a measured value as JSON holds it; raises `ConfigError` with the name of one that it cannot hold."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        return {_text(key, name): as_plain(part, f"{name}[{key!r}]") for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(part, f"{name}[{i}]") for i, part in enumerate(value)]
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) and abs(float(value)) < float("inf"):
        return float(value)
    raise ConfigError(f"{name} is {value!r}; it takes numbers (NaN and infinity are none), texts, lists and objects.")


def _text(key: Any, name: str) -> str:
    if not isinstance(key, str):
        raise ConfigError(f"{name} has the key {key!r}; keys are texts.")
    return key
