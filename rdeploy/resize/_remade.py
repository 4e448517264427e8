"""timm's networks whose image size is fixed when they are made: made anew at another size, with their weights carried over.

Tables of positions are resampled by timm's own functions; everything else is copied. Where a weight belongs to each place of
the image (MLP-Mixer) nothing can be carried over, and the network is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from rdeploy.errors import Unsupported
from rdeploy.types import Size, format_size

_FIXED = ("CoaT", "EfficientFormerV2", "GlobalContextVit", "Hiera", "Levit", "LevitDistilled", "MlpMixer", "Nest")


def is_made_for_a_size(module: Any) -> bool:
    """Whether this is such a network and it is known how it was made (`models/timm.py` says so)."""
    fixed = type(module).__name__ in _FIXED or any(
        name.endswith(".height_rel") for name, _ in module.named_parameters()
    )
    return fixed and callable(getattr(module, "made_at", None))


def remade(module: Any, resolution: Size) -> nn.Module:
    """Return the network for images of `resolution` (h, w), with the module's weights.

    Raises:
        Unsupported: it cannot be made for this size, or its weights belong to its own.
    """
    with torch.random.fork_rng(devices=[]):
        new: nn.Module = module.made_at(resolution)
    weight = next(module.parameters())
    new = new.to(device=weight.device, dtype=weight.dtype).train(module.training)
    state, expected = module.state_dict(), new.state_dict()
    if resolution[0] != resolution[1] and any(state[name].shape != tensor.shape for name, tensor in expected.items()):
        raise Unsupported(
            f"its tables of positions are resampled for square images only, not {format_size(resolution)}"
        )
    new.load_state_dict(carried(state, expected), strict=True)
    for mine, other in zip(new.parameters(), module.parameters(), strict=True):
        mine.requires_grad_(other.requires_grad)
    new.made_at = module.made_at
    return new


def carried(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights in the shapes that the new network expects.

    Raises:
        Unsupported: some belong to the image size, and nobody knows how to resample them.
    """
    found = {
        name: state[name] if state[name].shape == new.shape else _resampled(name, state[name], new.shape)
        for name, new in expected.items()
    }
    tied = [name for name, tensor in found.items() if tensor is None]
    if tied:
        raise Unsupported(
            f"{len(tied)} of its weights belong to its own image size and have no meaning at another ({tied[0]}, ...): "
            "train it at that size"
        )
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _resampled(name: str, old: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
    """Return a table of positions at its new size; None for what is no such table."""
    from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table, resize_rel_pos_bias_table_levit
    from timm.models import nest

    kind = name.rpartition(".")[2]
    if kind == "attention_biases":  # (heads, distances in h x w)
        return resize_rel_pos_bias_table_levit(old.T, (shape[1], shape[0])).T.contiguous()
    if kind == "relative_position_bias_table":
        side = (round(shape[0] ** 0.5) + 1) // 2
        return resize_rel_pos_bias_table(old, (side, side), tuple(shape))
    if kind in ("height_rel", "width_rel"):  # as MViTv2 and SAM resample theirs
        return functional.interpolate(old.T[None], size=shape[0], mode="linear")[0].T.contiguous()
    if kind == "pos_embed" and old.ndim == 4:
        return nest.resize_pos_embed(old, torch.empty(shape))
    if kind == "pos_embed" and old.ndim == 3:
        sides = [round(count**0.5) for count in (old.shape[1], shape[1])]
        return resample_abs_pos_embed(old, new_size=[sides[1]] * 2, old_size=[sides[0]] * 2, num_prefix_tokens=0)
    return None
