"""torchvision's VisionTransformer at another image size, which need not be square."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import nn

from rdeploy.errors import Unsupported
from rdeploy.types import Size


def is_torchvision_vit(module: nn.Module) -> bool:
    """Whether this is a torchvision VisionTransformer; torchvision is not imported to find out."""
    models = sys.modules.get("torchvision.models.vision_transformer")
    return models is not None and isinstance(module, models.VisionTransformer)


def retarget_torchvision_vit(module: Any, resolution: Size, *, new_patch: int | None = None) -> None:
    """Resample the position embedding in place, as torchvision's `interpolate_embeddings` does, and set the image size.

    Args:
        new_patch: the side of the patches, where they change with it; the patch embedding itself is left alone.

    Raises:
        Unsupported: the patches of the network are not on a square grid.
    """
    patch = module.patch_size
    new_patch = new_patch or patch
    embedding = module.encoder.pos_embedding
    tokens, width = embedding.shape[1] - 1, embedding.shape[2]
    side = round(tokens**0.5)
    old = getattr(module, "image_resolution", (side * patch, side * patch))
    old_grid, new_grid = (old[0] // patch, old[1] // patch), (resolution[0] // new_patch, resolution[1] // new_patch)
    if old_grid[0] * old_grid[1] != tokens:
        raise Unsupported(f"its {tokens} patches are no square grid: their positions cannot be resampled")
    grid = embedding[:, 1:].float().permute(0, 2, 1).reshape(1, width, *old_grid)
    # Bicubic with aligned corners: torchvision's choice, whose own function takes square sizes only.
    grid = nn.functional.interpolate(grid, size=new_grid, mode="bicubic", align_corners=True)
    new = torch.cat([embedding[:, :1], grid.reshape(1, width, -1).permute(0, 2, 1).to(embedding.dtype)], dim=1)
    module.encoder.pos_embedding = nn.Parameter(new, requires_grad=embedding.requires_grad)
    module.seq_length = new.shape[1]
    module.image_size = resolution[0]
    module.image_resolution = resolution
    module.patch_size = new_patch
    if resolution[0] != resolution[1]:
        module.__class__ = _rectangular()


@functools.cache
def _rectangular() -> type:
    """Return VisionTransformer with an input check for two sides; its own compares both with one number."""
    from torchvision.models.vision_transformer import VisionTransformer

    class RectangularVisionTransformer(VisionTransformer):  # type: ignore[misc]
        """torchvision's VisionTransformer for images that are not square."""

        def _process_input(self, images: torch.Tensor) -> torch.Tensor:
            height, width = self.image_resolution
            torch._assert(images.shape[2] == height, "wrong image height")
            torch._assert(images.shape[3] == width, "wrong image width")
            return self.conv_proj(images).flatten(2).permute(0, 2, 1)  # type: ignore[no-any-return]

    return RectangularVisionTransformer
