"""transformers' plain vision transformers (ViT, DINOv2, CLIP, SigLIP): their patches and blocks, as the places need them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rdeploy.errors import MissingDependency, Unsupported
from rdeploy.resize import _transformers
from rdeploy.types import Size, format_size

_LAYERS = ("ViTLayer", "Dinov2Layer", "Dinov2WithRegistersLayer", "CLIPEncoderLayer", "SiglipEncoderLayer")


def is_layer(block: Any) -> bool:
    """Whether this is a block of theirs, built as it is known here."""
    ours = type(block).__module__.split(".", 1)[0] == "transformers" and type(block).__name__ in _LAYERS
    return ours and all(hasattr(_attention(block), name) for name in ("q_proj", "k_proj", "v_proj", "head_dim"))


def blocks_name(module: nn.Module) -> str | None:
    """Return the name of the module's list of such blocks, if it holds one itself."""
    lists = [(name, child) for name, child in module.named_children() if isinstance(child, nn.ModuleList)]
    return next((name for name, child in lists if len(child) and is_layer(child[0])), None)


def attend(
    block: Any, tokens: torch.Tensor, softmax: Any, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a block's attention output, (N, tokens, width), and its keys, averaged over the heads."""
    attention, normed = _attention(block), _first(block, "layernorm_before", "norm1", "layer_norm1")(tokens)
    count, each = normed.shape[1], attention.head_dim
    projected = (getattr(attention, f"{name}_proj")(normed) for name in "qkv")
    queries, keys, values = (one.reshape(-1, count, one.shape[-1] // each, each).transpose(1, 2) for one in projected)
    rate = _first(attention, "attention_dropout", "dropout")
    dropout = nn.Dropout(float(rate)).train(attention.training)
    mixed = softmax(queries * each**-0.5, keys, bias, dropout) @ values
    mixed = mixed.transpose(1, 2).flatten(2)
    return _after(block, _first(attention, "o_proj", "out_proj")(mixed), "layer_scale1"), keys.mean(dim=1)


def perceive(block: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the output of a block's MLP branch."""
    normed = _first(block, "layernorm_after", "norm2", "layer_norm2")(tokens)
    return _after(block, block.mlp(normed), "layer_scale2")


def _after(block: Any, output: torch.Tensor, scale: str) -> torch.Tensor:
    """Apply what a branch ends with: a scale, dropout or dropped paths, where the block has them."""
    for name in (scale, "dropout", "drop_path"):
        if isinstance(found := getattr(block, name, None), nn.Module):
            output = found(output)
    return output


def _attention(block: Any) -> Any:
    return _first(block, "attention", "self_attn")


def _first(module: Any, *names: str) -> Any:
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def cuts_patches(module: Any) -> bool:
    """Whether this is an embedding with positions whose patches can be resized."""
    return _transformers.has_positions(module) and _projection(module) is not None


def set_patch(module: Any, native: Size, patch: Size) -> None:
    """Resample the patch embedding by its pseudo-inverse, and the positions to the new grid, in place.

    Raises:
        Unsupported: the patches are not square.
        MissingDependency: timm, whose resampling it is, is not installed.
    """
    try:
        from timm.layers import resample_patch_embed
    except ImportError as error:
        raise MissingDependency("resampling patches is timm's", install="pip install 'rdeploy[zoo]'") from error
    if patch[0] != patch[1]:
        raise Unsupported(f"transformers' networks take square patches only, not {format_size(patch)}")
    found = _projection(module)
    if found is None:
        raise Unsupported("it cuts its image into no patches that could be larger: reduce it at its input")
    holder, name = found
    old = getattr(holder, name)
    new = nn.Conv2d(old.in_channels, old.out_channels, patch, patch, bias=old.bias is not None)
    new = new.to(device=old.weight.device, dtype=old.weight.dtype).train(old.training)
    new.weight.copy_(resample_patch_embed(old.weight, list(patch)))
    if old.bias is not None:
        new.bias.copy_(old.bias)
    setattr(holder, name, new)
    for part in {module, holder}:
        if hasattr(part, "patch_size"):
            part.patch_size = patch if isinstance(part.patch_size, (tuple, list)) else patch[0]
    _transformers.retarget(module, native)


def _projection(module: Any) -> tuple[Any, str] | None:
    """Return the convolution that cuts the patches, as its holder and its name there."""
    for holder, name in ((getattr(module, "patch_embeddings", None), "projection"), (module, "patch_embedding")):
        if isinstance(getattr(holder, name, None), nn.Conv2d):
            return holder, name
    return None
