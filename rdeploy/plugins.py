"""Plugins are modules, found by file name: a package and a name go in, the module comes out."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from rdeploy.errors import ConfigError


def names(package: str) -> tuple[str, ...]:
    """Return the plugin names of a package, sorted: its public modules. Imports none of them."""
    paths = importlib.import_module(package).__path__
    return tuple(sorted(m.name for m in pkgutil.iter_modules(paths) if not m.name.startswith("_")))


def find(package: str, name: str) -> types.ModuleType:
    """Import the plugin `name` of `package`.

    Raises:
        ConfigError: there is no such plugin; the message lists what there is and the closest name.
    """
    known = names(package)
    if name not in known:
        kind = package.rsplit(".", 1)[-1].removesuffix("s")
        raise ConfigError(f"unknown {kind} {name!r}{did_you_mean(name, known)}; there are: {', '.join(known)}")
    return importlib.import_module(f"{package}.{name}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `, did you mean 'x'?` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def make_options(options_type: Any, values: Mapping[str, Any], *, where: str) -> Any:
    """Build a frozen options dataclass from a mapping, strictly: unknown keys and wrong types are errors.

    Raises:
        ConfigError: a key is unknown (with the closest name) or a value is not of the field's type.
    """
    fields = {f.name for f in dataclasses.fields(options_type)}
    hints = typing.get_type_hints(options_type)
    for key, value in values.items():
        if key not in fields:
            allowed = ", ".join(sorted(fields)) or "none"
            raise ConfigError(f"{where}: unknown key {key!r}{did_you_mean(key, fields)} (allowed: {allowed})")
        if not _fits(value, hints[key]):
            raise ConfigError(f"{where}: {key} must be {_describe(hints[key])}, not {value!r}")
    try:
        return options_type(**values)
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin is tuple:
        inner = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(_fits(item, inner) for item in value)
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _describe(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)
