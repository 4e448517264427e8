"""The preprocessing in front of a PyTorch module: what `embed` does to a graph, for the programs that PyTorch runs itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rdeploy.graph.embed import resize_matrix
from rdeploy.types import Preprocessing, Size


class Preprocessed(nn.Module):  # type: ignore[misc]
    """Takes uint8 (N, H, W, C) pictures of the `native` size (h, w), resizes as Pillow does, normalises, runs `module`."""

    columns: Tensor
    rows: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self, module: nn.Module, native: Size, resolution: Size, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.module = module
        self.narrower, self.lower = native[1] != resolution[1], native[0] != resolution[0]
        kind = (preprocessing.interpolation, preprocessing.antialias)
        std = torch.tensor(preprocessing.std, dtype=torch.float64)
        mean = torch.tensor(preprocessing.mean, dtype=torch.float64)
        constants = {
            "columns": torch.from_numpy(resize_matrix(native[1], resolution[1], *kind).T.copy()),
            "rows": torch.from_numpy(resize_matrix(native[0], resolution[0], *kind)),
            "scale": (1 / (255 * std)).reshape(1, -1, 1, 1),
            "offset": (-mean / std).reshape(1, -1, 1, 1),
        }
        for name, value in constants.items():
            self.register_buffer(name, value.float())

    def forward(self, image: Tensor) -> Tensor:
        """Return what the module says of uint8 pictures."""
        value = image.permute(0, 3, 1, 2).float()
        if self.narrower:
            value = _rounded(value @ self.columns)
        if self.lower:
            value = _rounded(self.rows @ value)
        return self.module(value * self.scale + self.offset)  # type: ignore[no-any-return]


def _rounded(value: Tensor) -> Tensor:
    """Round half up and clip to 0..255: Pillow keeps 8 bits between the axes."""
    return torch.floor(value + 0.5).clamp(0, 255)
