"""Reduce the resolution after a named module (`--at after:layer1`): the image keeps its size, everything behind runs smaller."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from rdeploy.errors import ConfigError, Unsupported
from rdeploy.plugins import did_you_mean
from rdeploy.resize import _insert
from rdeploy.types import ModelSpec, Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`module` is the dotted name of a submodule, as in `named_modules()`."""

    module: str


def unsupported(module: nn.Module, spec: ModelSpec, resolution: Size, options: Options) -> str | None:
    """Return in plain words why the map behind the named module cannot be reduced, or None."""
    try:
        apply(module, spec, resolution, options)
    except Unsupported as error:
        return str(error)
    return None


def snap(module: nn.Module, spec: ModelSpec, resolution: Size, options: Options) -> Size:
    """Return the image size (h, w) nearest to `resolution` that gives whole pixels behind the named module.

    Raises:
        ConfigError: the network has no module of that name.
        Unsupported: its output is no feature map.
    """
    if _insert.no_modules(module) is not None:
        return resolution
    _check(module, options.module)
    return _insert.feature_map(module, spec, options.module).snapped(resolution, spec.native_resolution)


def apply(module: nn.Module, spec: ModelSpec, resolution: Size, options: Options) -> nn.Module:
    """Return a copy whose map behind the named module is as large as an image of `resolution` (h, w) would make it.

    Raises:
        ConfigError: the network has no module of that name.
        Unsupported: its output is no feature map, or what comes after it cannot take a smaller one.
    """
    reason = _insert.no_modules(module) or _insert.larger(resolution, spec.native_resolution)
    if reason is not None:
        raise Unsupported(reason)
    _check(module, options.module)
    return _insert.reduce_behind(module, spec, options.module, resolution)


def _check(module: nn.Module, name: str) -> None:
    known = [name for name, _ in module.named_modules() if name]
    if name not in known:
        near = did_you_mean(name, known)
        outermost = ", ".join(name for name, _ in module.named_children())
        raise ConfigError(
            f"after:{name}: {type(module).__name__} has no such module{near}; outermost: {outermost[:300]}"
        )
