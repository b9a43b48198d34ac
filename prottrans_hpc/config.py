"""Find a recipe or machine profile by name or path, read it strictly, and apply ``--set section.key=value``.

The order is: the file, then ``--set``. Nothing else is consulted: no environment variables, no defaults file.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from .errors import ConfigError

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""For every noun that a human writes in TOML: no unknown key, no silent conversion, no nan or inf."""

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

T = typing.TypeVar("T")

_PACKAGE = Path(__file__).resolve().parent
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LEAST_BEGINNING, _MOST_MEANT = 3, 4
"""Letters that tell which names somebody has begun to type; so many of those are told, not more."""


def check_name(name: str, *, what: str) -> str:
    """A name that is safe in paths, shells and job names: letters, digits, dot, underscore, hyphen; 1 to 64."""
    if not _NAME.fullmatch(name) or name.startswith((".", "-")):
        raise ConfigError(f"{what} {name!r} is not a usable name: use 1 to 64 letters, digits, '.', '_' or '-', not starting with '.' or '-'")
    return name


def folder_of(kind: str) -> Path:
    """The shipped folder of a kind ("jobs" or "hpc"): inside the installed package, or beside it in a checkout."""
    installed = _PACKAGE / kind
    return installed if installed.is_dir() else _PACKAGE.parent / kind


def shipped_names(kind: str) -> list[str]:
    """The names of the files that ship for a kind, sorted."""
    return sorted(path.stem for path in folder_of(kind).glob("*.toml"))


def find_file(kind: str, name_or_path: str) -> Path:
    """The TOML file that a value names: a path if it ends in ``.toml``, else a shipped name. Raises ConfigError."""
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path)
        if not path.is_file():
            raise ConfigError(f"{name_or_path} is not a file")
        return path
    path = folder_of(kind) / f"{check_name(name_or_path, what='the value')}.toml"
    if not path.is_file():
        raise ConfigError(f"nothing in {kind}/ is called {name_or_path!r}{meant(name_or_path, shipped_names(kind))}; a path must end in .toml")
    return path


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file; a syntax error is a ConfigError with file, line and column."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def with_settings(values: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """`values` with each ``section.key=value`` applied; a value is TOML, else a bare string; a number indexes a list."""
    result: dict[str, Any] = json.loads(json.dumps(values, default=str))
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {setting!r} is not of the form section.key=value")
        _assign(result, key.strip().split("."), _parse_value(text.strip()), setting)
    return result


def _parse_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text  # a line break in the text would start another key


def _assign(target: Any, keys: list[str], value: Any, setting: str) -> None:
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(target, list):
            if not key.isdigit() or int(key) >= len(target):
                where = ".".join(keys[:depth])
                raise ConfigError(f"--set {setting!r}: {where} is a list of {len(target)}; give an index from 0 to {len(target) - 1}, not {key!r}")
            index: Any = int(key)
        elif isinstance(target, dict):
            index = key
        else:
            raise ConfigError(f"--set {setting!r}: {'.'.join(keys[:depth])} is a value, not a section")
        if last:
            target[index] = value
        else:
            target = target.setdefault(index, {}) if isinstance(target, dict) else target[index]


def parse(noun: type[T], values: Mapping[str, Any], *, source: str) -> T:
    """Build a frozen dataclass from plain values; every fault is reported at once, with file, key and nearest key.

    Validation goes through JSON because in pydantic's strict mode only there an array may become a tuple.
    """
    try:
        return TypeAdapter(noun).validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        faults = [_describe(noun, fault) for fault in error.errors(include_url=False, include_context=True)]
        raise ConfigError(f"{source}: " + "; ".join(faults)) from error


def to_json(noun: Any) -> Any:
    """The plain values of a frozen dataclass, as they go into run.json."""
    return TypeAdapter(type(noun)).dump_python(noun, mode="json")


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Lines ``key: old -> new`` for every leaf that differs between two plain values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(old) + [key for key in new if key not in old]
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{prefix}.{key}".lstrip("."))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, (a, b) in enumerate(zip(old, new, strict=True)) for line in differences(a, b, f"{prefix}.{i}".lstrip("."))]
    return [] if old == new else [f"{prefix}: {old!r} -> {new!r}"]


def _describe(noun: type[Any], fault: ErrorDetails) -> str:
    location = [str(part) for part in fault["loc"]]
    where = ".".join(_without_tags(noun, location)) or "the file"
    if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {where}{_nearest(location[-1], _keys_at(noun, location[:-1]))}"
    if fault["type"] in ("missing", "missing_argument"):
        return f"missing key {where}"
    if fault["type"] == "union_tag_not_found":
        return f"missing key {where}.{_discriminator(fault)}"
    if fault["type"] == "union_tag_invalid":
        tags = fault["ctx"]["expected_tags"].replace("'", "").split(", ")
        return f"{where}.{_discriminator(fault)} = {fault['ctx']['tag']!r}: unknown{_nearest(fault['ctx']['tag'], tags)}; known are {', '.join(tags)}"
    if fault["type"] == "value_error":
        return fault["msg"].removeprefix("Value error, ") if where == "the file" else f"{where}: {fault['msg'].removeprefix('Value error, ')}"
    return f"{where} = {fault['input']!r}: {fault['msg'].lower()}"


def _discriminator(fault: ErrorDetails) -> str:
    return str(fault["ctx"]["discriminator"]).strip("'")


def _without_tags(noun: Any, location: list[str]) -> list[str]:
    """The keys of a fault's location as they stand in the file: pydantic adds which alternative of a union it is in."""
    keys, is_tag = [], False
    for part in location:
        if is_tag:
            is_tag = False
            continue
        keys.append(part)
        noun = _member(noun, part)
        is_tag = len(_alternatives(noun)) > 1 and all(dataclasses.is_dataclass(kind) for kind in _alternatives(noun))
    return keys


def meant(name: str, known: list[str]) -> str:
    """A hint behind a name that nothing has: the names that begin with it, else the one most like it, else all."""
    begun = [one for one in known if one.startswith(name)] if len(name) >= _LEAST_BEGINNING else []
    if not begun:
        return _nearest(name, known)
    return f" (did you mean {' or '.join(map(repr, begun))}?)" if len(begun) <= _MOST_MEANT else f" (with it begin {', '.join(begun)})"


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (known: {', '.join(known)})" if known else ""


def _keys_at(noun: Any, location: list[str]) -> list[str]:
    """The field names of the dataclass that a fault's location points into."""
    for part in location:
        noun = _member(noun, part)
    return [field.name for kind in _alternatives(noun) if dataclasses.is_dataclass(kind) for field in dataclasses.fields(kind)]


def _member(noun: Any, part: str) -> Any:
    for kind in _alternatives(noun):
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            hints = typing.get_type_hints(kind)
            if part in hints:
                return hints[part]
            if part in typing.get_args(hints.get("name")):
                return kind  # the tag of a union, an objective's name
        elif typing.get_origin(kind) in (tuple, list, dict):
            return typing.get_args(kind)[-1 if typing.get_origin(kind) is dict else 0]
    return noun


def _alternatives(noun: Any) -> list[Any]:
    if typing.get_origin(noun) is typing.Annotated:
        noun = typing.get_args(noun)[0]
    if typing.get_origin(noun) in (typing.Union, types.UnionType):
        return [kind for kind in typing.get_args(noun) if kind is not type(None)]
    return [noun]
