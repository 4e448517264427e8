"""Frozen dataclasses to JSON and back, strictly: an unknown key is an error, a tuple stays a tuple."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from rdeploy.errors import ConfigError

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """Turn dataclasses, tuples, dicts and paths into plain JSON values; NaN and infinity become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, frozenset, set)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        return to_json(value.item())
    return value


def from_json(cls: type[T], data: Any, *, where: str = "") -> T:
    """Rebuild a dataclass from what `to_json` made of it.

    Raises:
        ConfigError: a key is unknown or a required one is missing; `where` says in which file.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or cls.__name__}: expected a mapping, found {type(data).__name__}")
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise ConfigError(f"{where or cls.__name__}: unknown key {unknown[0]!r}")
    try:
        return cls(**{key: _restore(hints[key], item, where) for key, item in data.items()})
    except TypeError as error:
        raise ConfigError(f"{where or cls.__name__}: {error}") from error


def _restore(hint: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if data is None:
            return None
        return _restore(next(a for a in arguments if a is not type(None)), data, where)
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast(type, hint), data, where=where)
    if origin is tuple and isinstance(data, (list, tuple)):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_restore(arguments[0], item, where) for item in data)
        return tuple(_restore(a, item, where) for a, item in zip(arguments, data, strict=True))
    if hint is Any and isinstance(data, list):
        return tuple(_restore(Any, item, where) for item in data)
    return float(data) if hint is float and isinstance(data, int) else data


def dumps(value: Any) -> str:
    """Return readable JSON with sorted-by-definition keys and a final newline."""
    return json.dumps(to_json(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def loads(text: str) -> Any:
    """Return the JSON values of a text that `dumps` made."""
    return json.loads(text)


def digest(value: Any) -> str:
    """Return the sha256 of a value's canonical JSON: the key of a content-addressed entry."""
    text = json.dumps(to_json(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the sha256 of a file's content, read in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest_310(file)


def _digest_310(file: Any) -> str:
    state = hashlib.sha256()
    while block := file.read(1 << 20):
        state.update(block)
    return state.hexdigest()
