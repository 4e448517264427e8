"""Reduce the resolution at the input: the network sees smaller images, everything behind follows.

Convolutional networks stay as they are. Vision transformers get their position embedding (and windows, and relative
positions) resampled by timm's and torchvision's own functions; prefix tokens and dtypes are kept, h and w may differ.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rdeploy.errors import Unsupported
from rdeploy.resize import _remade, _transformers, _windows
from rdeploy.resize._names import plain_name, reason_of
from rdeploy.resize._torchvision_vit import is_torchvision_vit, retarget_torchvision_vit
from rdeploy.types import ModelSpec, Size, format_size

_MULTIPLES = (8, 16, 32, 64, 224)
_MOST_TRIED = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """This method has none."""


_NONE = Options()


def unsupported(module: nn.Module, spec: ModelSpec, resolution: Size, options: Options = _NONE) -> str | None:
    """Return in plain words why the module cannot run at `resolution` (h, w), or None: it did, once, on zeros."""
    reason = _structural(module, resolution)
    if reason is not None:
        return reason
    try:
        output = _run(_resized(module, spec, resolution), spec, resolution)
    except Unsupported as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - whatever a network raises at a foreign size is the reason we ask for
        return _plain(module, resolution, error)
    return _changed_interface(module, spec, resolution, output)


def snap(module: nn.Module, spec: ModelSpec, resolution: Size, options: Options = _NONE) -> Size:
    """Return the size (h, w) nearest to `resolution` that the module can take; its native one when there is no other.

    Structure first (patch size), then real forwards over candidates by distance; a tie goes to the smaller. A
    convolutional network takes any size and costs one forward.
    """
    if _fixed_size(module) is not None:
        return spec.native_resolution
    step = _step(module)
    for candidate in _candidates(resolution, spec.native_resolution, step):
        if candidate == spec.native_resolution or _runs(module, spec, candidate):
            return candidate
    return spec.native_resolution


def apply(module: nn.Module, spec: ModelSpec, resolution: Size, options: Options) -> nn.Module:
    """Return a copy of the module for images of `resolution` (h, w); the module that came in is left untouched.

    Raises:
        Unsupported: the module's own functions refuse this size.
    """
    reason = _structural(module, resolution)
    if reason is not None:
        raise Unsupported(reason)
    resized = copy.deepcopy(module)
    parts = list(_sized_parts(resized))
    if (
        resolution == spec.native_resolution
    ):  # transformers' networks may have been trained at another size than their own
        parts = [part for part in parts if _transformers.has_positions(part)]
    dtypes = {name: tensor.dtype for name, tensor in _tensors(resized)}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # timm's resampling of relative positions makes PyTorch warn; nobody who resizes a network can act on it.
            warnings.simplefilter("ignore", UserWarning)
            for part in parts:
                resized = _with(resized, part, _retarget(part, resolution))
    except (AssertionError, ValueError, RuntimeError, TypeError) as error:
        raise Unsupported(_plain(module, resolution, error)) from error
    # timm rebuilds some buffers (attention masks) in float32: a half-precision module must stay one.
    for name, tensor in _tensors(resized):
        if dtypes.get(name, tensor.dtype) != tensor.dtype:
            tensor.data = tensor.data.to(dtypes[name])
    return resized


def resamples_itself(module: nn.Module) -> bool:
    """Whether the module resamples its positions on every run: done once for its own size, the graph need not."""
    return any(_transformers.has_positions(part) for part in module.modules())


def whole_patches(module: nn.Module, resolution: Size) -> Size:
    """Return the size (h, w) nearest to `resolution` of whole patches, where the module has some; a tie goes to the smaller."""
    height, width = (_round(side, unit) for side, unit in zip(resolution, _step(module)))
    return height, width


def _sized_parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost networks inside the module that know their image size."""
    known = _remade.is_made_for_a_size(module) or _windows.is_windowed(module) or is_torchvision_vit(module)
    if known or _takes_image_size(module) or _has_patch_grid(module) or _transformers.has_positions(module):
        yield module
        return
    for child in module.children():
        yield from _sized_parts(child)


def _takes_image_size(module: nn.Module) -> bool:
    """Whether this is a whole timm network that can be told its image size (its blocks have other arguments)."""
    method = getattr(module, "set_input_size", None)
    return callable(method) and "img_size" in inspect.signature(method).parameters and not _is_patch_embedding(module)


def _is_patch_embedding(module: Any) -> bool:
    return hasattr(module, "grid_size") and hasattr(module, "proj")


def _has_patch_grid(module: nn.Module) -> bool:
    """Whether this is a network with timm's patch embedding but no method of its own to resize it."""
    embedding = getattr(module, "patch_embed", None)
    return embedding is not None and getattr(embedding, "grid_size", None) is not None and _takes_size(embedding)


def _takes_size(embedding: Any) -> bool:
    return callable(getattr(embedding, "set_input_size", None))


def _retarget(part: Any, resolution: Size) -> Any:
    """Return the part at the new size: itself, changed in place, or one that was made anew."""
    if _remade.is_made_for_a_size(part):
        return _remade.remade(part, resolution)
    if _windows.is_windowed(part):
        _windows.retarget_windows(part, resolution)
    elif is_torchvision_vit(part):
        retarget_torchvision_vit(part, resolution)
    elif _transformers.has_positions(part):
        _transformers.retarget(part, resolution)
    elif _takes_image_size(part):
        part.set_input_size(img_size=resolution)
    else:
        _retarget_patch_grid(part, resolution)
    return part


def _with(module: nn.Module, part: nn.Module, new: nn.Module) -> nn.Module:
    """Return the module with `new` in the place of one of its parts, or of itself."""
    if part is module:
        return new
    if new is not part:
        module.set_submodule(next(name for name, inner in module.named_modules() if inner is part), new)
    return module


