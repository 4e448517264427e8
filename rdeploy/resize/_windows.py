"""Networks whose attention windows must follow the image: transformers' Swin and torchvision's MaxViT, in place.

The tables of relative positions are resampled to the new window by timm's function, as timm does for its own Swin and MaxViT.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from rdeploy.errors import MissingDependency, Unsupported
from rdeploy.types import Size, format_size

_STRIDE = 32
"""Of MaxViT: its windows are as large as its last map."""


def is_windowed(module: Any) -> bool:
    """Whether this is one of the two."""
    package = type(module).__module__.split(".", 1)[0]
    return (package, type(module).__name__) in (("transformers", "SwinModel"), ("torchvision", "MaxVit"))


def retarget_windows(module: Any, resolution: Size) -> None:
    """Let the windows fit the maps of images of `resolution` (h, w).

    Raises:
        Unsupported: MaxViT's windows are square.
    """
    if type(module).__name__ == "MaxVit":
        _retarget_maxvit(module, resolution)
    else:
        _retarget_swin(module, resolution)


def _retarget_swin(module: Any, resolution: Size) -> None:
    """Shrink the windows that are larger than their map: transformers shrinks them without their tables."""
    patch = module.embeddings.patch_embeddings.patch_size
    grid = [math.ceil(side / one) for side, one in zip(resolution, patch)]
    for stage in module.encoder.layers:
        for block in stage.blocks:
            bias = block.attention.relative_position_bias
            window = min(*grid, bias.window_size[0])
            if window < bias.window_size[0]:
                _resample(bias, window)
                bias.window_size, bias.window_area = (window, window), window * window
                bias.relative_position_index = bias._create_relative_position_index().view(-1)
                block.window_size, block.shift_size = window, 0
        grid = [math.ceil(side / 2) for side in grid]


def _retarget_maxvit(module: Any, resolution: Size) -> None:
    from torchvision.models.maxvit import PartitionAttentionLayer, _get_relative_position_index

    if resolution[0] != resolution[1] or resolution[0] % _STRIDE:
        raise Unsupported(
            f"MaxVit takes square images of a multiple of {_STRIDE} pixels, not {format_size(resolution)}"
        )
    window, stride = resolution[0] // _STRIDE, 2
    for block in module.blocks:
        stride *= 2
        for part in block.modules():
            if not isinstance(part, PartitionAttentionLayer):
                continue
            side = resolution[0] // stride
            part.grid_size, part.n_partitions = (side, side), side // window
            part.p, part.g = (
                (window, part.n_partitions) if part.partition_type == "window" else (part.n_partitions, window)
            )
            attention = part.attn_layer[1]
            _resample(attention, window)
            attention.size, attention.max_seq_len = window, window * window
            attention.relative_position_index = _get_relative_position_index(window, window)


def _resample(holder: Any, window: int) -> None:
    """Resample a table of relative positions to a square window."""
    try:
        from timm.layers import resize_rel_pos_bias_table
    except ImportError as error:
        raise MissingDependency("resampling positions is timm's", install="pip install 'rdeploy[zoo]'") from error
    old = holder.relative_position_bias_table
    shape = ((2 * window - 1) ** 2, old.shape[1])
    new = resize_rel_pos_bias_table(old, (window, window), shape)
    holder.relative_position_bias_table = nn.Parameter(new.to(old.dtype), requires_grad=old.requires_grad)
