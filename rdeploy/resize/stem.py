"""Reduce the resolution right after the first convolution: the image keeps its size, everything behind the stem runs smaller.

The convolution is found by running the network, not by its name. The downscale goes before its BatchNorm, as in "Input
Resolution Downsizing as a Compression Technique" (arXiv 2504.03749). Where the first convolution is one of several parallel
branches, it goes behind the block that joins them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from rdeploy.errors import Unsupported
from rdeploy.resize import _insert
from rdeploy.resize.input import whole_patches
from rdeploy.types import ModelSpec, Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """This method has none."""


def unsupported(module: nn.Module, spec: ModelSpec, resolution: Size, options: Options) -> str | None:
    """Return in plain words why the stem's output cannot be reduced to that of an image of `resolution`, or None."""
    try:
        _reduced(module, spec, resolution)
    except Unsupported as error:
        return str(error)
    return None


def snap(module: nn.Module, spec: ModelSpec, resolution: Size, options: Options) -> Size:
    """Return the image size (h, w) nearest to `resolution` that gives whole pixels behind the stem."""
    name = _insert.no_modules(module) is None and _insert.first_convolution(module, spec)
    if not name:
        return resolution
    return _insert.feature_map(module, spec, name).snapped(whole_patches(module, resolution), spec.native_resolution)


def apply(module: nn.Module, spec: ModelSpec, resolution: Size, options: Options) -> nn.Module:
    """Return a copy whose map behind the first convolution is as large as an image of `resolution` (h, w) would make it.

    Raises:
        Unsupported: there is no such convolution, or what comes after it cannot take a smaller map.
    """
    return _reduced(module, spec, resolution)


def _reduced(module: nn.Module, spec: ModelSpec, resolution: Size) -> nn.Module:
    reason = _insert.no_modules(module) or _insert.larger(resolution, spec.native_resolution)
    if reason is not None:
        raise Unsupported(reason)
    name = _insert.first_convolution(module, spec)
    if name is None:
        raise Unsupported("it has no convolution that sees the image: reduce it at its input")
    reasons, patches = [], _cuts_patches(module.get_submodule(name))
    for place in _outwards(name):
        try:
            return _insert.reduce_behind(module, spec, place, resolution, positions=not patches)
        except Unsupported as error:
            reasons.append(str(error))
    if patches:
        raise Unsupported(
            f"its first convolution ({name}) cuts the image into patches, which a transformer cannot have fewer of: "
            "use --at patch, --at tokens or --at input"
        )
    raise Unsupported(reasons[0])


def _outwards(name: str) -> Iterator[str]:
    """Yield the convolution and the blocks around it, the network itself left out."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _cuts_patches(convolution: nn.Module) -> bool:
    kernel, stride = getattr(convolution, "kernel_size", None), getattr(convolution, "stride", None)
    return kernel == stride and kernel != (1, 1)