def _retarget_patch_grid(part: Any, resolution: Size) -> None:
    """Resize the patch embedding, and a position embedding that has one vector for each of its patches."""
    from timm.layers import resample_abs_pos_embed

    old = tuple(part.patch_embed.grid_size)
    part.patch_embed.set_input_size(img_size=resolution)
    embedding = getattr(part, "pos_embed", None)
    if not isinstance(embedding, nn.Parameter) or embedding.ndim != 3:
        return
    prefix = embedding.shape[1] - old[0] * old[1]
    if 0 <= prefix <= getattr(part, "num_prefix_tokens", 2):
        new = resample_abs_pos_embed(
            embedding, new_size=list(part.patch_embed.grid_size), old_size=list(old), num_prefix_tokens=prefix
        )
        part.pos_embed = nn.Parameter(new, requires_grad=embedding.requires_grad)


def _structural(module: nn.Module, resolution: Size) -> str | None:
    """Return what is known to be wrong without running the module."""
    if min(resolution) < 1:
        return f"a resolution of {format_size(resolution)} has no pixels"
    fixed = _fixed_size(module)
    if fixed is not None and fixed != resolution:
        return (
            f"it was exported for images of {format_size(fixed)} only: export it with dynamic height and width, "
            "or give the original module"
        )
    step = _step(module)
    if resolution[0] % step[0] or resolution[1] % step[1]:
        return f"its patches are {format_size(step)} pixels: {format_size(resolution)} is no multiple of that"
    return None


def _fixed_size(module: nn.Module) -> Size | None:
    """Return the size baked into a graph of `torch.export`, None for modules that are not such a graph or dynamic."""
    if not isinstance(module, torch.fx.GraphModule) or isinstance(module, torch.jit.ScriptModule):
        return None
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    value = inputs[0].meta.get("val") if inputs else None
    if value is None or value.ndim != 4 or not all(isinstance(side, int) for side in value.shape[2:]):
        return None
    return int(value.shape[2]), int(value.shape[3])


def _step(module: nn.Module) -> Size:
    """Return the patch size (h, w) that the resolution must be a multiple of; (1, 1) where there is none."""
    for part in _sized_parts(module):
        if is_torchvision_vit(part):
            return int(part.patch_size), int(part.patch_size)
        if _transformers.has_positions(part):
            return _transformers.patch_size(part)
        embedding = getattr(part, "patch_embed", None)
        size = getattr(embedding, "patch_size", None)
        if size is None or getattr(embedding, "dynamic_img_pad", False):
            continue
        height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)
    return 1, 1


def _candidates(resolution: Size, native: Size, step: Size) -> list[Size]:
    """List sizes by distance from `resolution`, the smaller first among equals: the nearest of each usual multiple.

    A side that was not asked to grow stays within the native one.
    """
    most = [max(sides) for sides in zip(resolution, native)]
    wanted = [_round(side, unit) for side, unit in zip(resolution, step)]
    found = {(wanted[0], wanted[1]), native}
    for multiple in _MULTIPLES:
        units = [unit * multiple // _common(unit, multiple) for unit in step]
        for away in (-1, 0, 1):
            sides = [_round(side, unit) + away * unit for side, unit in zip(resolution, units)]
            if min(sides) > 0:
                found.add((sides[0], sides[1]))
    found = {size for size in found if size[0] <= most[0] and size[1] <= most[1]}

    def distance(size: Size) -> tuple[int, int]:
        return abs(size[0] - resolution[0]) + abs(size[1] - resolution[1]), size[0] * size[1]

    return sorted(found, key=distance)[:_MOST_TRIED]


def _common(first: int, second: int) -> int:
    while second:
        first, second = second, first % second
    return first


def _round(side: int, unit: int) -> int:
    """Return the multiple of `unit` nearest to `side`, at least one; half-way goes down."""
    return max(1, -((unit - 2 * side) // (2 * unit))) * unit


def _runs(module: nn.Module, spec: ModelSpec, resolution: Size) -> bool:
    try:
        output = _run(_resized(module, spec, resolution), spec, resolution)
    except Exception:  # noqa: BLE001 - a network may raise anything at a size that it cannot take: that is the answer
        return False
    return _one_answer(output)


def _resized(module: nn.Module, spec: ModelSpec, resolution: Size) -> nn.Module:
    """Return what `apply` does, without the copy where nothing inside the module knows its image size."""
    if next(_sized_parts(module), None) is None and not _transformers.remembers_sizes(module):
        return module
    return apply(module, spec, resolution, _NONE)


def _run(module: nn.Module, spec: ModelSpec, resolution: Size) -> Any:
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    with torch.no_grad():
        return module(torch.zeros(1, spec.channels, *resolution, dtype=dtype))


def _one_answer(output: Any) -> bool:
    """Whether one image gave one answer: `view(-1, 512)` at another size gives several, without an error."""
    return isinstance(output, torch.Tensor) and output.shape[:1] == (1,) and output.numel() > 0


def _changed_interface(module: nn.Module, spec: ModelSpec, resolution: Size, output: Any) -> str | None:
    if not _one_answer(output):
        return f"at {format_size(resolution)} it gives another number of answers than images: its size is baked in"
    if output.ndim != 2 or resolution == spec.native_resolution:
        return None
    native = _run(module, spec, spec.native_resolution)
    if native.shape == output.shape:
        return None
    return (
        f"at {format_size(resolution)} its output is {output.shape[1]} numbers instead of {native.shape[1]}: "
        "it flattens the feature map without pooling"
    )


def _plain(module: nn.Module, resolution: Size, error: Exception) -> str:
    return f"{plain_name(module)} cannot take {format_size(resolution)}: {reason_of(error)}"


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
