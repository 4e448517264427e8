"""transformers' vision networks at another image size: their learned positions, resampled once by their own method."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from rdeploy.errors import Unsupported
from rdeploy.types import Size


def has_positions(module: nn.Module) -> bool:
    """Whether this is an embedding of transformers with positions for a grid of patches (ViT, DINOv2, CLIP, SigLIP, ...)."""
    ours = type(module).__module__.split(".", 1)[0] == "transformers"
    return ours and callable(getattr(module, "interpolate_pos_encoding", None)) and _positions(module) is not None


def remembers_sizes(module: nn.Module) -> bool:
    """Whether a forward changes the module for the next one: transformers' Swin shrinks its windows for good."""
    return any(hasattr(part, "set_shift_and_window_size") for part in module.modules())


def patch_size(module: Any) -> Size:
    """Return the patch size (h, w) of such an embedding."""
    found = getattr(module, "patch_size", None) or module.patch_embeddings.patch_size
    return (int(found), int(found)) if isinstance(found, int) else (int(found[0]), int(found[1]))


def retarget(module: Any, resolution: Size) -> None:
    """Resample the positions in place with the network's own function, and let it take images of `resolution` as they are.

    Done here and not in the graph: a graph would resample on every run, and its bicubic is not PyTorch's.

    Raises:
        Unsupported: the patches of the network are not on a square grid.
    """
    if hasattr(module, "trained_positions"):  # resampled before: start again from what was trained
        original: Any = type(module).__mro__[1]
        _set_positions(module, module.trained_positions)
        module.__class__ = original
    old = _positions(module)
    if old is None:  # `has_positions` was asked before
        return
    height, width = patch_size(module)
    grid = resolution[0] // height, resolution[1] // width
    side = int(old.shape[1] ** 0.5)
    prefix = old.shape[1] - side * side
    stand_in = torch.empty(1, prefix + grid[0] * grid[1], old.shape[2], dtype=old.dtype)
    try:
        new = module.interpolate_pos_encoding(stand_in, *resolution).detach().clone()
    except RuntimeError as error:
        raise Unsupported(f"its {old.shape[1]} positions are no square grid: they cannot be resampled") from error
    module.trained_positions = old.detach().clone()
    _set_positions(module, new)
    for part in (module, getattr(module, "patch_embeddings", None)):
        if part is not None and hasattr(part, "image_size"):
            part.image_size = tuple(resolution) if isinstance(part.image_size, (tuple, list)) else resolution[0]
    kind: Any = type(module)
    module.__class__ = _fixed(kind)


def _set_positions(module: Any, new: torch.Tensor) -> None:
    if isinstance(getattr(module, "position_embedding", None), nn.Embedding):
        module.position_embedding = nn.Embedding.from_pretrained(new[0], freeze=False)
        module.position_ids = torch.arange(new.shape[1]).expand((1, -1))
    else:
        module.position_embeddings = nn.Parameter(new, requires_grad=module.position_embeddings.requires_grad)


def _positions(module: Any) -> torch.Tensor | None:
    """Return the learned positions as (1, tokens, width)."""
    table = getattr(module, "position_embeddings", None)
    if isinstance(table, torch.Tensor) and table.ndim == 3:
        return table
    table = getattr(module, "position_embedding", None)
    return table.weight[None] if isinstance(table, nn.Embedding) else None


@functools.cache
def _fixed(kind: type) -> type:
    """Return the class with positions that are taken as they are."""

    def interpolate_pos_encoding(self: Any, *_: Any) -> torch.Tensor | None:
        return _positions(self)

    return type(
        kind.__name__, (kind,), {"interpolate_pos_encoding": interpolate_pos_encoding, "__module__": kind.__module__}
    )
