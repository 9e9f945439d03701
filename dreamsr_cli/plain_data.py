"""Plain data (JSON, TOML) into frozen dataclasses and back; an unknown key or a wrong type is an error naming it."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from dreamsr_cli.errors import ConfigError

T = TypeVar("T")


def from_dict(cls: type[T], data: dict[str, Any], where: str) -> T:
    """Build the frozen dataclass `cls` from plain data, recursively.

    `where` names the file for messages. Unknown keys, missing keys and wrong types raise `ConfigError` naming the key
    and the nearest known one.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a table, found {type(data).__name__}", "check the file against the docs")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            raise ConfigError(f"{where}: unknown key {key!r}", hint)
    values = {}
    for name, spec in known.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], f"{where}: {name}")
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: key {name!r} is missing", f"add {name!r}")
    return cls(**values)


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        if isinstance(value, str) and value in words_of(kind):
            return value
        (kind,) = [a for a in args if a is not type(None) and typing.get_origin(a) is not Literal]
        return _convert(kind, value, where)
    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], v, where) for v in value)
        if len(args) == len(value):
            return tuple(_convert(a, v, where) for a, v in zip(args, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {k: _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    name = getattr(kind, "__name__", str(kind))
    raise ConfigError(f"{where}: expected {name}, found {value!r}", "correct the value")


def words_of(kind: Any) -> tuple[str, ...]:
    """The words that a setting of this type may be beside its values: ("auto",) of `int | Literal["auto"] | None`."""
    return tuple(
        word for part in typing.get_args(kind) if typing.get_origin(part) is Literal for word in typing.get_args(part)
    )


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain JSON-able data; tuples become lists, and None values are left out where the class
    says `LEAVE_OUT_NONE`."""

    def plain(value: Any) -> Any:
        if getattr(value, "LEAVE_OUT_NONE", False):
            return {k: v for k, v in vars(value).items() if v is not None}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(config)


def load_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file; `ConfigError` names the line of a syntax error."""
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}", "check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}", "correct that line") from error
