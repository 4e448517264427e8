"""Larger patches for a vision transformer: the image keeps its size, and is cut into fewer tokens.

The patch embedding is resampled by its pseudo-inverse (FlexiViT, arXiv 2212.08013) and the position embedding to the new grid,
both by timm's own functions. A patch must divide the image, so only some sizes exist: `snap` goes to the nearest.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rdeploy.errors import MissingDependency, Unsupported
from rdeploy.resize import _insert, _transformers, _transformers_vit
from rdeploy.resize._names import plain_name, reason_of
from rdeploy.resize._torchvision_vit import is_torchvision_vit, retarget_torchvision_vit
from rdeploy.types import ModelSpec, Size, format_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`patch` is the new size (h, w) of the patches; it follows from the resolution, which is what counts."""

    patch: Size | None = None


def fit(module: nn.Module, spec: ModelSpec, resolution: Size, options: Options, images: object) -> Options:
    """Return the patch size that the resolution comes down to, for the record."""
    return Options(patch=_new_patch(_embedded(module), spec.native_resolution, resolution))


def said(options: Options) -> str:
    """Return what became of the patches."""
    return f"the image is cut into patches of {format_size(options.patch or (0, 0))} pixels"


def unsupported(module: nn.Module, spec: ModelSpec, resolution: Size, options: Options) -> str | None:
    """Return in plain words why the module cannot have the patches that `resolution` stands for, or None: it did, once."""
    try:
        reduced = apply(module, spec, resolution, options)
        _insert.run(reduced, spec, spec.native_resolution)
    except Unsupported as error:
        return str(error)
    except MissingDependency:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a network raises with foreign patches is the reason we ask for
        return f"{plain_name(module)} cannot take other patches: {reason_of(error)}"
    return None


def snap(module: nn.Module, spec: ModelSpec, resolution: Size, options: Options) -> Size:
    """Return the size (h, w), nearest to `resolution`, of the images that have as many of the old patches.

    Where fewer are asked for there are fewer: the size itself is never the nearest.
    """
    part = _find(module)
    if part is None:
        return resolution
    sides = zip(spec.native_resolution, _patch_size(part), resolution)
    height, width = (min(_sides(native, patch, wanted), key=lambda side: (abs(side - wanted), side))
                     for native, patch, wanted in sides)  # fmt: skip
    return height, width


def apply(module: nn.Module, spec: ModelSpec, resolution: Size, options: Options) -> nn.Module:
    """Return a copy with larger patches: as many as an image of `resolution` (h, w) has of the old ones.

    Raises:
        Unsupported: it has no patches, or none of that size divides the image.
        MissingDependency: timm, whose resampling it is, is not installed.
    """
    patch = _new_patch(_embedded(module), spec.native_resolution, resolution)
    reduced = copy.deepcopy(module)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            _set_patch(_embedded(reduced), spec.native_resolution, patch)
    except (AssertionError, ValueError, RuntimeError, TypeError) as error:
        raise Unsupported(f"{plain_name(module)} cannot take patches of {format_size(patch)}: {error}") from error
    return reduced


def _sides(native: int, patch: int, wanted: int) -> list[int]:
    """Return the sides that a grid of whole patches stands for, in old pixels; the native one only when it is asked for."""
    if wanted >= native:
        return [native]
    grids = [grid for grid in range(1, native // patch) if native % grid == 0]
    return [grid * patch for grid in grids] or [native]


def _new_patch(part: Any, native: Size, resolution: Size) -> Size:
    old = _patch_size(part)
    for side, patch, wanted in zip(native, old, resolution):
        if wanted > side or wanted < patch or wanted % patch or side % (wanted // patch):
            sides = ", ".join(str(side // (one // patch)) for one in reversed(_sides(side, patch, 1)))
            raise Unsupported(f"patches must divide the image: {side} pixels can have patches of {sides}")
    height, width = (side // (wanted // patch) for side, patch, wanted in zip(native, old, resolution))
    return height, width


def _embedded(module: nn.Module) -> Any:
    part = _find(module)
    if part is None:
        raise Unsupported(
            f"{plain_name(module)} cuts its image into no patches that could be larger: reduce it at its input"
        )
    return part


def _find(module: nn.Module) -> Any | None:
    """Return the outermost network inside the module whose patches can be resized."""
    if is_torchvision_vit(module) or _takes_patch_size(module) or _transformers_vit.cuts_patches(module):
        return module
    return next((found for child in module.children() if (found := _find(child)) is not None), None)


def _takes_patch_size(module: Any) -> bool:
    method, embedding = getattr(module, "set_input_size", None), getattr(module, "patch_embed", None)
    if not callable(method) or not {"img_size", "patch_size"} <= set(inspect.signature(method).parameters):
        return False
    kernel = getattr(getattr(embedding, "proj", None), "kernel_size", None)
    return kernel is not None and kernel == getattr(embedding, "patch_size", None)


def _patch_size(part: Any) -> Size:
    if _transformers_vit.cuts_patches(part):
        return _transformers.patch_size(part)
    size = part.patch_size if is_torchvision_vit(part) else part.patch_embed.patch_size
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _set_patch(part: Any, native: Size, patch: Size) -> None:
    if _transformers_vit.cuts_patches(part):
        _transformers_vit.set_patch(part, native, patch)
        return
    if not is_torchvision_vit(part):
        part.set_input_size(patch_size=patch)
        return
    try:
        from timm.layers import resample_patch_embed
    except ImportError as error:
        raise MissingDependency("resampling patches is timm's", install="pip install 'rdeploy[zoo]'") from error
    if patch[0] != patch[1]:
        raise Unsupported("torchvision's transformers take square patches only")
    old = part.conv_proj
    new = nn.Conv2d(
        old.in_channels, old.out_channels, patch, patch, device=old.weight.device, dtype=old.weight.dtype
    ).train(old.training)
    new.weight.copy_(resample_patch_embed(old.weight, list(patch)))
    new.bias.copy_(old.bias)
    part.conv_proj = new
    retarget_torchvision_vit(part, native, new_patch=patch[0])
