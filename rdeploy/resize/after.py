"""Reduce the resolution after a named module (`--at after:layer1`): the image keeps its size, everything behind runs smaller."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from rdeploy.errors import ConfigError, Unsupported
from rdeploy.plugins import did_you_mean
from rdeploy.resize import _insert
from rdeploy.resize._names import unwrapped
from rdeploy.resize.input import whole_patches
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
    name = _found(module, options.module)
    return _insert.feature_map(module, spec, name).snapped(whole_patches(module, resolution), spec.native_resolution)


def apply(module: nn.Module, spec: ModelSpec, resolution: Size, options: Options) -> nn.Module:
    """Return a copy whose map behind the named module is as large as an image of `resolution` (h, w) would make it.

    Raises:
        ConfigError: the network has no module of that name.
        Unsupported: its output is no feature map, or what comes after it cannot take a smaller one.
    """
    reason = _insert.no_modules(module) or _insert.larger(resolution, spec.native_resolution)
    if reason is not None:
        raise Unsupported(reason)
    return _insert.reduce_behind(module, spec, _found(module, options.module), resolution)


def _found(module: nn.Module, name: str) -> str:
    """Return the name in the module of what the user's network calls so: rdeploy's wrappers put theirs before it."""
    network, prefix = unwrapped(module)
    known = [inner for inner, _ in network.named_modules() if inner]
    if name in known:
        return prefix + name
    if name in dict(module.named_modules()):
        return name
    near = did_you_mean(name, known)
    outermost = ", ".join(inner for inner, _ in network.named_children())
    raise ConfigError(f"after:{name}: {type(network).__name__} has no such module{near}; outermost: {outermost[:300]}")
